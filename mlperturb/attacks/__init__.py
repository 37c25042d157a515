"""The attacks, one family a file."""
