"""The attacks by name, with their budgets and options. This module does not load torch; `Method.load` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlperturb.attacks.schedule import BALANCED, FAST, PAPER
from mlperturb.errors import UsageError

if TYPE_CHECKING:
    from mlperturb.attacks.best import Outcome

BUDGETS = ("fast", "balanced", "paper")
DEFAULT_METHOD = "ml-ddn"
RANKING = ("rank-1", "rank-2")  # methods that compare the labels of one classifier with each other
CHOICES: dict[str, tuple[str, ...]] = {  # the options of methods, and their values
    "rounding": ("inside", "after"),
    "between": ("rest", "rest-positive", "rest-negative", "none", "threshold"),
    "solver": ("pinv", "nnls"),
    "space": ("logit", "probability"),
    "aim": ("least", "strongest"),
    "diversity": ("none", "resize", "shift", "both"),
}


@dataclass(frozen=True)
class Method:
    """An attack by name.

    Attributes:
        place: the module in `mlperturb.attacks`, and the function.
        summary: a description of one line.
        equation: the equation or section of the paper.
        budgets: the key-word arguments for each of `BUDGETS`.
        options: the names in `CHOICES` that the method accepts.
        opens: the first backward pass is at the clean photos, so that the forward pass before it is worth keeping.
    """

    place: tuple[str, str]
    summary: str
    equation: str
    budgets: Mapping[str, Mapping[str, Any]]
    options: tuple[str, ...] = field(default=())
    opens: bool = False

    def load(self) -> Callable[..., Outcome]:
        """Return the attack: a function of a `Problem` and key-word arguments."""
        module, function = self.place
        attack: Callable[..., Outcome] = getattr(import_module(f"mlperturb.attacks.{module}"), function)
        return attack

    def writes_lattice(self, tuning: Mapping[str, Any]) -> bool:
        """Say whether the attack's result with this tuning is on the 8-bit lattice already."""
        return tuning.get("rounding") == "inside"

    def tuning(self, budget: str, **options: str | None) -> dict[str, Any]:
        """Return the key-word arguments of a budget, with the options given in place of its values.

        Raises:
            UsageError: if the budget, an option of this method or a value is unknown.
        """
        if budget not in tuple(self.budgets):
            raise UsageError(f"unknown budget {budget!r}: expected {', '.join(self.budgets)}")
        given = {name: value for name, value in options.items() if value is not None}
        for name, value in given.items():
            if name not in self.options:
                having = [other for other, method in METHODS.items() if name in method.options]
                if not having:
                    raise UsageError(f"unknown option `{name}`: expected one of {', '.join(CHOICES)}")
                raise UsageError(f"`{name}` is an option of {', '.join(having)}, not of this method")
            if value not in CHOICES[name]:
                raise UsageError(f"unknown `{name}` {value!r}: expected {', '.join(CHOICES[name])}")
        return {**self.budgets[budget], **given}


def _schedules() -> dict[str, dict[str, Any]]:
    return {
        "fast": {"schedule": FAST},
        "balanced": {"schedule": BALANCED},
        "paper": {"schedule": PAPER, "space": "probability"},
    }


_GRIDS = {
    "fast": {"grid": 10, "refinements": 3},
    "balanced": {"grid": 20, "refinements": 5},
    "paper": {"grid": 100, "refinements": 0},
}

METHODS: dict[str, Method] = {
    "ml-ddn": Method(
        ("ddn", "ml_ddn"),
        "least norm by direction and norm apart, a multiplier for each constraint",
        "after Rony et al. 2019, 2021",
        {name: {"iterations": count, "rounding": "inside"} for name, count in zip(BUDGETS, (13, 48, 500), strict=True)},
        ("space", "rounding", "aim", "diversity"),
        opens=True,
    ),
    "fgs": Method(
        ("fast_gradient", "fgs"), "one step along the sign of the gradient", "Section IV-C", _GRIDS, opens=True
    ),
    "fg": Method(("fast_gradient", "fg"), "one step along the gradient", "Section IV-C", _GRIDS, opens=True),
    "ml-cw": Method(
        ("carlini_wagner", "ml_cw"),
        "least norm with a hinge on every constraint, weight searched per photo",
        "Eq. 5",
        _schedules(),
        ("space",),
    ),
    "ml-dp": Method(
        ("deepfool", "ml_dp"),
        "linearise the constraints, step to where they hold, repeat",
        "Eq. 6-7, Algorithm 1",
        {
            "fast": {"iterations": 5},
            "balanced": {"iterations": 20},
            "paper": {
                "iterations": 20,
                "solver": "pinv",
                "space": "probability",
                "overshoot": 0.0,
                "stop_when_met": False,
            },
        },
        ("solver", "space"),
    ),
    "rank-1": Method(
        ("ranking", "rank_1"),
        "rank labels to be absent below the rest, and the rest below labels to be present",
        "Eq. 9",
        _schedules(),
        ("between", "space"),
    ),
    "rank-2": Method(
        ("ranking", "rank_2"),
        "Rank I with the flipped labels ranked outermost",
        "Eq. 9-11",
        _schedules(),
        ("between", "space"),
    ),
}


def find_method(name: str) -> Method:
    """Return the method called `name`.

    Raises:
        UsageError: if the name is unknown.
    """
    if name not in tuple(METHODS):
        raise UsageError(f"unknown method {name!r}: expected {', '.join(METHODS)}")
    return METHODS[name]
