"""Choices of operators under a budget: how a price tilts their chances, how they learn, and what they score.

Units are shifted all alike, because closing any of them saves something. The operators of a choice are *tilted*: the
shift ``b`` takes ``b * t`` off an operator's logit, where ``t`` is its cost between that of the cheapest operator of
the choice (0) and that of the costliest (1). So one number moves units and choices together, from the costliest network
to the cheapest.

Where the task alone would spend less than the budget, the shift is a bonus for what is costly. It is paid only where
what a choice gives is read: behind an operator that lets nothing through no gradient speaks against it, and all of the
budget would go where it is of no use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunegate.budget.readers import Readers
from prunegate.groups import GateMap
from prunegate.labels.trace import Trace
from prunegate.polynomial import Polynomial
from prunegate.select import Width

__all__ = ["Mixing"]

_RATE = 0.05
_MOMENTUM = 0.9
_SECOND_MOMENT = 0.99
_LARGEST = 8.0
_WARM = 0.2  # of the moving part: operators that have hardly been trained cannot be told apart
_SURE = 8.0
_LEAST_GAP = 0.01
_UNDECIDED = 0.1  # logits that are no further apart the final choice may decide for the costlier, if it fits
_LEAST_READ = 0.05  # what is read less often counts as unread in the final choice
_LEAST_BONUS = 1e-3  # every cost must be in reach, but what is not read must not be costly before all that is read


class Mixing:
    """The choices of one search.

    Args:
        widths: What every group may keep; those of choices come last.
        costs: What is limited.
        n_gates: Number of gates.
        readers: Tells which choices are read.

    Attributes:
        tilt: float64 ``[n_gates]``, what a shift of 1 takes off each logit.
        start: float64 ``[n_gates]``, the chances with which a search begins: units open, operators alike.
        reach: How much further than for units a shift may have to go, up and down.
    """

    def __init__(self, widths: Sequence[Width], costs: Sequence[Polynomial], n_gates: int, readers: Readers) -> None:
        self._widths = [width for width in widths if width.one_of]
        self._readers = readers
        self._read = torch.ones(n_gates, dtype=torch.float64)
        self.tilt = torch.ones(n_gates, dtype=torch.float64)
        self.start = torch.ones(n_gates, dtype=torch.float64)
        for width in self._widths:
            self.start[width.slice] = 1 / (width.slice.stop - width.slice.start)
        price = torch.zeros(n_gates, dtype=torch.float64)
        for cost in costs:
            price += cost.gradient(self.start) / max(cost.dense, 1)
        self._price = price
        self._spread: list[float] = []
        gap = 1.0
        for width in self._widths:
            own = price[width.slice]
            spread = float(own.max() - own.min())
            self._spread.append(spread)
            self.tilt[width.slice] = (own - own.min()) / spread if spread > 0 else 0.0
            steps = self.tilt[width.slice].unique().diff()
            gap = min([gap, *steps[steps > 0].tolist()])
        self.reach = 1 / max(gap, _LEAST_GAP), 1 / max(gap, _LEAST_GAP) / _LEAST_BONUS
        self._first = torch.zeros(n_gates, dtype=torch.float64)
        self._second = 0.0
        self._steps = 0

    @classmethod
    def of(cls, widths: Sequence[Width], costs: Sequence[Polynomial], trace: Trace,
           gate_map: GateMap) -> Mixing | None:  # fmt: skip
        """The choices of a search, ``None`` if there are none."""
        if not any(width.one_of for width in widths):
            return None
        return cls(widths, costs, gate_map.n_gates, Readers(trace, gate_map.choices))

    def chances(self, logits: Tensor) -> Tensor:
        """The chance of every gate, ``[n_gates]``, from logits divided by the noise."""
        p = torch.sigmoid(logits)
        for width in self._widths:
            p[width.slice] = torch.softmax(logits[width.slice], 0)
        return p

    def taken(self, shift: float) -> Tensor:
        """What a shift takes off each logit, float64 ``[n_gates]``; below 0 where it is a bonus."""
        return shift * (self.tilt if shift >= 0 else self.tilt * self._read.clamp(min=_LEAST_BONUS))

    def listen(self, logits: Tensor) -> None:
        """Finds out which choices are read at logits divided by the noise; from now on these get the bonus."""
        self._read = self._readers.chances(self.chances(logits))

    def settle(self, logits: Tensor) -> Tensor:
        """Logits in which choices that are held have their operator for sure; changed in place."""
        for width in self._widths:
            if width.options is not None:
                logits[width.slice] = -_SURE
                logits[width.slice.start + width.options[0]] = _SURE
        return logits

    def without(self, gradient: Tensor) -> Tensor:
        """A gradient without the choices' part."""
        rest = gradient.clone()
        for width in self._widths:
            rest[width.slice] = 0.0
        return rest

    def step(self, before: Tensor, after: Tensor, gradient: Tensor, progress: float) -> Tensor:
        """The ranks after one step.

        Args:
            before: Ranks before it, float64 ``[n_gates]``.
            after: Ranks in which the units have moved.
            gradient: Of the loss by the logits.
            progress: How much of the search is behind, 0 to 1.
        """
        moved = after.clone()
        for width in self._widths:
            moved[width.slice] = before[width.slice]
        if progress < _WARM:
            return moved
        self._steps += 1
        self._first = _MOMENTUM * self._first + (1 - _MOMENTUM) * gradient
        parts = torch.cat([gradient[width.slice] for width in self._widths])
        self._second = _SECOND_MOMENT * self._second + (1 - _SECOND_MOMENT) * float(parts.pow(2).mean())
        scale = (self._second / (1 - _SECOND_MOMENT**self._steps)) ** 0.5
        if scale > 0:
            first = self._first / (1 - _MOMENTUM**self._steps) / scale
            for width in self._widths:
                own = moved[width.slice] - _RATE * first[width.slice]
                moved[width.slice] = (own - own.mean()).clamp(-_LARGEST, _LARGEST)
        return moved

    def score(self, scores: Tensor, ranks: Tensor, logits: Tensor) -> Tensor:
        """The scores with those of operators.

        The final choice weighs scores against costs as the search did: a choice counts by how far apart the costs of
        its operators are, at the rate of score per cost at which units stand. The operators of a choice that is not
        read score alike, so that the cheapest of them stays.

        Args:
            scores: float64 ``[n_gates]``, those of units.
            ranks: float64 ``[n_gates]``, logits without the tilt.
            logits: float64 ``[n_gates]``, divided by the noise, which decide what is read.
        """
        read = self._readers.chances(self.chances(logits))
        unit = torch.ones_like(scores, dtype=torch.bool)
        for width in self._widths:
            unit[width.slice] = False
        paid = float((scores * self._price)[unit].sum())
        rate = float(scores[unit].sum()) / paid if paid > 0 else 1.0
        found = scores.clone()
        least = max(self._spread) or 1.0
        for width, spread in zip(self._widths, self._spread, strict=True):
            own = ranks[width.slice] + _UNDECIDED * self.tilt[width.slice]
            worth = rate * (spread if spread > 0 else _LEAST_GAP * least) * (own - own.min())
            found[width.slice] = worth * (read[width.slice] >= _LEAST_READ)
        return found

    def without_unread(self, scores: Tensor, mask: Tensor) -> Tensor:
        """The scores, 0 for the operators of choices that are not read under a mask: the cheapest of them stays."""
        read = self._readers.chances(mask.double())
        choices = torch.zeros_like(mask)
        for width in self._widths:
            choices[width.slice] = True
        return scores.masked_fill(choices & (read == 0), 0.0)

    def spends_unread(self, scores: Tensor, mask: Tensor) -> bool:
        """Whether a choice that is not read under a mask has scores that tell its operators apart."""
        return not torch.equal(scores, self.without_unread(scores, mask))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed search needs."""
        return {"first": self._first.clone(), "second": self._second, "steps": self._steps,
                "read": self._read.clone()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self._first = state["first"].clone()
        self._second, self._steps = float(state["second"]), int(state["steps"])
        self._read = state["read"].clone()
