"""Training a classifier with Eq. 12."""
