"""Multi-label adversarial perturbations for image files."""

__version__ = "0.1.0"
