"""How long ML-CW, Rank I and Rank II search. No torch here: the list of methods must be quick to read."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """How long and how finely to search.

    Attributes:
        initial_weight: the first lambda.
        searches: how many lambdas are tried.
        iterations: Adam steps for each.
        learning_rate: of Adam, on w.
        final_rate: the share of `learning_rate` that a cosine decay ends at; 1 keeps it constant.
        warm: start each search from the best iterate that met the goal, or else from the last one, in place of the
            clean photo.
        patience: an image's descent ends when a tenth of the iterations lowered its loss by less than this share.
        precision: an image is finished when its lambda is known to this share.
    """

    initial_weight: float = 1.0
    searches: int = 5
    iterations: int = 40
    learning_rate: float = 5e-3
    final_rate: float = 0.1
    warm: bool = True
    patience: float = 1e-4
    precision: float = 0.5

    def rate(self, step: int) -> float:
        """Return the learning rate of an iteration."""
        cosine = (1 + math.cos(math.pi * step / self.iterations)) / 2
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)


FAST = Schedule(searches=3, iterations=20, learning_rate=1e-2)
BALANCED = Schedule()
PAPER = Schedule(1e5, 10, 1000, 1e-2, final_rate=1.0, warm=False, precision=0.0)  # Section IV-C, Parameter Setting
