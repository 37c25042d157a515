"""ML-CW, the multi-label Carlini & Wagner attack (Section III-B1, Eq. 5)."""

from __future__ import annotations

from mlperturb.attacks.best import Outcome
from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.penalty import minimise_penalty
from mlperturb.attacks.problem import Problem
from mlperturb.attacks.schedule import BALANCED, Schedule
from mlperturb.targets import Space


def ml_cw(problem: Problem, *, space: Space = "logit", schedule: Schedule = BALANCED) -> Outcome:
    """Min ||r||_2 + lambda * sum_j max(0, y'_j f'_j(x + r) - c_j), Eq. 5; lambda per image.

    Of the iterates that hold the most constraints, the one of least distortion is kept.

    Args:
        problem: the batch.
        space: where the hinge lies. On probabilities, as in the paper, its gradient dies with a confident label;
            the constraint is the same on logits, where it never does.
        schedule: how long to search; `schedule.PAPER` (with space="probability") is the paper's. From its lambda of
            1e5, ten halvings never reach the small ones that give small perturbations.
    """
    return minimise_penalty(problem.aim(ClassificationGoal(problem.targets, space)), schedule)
