"""The final choice against enumeration, a linear-programming solver and plain bisection on a threshold."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from prunegate.budget.limits import check_together
from prunegate.errors import BudgetError
from prunegate.polynomial import Polynomial, PolynomialBuilder
from prunegate.select import Limit, Width, least_cost, select
from tools.bench_budget import made_up


def random_scores(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_threshold(scores: Tensor, cost: Polynomial, slices: list[slice], most: int) -> Tensor:
    """The baseline: everything above one threshold, found by bisection, and the best unit of every group."""
    ranked = torch.sort(scores).values

    def above(rank: int) -> Tensor:
        mask = scores > ranked[rank]
        for s in slices:
            mask[s.start + int(scores[s].argmax())] = True
        return mask

    low, high = -1, len(ranked) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost.exact(above(middle)) <= most else (middle, high)
    return above(high)


def least_added(cost: Polynomial, mask: Tensor, slices: list[slice], multiple: int) -> int:
    """What the cheapest step of any group would add; larger than any budget if all are at their widest."""
    added = [2**62]
    for s in slices:
        closed = torch.nonzero(~mask[s]).flatten()[:multiple] + s.start
        if closed.numel() == multiple:
            wider = mask.clone()
            wider[closed] = True
            added.append(cost.exact(wider) - cost.exact(mask))
    return min(added)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("multiple", [1, 2])
def test_small_instances_come_close_to_the_best_of_all_choices(seed: int, multiple: int) -> None:
    cost, _, slices = made_up(seed=seed, n_groups=4, low=4, high=9, n_terms=8)
    scores = random_scores(cost.n_gates, seed)
    most = cost.dense // 2
    best = 0.0
    ordered = [s.start + torch.argsort(-scores[s]) for s in slices]
    for kept in itertools.product(*(range(multiple, s.stop - s.start + 1, multiple) for s in slices)):
        mask = torch.zeros(cost.n_gates, dtype=torch.bool)
        for order, count in zip(ordered, kept, strict=True):
            mask[order[:count]] = True
        if cost.exact(mask) <= most:
            best = max(best, float(scores[mask].sum()))
    chosen = select(scores, [Limit("flops", cost, most)], [Width(s, 1, 99, multiple) for s in slices])
    assert cost.exact(chosen.mask) <= most
    assert chosen.score == pytest.approx(float(scores[chosen.mask].sum()))
    assert 0.98 * best <= chosen.score <= best * (1 + 1e-12)


def test_units_of_one_group_that_cost_differently() -> None:
    builder = PolynomialBuilder(8)
    whole, half = torch.arange(8), torch.arange(4)
    builder.add(3, [whole])
    builder.add(10, [half, half])
    cost = builder.build()
    scores = random_scores(8, 3)
    masks = [torch.tensor(bits) for bits in itertools.product([False, True], repeat=8)]
    best = max(float(scores[m].sum()) for m in masks if m.any() and cost.exact(m) <= 60)
    chosen = select(scores, [Limit("flops", cost, 60)], [Width(slice(0, 8), 1, 8)])
    assert cost.exact(chosen.mask) <= 60
    assert chosen.score >= 0.95 * best


@pytest.mark.parametrize("seed", range(10))
def test_the_choice_beats_bisection_on_the_threshold(seed: int) -> None:
    cost, _, slices = made_up(seed=seed, n_groups=20, low=16, high=200, n_terms=60)
    scores = random_scores(cost.n_gates, seed)
    most = int(cost.dense * (0.15 + 0.07 * seed))
    baseline = by_threshold(scores, cost, slices, most)
    chosen = select(scores, [Limit("flops", cost, most)], [Width(s, 1, 10**6) for s in slices])
    assert cost.exact(baseline) <= most
    assert cost.exact(chosen.mask) <= most
    assert chosen.score > float(scores[baseline].sum()) * 1.001
    assert chosen.gap < 1e-3


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.3, 0.15, 0.05])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("thorough", [True, False])
def test_the_budget_is_filled_and_never_exceeded(share: float, multiple: int, thorough: bool) -> None:
    cost, _, slices = made_up(seed=7, n_groups=20, low=16, high=200, n_terms=60)
    scores = random_scores(cost.n_gates, 1)
    most = int(cost.dense * share)
    widths = [Width(s, 1, 10**6, multiple) for s in slices]
    chosen = select(scores, [Limit("flops", cost, most)], widths, thorough=thorough)
    used = cost.exact(chosen.mask)
    assert used <= most
    assert all(int(chosen.mask[s].sum()) % multiple == 0 and chosen.mask[s].any() for s in slices)
    assert used >= (0.99 if multiple == 1 else 0.97) * most or used + least_added(cost, chosen.mask, slices,
                                                                                  multiple) > most  # fmt: skip


def test_two_budgets_hold_together_and_one_is_used_up() -> None:
    flops, params, slices = made_up(seed=3, n_groups=20, low=16, high=200, n_terms=60)
    scores = random_scores(flops.n_gates, 2)
    limits = [Limit("flops", flops, flops.dense // 2), Limit("params", params, int(params.dense * 0.45))]
    chosen = select(scores, limits, [Width(s, 1, 10**6) for s in slices])
    used = [limit.cost.exact(chosen.mask) / limit.most for limit in limits]
    assert max(used) <= 1
    assert max(used) > 0.99
    either = [select(scores, [limit], [Width(s, 1, 10**6) for s in slices]).score for limit in limits]
    assert chosen.score <= min(either) * 1.0001
    assert chosen.score > 0.9 * min(either)


def test_the_bound_is_that_of_a_linear_program() -> None:
    cost, _, slices = made_up(seed=5, n_groups=6, low=8, high=20, n_terms=14)
    scores = random_scores(cost.n_gates, 5)
    most = int(cost.dense * 0.4)
    chosen = select(scores, [Limit("flops", cost, most)], [Width(s, 2, 10**6) for s in slices])
    mask = chosen.mask.numpy()
    counts = np.bincount(cost.classes.numpy()[mask], minlength=cost.sizes.numel()).astype(float)
    price = cost.slope(counts)[cost.classes.numpy()]
    room = most - cost.exact(chosen.mask) + price[mask].sum()
    bounds = [(0, 1)] * cost.n_gates
    for s in slices:
        for unit in torch.argsort(-scores[s])[:2].tolist():
            bounds[s.start + unit] = (1, 1)
    solved = linprog(-scores.numpy(), A_ub=price[None], b_ub=[room], bounds=bounds)
    assert chosen.bound == pytest.approx(-solved.fun, rel=1e-6)
    assert 0 <= chosen.gap < 0.05


def test_widths_are_kept() -> None:
    cost, _, slices = made_up(seed=2, n_groups=6, low=20, high=60, n_terms=20)
    scores = random_scores(cost.n_gates, 2)
    widths = [Width(slices[0], 7, 10), Width(slices[1], 5, 31, 8), Width(slices[2], 10**6, 10**6),
              *(Width(s, 1, 10**6, 64) for s in slices[3:])]  # fmt: skip
    size = slices[2].stop - slices[2].start
    widths[2] = Width(slices[2], size, size, 8)
    chosen = select(scores, [Limit("flops", cost, int(cost.dense * 0.6))], widths)
    kept = [int(chosen.mask[s].sum()) for s in slices]
    assert 7 <= kept[0] <= 10
    assert kept[1] in (8, 16, 24)
    assert kept[2] == size
    assert all(1 <= count < 64 for count in kept[3:])  # smaller than the multiple: any number


def test_gates_of_no_group_stay() -> None:
    cost, _, slices = made_up(seed=2, n_groups=6, low=20, high=60, n_terms=20)
    chosen = select(torch.zeros(cost.n_gates), [Limit("flops", cost, cost.dense // 2)],
                    [Width(s, 1, 10**6) for s in slices[1:]])  # fmt: skip
    assert chosen.mask[slices[0]].all()


def test_what_cannot_be_met_is_refused() -> None:
    cost, _, slices = made_up(seed=2, n_groups=6, low=20, high=60, n_terms=20)
    widths = [Width(s, 10, 10**6) for s in slices]
    least = least_cost(cost, widths)
    fits = select(torch.ones(cost.n_gates), [Limit("flops", cost, least)], widths)
    assert cost.exact(fits.mask) == least
    assert all(int(fits.mask[s].sum()) == 10 for s in slices)
    with pytest.raises(BudgetError, match=f"flops is still {least:,}"):
        select(torch.ones(cost.n_gates), [Limit("flops", cost, least - 1)], widths)
    with pytest.raises(BudgetError, match="no width fits"):
        Width(slices[0], 9, 15, 16).allowed()


@pytest.mark.slow
def test_a_thousand_layers() -> None:
    flops, _, slices = made_up(seed=1, n_groups=1000, low=64, high=200, n_terms=2500)
    chosen = select(random_scores(flops.n_gates, 0), [Limit("flops", flops, flops.dense // 2)],
                    [Width(s, 1, 10**6) for s in slices])  # fmt: skip
    assert chosen.gap < 1e-4


def test_an_operator_that_is_fair_by_every_cost_is_found_though_it_is_the_best_by_none() -> None:
    costs = []
    for each in ((13, 9, 0), (0, 9, 13)):
        builder = PolynomialBuilder(3)
        for gate, cost in enumerate(each):
            builder.add(cost, [torch.tensor([gate])])
        costs.append(builder.build())
    limits = [Limit("flops", costs[0], 10), Limit("params", costs[1], 10)]
    widths = [Width(slice(0, 3), 1, 1, one_of=True)]
    check_together(limits, widths)
    assert select(torch.tensor([1.0, 0.5, 1.0]), limits, widths).mask.tolist() == [False, True, False]
    tight = [replace(limit, most=8) for limit in limits]
    with pytest.raises(BudgetError, match="cannot be met together"):
        check_together(tight, widths)
