"""One search for several budgets: targets in turn, masks inside one another, any budget cut afterwards."""

from __future__ import annotations

from pathlib import Path

import budgets
import pytest
import torch
from torch import Tensor, nn

import prunegate
from prunegate.budget.nested import Levels
from tests.models import relative_error
from tools import pareto

LEVELS = (0.7, 0.5, 0.3)


class Net(nn.Module):
    """Plain layers, and a choice between two blocks and none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU())
        self.block = prunegate.Choice([nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 24, 1), nn.Identity()])
        self.second = nn.Sequential(nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, H, W] to [N, 4]."""
        return self.head(self.second(self.block(self.first(x))).mean((2, 3)))


def searched(steps: int = 60) -> tuple[prunegate.GatedModel, prunegate.Budget, Tensor, list[float]]:
    """The gated model, its budget, an input, and the share of dense that each step of the search was held to."""
    torch.manual_seed(0)
    x = torch.randn(16, 1, 12, 12)
    gated = prunegate.attach(Net(), x[:1])
    budget = prunegate.Budget(gated, flops=LEVELS, steps=steps)
    optimizer = torch.optim.AdamW(budget.param_groups(1e-3))
    targets = []
    for _ in range(steps):
        if budget.phase == "search":
            assert budget.expected() == pytest.approx(budget.target(), rel=2e-3)
            targets.append(budget.target() / gated.cost.flops())
        (gated(x).square().mean() + budget.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        budget.step()
    return gated, budget, x, targets


def test_steps_take_the_largest_the_smallest_and_one_between_in_turn() -> None:
    targets = searched()[3]
    last = targets[-6:]  # the schedule has come down
    assert max(last) == pytest.approx(0.7, abs=0.02)
    assert min(last) == pytest.approx(0.3, abs=0.02)
    assert any(0.32 < each < 0.68 for each in targets[-12:])


def test_masks_lie_inside_one_another_and_fill_their_budgets() -> None:
    gated, budget, x, _ = searched()
    dense = gated.cost.flops()
    units = torch.ones(gated.logits.numel(), dtype=torch.bool)
    for own in gated.gate_map.choices.values():
        units[own] = False
    outer = torch.ones_like(units)
    for share in (0.7, 0.62, 0.5, 0.4, 0.35, 0.3):
        mask = budget.mask_for(share)
        assert gated.cost.flops(mask) <= int(share * dense)
        assert gated.cost.flops(mask) >= 0.93 * share * dense
        assert not bool((mask & ~outer)[units].any())
        outer = mask
        slim = gated.export(flops=share)
        assert prunegate.count_flops(slim, x[:1]) == gated.cost.flops(mask)
    assert torch.equal(gated.mask, budget.mask_for(0.3))


def test_export_at_a_budget_is_that_of_its_mask_and_leaves_the_mask() -> None:
    gated, budget, x, _ = searched()
    before = gated.mask
    slim = gated.eval().export(flops=0.4)
    assert torch.equal(gated.mask, before)
    gated.mask = budget.mask_for(0.4)
    assert relative_error(gated(x), slim(x)) < 1e-4


def test_absolute_numbers_are_budgets_too() -> None:
    gated, budget, _, _ = searched(steps=20)
    most = int(0.45 * gated.cost.flops())
    assert torch.equal(budget.mask_for(most), budget.mask_for(most / gated.cost.flops()))


def test_weights_settle_on_every_mask() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 1, 12, 12)
    gated = prunegate.attach(Net(), x[:1])
    budget = prunegate.Budget(gated, flops=LEVELS, steps=30)
    seen = set()
    for _ in range(30):
        (gated(x).square().mean() + budget.loss()).backward()
        budget.step()
        if budget.phase == "fixed" and not budget.finished:
            seen.add(gated.cost.flops(gated.mask))
    assert seen == {gated.cost.flops(budget.mask_for(share)) for share in LEVELS}


def test_resumed_search_goes_on_as_if_it_had_not_stopped() -> None:
    def start() -> tuple[prunegate.GatedModel, prunegate.Budget]:
        torch.manual_seed(0)
        gated = prunegate.attach(Net(), torch.zeros(1, 1, 12, 12))
        return gated, prunegate.Budget(gated, flops=LEVELS, steps=20)

    x = torch.randn(8, 1, 12, 12)

    def go(gated: prunegate.GatedModel, budget: prunegate.Budget, count: int) -> None:
        for _ in range(count):
            gated(x).square().mean().backward()
            budget.step()

    for stop in (9, 18):
        gated, budget = start()
        go(gated, budget, stop)
        state, weights = budget.state_dict(), {k: v.clone() for k, v in gated.state_dict().items()}
        other, resumed = start()
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
        for one, each in ((gated, budget), (other, resumed)):
            torch.manual_seed(1)
            go(one, each, 20 - stop)
        for share in (0.7, 0.4, 0.3):
            assert torch.equal(budget.mask_for(share), resumed.mask_for(share))


def test_every_rank_has_the_same_budget_in_a_step() -> None:
    budget = searched(steps=20)[1]
    levels = budget._levels
    assert isinstance(levels, Levels)
    state = torch.get_rng_state()
    first = [levels.most(step) for step in range(12)]
    torch.manual_seed(99)
    assert first == [levels.most(step) for step in range(12)]
    assert len(set(first)) > 4
    torch.set_rng_state(state)


def test_wrong_use_is_refused() -> None:
    gated, budget, _, _ = searched(steps=20)
    with pytest.raises(prunegate.BudgetError, match="was made for"):
        budget.mask_for(0.9)
    with pytest.raises(prunegate.BudgetError, match="was made for"):
        gated.export(flops=0.1)
    fresh = prunegate.attach(Net(), torch.zeros(1, 1, 12, 12))
    with pytest.raises(prunegate.ExportError, match="before any search"):
        fresh.export(flops=0.5)
    for wrong in ([0.5], [0.5, 0.5], [0.5, "a"], []):
        with pytest.raises(prunegate.BudgetError, match="two or more different"):
            prunegate.Budget(fresh, flops=wrong, steps=10)
    with pytest.raises(prunegate.BudgetError, match="stands alone"):
        prunegate.Budget(fresh, flops=[0.5, 0.3], params=0.5, steps=10)
    with pytest.raises(prunegate.BudgetError, match="out of reach"):
        prunegate.Budget(fresh, flops=[0.5, 0.0001], steps=10)
    early = prunegate.Budget(fresh, flops=[0.5, 0.3], steps=10)
    with pytest.raises(prunegate.BudgetError, match="not chosen yet"):
        early.mask_for(0.4)
    single = prunegate.Budget(prunegate.attach(Net(), torch.zeros(1, 1, 12, 12)), flops=0.5, steps=10)
    with pytest.raises(prunegate.BudgetError, match="made for one budget"):
        single.mask_for(0.5)


def test_recipe_compares_with_a_search_for_each_budget_and_the_front_is_drawn(tmp_path: Path) -> None:
    results = budgets.main(["--flops", "0.5", "0.3", "--between", "0.4", "--dense-steps", "4", "--steps", "10",
                            "--seeds", "0", "--output", str(tmp_path)])  # fmt: skip
    ways = [(each["method"], each["share"]) for each in results]
    assert ways == [("dense", 1.0), *(("one search for all", share) for share in (0.5, 0.4, 0.3)),
                    ("a search for each", 0.5), ("a search for each", 0.3)]  # fmt: skip
    dense = results[0]["flops"]
    assert all(each["flops"] <= each["share"] * dense for each in results)
    picture = tmp_path / "pareto.png"
    assert pareto.main([str(tmp_path / "budgets.json"), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_front_keeps_what_no_other_point_beats() -> None:
    points = [(3.0, 60.0), (1.0, 50.0), (2.0, 40.0), (1.0, 45.0), (4.0, 60.0)]
    assert pareto.front(points) == [(1.0, 50.0), (3.0, 60.0)]


def test_front_of_files_that_are_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("not json", "{}", '[{"method": "a", "top1": 1}]', "[]"):
        (tmp_path / "x.json").write_text(text)
        assert pareto.main([str(tmp_path / "x.json"), "--out", str(tmp_path / "p.png")]) == 2
        assert "pareto:" in capsys.readouterr().err
