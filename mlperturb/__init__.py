"""Multi-label adversarial perturbations that still work when the image file is read back.

    import mlperturb

    classifier = mlperturb.load()
    result = mlperturb.attack(classifier, ["photo.jpg"], flip=["person"], keep="rest")

The public names load on first use, so that `import mlperturb` is quick. `mlperturb.attacks` has the attacks
themselves, for people who write attacks.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlperturb.api import attack as attack
    from mlperturb.api import load as load
    from mlperturb.api import predict as predict
    from mlperturb.errors import MlperturbError as MlperturbError
    from mlperturb.limits import Limits as Limits
    from mlperturb.model.classifier import Classifier as Classifier
    from mlperturb.model.export import export as export
    from mlperturb.model.preprocess import Preprocess as Preprocess
    from mlperturb.run.results import Result as Result

__version__ = "0.1.0"

_PLACES = {
    "Classifier": "model.classifier",
    "Limits": "limits",
    "MlperturbError": "errors",
    "Preprocess": "model.preprocess",
    "Result": "run.results",
    "attack": "api",
    "export": "model.export",
    "load": "api",
    "predict": "api",
}


if not TYPE_CHECKING:  # so that a type checker refuses a name that is not in the list above

    def __getattr__(name: str) -> object:
        """Load a public name."""
        if name not in _PLACES:
            raise AttributeError(f"module 'mlperturb' has no attribute {name!r}")
        return getattr(import_module(f"mlperturb.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted([*_PLACES, "__version__"])
