"""When a search scores, moves and freezes, and the values that follow from the number of steps done."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prunegate.errors import BudgetError

__all__ = ["Ramp", "Schedule", "ramp"]

_MOST_SCORING_STEPS = 20
_MOVING_SHARE = 0.8


@dataclass(frozen=True)
class Ramp:
    """A value that goes from ``start`` to ``end`` in a straight line."""

    start: float
    end: float

    def at(self, progress: float) -> float:
        """The value at ``progress`` in [0, 1]."""
        return self.start + (self.end - self.start) * progress


def ramp(name: str, value: float | tuple[float, float], positive: bool) -> Ramp:
    """A number, or (start, end), as a ramp.

    Raises:
        BudgetError: It is neither, or not finite, or negative, or 0 where it must be positive.
    """
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    numbers = [v for v in pair if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]
    if len(pair) != 2 or len(numbers) != 2 or min(numbers) < 0 or (positive and min(numbers) == 0):
        least = "above 0" if positive else "of at least 0"
        raise BudgetError(f"{name}={value!r} was given; expected a number {least}, or a pair (start, end) of such")
    return Ramp(float(numbers[0]), float(numbers[1]))


@dataclass(frozen=True)
class Schedule:
    """The three parts of a search.

    Attributes:
        steps: Number of steps in all.
        scoring: The first steps, in which every gate is open and scores are gathered.
        moving: The step after which logits and noise stand still, so that the weights settle on the final mask.
    """

    steps: int
    scoring: int
    moving: int

    @classmethod
    def of(cls, steps: int, score: bool) -> Schedule:
        """Splits ``steps`` into parts; ``score`` says whether scores are needed at all."""
        scoring = min(_MOST_SCORING_STEPS, steps // 10) if score else 0
        return cls(steps, scoring, scoring + math.ceil(_MOVING_SHARE * (steps - scoring)))

    def progress(self, step: int) -> float:
        """How much of the moving part is behind after ``step`` steps, 0 to 1."""
        return min(1.0, max(0, step - self.scoring) / (self.moving - self.scoring))

    def target(self, step: int, dense: float, final: float) -> float:
        """The cost to be held in the step that follows ``step`` steps; falls cubically from ``dense`` to ``final``."""
        return final + (dense - final) * (1 - self.progress(step)) ** 3
