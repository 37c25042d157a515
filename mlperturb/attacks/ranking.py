"""Rank I and Rank II, the attacks on multi-label ranking (Section III-C, Eq. 9-11)."""

from __future__ import annotations

from mlperturb.attacks.best import Outcome
from mlperturb.attacks.goals import Between, RankingGoal
from mlperturb.attacks.penalty import minimise_penalty
from mlperturb.attacks.problem import Problem
from mlperturb.attacks.schedule import BALANCED, Schedule
from mlperturb.targets import Space


def rank_1(
    problem: Problem, *, between: Between = "rest", space: Space = "logit", schedule: Schedule = BALANCED
) -> Outcome:
    """Min ||r||_2 + lambda * sum of max(0, max exp(f_low) - min exp(f_high)) over the pairs of sets of Eq. 9.

    Of the iterates that satisfy every ranking constraint (else of all), the iterate of highest Kendall tau_b against
    y^tau is kept, then of least distortion. Each image has its own lambda, the same for all terms.

    Args:
        problem: the batch; any of A_1, A_-1, B_1, B_-1, C may be empty, and then contributes zero.
        between: Omega0, see `RankingGoal`.
        space: the space of the hinge, see `RankingGoal`; the paper's is `probability`.
        schedule: how long to search; `schedule.PAPER` is the paper's setting.
    """
    return minimise_penalty(problem.aim(RankingGoal(problem.targets, between, space=space)), schedule)


def rank_2(
    problem: Problem, *, between: Between = "rest", space: Space = "logit", schedule: Schedule = BALANCED
) -> Outcome:
    """Rank I with the two terms of Eq. 10 added, Eq. 11: A_1 below B_-1, and A_-1 above B_1.

    Args:
        problem: the batch.
        between: Omega0, see `RankingGoal`.
        space: the space of the hinge, see `RankingGoal`; the paper's is `probability`.
        schedule: how long to search; `schedule.PAPER` is the paper's setting.
    """
    goal = RankingGoal(problem.targets, between, separate=True, space=space)
    return minimise_penalty(problem.aim(goal), schedule)
