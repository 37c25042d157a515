"""`python -m mlperturb`."""

from mlperturb.cli.main import run

run()
