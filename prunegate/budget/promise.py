"""What was asked, what a mask uses of it, and the final choice that holds it.

Search and selection work on polynomials. Two costs are more than that: memory is the largest of many sums, and measured
times rise in steps. Where they differ, what counts is the cost itself, so the choice is corrected until that holds.

Time is a model still: of operators, not of the network. What counts is the network, so where it can be timed a cut is,
and where it is too slow the model is corrected by what it was wrong by, and the choice made again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prunegate.budget.limits import show
from prunegate.budget.memory import MemoryModel
from prunegate.budget.whole import Measured, Trial
from prunegate.select import Limit, Selection, Width, least_cost, select

__all__ = ["Exact", "Promise"]

_CORRECTIONS = 8
_ENOUGH = 0.99
_AIM = 0.995  # between enough and all
_TRIALS = 6
_NEAR = 0.97  # of the budget, measured: closer than that two measurements of one model are not
_AT_MOST = 0.99  # of the budget is aimed at, so that noise does not make another measurement of every other one
_APART = 0.05  # relative; between points that are closer the slope is noise
_LEAST_SLOPE, _GREATEST_SLOPE = 0.2, 1.5  # of measured over predicted, relative to their ratio
_NEXT = (0.1, 2.0)  # of the last prediction; nothing further off is tried next

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
        trial: Finds out what a cut really takes; ``None`` where only the model of it is to be had.
        untried: Why there is no trial, for the report.
        factor: By how much longer than predicted the chosen cut takes; 1 before, and where it was not measured.
        measured: The chosen cut's time, if it was measured.
        trials: How many cuts were measured to find it.
    """

    limits: list[Limit]
    widths: Sequence[Width]
    start: Tensor
    exact: Mapping[str, Exact]
    memory: MemoryModel | None = None
    trial: Trial | None = None
    untried: str = ""
    factor: float = field(init=False, default=1.0)
    measured: Measured | None = field(init=False, default=None)
    trials: int = field(init=False, default=0)
    asked: dict[str, int] = field(init=False)
    _timed: int | None = field(init=False, default=None)  # the number of the limit on predicted time

    def __post_init__(self) -> None:
        """Where a polynomial does not reach as low as the cost itself, its limit is as low as it reaches."""
        self.asked = {limit.name: limit.most for limit in self.limits}
        for number, limit in enumerate(self.limits):
            if _is_timed(limit):
                self._timed = number
                self.limits[number] = replace(limit, most=max(limit.most, least_cost(limit.cost, self.widths)))

    def named(self) -> list[Limit]:
        """The first limit of each name."""
        first: dict[str, Limit] = {}
        for limit in self.limits:
            first.setdefault(limit.name, limit)
        return list(first.values())

    def used(self, limit: Limit, mask: Tensor) -> int:
        """What a mask costs: its time as predicted, corrected by what was measured."""
        predicted = self._predicted(limit, mask)
        return round(self.factor * predicted) if _is_timed(limit) else predicted

    def _predicted(self, limit: Limit, mask: Tensor) -> int:
        return self.exact[limit.name](mask) if limit.name in self.exact else limit.cost.exact(mask)

    def dense(self, limit: Limit) -> int:
        """What the dense model costs."""
        return self._predicted(limit, self.start)

    def choose(self, scores: Tensor) -> Selection:
        """The units that stay: the best choice that keeps within every budget.

        Raises:
            BudgetError: The budgets cannot be met together.
        """
        self.factor, self.measured, self.trials = 1.0, None, 0
        if self._timed is None:
            return self._select(scores)
        if self.trial is None:
            return self._in_time(self._timed, scores)
        try:
            return self._tried(self.trial, self._timed, scores)
        finally:
            self.trial.end()

    def _tried(self, trial: Trial, number: int, scores: Tensor) -> Selection:
        """Measures the choice, and corrects the predicted times by the ratio until it keeps within its budget."""
        limit = self.limits[number]
        asked = self.asked[limit.name]
        found: list[tuple[Selection, int, Measured]] = []
        points: list[tuple[int, int]] = []  # what was predicted, and what was measured
        while len(found) < _TRIALS:
            chosen = self._in_time(number, scores)
            if any(torch.equal(chosen.mask, other.mask) for other, *_ in found):
                break  # no other choice comes nearer
            timed = trial.run(chosen.mask)
            if timed is None:
                self.untried = trial.obstacle
                warnings.warn(
                    f"latency: the final cut was not measured ({trial.obstacle}), so that it keeps within the budget "
                    "is only predicted; measure it with prunegate bench, and ask for less if it is too slow",
                    stacklevel=2,
                )
                if not found:
                    return chosen
                break
            cost, measured = timed
            found.append((chosen, cost, measured))
            if _NEAR * asked <= cost <= asked:
                break
            points.append((self._predicted(limit, chosen.mask), cost))
            self.factor = asked / _aim(points, asked)
        within = [each for each in found if each[1] <= asked]
        # By score, or where none is fast enough, by time.
        best = max(within, key=lambda each: each[0].score) if within else min(found, key=lambda each: each[1])
        chosen, cost, self.measured = best
        self.factor, self.trials = cost / max(1, self._predicted(limit, chosen.mask)), len(found)
        if not within:
            warnings.warn(
                f"latency: none of {self.trials} cuts keeps within the budget of {show(limit.name, asked)} when it is "
                f"measured; the fastest takes {self._in_words(self.measured)}, and is kept. Ask for at least that, let "
                "groups keep less (min_keep, round_to, ignore), or search again while the machine is quiet",
                stacklevel=2,
            )
        return chosen

    @staticmethod
    def _in_words(measured: Measured) -> str:
        return f"{measured.slim_ms:.3f} ms, {measured.share:.4f} of the dense model's {measured.dense_ms:.3f} ms"

    def state_dict(self) -> dict[str, Any]:
        """What was measured: numbers and strings."""
        return {"factor": self.factor, "trials": self.trials, "untried": self.untried,
                "measured": None if self.measured is None else asdict(self.measured)}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.factor, self.trials, self.untried = float(state["factor"]), int(state["trials"]), str(state["untried"])
        self.measured = None if state["measured"] is None else Measured(**state["measured"])

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
        lowest = least_cost(limit.cost, self.widths)
        best, most = None, max(round(limit.most / self.factor), lowest)
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
                most = max(round(most * asked / used), lowest)
            else:
                share = (_AIM * asked - below[1]) / (above[1] - below[1])
                most = round(below[0] + share * (above[0] - below[0]))
            if any(end is not None and end[0] == most for end in (below, above)):
                break
        if best is None:
            best = self._select(scores, number, lowest)
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

    def _where_from(self) -> str:
        """Whether the chosen cut's time was measured or only predicted."""
        if self.measured is None:
            return f"; predicted, not measured: {self.untried}"
        off = f"{self.factor:.3f} times what the table predicts"
        return f"; measured: {self._in_words(self.measured)} ({off}; {self.trials} cuts tried)"

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
                elif any(width.one_of for width in self.widths):
                    # A dearer operator may fit, and be worse: a search that leaves FLOPs over is right to.
                    line += "; no dearer operator or unit that fits would score higher"
                elif selection.full:
                    line += "; one step more of any group would exceed a budget"
            if _is_timed(limit) and selection is not None:
                line += self._where_from()
            lines.append(line)
        if selection is not None:
            lines.append(f"score within {selection.gap:.3%} of the linear relaxation's bound around this choice")
        return "\n".join(lines)


def _is_timed(limit: Limit) -> bool:
    """Whether a limit is on time, which alone can be measured where others are counted."""
    return limit.name == "latency"


def _aim(points: Sequence[tuple[int, int]], asked: int) -> float:
    """The predicted cost at which the measured one is expected to be just within the budget.

    Args:
        points: Pairs of predicted and measured costs, the last one last.
        asked: The budget.
    """
    predicted, measured = points[-1]
    predicted, measured = max(1, predicted), max(1, measured)
    slope = measured / predicted
    if len(points) > 1:
        # What no cut saves is the same for all, so a line through two cuts is nearer to the truth than a ratio.
        other, there = points[-2]
        if abs(predicted - other) > _APART * predicted:
            found = (measured - there) / (predicted - other)
            slope *= min(max(found / slope, _LEAST_SLOPE), _GREATEST_SLOPE)
    aim = predicted + (_AT_MOST * asked - measured) / slope
    return min(max(aim, _NEXT[0] * predicted), _NEXT[1] * predicted)
