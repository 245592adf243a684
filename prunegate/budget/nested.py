"""Several budgets in one search: masks that lie inside one another, each trained on its turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunegate.errors import BudgetError
from prunegate.select import Limit, Width, select

__all__ = ["Levels", "smallest_of"]

_FIRST = 1e6


def smallest_of(name: str, value: Any, others: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The smallest of several budgets, and all of them, the largest first; one budget as it is, and no list.

    Raises:
        BudgetError: The list has fewer than two entries, or the same one twice, or other budgets stand beside it.
    """
    if not isinstance(value, (list, tuple)):
        return value, []
    if any(other is not None for other in others):
        raise BudgetError(f"{name}={value!r} was given beside another budget; a list of budgets stands alone")
    numbers = [each for each in value if isinstance(each, (int, float)) and not isinstance(each, bool)]
    if len(numbers) != len(value) or len(set(numbers)) != len(value) or len(value) < 2:
        raise BudgetError(f"{name}={value!r} was given; expected one number, or a list of two or more different ones")
    ordered = sorted(numbers, reverse=True)
    return ordered[-1], ordered


class Levels:
    """The budgets of one search.

    Every step has one of them: the largest, the smallest, and one between at random, in turn (the sandwich of Yu and
    Huang, arXiv 1903.05134). All share one ranking of the units, so a smaller budget keeps a part of what a larger one
    keeps; operators of choices may differ.

    Args:
        limits: One for each budget, the largest first.
    """

    def __init__(self, limits: Sequence[Limit]) -> None:
        self.limits = list(limits)
        self.masks: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._widths: list[Width] = []

    def most(self, step: int) -> float:
        """The budget of the step that follows ``step`` steps; the same on every rank."""
        if step % 3 < 2:
            return float(self.limits[-(step % 3)].most)
        share = float(torch.rand((), generator=torch.Generator().manual_seed(step)))
        low, high = self.limits[-1].most, self.limits[0].most
        return low + share * (high - low)

    def settle(self, scores: Callable[[Limit], Tensor], widths: Sequence[Width]) -> None:
        """Chooses the mask of every budget, each inside the one before it.

        Args:
            scores: Gives the units' scores under a limit.
            widths: What each group may keep.
        """
        self._widths = list(widths)
        self._scores = [scores(limit) for limit in self.limits]
        self.masks = []
        for limit, own in zip(self.limits, self._scores, strict=True):
            outer = self.masks[-1] if self.masks else torch.ones(limit.cost.n_gates, dtype=torch.bool)
            self.masks.append(self._between(outer, None, limit, own))

    def mask_of(self, step: int) -> Tensor:
        """The mask on which the weights of a step are trained."""
        last = len(self.masks) - 1
        between = 1 + step // 3 % (last - 1) if last > 1 else 0
        return self.masks[(0, last, between)[step % 3]]

    def mask_for(self, most: float) -> Tensor:
        """A mask for any budget in the range, between those of its neighbours; a share of dense, or an absolute number.

        Raises:
            BudgetError: It is out of the range of the search, or the search has not chosen yet.
        """
        cost = self.limits[0].cost
        low, high = self.limits[-1].most, self.limits[0].most
        if not self.masks:
            raise BudgetError("the search has not chosen yet what stays; call budget.finish() first")
        number = isinstance(most, (int, float)) and not isinstance(most, bool)
        value = int(most * cost.dense) if number and 0 < most <= 1 else int(most) if number else -1
        if not low <= value <= high:
            raise BudgetError(
                f"flops={most!r} was given; the search was made for {low:,} to {high:,} FLOPs, or a share of "
                f"{low / cost.dense:.4f} to {high / cost.dense:.4f} of the dense model"
            )
        at = max(i for i, limit in enumerate(self.limits) if limit.most >= value)
        if self.limits[at].most == value:
            return self.masks[at]
        return self._between(self.masks[at], self.masks[at + 1], Limit("flops", cost, value), self._scores[at])

    def _between(self, outer: Tensor, inner: Tensor | None, limit: Limit, scores: Tensor) -> Tensor:
        """The best mask under ``limit`` that keeps all of ``inner`` and nothing outside ``outer``."""
        scores = scores.clone()
        widths = []
        for width in self._widths:
            own = width.slice
            if width.one_of:
                widths.append(width)
                continue
            scores[own] = scores[own].masked_fill(~outer[own], 0.0)
            least = width.low
            if inner is not None:
                scores[own] = scores[own] + _FIRST * inner[own]
                least = max(least, int(inner[own].sum()))
            kept = int(outer[own].sum())
            widths.append(replace(width, low=min(least, kept), high=min(width.high, kept)))
        return select(scores, [limit], widths).mask

    def state_dict(self) -> dict[str, Any]:
        """What a resumed search needs."""
        return {"most": [limit.most for limit in self.limits], "masks": [mask.clone() for mask in self.masks],
                "scores": [each.clone() for each in self._scores]}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], widths: Sequence[Width]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        if state["most"] != [limit.most for limit in self.limits]:
            raise BudgetError(
                f"the state was saved with the budgets {state['most']}, this search has "
                f"{[limit.most for limit in self.limits]}; make the Budget with the same arguments"
            )
        self._widths = list(widths)
        self.masks, self._scores = list(state["masks"]), list(state["scores"])
