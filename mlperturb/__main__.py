"""`python -m mlperturb`."""

from mlperturb.cli.main import main

main()
