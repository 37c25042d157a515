"""The limits of an attack: its passes, the RMSD, and the largest change of a pixel."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

from mlperturb.errors import UsageError

MIN_PASSES, MAX_PASSES = 10, 10**9
MARGIN = 0.01  # of a logit beyond its threshold: another batch size or device adds in another order


def is_number(value: object, kind: type = Real) -> bool:
    """Say whether a value is a number, NumPy's too, of a kind of the module `numbers`; a boolean is not a number."""
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class Limits:
    """The limits of an attack on one photo; None for no limit.

    Attributes:
        passes: the most forward and backward passes together for a photo; `MIN_PASSES` to `MAX_PASSES`.
        rmsd: the largest RMSD allowed, on the 0-255 scale, of the float result and of the PNG.
        linf: the most grey levels, 1 to 255, by which a pixel may change, in the float result and the PNG.

    Raises:
        UsageError: if a limit is not a number or out of its range.
    """

    passes: int | None = None
    rmsd: float | None = None
    linf: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("passes", Integral), ("rmsd", Real), ("linf", Integral)):
            value = getattr(self, name)
            if value is not None and not is_number(value, kind):
                words = "a whole number" if kind is Integral else "a number"
                raise UsageError(f"expected {words} for `{name}`, got {value!r:.60}")
        if self.passes is not None and self.passes < MIN_PASSES:
            raise UsageError(f"expected `passes` of at least {MIN_PASSES}, got {self.passes}")
        if self.passes is not None and self.passes > MAX_PASSES:
            raise UsageError(f"expected `passes` of at most {MAX_PASSES}, got {str(self.passes)[:30]}")
        if self.rmsd is not None and not 0 < self.rmsd < float("inf"):
            raise UsageError(f"expected a finite `rmsd` above 0, got {self.rmsd}")
        if self.linf is not None and not 1 <= self.linf <= 255:
            raise UsageError(f"expected `linf` from 1 to 255 grey levels, got {self.linf}")

    def describe(self) -> dict[str, float | None]:
        """Return the limits under the names that a report's settings and a journal's key use."""
        return {"passes": self.passes, "max_rmsd": self.rmsd, "max_linf": self.linf}
