"""The final choice: which units stay, so that the kept score is greatest and no budget is exceeded.

Inside a group, units that cost the same are kept in the order of their scores, so what is left to choose is one number
per group: how many stay. Costs are products of these numbers, and the problem is solved by successive linearisation:
where the costs' slopes are known it is a knapsack, whose relaxation keeps the units of greatest score per cost. Steps
are bounded by a trust region and measured by the exact costs, several starts are tried (the problem is not convex), and
single steps are exchanged at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunegate.errors import BudgetError
from prunegate.polynomial import Polynomial

__all__ = ["Limit", "Selection", "Width", "greatest_mask", "least_cost", "least_mask", "least_masks", "select"]

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]

_FIRST_ROUNDS = 8
_ROUNDS = 40
_EXCHANGE_WORK = 60_000  # number of groups times number of exchanges tried
_MAX_EXCHANGES = 600
_LEAST_GAIN = 1e-6  # relative; less is not worth another round of exchanges
_RANDOM_STARTS = 3
_BETWEEN = (0.25, 0.5, 0.75)  # of the way from one cost to another


@dataclass(frozen=True)
class Limit:
    """An upper limit on a cost.

    Attributes:
        name: What is limited, for messages.
        cost: The cost.
        most: The greatest value allowed.
    """

    name: str
    cost: Polynomial
    most: int


@dataclass(frozen=True)
class Width:
    """How many units of a group may stay.

    Attributes:
        slice: Where the group's gates stand.
        low: The least number of units.
        high: The greatest number of units.
        multiple: The number must be a multiple of this, unless the group is smaller or ``low == high``.
        one_of: Whether the units are operators of a choice, of which exactly one stays.
        options: Of a choice, the operators that may stay; all of them if ``None``.
    """

    slice: slice
    low: int
    high: int
    multiple: int = 1
    one_of: bool = False
    options: tuple[int, ...] | None = None

    @property
    def held(self) -> bool:
        """Whether the group must stay whole."""
        return not self.one_of and self.low == self.high == self.slice.stop - self.slice.start

    def operators(self) -> tuple[int, ...]:
        """Of a choice, the numbers of the operators that may stay."""
        return self.options or tuple(range(self.slice.stop - self.slice.start))

    def allowed(self) -> _Ints:
        """The allowed numbers of units, ascending; not empty.

        Raises:
            BudgetError: No number fits.
        """
        size = self.slice.stop - self.slice.start
        low, high, step = self.low, min(self.high, size), self.multiple
        if low != high and size >= step:
            low, high = -(-low // step) * step, high // step * step
        else:
            step = 1
        if low > high:
            raise BudgetError(
                f"no width fits gates {self.slice.start} to {self.slice.stop - 1}: of {size} units at least "
                f"{self.low} and at most {self.high} must stay, in multiples of {self.multiple}; relax one of them"
            )
        return np.arange(low, high + 1, step)


@dataclass(frozen=True, eq=False)
class Selection:
    """A choice of units.

    Attributes:
        mask: bool ``[n_gates]``, True where the unit stays.
        score: Sum of the scores of what stays.
        bound: The greatest score of the relaxed problem (fractions of units allowed, costs linearised at this choice).
            Costs are not convex, so a choice far away may score more; near this one none does.
        full: Whether no further step of any group fits; of operators, none that scores higher.
    """

    mask: Tensor
    score: float
    bound: float
    full: bool

    @property
    def gap(self) -> float:
        """Distance to the bound, as a share of it."""
        return max(0.0, 1 - self.score / self.bound) if self.bound > 0 else 0.0


def select(scores: Tensor, limits: Sequence[Limit], widths: Sequence[Width], thorough: bool = True) -> Selection:
    """Keeps the units whose scores add up to the most under all limits.

    Args:
        scores: ``[n_gates]``, at least 0.
        limits: At least one.
        widths: What each group may keep; gates of no group always stay.
        thorough: ``False`` cuts at one threshold and fills what is left, in milliseconds.

    Returns:
        A choice that exceeds no limit, to which no further step of any group can be added.

    Raises:
        BudgetError: The limits cannot be met together; says how far one can go.
    """
    problem = _Problem(scores.detach().double().cpu().numpy(), limits, widths)
    levels = problem.fill(problem.cut(problem.mean_score))
    if thorough:
        tried = [problem.improve(start, _FIRST_ROUNDS) for start in problem.starts()]
        levels = problem.exchange(problem.improve(max(tried, key=problem.score), _ROUNDS))
    mask = torch.from_numpy(problem.mask(levels))
    kept = float(problem.scores[mask.numpy()].sum())
    return Selection(mask, kept, max(kept, problem.bound(levels)), problem.is_full(levels))


def least_mask(cost: Polynomial, widths: Sequence[Width]) -> Tensor:
    """The mask in which every group keeps as little as it may, with the cheapest operators."""
    mask = torch.ones(cost.n_gates, dtype=torch.bool)
    for width in widths:
        if not width.one_of:
            mask[width.slice.start + int(width.allowed()[0]) : width.slice.stop] = False
    return _with_operators(mask, cost.gradient, widths, dearest=False)


def least_cost(cost: Polynomial, widths: Sequence[Width]) -> int:
    """The cost when every group keeps as little as it may."""
    return cost.exact(least_mask(cost, widths))


def greatest_mask(cost: Polynomial, widths: Sequence[Width]) -> Tensor:
    """The mask in which every unit stays, with the costliest operators."""
    return _with_operators(torch.ones(cost.n_gates, dtype=torch.bool), cost.gradient, widths, dearest=True)


def least_masks(limits: Sequence[Limit], widths: Sequence[Width]) -> Iterator[Tensor]:
    """Masks in which every group keeps as little as it may, with operators that are cheap by one cost or by several.

    Without choices of operators there is one such mask. With them an operator may be cheap by one cost and dear by
    another, so the operators are those of the least price for several mixtures of the costs, the even one first. No
    mixture finds an operator that is fair by every cost and the best by none: last come the same masks after exchanges.
    """
    start = least_mask(limits[0].cost, [width for width in widths if not width.one_of])
    corners = np.eye(len(limits))
    even = np.full(len(limits), 1 / len(limits))
    mixes = [even, *corners, *((1 - t) * a + t * b for a, b in itertools.combinations(corners, 2) for t in _BETWEEN)]
    choices = [width for width in widths if width.one_of]
    found = []
    for mix in mixes if choices else mixes[:1]:

        def price(p: Tensor, mix: _Floats = mix) -> Tensor:
            parts = zip(mix.tolist(), limits, strict=True)
            return torch.stack([w * each.cost.gradient(p) / max(each.most, 1) for w, each in parts]).sum(0)

        found.append(_with_operators(start, price, widths, dearest=False))
        yield found[-1]
    if choices:
        yield from (_exchanged(mask, limits, choices) for mask in found)


def _exchanged(mask: Tensor, limits: Sequence[Limit], choices: Sequence[Width]) -> Tensor:
    """The mask after exchanges of one operator at a time, each of which lowers the largest share of any limit."""

    def largest(mask: Tensor) -> float:
        return max(limit.cost.exact(mask) / max(limit.most, 1) for limit in limits)

    least, before = largest(mask), float("inf")
    while 1 < least < before:
        before = least
        for width in choices:
            for option in width.operators():
                other = mask.clone()
                other[width.slice] = False
                other[width.slice.start + option] = True
                if largest(other) < least:
                    mask, least = other, largest(other)
    return mask


def _with_operators(mask: Tensor, price: Callable[[Tensor], Tensor], widths: Sequence[Width], dearest: bool) -> Tensor:
    """A mask with the cheapest, or dearest, operator of every choice by a price of each gate, given all chances.

    Choices inside others come after them and are settled first, while the outer ones are still open to all.
    """
    choices = [width for width in widths if width.one_of]
    p = mask.double()
    for width in choices:
        p[width.slice] = 1 / (width.slice.stop - width.slice.start)
    for _ in range(2 if choices else 0):  # with shared keys the first round need not be the last
        for width in reversed(choices):
            own = price(p)[width.slice]
            options = list(width.operators())
            best = int(own[options].argmax() if dearest else own[options].argmin())
            p[width.slice] = 0.0
            p[width.slice.start + options[best]] = 1.0
    return p > 0.5


class _Problem:
    """The selection in terms of levels: level ``t`` of a group keeps the ``t``-th of its allowed numbers of units.

    A *step* takes a group from one level to the next. Steps are numbered group by group, in order.
    """

    def __init__(self, scores: _Floats, limits: Sequence[Limit], widths: Sequence[Width]) -> None:
        self.scores = scores
        self.limits = limits
        self.most = np.array([limit.most for limit in limits], dtype=np.float64)
        n = scores.size
        # Gates that no cost can tell apart share a class.
        together = np.zeros(n, dtype=np.int64)
        for limit in limits:
            together = together * limit.cost.sizes.numel() + limit.cost.classes.numpy()
            together = np.unique(together, return_inverse=True)[1].reshape(-1)
        self.classes = together
        self.n_classes = int(together.max()) + 1 if n else 0
        _, example = np.unique(together, return_index=True)
        self.of_cost = [limit.cost.classes.numpy()[example] for limit in limits]
        self._lay_out(widths)
        if not self.fits(np.zeros(len(widths), dtype=np.int64)):
            least = self.costs(np.zeros(len(widths), dtype=np.int64))
            reached = ", ".join(
                f"{limit.name} is still {int(value):,} (budget {limit.most:,})"
                for limit, value in zip(limits, least, strict=True)
            )
            raise BudgetError(
                f"the budgets cannot be met: with as few units as allowed {reached}; raise the budget, or lower "
                "min_keep, round_to or ignore"
            )

    def _lay_out(self, widths: Sequence[Width]) -> None:
        slopes = self._prices_of_classes(np.bincount(self.classes, minlength=self.n_classes).astype(np.float64))
        relative = np.maximum((slopes / self.most[:, None]).sum(0), 1e-30)
        in_group = np.zeros(self.scores.size, dtype=bool)
        self.order: list[_Ints] = []
        self.kept: list[_Ints] = []
        part_group, part_class, tables = [], [], []
        step_group, step_index, gains, sizes, entries = [], [], [], [], []
        n_steps = 0
        self.operators: dict[int, _Ints] = {}
        cheapest = self._cheapest_operators(widths)
        for group, width in enumerate(widths):
            units = np.arange(width.slice.start, width.slice.stop)
            in_group[units] = True
            if width.one_of:
                options = self._worthwhile(width, relative, cheapest[width.slice.start])
                self.operators[group] = options
                self.order.append(units)
                self.kept.append(np.arange(len(options)))
                gains.append(np.diff(self.scores[options]))
                steps = np.arange(len(options) - 1)
                sizes.append(np.ones(steps.size))
                step_group.append(np.full(steps.size, group))
                step_index.append(steps)
                for gate_class in np.unique(self.classes[options]):
                    count = (self.classes[options] == gate_class).astype(np.int64)
                    part_group.append(group)
                    part_class.append(gate_class)
                    tables.append(count)
                    entries.append((n_steps + steps, np.full(steps.size, gate_class), np.diff(count)))
                n_steps += steps.size
                continue
            classes = self.classes[units]
            value = self.scores[units]
            order = np.argsort(-(value / relative[classes] if np.ptp(classes) else value), kind="stable")
            allowed = width.allowed()
            self.order.append(units[order])
            self.kept.append(allowed)
            total = np.concatenate([[0.0], np.cumsum(value[order])])
            gains.append(np.diff(total[allowed]))
            sizes.append(np.diff(allowed))
            steps = np.arange(len(allowed) - 1)
            step_group.append(np.full(steps.size, group))
            step_index.append(steps)
            for gate_class in np.unique(classes):
                count = np.concatenate([[0], np.cumsum(classes[order] == gate_class)])[allowed]
                part_group.append(group)
                part_class.append(gate_class)
                tables.append(count)
                entries.append((n_steps + steps, np.full(steps.size, gate_class), np.diff(count)))
            n_steps += steps.size
        self.step_group, self.step_index = _join(step_group, np.int64), _join(step_index, np.int64)
        self.gain = _join(gains, np.float64)
        self.mean_score = self.gain / np.maximum(_join(sizes, np.float64), 1)
        self.top = np.array([len(allowed) - 1 for allowed in self.kept], dtype=np.int64)
        self.first = np.cumsum(self.top) - self.top
        self.entry_step = _join([e[0] for e in entries], np.int64)
        self.entry_class = _join([e[1] for e in entries], np.int64)
        self.entry_count = _join([e[2] for e in entries], np.float64)
        self.part_group, self.part_class = np.array(part_group, dtype=np.int64), np.array(part_class, dtype=np.int64)
        self.part_start = np.cumsum([0, *(len(table) for table in tables)])[:-1]
        self.table = _join(tables, np.float64)
        self.always = np.bincount(self.classes[~in_group], minlength=self.n_classes).astype(np.float64)
        self.gain_until = np.concatenate([[0.0], np.cumsum(self.gain)])

    def _cheapest_operators(self, widths: Sequence[Width]) -> dict[int, int]:
        """The gate of a cheap operator of each choice where little else is kept, by the choice's first gate."""
        if not any(width.one_of for width in widths):
            return {}
        masks = least_masks(self.limits, widths)
        first = next(masks)
        mask = next((mask for mask in itertools.chain([first], masks) if self._fits(mask)), first)
        return {w.slice.start: w.slice.start + int(mask[w.slice].int().argmax()) for w in widths if w.one_of}

    def _fits(self, mask: Tensor) -> bool:
        return all(limit.cost.exact(mask) <= limit.most for limit in self.limits)

    def _worthwhile(self, width: Width, price: _Floats, cheapest: int) -> _Ints:
        """Gates of operators, the cheapest first, each of them dearer than the one before it and of greater score."""
        units = width.slice.start + np.array(width.operators())
        units = units[np.lexsort((-self.scores[units], price[self.classes[units]]))]
        kept = [cheapest]
        for unit in units:
            if self.scores[unit] > self.scores[kept[-1]]:
                same = price[self.classes[unit]] <= price[self.classes[kept[-1]]] and len(kept) > 1
                kept = [*kept[:-1], int(unit)] if same else [*kept, int(unit)]
        return np.array(kept)

    # ------------------------------------------------------------------ values

    def counts(self, levels: _Ints) -> _Floats:
        """Number of open gates of each class."""
        picked = self.table[self.part_start + levels[self.part_group]]
        return self.always + np.bincount(self.part_class, weights=picked, minlength=self.n_classes)

    def costs(self, levels: _Ints) -> _Floats:
        """The value of each limited cost."""
        counts = self.counts(levels)
        return np.array([
            limit.cost.at(np.bincount(of, weights=counts, minlength=limit.cost.sizes.numel()))
            for limit, of in zip(self.limits, self.of_cost, strict=True)
        ])  # fmt: skip

    def fits(self, levels: _Ints) -> bool:
        """Whether no limit is exceeded."""
        return bool((self.costs(levels) <= self.most).all())

    def score(self, levels: _Ints) -> float:
        """Score of the steps taken (what every choice keeps is left out)."""
        return float((self.gain_until[self.first + levels] - self.gain_until[self.first]).sum())

    def mask(self, levels: _Ints) -> NDArray[np.bool_]:
        """The choice as a mask."""
        mask = np.ones(self.scores.size, dtype=bool)
        for group, level in enumerate(levels):
            if group in self.operators:
                mask[self.order[group]] = False
                mask[self.operators[group][level]] = True
            else:
                mask[self.order[group][self.kept[group][level] :]] = False
        return mask

    def _prices_of_classes(self, counts: _Floats) -> _Floats:
        return np.stack([
            limit.cost.slope(np.bincount(of, weights=counts, minlength=limit.cost.sizes.numel()))[of]
            for limit, of in zip(self.limits, self.of_cost, strict=True)
        ])  # fmt: skip

    def prices(self, levels: _Ints) -> _Floats:
        """What each step adds to each cost, linearised, ``[n_limits, n_steps]``."""
        slopes = self._prices_of_classes(self.counts(levels))
        return np.stack([
            np.bincount(self.entry_step, weights=slope[self.entry_class] * self.entry_count, minlength=self.gain.size)
            for slope in slopes
        ])  # fmt: skip

    # ------------------------------------------------------------------ moves

    def cut(self, key: _Floats, low: _Ints | None = None, high: _Ints | None = None) -> _Ints:
        """From levels ``low``, takes steps below ``high`` in the order of falling ``key`` as long as they fit."""
        low = np.zeros_like(self.top) if low is None else low
        high = self.top if high is None else high
        free = np.flatnonzero((self.step_index >= low[self.step_group]) & (self.step_index < high[self.step_group]))
        groups = self.step_group[free[np.argsort(-key[free], kind="stable")]]

        def levels(n: int) -> _Ints:
            return low + np.bincount(groups[:n], minlength=low.size)

        fitting, too_many = 0, groups.size + 1
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            if self.fits(levels(middle)):
                fitting = middle
            else:
                too_many = middle
        return levels(fitting)

    def starts(self) -> list[_Ints]:
        """Choices to improve: one threshold for all, equal shares, score per cost at several slopes."""
        equal = self.cut(-(self.step_index + 0.5) / np.maximum(self.top, 1)[self.step_group])
        per_dense_cost = self.gain / self._mixed(self.prices(self.top), self._even())
        per_cost = self.gain / self._mixed(self.prices(equal), self._even())
        found = [self.cut(self.mean_score), equal, self.cut(per_dense_cost), self.cut(per_cost)]
        random = np.random.default_rng(0)
        for _ in range(_RANDOM_STARTS):
            found.append(self.cut(per_cost * np.exp(random.normal(0, 1, self.top.size))[self.step_group]))
        return found

    def _even(self) -> _Floats:
        return np.full(len(self.limits), 1 / len(self.limits))

    def _mixed(self, prices: _Floats, weights: _Floats) -> _Floats:
        """One price from several, each as a share of its limit."""
        return np.maximum((weights / np.maximum(self.most, 1)) @ prices, 1e-30)

    def improve(self, levels: _Ints, rounds: int) -> _Ints:
        """Successive linearisation in a trust region; the score never falls."""
        weights, turn = self._even(), 0.5
        reach, best = 0.5, self.score(levels)
        for _ in range(rounds):
            prices = self.prices(levels)
            span = np.maximum(1, np.ceil(reach * self.top)).astype(np.int64)
            low, high = np.maximum(levels - span, 0), np.minimum(levels + span, self.top)
            mixes = [weights]
            if len(self.limits) > 1:
                mixes += [(1 - turn) * weights + turn * one for one in np.eye(len(self.limits))]
            found = [self.cut(self.gain / self._mixed(prices, mix), low, high) for mix in mixes]
            scores = [self.score(candidate) for candidate in found]
            winner = int(np.argmax(scores))
            if scores[winner] > best:
                levels, best, weights = found[winner], scores[winner], mixes[winner]
                continue
            reach, turn = reach / 2, turn / 2
            if (span <= 1).all():
                break
        return self.fill(levels)

    def fill(self, levels: _Ints, banned: int = -1) -> _Ints:
        """Takes single steps, the one of most score per cost first, until none fits."""
        levels = levels.copy()
        open_to_more = levels < self.top
        if banned >= 0:
            open_to_more[banned] = False
        while open_to_more.any():
            groups = np.flatnonzero(open_to_more)
            steps = self.first[groups] + levels[groups]
            prices = self.prices(levels)[:, steps]
            # Costs are convex in one group's number, so a step costs at least what its slope says.
            room = self.most * (1 + 1e-12) - self.costs(levels)
            fitting = np.max(prices - room[:, None], axis=0) <= 0
            open_to_more[groups[~fitting]] = False
            ratio = self.gain[steps] / self._mixed(prices, self._even())
            for i in np.argsort(-ratio, kind="stable"):
                if fitting[i]:
                    levels[groups[i]] += 1
                    if self.fits(levels):
                        open_to_more[groups[i]] = levels[groups[i]] < self.top[groups[i]]
                        break
                    levels[groups[i]] -= 1
                    open_to_more[groups[i]] = False
        return levels

    def is_full(self, levels: _Ints) -> bool:
        """Whether no single step fits."""
        return bool((self.fill(levels) == levels).all())

    def exchange(self, levels: _Ints) -> _Ints:
        """Gives up one step, or forces one in, and refills, as long as that gains."""
        best, trials, improved = self.score(levels), 0, True
        most_trials = min(_MAX_EXCHANGES, _EXCHANGE_WORK // max(1, self.top.size))
        while improved:
            improved = False
            for group in range(self.top.size):
                for move in (self._give_up, self._force):
                    if trials >= most_trials:
                        return levels
                    candidate = move(levels, group)
                    if candidate is None:
                        continue
                    trials += 1
                    value = self.score(candidate)
                    if value > best * (1 + _LEAST_GAIN):
                        levels, best, improved = candidate, value, True
        return levels

    def _give_up(self, levels: _Ints, group: int) -> _Ints | None:
        if levels[group] == 0:
            return None
        candidate = levels.copy()
        candidate[group] -= 1
        return self.fill(self.fill(candidate, banned=group))

    def _force(self, levels: _Ints, group: int) -> _Ints | None:
        if levels[group] == self.top[group]:
            return None
        candidate = levels.copy()
        candidate[group] += 1
        while not self.fits(candidate):
            groups = np.flatnonzero(candidate > 0)
            groups = groups[groups != group]
            if not groups.size:
                return None
            steps = self.first[groups] + candidate[groups] - 1
            excess = np.maximum(self.costs(candidate) - self.most, 0) / self.most
            weights = excess / excess.sum()
            ratio = self.gain[steps] / self._mixed(self.prices(candidate)[:, steps], weights)
            candidate[groups[int(np.argmin(ratio))]] -= 1
        return self.fill(candidate)

    def bound(self, levels: _Ints) -> float:
        """The greatest score of the relaxation linearised at ``levels``; what every choice keeps is counted too."""
        prices = self.prices(levels)
        taken = self.step_index < levels[self.step_group]
        room = self.most - self.costs(levels) + prices @ taken
        always = self.scores.sum() - self.gain.sum() - float(self.scores[~self.mask(self.top)].sum())
        best = np.inf
        corners = np.eye(len(self.limits))
        for share in np.linspace(0, 1, 9):
            for corner in corners:
                # Any non-negative combination of the limits is a limit, so each of these bounds is valid.
                weights = share * corner + (1 - share) * self._even()
                price = self._mixed(prices, weights)
                order = np.argsort(-self.gain / price, kind="stable")
                used = np.cumsum(price[order])
                allowed = float((weights / np.maximum(self.most, 1)) @ room)
                whole = int(np.searchsorted(used, allowed, side="right"))
                value = float(self.gain[order[:whole]].sum())
                if whole < used.size:
                    left = allowed - (used[whole - 1] if whole else 0.0)
                    value += float(self.gain[order[whole]] * max(0.0, left / price[order[whole]]))
                best = min(best, value)
        return float(always + best)


def _join(arrays: list[NDArray], dtype: type) -> NDArray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype=dtype)
