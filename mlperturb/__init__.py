"""Multi-label adversarial perturbations for image files that work when they are opened again.

The public names load on first use, so that `import mlperturb` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "Classifier": "classifier",
    "METHODS": "attacks.methods",
    "MlperturbError": "errors",
    "Outcome": "attacks.best",
    "Preprocess": "preprocess",
    "Problem": "attacks.problem",
    "Request": "labels",
    "Targets": "targets",
    "bundled_checkpoint": "checkpoints",
    "fg": "attacks.fast_gradient",
    "fgs": "attacks.fast_gradient",
    "load_checkpoint": "checkpoints",
    "make_targets": "targets",
    "ml_cw": "attacks.carlini_wagner",
    "ml_dp": "attacks.deepfool",
    "parse_request": "labels",
    "rank_1": "attacks.ranking",
    "rank_2": "attacks.ranking",
}

__all__ = ["__version__", *_PLACES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Load a public name."""
    if name not in _PLACES:
        raise AttributeError(f"module 'mlperturb' has no attribute {name!r}")
    return getattr(import_module(f"mlperturb.{_PLACES[name]}"), name)
