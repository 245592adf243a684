"""What is measured before a search: against units zeroed by hand, and that nothing is left behind by it."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunegate
from prunegate.budget.damage import marginal_damage, shared_out
from prunegate.budget.limits import make_limits
from prunegate.errors import BudgetError
from prunegate.select import Width
from tests import models

_SHARES = (0.1, 0.2, 0.35, 0.5, 0.7, 0.85)


class Net(nn.Module):
    """Two groups, of 20 and of 12 channels; the first is normed by the batch, and there is dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 20, 3, bias=False)
        self.norm = nn.BatchNorm2d(20)
        self.second = nn.Conv2d(20, 12, 1)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> Tensor:
        hidden = self.norm(self.first(x)).relu()
        hidden = hidden if first is None else hidden * first[:, None, None]
        hidden = self.second(hidden).relu().mean((2, 3))
        return self.last(self.drop(hidden if second is None else hidden * second))


@pytest.fixture
def net() -> Net:
    return models.randomise(Net())


@pytest.fixture
def gated(net: Net) -> prunegate.GatedModel:
    return prunegate.attach(net, torch.randn(1, 3, 6, 6, dtype=torch.float64))


def _inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=generator) for _ in range(2)]


def _widths(gated: prunegate.GatedModel) -> list[Width]:
    return [Width(group.slice, 1, group.size) for group in gated.groups]


def test_damage_is_the_change_of_the_output(net: Net, gated: prunegate.GatedModel) -> None:
    ranks = torch.randn(32, dtype=torch.float64)
    found = marginal_damage(gated, ranks, _widths(gated), _inputs())
    by_hand = copy.deepcopy(net).eval()
    by_hand.norm.train()
    with torch.no_grad():
        wholes = [by_hand(x) for x in _inputs()]
        for group, size, name in zip(gated.groups, (20, 12), ("first", "second"), strict=True):
            order = torch.argsort(ranks[group.slice])
            counts = [0, *(max(1, round(share * size)) for share in _SHARES)]
            lost = [0.0]
            for count in counts[1:]:
                keep = torch.ones(size, dtype=torch.float64)
                keep[order[:count]] = 0
                changes = [
                    float((by_hand(x, **{name: keep}) - whole).square().sum() / (whole - whole.mean(0)).square().sum())
                    for x, whole in zip(_inputs(), wholes, strict=True)
                ]
                lost.append(max(lost[-1], sum(changes) / 2))
            steepest = 0.0
            for (start, stop), (before, after) in zip(pairwise(counts), pairwise(lost), strict=True):
                steepest = max(steepest, (after - before) / (stop - start))
                own = found[group.slice][order[start:stop]]
                np.testing.assert_allclose(own, steepest, rtol=1e-6, atol=1e-8)


def test_a_block_is_worth_what_the_output_loses_with_it() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = nn.Linear(5, 12), nn.Linear(12, 3)
            self.a, self.b = (nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 12)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.a(x)
            x = x + self.b(x)
            return self.last(x)

    net = models.randomise(Residual())
    x = torch.randn(16, 5, dtype=torch.float64)
    gated = prunegate.attach(net, x[:1], units=("channel", "block"))
    widths = [Width(group.slice, int(group.kind != "block"), group.size) for group in gated.groups]
    found = marginal_damage(gated, torch.zeros(gated.logits.numel()).double(), widths, [x])
    blocks = [float(found[group.slice]) for group in gated.groups if group.kind == "block"]
    with torch.no_grad():
        whole, stem = net(x), net.stem(x)
        cuts = [net.last(stem + net.b(stem)), net.last(stem + net.a(stem))]
        expected = [float((cut - whole).square().sum() / (whole - whole.mean(0)).square().sum()) for cut in cuts]
    np.testing.assert_allclose(blocks, expected, rtol=1e-6)


@pytest.mark.parametrize("phase", ["open", "score", "search"])
def test_measuring_leaves_nothing_behind(net: Net, gated: prunegate.GatedModel, phase: str) -> None:
    gated.train()
    gated.model.drop.eval()
    gated.prunegate.phase = phase
    before = copy.deepcopy(gated.state_dict())
    ranks = torch.randn(32, dtype=torch.float64)
    random = torch.get_rng_state()
    marginal_damage(gated, ranks, _widths(gated), _inputs())
    assert gated.prunegate.phase == phase
    assert (gated.training, gated.model.training, gated.model.norm.training, gated.model.drop.training) == (
        True, True, True, False)  # fmt: skip
    assert gated.model.norm.momentum == 0.1
    assert bool(gated.prunegate.fixed_mask.all())
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in gated.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_shares_out_is_the_best_choice_under_the_limit(gated: prunegate.GatedModel) -> None:
    """Of all pairs of widths within the budget, the one whose removed units do least damage, found by trying all."""
    ranks, widths = torch.randn(32, dtype=torch.float64), _widths(gated)
    damage = marginal_damage(gated, ranks, widths, _inputs())
    limits = make_limits({"flops": 0.4}, gated.cost.polynomials, widths)
    moved = shared_out(ranks, damage, limits, widths)

    def lost(first: int, second: int) -> float:
        parts = [damage[own][torch.argsort(ranks[own])] for own in (group.slice for group in gated.groups)]
        return float(parts[0][: 20 - first].sum() + parts[1][: 12 - second].sum())

    def flops(first: int, second: int) -> int:
        mask = torch.zeros(32, dtype=torch.bool)
        for group, kept in zip(gated.groups, (first, second), strict=True):
            mask[group.slice.start : group.slice.start + kept] = True
        return gated.cost.flops(mask)

    best = min(
        (lost(first, second), first, second)
        for first in range(1, 21)
        for second in range(1, 13)
        if flops(first, second) <= limits[0].most
    )
    kept = [int((moved[group.slice] > 0).sum()) for group in gated.groups]
    assert lost(*kept) == pytest.approx(best[0], rel=1e-9)
    assert flops(*kept) <= limits[0].most
    for group in gated.groups:
        shift = moved[group.slice] - ranks[group.slice]
        assert float(shift.std()) < 1e-12


def _searched(net: nn.Module, **more: object) -> prunegate.GatedModel:
    torch.manual_seed(0)
    gated = prunegate.attach(copy.deepcopy(net), torch.randn(1, 16, dtype=torch.float64))
    budget = prunegate.Budget(gated, flops=0.7, steps=20, **more)
    for _ in range(20):
        gated(torch.randn(16, 16, dtype=torch.float64)).square().mean().backward()
        budget.step()
    return gated


class Branches(nn.Module):
    """A sum of two."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def _branches(important: str) -> Branches:
    """Of which one makes nearly all of the output."""
    net = models.randomise(Branches())
    other = {"left": net.right, "right": net.left}[important]
    with torch.no_grad():
        for parameter in other[2].parameters():
            parameter.mul_(0.01)
    return net


@pytest.mark.parametrize("important", ["left", "right"])
def test_a_search_starts_from_the_shares_that_change_the_output_least(important: str) -> None:
    """Of two branches the one that makes the output keeps its units, which scores inside a group cannot say."""
    net = _branches(important)
    calibration = [torch.randn(32, 16, dtype=torch.float64)]
    gated = _searched(net, calibration=calibration)
    kept = {group.name.split(".")[0]: int(gated.mask[group.slice].sum()) for group in gated.groups}
    assert kept[important] >= 38
    assert gated.cost.flops(gated.mask) <= 0.7 * gated.cost.flops()
    plain = _searched(net)
    without = {group.name.split(".")[0]: int(plain.mask[group.slice].sum()) for group in plain.groups}
    assert without[important] < 38


def test_a_one_shot_cut_changes_the_output_less() -> None:
    net, x = _branches("left"), torch.randn(64, 16, dtype=torch.float64)
    changes = []
    for more in ({}, {"calibration": [torch.randn(32, 16, dtype=torch.float64)]}):
        slim = prunegate.one_shot(copy.deepcopy(net), x[:1], flops=0.6, **more)
        with torch.no_grad():
            changes.append(float((slim(x) - net(x)).square().mean()))
        assert (slim.left[0].out_features > 38) is bool(more)
    assert changes[1] < 0.1 * changes[0]


def test_empty_calibration_and_choices_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(BudgetError, match="calibration= has no batches"):
        prunegate.Budget(prunegate.attach(net, torch.randn(1, 4)), flops=0.5, steps=10, calibration=[])
    choice = prunegate.Choice([nn.Linear(4, 4), nn.Identity()], names=["linear", "skip"])
    gated = prunegate.attach(nn.Sequential(choice, nn.Linear(4, 2)), torch.randn(1, 4))
    with pytest.raises(BudgetError, match="choices of operators"):
        prunegate.Budget(gated, flops=0.9, steps=10, calibration=[torch.randn(4, 4)])
