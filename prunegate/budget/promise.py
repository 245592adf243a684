"""What was asked, what a mask uses of it, and the final choice that holds it.

Search and selection work on polynomials. Two costs are more than that: memory is the largest of many sums, and measured
times rise in steps. Where they differ, what counts is the cost itself, so the choice is corrected until that holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prunegate.budget.limits import show
from prunegate.budget.memory import MemoryModel
from prunegate.select import Limit, Selection, Width, least_cost, select

__all__ = ["Exact", "Promise"]

_CORRECTIONS = 8
_ENOUGH = 0.99
_AIM = 0.995  # between enough and all

Exact = Callable[[Tensor], int]
"""The cost of a mask, bool ``[n_gates]``, in the units of its polynomial."""


@dataclass
class Promise:
    """The budgets of one search.

    Attributes:
        limits: Every limit on a polynomial; of memory there is one for every point.
        asked: The budgets themselves, by name.
        widths: What each group may keep.
        start: The mask of the dense model.
        exact: Costs that are not their polynomial, by name.
        memory: Finds the points of memory.
    """

    limits: list[Limit]
    widths: Sequence[Width]
    start: Tensor
    exact: Mapping[str, Exact]
    memory: MemoryModel | None = None
    asked: dict[str, int] = field(init=False)
    _timed: int | None = field(init=False, default=None)  # the number of the limit on predicted time

    def __post_init__(self) -> None:
        """Where a polynomial does not reach as low as the cost itself, its limit is as low as it reaches."""
        self.asked = {limit.name: limit.most for limit in self.limits}
        for number, limit in enumerate(self.limits):
            if limit.name == "latency":
                self._timed = number
                self.limits[number] = replace(limit, most=max(limit.most, least_cost(limit.cost, self.widths)))

    def named(self) -> list[Limit]:
        """The first limit of each name."""
        first: dict[str, Limit] = {}
        for limit in self.limits:
            first.setdefault(limit.name, limit)
        return list(first.values())

    def used(self, limit: Limit, mask: Tensor) -> int:
        """What a mask costs."""
        return self.exact[limit.name](mask) if limit.name in self.exact else limit.cost.exact(mask)

    def dense(self, limit: Limit) -> int:
        """What the dense model costs."""
        return self.used(limit, self.start)

    def choose(self, scores: Tensor) -> Selection:
        """The units that stay: the best choice that keeps within every budget.

        Raises:
            BudgetError: The budgets cannot be met together.
        """
        return self._select(scores) if self._timed is None else self._in_time(self._timed, scores)

    def _select(self, scores: Tensor, number: int = 0, most: int | None = None) -> Selection:
        """The best choice under all polynomials, one of which may have another limit, and at every point of memory."""
        while True:
            limits = list(self.limits)
            if most is not None:
                limits[number] = replace(limits[number], most=most)
            chosen = select(scores, limits, self.widths)
            if self.memory is None or not self._add_point(self.memory, chosen.mask):
                return chosen

    def _add_point(self, memory: MemoryModel, mask: Tensor) -> bool:
        """Limits the point that has the mask's peak too, if it is above the budget; returns whether it is."""
        most = self.asked["memory"]
        peak, point = memory.peak(mask)
        if peak > most:
            self.limits.append(Limit("memory", memory.cost(point), most))
        return peak > most

    def _in_time(self, number: int, scores: Tensor) -> Selection:
        """Moves the limit of the polynomial until the predicted time itself is below the budget, and close to it."""
        limit = self.limits[number]
        asked = self.asked[limit.name]
        below: tuple[int, int] | None = None  # the greatest limit whose choice kept within the budget, and its time
        above: tuple[int, int] | None = None  # the least whose choice did not
        best, most = None, limit.most
        for _ in range(_CORRECTIONS):
            chosen = self._select(scores, number, most)
            used = self.used(limit, chosen.mask)
            if used <= asked:
                below = (most, used)
                if best is None or chosen.score > best.score:
                    best = chosen
                if used >= _ENOUGH * asked or limit.cost.exact(chosen.mask) < _ENOUGH * most:
                    break  # full, or another budget binds
            else:
                above = (most, used)
            if below is None or above is None:
                most = max(round(most * asked / used), least_cost(limit.cost, self.widths))
            else:
                share = (_AIM * asked - below[1]) / (above[1] - below[1])
                most = round(below[0] + share * (above[0] - below[0]))
            if any(end is not None and end[0] == most for end in (below, above)):
                break
        if best is None:
            best = self._select(scores, number, least_cost(limit.cost, self.widths))
        return best if self._binds(best.mask) else self._filled(best, scores)

    def _binds(self, mask: Tensor) -> bool:
        """Whether one of the budgets is used up."""
        return any(self.used(limit, mask) >= _ENOUGH * self.asked[limit.name] for limit in self.named())

    def _filled(self, chosen: Selection, scores: Tensor) -> Selection:
        """A choice with every further step of a group that keeps within all budgets, costs as they are."""
        mask = chosen.mask.clone()
        left = scores.masked_fill(mask, 0.0)
        units = [width for width in self.widths if not width.one_of]
        for width in sorted(units, key=lambda width: float(left[width.slice].max()), reverse=True):
            own, kept = width.slice, int(mask[width.slice].sum())
            order = own.start + torch.argsort(scores[own].masked_fill(mask[own], -1.0), descending=True)
            wider = mask.clone()
            for count in width.allowed()[width.allowed() > kept].tolist():
                wider[order[: count - kept]] = True
                if any(self.used(limit, wider) > self.asked[limit.name] for limit in self.named()):
                    break
                mask = wider.clone()
        score = chosen.score + float(scores[mask].sum() - scores[chosen.mask].sum())
        return replace(chosen, mask=mask, score=score, bound=max(score, chosen.bound), full=True)

    def report(self, mask: Tensor, selection: Selection | None) -> str:
        """One line per budget: how much of it is used, and why not more."""
        used = {limit.name: self.used(limit, mask) for limit in self.named()}
        filled = self._binds(mask)
        lines = []
        for limit in self.named():
            share = used[limit.name] / self.asked[limit.name]
            shown = f"{show(limit.name, used[limit.name])} of {show(limit.name, self.asked[limit.name])}"
            line = f"{limit.name}: {shown} ({share:.2%} of the budget)"
            if selection is not None and share < _ENOUGH:
                if filled:
                    line += "; another budget binds"
                elif selection.full:
                    line += "; one step more of any group would exceed a budget"
            lines.append(line)
        if selection is not None:
            lines.append(f"score within {selection.gap:.3%} of the linear relaxation's bound around this choice")
        return "\n".join(lines)
