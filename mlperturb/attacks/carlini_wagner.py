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

    Of the iterates that meet the most constraints, the iterate of least distortion is kept.

    Args:
        problem: the batch.
        space: measure the hinge on the logits or, as in the paper, on the probabilities. The constraints are the same;
            but on the probabilities the gradient of a confident label vanishes.
        schedule: how long to search; `schedule.PAPER` (with space="probability") is the paper's setting. From its
            lambda of 1e5, ten halvings never reach the small lambdas that give small perturbations.
    """
    return minimise_penalty(problem.aim(ClassificationGoal(problem.targets, space)), schedule)
