"""The attacks, for people who write attacks of their own.

A `Problem` is a batch of images, a model and a `Goal`; an attack is a function of a problem that returns an `Outcome`.
Nothing here knows files or label names. The names load on first use: the list of methods must be quick to read.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlperturb.attacks.best import Best as Best
    from mlperturb.attacks.best import Outcome as Outcome
    from mlperturb.attacks.carlini_wagner import ml_cw as ml_cw
    from mlperturb.attacks.ddn import ml_ddn as ml_ddn
    from mlperturb.attacks.deepfool import ml_dp as ml_dp
    from mlperturb.attacks.fast_gradient import fg as fg
    from mlperturb.attacks.fast_gradient import fgs as fgs
    from mlperturb.attacks.goals import ClassificationGoal as ClassificationGoal
    from mlperturb.attacks.goals import Goal as Goal
    from mlperturb.attacks.goals import RankingGoal as RankingGoal
    from mlperturb.attacks.methods import METHODS as METHODS
    from mlperturb.attacks.methods import Method as Method
    from mlperturb.attacks.methods import find_method as find_method
    from mlperturb.attacks.problem import Meter as Meter
    from mlperturb.attacks.problem import Problem as Problem
    from mlperturb.attacks.quantise import quantise as quantise
    from mlperturb.attacks.ranking import rank_1 as rank_1
    from mlperturb.attacks.ranking import rank_2 as rank_2
    from mlperturb.attacks.untargeted import nearest_label as nearest_label
    from mlperturb.targets import Targets as Targets

_PLACES = {
    "Best": "attacks.best",
    "ClassificationGoal": "attacks.goals",
    "Goal": "attacks.goals",
    "METHODS": "attacks.methods",
    "Meter": "attacks.problem",
    "Method": "attacks.methods",
    "Outcome": "attacks.best",
    "Problem": "attacks.problem",
    "RankingGoal": "attacks.goals",
    "Targets": "targets",
    "fg": "attacks.fast_gradient",
    "fgs": "attacks.fast_gradient",
    "find_method": "attacks.methods",
    "ml_cw": "attacks.carlini_wagner",
    "ml_ddn": "attacks.ddn",
    "ml_dp": "attacks.deepfool",
    "nearest_label": "attacks.untargeted",
    "quantise": "attacks.quantise",
    "rank_1": "attacks.ranking",
    "rank_2": "attacks.ranking",
}


if not TYPE_CHECKING:  # so that a type checker refuses a name that is not in the list

    def __getattr__(name: str) -> object:
        """Load a public name."""
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"mlperturb.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(_PLACES)
