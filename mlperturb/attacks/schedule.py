"""How long ML-CW, Rank I and Rank II search. No torch here: the list of methods must be quick to read."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """How long and how finely to search.

    Attributes:
        initial_weight: the first lambda.
        searches: the number of lambdas tried.
        iterations: Adam steps for each lambda.
        learning_rate: Adam's learning rate on w.
        final_rate: the share of `learning_rate` at the end of a cosine decay; 1 keeps the rate constant.
        warm: start each search from the best iterate if it met the goal, or else from the last iterate, in place of
            the clean photo.
        patience: an image's descent ends when a tenth of the iterations lowers its loss by less than this share.
        precision: an image's search ends when its lambda is known to this share.
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
