"""The promise of a budget: held during the search, met at the end, with any optimizer, across resumes and ranks."""

from __future__ import annotations

import copy
import itertools
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing
from scipy.optimize import brentq
from torch import Tensor, nn

import prunegate
from prunegate import Budget, BudgetError, GatedModel
from prunegate.budget.learner import Learner, initial_ranks, magnitudes
from prunegate.budget.projection import project
from prunegate.budget.schedule import Schedule
from prunegate.polynomial import PolynomialBuilder
from prunegate.select import Width

NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "mobilenetv2_100": {},
    "vit_tiny_patch16_224": {"img_size": 64},
    "convnext_atto": {},
}
SIZE = 64


@lru_cache
def network(name: str) -> GatedModel:
    torch.manual_seed(0)
    return prunegate.attach(timm.create_model(name, num_classes=10, **NETWORKS[name]), torch.randn(1, 3, SIZE, SIZE))


def fresh(name: str) -> GatedModel:
    gated = network(name)
    with torch.no_grad():
        gated.logits.zero_()
    return gated


def randomise(gated: GatedModel, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gated.logits.copy_((2 * torch.rand(gated.logits.numel(), generator=generator) - 1) * spread)


def mlp(seed: int = 0) -> GatedModel:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 4))
    return prunegate.attach(net, torch.randn(1, 32))


def give_gradient(gated: GatedModel, gradient: Tensor) -> None:
    """A backward pass that leaves ``gradient`` in the logits."""
    (gated.logits * gradient.to(gated.logits)).sum().backward()


def live_widths(gated: GatedModel) -> list[tuple[int, int]]:
    """(width, live width) of every parameter dimension that is gated as a whole."""
    mask = gated.mask
    return [
        (index.numel(), int(mask[index].sum())) for index in gated.gate_map.dims.values() if bool((index >= 0).all())
    ]


# ---------------------------------------------------------------------- the final choice


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.3, 0.15, 0.08])
@pytest.mark.parametrize("round_to", [1, 8])
def test_the_budget_is_met_from_any_logits(name: str, share: float, round_to: int) -> None:
    gated = fresh(name)
    randomise(gated, 6, seed=int(share * 100))
    budget = Budget(gated, flops=share, steps=100, round_to=round_to)
    budget.finish()
    used, most = gated.cost.flops(gated.mask), share * gated.cost.flops()
    assert used <= most
    enough = 0.99 if round_to == 1 else 0.97
    if used < enough * most:
        assert "one step more of any group would exceed" in budget.report()
        # The granularity is to blame: even the cheapest group's next step does not fit.
        assert budget.selection is not None
        assert budget.selection.full
    assert all(live % round_to == 0 and live > 0 for width, live in live_widths(gated) if width >= round_to)


def test_two_budgets_hold_at_once() -> None:
    gated = fresh("mobilenetv2_100")
    randomise(gated, 6, seed=1)
    Budget(gated, flops=0.5, params=0.4, steps=50).finish()
    shares = [gated.cost.flops(gated.mask) / gated.cost.flops(), gated.cost.params(gated.mask) / gated.cost.params()]
    assert shares[0] <= 0.5
    assert shares[1] <= 0.4
    assert shares[0] > 0.495 or shares[1] > 0.396


def test_the_report_says_what_binds() -> None:
    gated = fresh("mobilenetv2_100")
    randomise(gated, 6, seed=1)
    budget = Budget(gated, flops=0.3, params=0.9, steps=50)
    budget.finish()
    flops, params, score = budget.report().splitlines()
    most = math.floor(0.3 * gated.cost.flops())
    assert flops.startswith(f"flops: {gated.cost.flops(gated.mask):,} of {most:,} (")
    assert "exceed" not in flops
    assert params.endswith("another budget binds")
    assert "bound" in score


def test_absolute_budgets_are_counted_on_the_exported_model() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    gated = prunegate.attach(timm.create_model("resnet18", num_classes=10), x)
    Budget(gated, flops=1.5e7, steps=10).finish()
    counted = prunegate.count_flops(gated.export(), x)
    assert 0.99 * 1.5e7 <= counted <= 1.5e7


def test_units_that_the_search_had_open_stay() -> None:
    gated = fresh("resnet18")
    randomise(gated, 6, seed=3)
    budget = Budget(gated, flops=0.4, steps=50, noise=0.05)
    budget.finish()
    logits = gated.logits.detach()
    sure = logits.abs() > 0.5
    agree = (gated.mask == (logits > 0))[sure].float().mean()
    assert float(agree) > 0.99


def test_heads_count_by_their_width_when_rounding() -> None:
    gated = fresh("vit_tiny_patch16_224")
    randomise(gated, 6, seed=3)
    Budget(gated, flops=0.5, steps=50, round_to=64).finish()
    kept = {g.kind: set() for g in gated.groups}
    for group in gated.groups:
        kept[group.kind].add(int(gated.mask[group.slice].sum()))
    assert kept["head"] <= {1, 2, 3}  # 64 channels each, so any number is a multiple
    assert all(count % 64 == 0 for count in kept["channel"])


@pytest.mark.parametrize(("capability", "width"), [("AVX512", 16), ("AVX2", 8), ("DEFAULT", 8)])
def test_the_devices_own_width(capability: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    gated = mlp()
    Budget(gated, params=0.6, steps=10, round_to="auto").finish()
    kept = [int(gated.mask[group.slice].sum()) for group in gated.groups]
    assert all(count % width == 0 for count in kept)
    assert math.gcd(*kept) == width


@pytest.mark.parametrize(("capability", "steps"), [("AVX512", [16, 16, 32, 64, 64]), ("AVX2", [8, 16, 32, 64, 64])])
def test_the_devices_own_width_grows_with_the_layer(
    capability: str, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    sizes = [64, 128, 256, 512, 1024]
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in zip([3, *sizes], sizes, strict=False)]
    gated = prunegate.attach(nn.Sequential(*layers, nn.Linear(sizes[-1], 2)), torch.randn(1, 3))
    torch.manual_seed(0)
    seen = dict.fromkeys(sizes, 0)
    for share in (0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7):
        gated.logits.data.normal_(0, 3)
        Budget(gated, params=share, steps=10, round_to="auto").finish()
        for group in gated.groups:
            seen[group.size] = math.gcd(seen[group.size], int(gated.mask[group.slice].sum()))
    assert [seen[size] for size in sizes] == steps


def test_a_scaled_loss_with_overflows_moves_the_logits_as_without() -> None:
    found = []
    for scale in (1.0, 2.0**16):
        gated = mlp()
        budget = Budget(gated, params=0.5, steps=40)
        generator = torch.Generator().manual_seed(0)
        for i in range(20):
            gradient = scale * torch.randn(gated.logits.numel(), generator=generator)
            give_gradient(gated, gradient * (math.inf if i == 9 else 1))
            budget.step()
        found.append(gated.logits.detach().clone())
    torch.testing.assert_close(*found)


def test_widths_by_pattern() -> None:
    gated = mlp()
    first, second = gated.groups
    budget = Budget(gated, params=0.6, steps=10, round_to={first.name: 8}, max_keep={second.name: 0.5},
                    min_keep={second.name: 15})  # fmt: skip
    budget.finish()
    assert int(gated.mask[first.slice].sum()) % 8 == 0
    assert 15 <= int(gated.mask[second.slice].sum()) <= 20


def test_ignored_groups_are_open_in_every_draw_and_at_the_end() -> None:
    gated = mlp()
    first, second = gated.groups
    budget = Budget(gated, params=0.6, steps=20, ignore=(second.name,))
    gated.train()
    for _ in range(19):
        gated(torch.randn(4, 32)).square().mean().backward()
        budget.step()
    assert float(gated.prunegate.probabilities().detach()[second.slice].min()) > 0.999
    budget.step()
    assert gated.mask[second.slice].all()
    assert not gated.mask[first.slice].all()


def test_gradients_of_ignored_groups_do_not_slow_the_others() -> None:
    found = []
    for size in (0.0, 1e6):
        gated = mlp()
        first, second = gated.groups
        budget = Budget(gated, params=0.6, steps=40, ignore=(second.name,))
        gradient = torch.linspace(-1, 1, gated.logits.numel())
        gradient[second.slice] = size
        for _ in range(20):
            give_gradient(gated, gradient)
            budget.step()
        found.append(gated.logits.detach()[first.slice].clone())
    torch.testing.assert_close(*found)


# ---------------------------------------------------------------------- the search


@lru_cache
def at_full_size(name: str) -> GatedModel:
    torch.manual_seed(0)
    return prunegate.attach(timm.create_model(name))


def anywhere(gated: GatedModel, start: str) -> None:
    """Logits in [-6, 6]: at random, at an end, or each group somewhere else."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(gated.logits.numel())
    if start == "random":
        logits = 12 * torch.rand(logits.numel(), generator=generator) - 6
    elif start == "by group":
        for group in gated.groups:
            center = 12 * torch.rand((), generator=generator) - 6
            logits[group.slice] = (center + torch.randn(group.size, generator=generator)).clamp(-6, 6)
    elif start != "scored":
        logits += float(start)
    with torch.no_grad():
        gated.logits.copy_(logits)


@pytest.mark.parametrize("name", ["resnet50", "mobilenetv2_100", "deit_tiny_patch16_224", "convnext_atto"])
@pytest.mark.parametrize("start", ["scored", "random", "by group", "-6", "6"])
def test_the_expected_cost_stays_on_its_schedule_under_wild_gradients(name: str, start: str) -> None:
    gated = at_full_size(name)
    gated.mask = None
    anywhere(gated, start)
    steps = 60
    budget = Budget(gated, flops=0.3, steps=steps)
    generator = torch.Generator().manual_seed(0)
    dense, scoring = gated.cost.flops(), 6 if start == "scored" else 0
    moving = scoring + math.ceil(0.8 * (steps - scoring))
    for done in range(1, steps + 1):
        size = 10.0 ** float(torch.randint(-6, 7, (1,), generator=generator))
        give_gradient(gated, size * torch.randn(gated.logits.numel(), generator=generator))
        budget.step()
        if done >= steps // 10:
            u = min(1.0, (done - scoring) / (moving - scoring))
            schedule = dense * (0.3 + 0.7 * (1 - u) ** 3)
            assert budget.target("flops") == pytest.approx(schedule)
            assert budget.expected("flops") == pytest.approx(schedule, rel=0.03)
            if budget.phase == "search":
                assert float(gated.cost.expected_flops().detach()) == pytest.approx(schedule, rel=0.03)
    assert budget.finished
    assert gated.cost.flops(gated.mask) <= 0.3 * dense


def test_the_tightest_of_two_budgets_is_on_target() -> None:
    gated = mlp()
    budget = Budget(gated, flops=0.5, params=0.3, steps=40)
    for _ in range(20):
        budget.step()
        if budget.phase == "search":
            ratios = [budget.expected(name) / budget.target(name) for name in ("flops", "params")]
            assert max(ratios) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.05),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    ],
)
@pytest.mark.parametrize("zero_first", [True, False])
def test_the_users_optimizer_never_touches_the_logits(make: Any, zero_first: bool) -> None:
    gated = mlp()
    gated.train()
    optimizer = make(gated.parameters())
    budget = Budget(gated, params=0.5, steps=30)
    weight = dict(gated.named_parameters())["0.weight"].detach().clone()
    seen = []
    for _ in range(30):
        if zero_first:
            optimizer.zero_grad()
        loss = gated(torch.randn(16, 32)).square().mean() + budget.loss()
        loss.backward()
        before = gated.logits.detach().clone()
        assert gated.logits.grad is None
        optimizer.step()
        if not zero_first:
            optimizer.zero_grad()
        assert torch.equal(gated.logits.detach(), before)
        budget.step()
        seen.append(gated.logits.detach().clone())
    assert not torch.equal(seen[10], seen[15])
    assert not torch.equal(weight, dict(gated.named_parameters())["0.weight"])
    assert gated.cost.params(gated.mask) <= 0.5 * gated.cost.params()


def test_the_parts_of_a_search() -> None:
    gated = mlp()
    budget = Budget(gated, params=0.5, steps=50, tau=(2.0, 1.0), noise=(0.3, 0.0))
    gated.train()
    phases, noises = [], []
    for _ in range(50):
        phases.append(budget.phase)
        noises.append(budget.noise)
        gated(torch.randn(16, 32)).square().mean().backward()
        budget.step()
    assert phases == ["score"] * 5 + ["search"] * 36 + ["fixed"] * 9
    assert noises[5] == pytest.approx(0.3)
    assert noises[41] == pytest.approx(0.0)
    assert all(a >= b for a, b in itertools.pairwise(noises))
    assert budget.tau == pytest.approx(1.0)
    assert budget.finished


def test_the_mask_of_the_last_fifth_is_the_final_one() -> None:
    gated = mlp()
    budget = Budget(gated, params=0.5, steps=50)
    masks = []
    for _ in range(50):
        budget.step()
        masks.append(gated.mask)
    assert all(torch.equal(mask, masks[-1]) for mask in masks[41:])
    halfway = gated.cost.params(masks[20])
    assert gated.cost.params(masks[-1]) < halfway < gated.cost.params()


def test_scores_come_from_open_gates() -> None:
    gated = mlp()
    x = torch.randn(4, 32)
    gated.train()
    with torch.no_grad():
        dense = gated(x)
    Budget(gated, params=0.5, steps=100)
    torch.testing.assert_close(gated(x), dense)


def test_the_gradient_decides_which_layer_keeps_more() -> None:
    kept = []
    for favoured in (0, 1):
        gated = mlp()
        budget = Budget(gated, params=0.4, steps=200)
        push = torch.zeros(gated.logits.numel())
        push[gated.groups[favoured].slice] = -1.0  # opening these would lower the loss
        for _ in range(200):
            give_gradient(gated, push)
            budget.step()
        kept.append([int(gated.mask[group.slice].sum()) for group in gated.groups])
    assert kept[0][0] > kept[1][0] + 10
    assert kept[0][1] < kept[1][1] - 10


@pytest.mark.parametrize(("share", "decides"), [(0.97, False), (0.4, True)])
def test_a_measured_start_is_left_only_as_units_go(share: float, decides: bool) -> None:
    """What open gates say of groups is noise; under a mild budget nearly all are open."""
    kept = []
    for favoured in (0, 1):
        gated = mlp()
        calibration = [torch.randn(16, 32, generator=torch.Generator().manual_seed(7))]
        budget = Budget(gated, params=share, steps=200, calibration=calibration)
        push = torch.zeros(gated.logits.numel())
        push[gated.groups[favoured].slice] = -1.0
        for _ in range(200):
            give_gradient(gated, push)
            budget.step()
        kept.append([int(gated.mask[group.slice].sum()) for group in gated.groups])
    assert (kept[0][0] > kept[1][0] + 10) is decides
    assert decides or kept[0] == kept[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_broken_gradient_is_skipped(bad: float) -> None:
    runs = []
    for broken in (True, False):
        gated = mlp()
        budget = Budget(gated, params=0.5, steps=40)
        generator = torch.Generator().manual_seed(0)
        for i in range(20):
            gradient = torch.randn(gated.logits.numel(), generator=generator)
            if i in (2, 10):
                if broken:
                    gradient[3] = bad
                else:
                    budget.step()
                    continue
            give_gradient(gated, gradient)
            budget.step()
        runs.append(gated.logits.detach().clone())
    assert runs[0].isfinite().all()
    assert torch.equal(*runs)


def test_logits_that_the_user_set_are_kept() -> None:
    gated = mlp()
    randomise(gated, 3, seed=0)
    given = gated.logits.detach().clone()
    budget = Budget(gated, params=0.5, steps=40)
    assert budget.phase == "search"
    moved = gated.logits.detach() - given
    torch.testing.assert_close(moved, moved[:1].expand_as(moved))
    for _ in range(5):
        budget.step()
    with torch.no_grad():
        gated.logits.copy_(-given)
    budget.step()
    assert float(torch.corrcoef(torch.stack([gated.logits.detach(), -given]))[0, 1]) > 0.999


# ---------------------------------------------------------------------- its end


def test_finish_may_come_at_any_time_and_only_a_later_step_is_an_error() -> None:
    for done in (0, 1, 10, 37, 45):
        gated = mlp()
        budget = Budget(gated, params=0.5, steps=50)
        for _ in range(done):
            budget.step()
        budget.finish()
        mask, logits = gated.mask, gated.logits.detach().clone()
        assert 0.97 * 0.5 * gated.cost.params() < gated.cost.params(mask) <= 0.5 * gated.cost.params()
        budget.finish()
        assert torch.equal(gated.mask, mask)
        assert torch.equal(gated.logits.detach(), logits)
        assert not budget.loss().requires_grad
        with pytest.raises(BudgetError, match="after the search of 50 steps had ended"):
            budget.step()


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 11])
def test_short_searches_end_on_budget(steps: int) -> None:
    gated = mlp()
    budget = Budget(gated, params=0.5, steps=steps)
    gated.train()
    for _ in range(steps):
        gated(torch.randn(4, 32)).square().mean().backward()
        budget.step()
    assert budget.finished
    assert gated.cost.params(gated.mask) <= 0.5 * gated.cost.params()


@pytest.mark.parametrize("calibration", [None, [torch.randn(16, 32, generator=torch.Generator().manual_seed(7))]])
@pytest.mark.parametrize("stop", [3, 12, 39])
def test_a_resumed_search_is_the_uninterrupted_one(stop: int, calibration: Any, tmp_path: Path) -> None:
    def run(gated: GatedModel, budget: Budget, first: int, last: int) -> None:
        for i in range(first, last):
            give_gradient(gated, torch.randn(gated.logits.numel(), generator=torch.Generator().manual_seed(i)))
            budget.step()

    whole = mlp()
    run(whole, Budget(whole, params=0.5, steps=45, calibration=calibration), 0, 45)

    begun = mlp()
    budget = Budget(begun, params=0.5, steps=45, calibration=calibration)
    run(begun, budget, 0, stop)
    torch.save({"model": begun.state_dict(), "budget": budget.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = mlp(seed=1)
    resumed.load_state_dict(saved["model"])
    budget = Budget(resumed, params=0.5, steps=45, calibration=calibration)
    budget.load_state_dict(saved["budget"])
    assert budget.step_count == stop
    run(resumed, budget, stop, 45)
    assert torch.equal(resumed.mask, whole.mask)
    assert torch.equal(resumed.logits, whole.logits)


def test_states_of_other_searches_are_refused() -> None:
    gated = mlp()
    state = Budget(gated, params=0.5, steps=40).state_dict()
    with pytest.raises(BudgetError, match="steps 40, this budget has 41"):
        Budget(gated, params=0.5, steps=41).load_state_dict(state)
    with pytest.raises(BudgetError, match="calibration False, this budget has True"):
        Budget(gated, params=0.5, steps=40, calibration=[torch.randn(4, 32)]).load_state_dict(state)
    with pytest.raises(BudgetError, match="not a state"):
        Budget(gated, params=0.5, steps=40).load_state_dict({})


# ---------------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no budget was given"),
        ({"flops": 0}, "reachable is"),
        ({"flops": -0.5}, "reachable is"),
        ({"flops": math.nan}, "reachable is"),
        ({"flops": 1.5}, "reachable is"),
        ({"flops": 999}, "reachable is"),
        ({"flops": True}, "reachable is"),
        ({"flops": "half"}, "reachable is"),
        ({"flops": 1e12}, "out of reach"),
        ({"flops": 1e-4}, r"out of reach: that is .* reachable is"),
        ({"flops": 0.5, "params": 1e-4}, "params=0.0001 is out of reach"),
        ({"flops": 0.5, "min_keep": 0.9}, "out of reach"),
        ({"flops": 0.5, "min_keep": 0}, "min_keep=0 was given"),
        ({"flops": 0.5, "min_keep": 1.5}, "min_keep=1.5 was given"),
        ({"flops": 0.5, "min_keep": 20, "max_keep": 10}, "above max_keep"),
        ({"flops": 0.5, "max_keep": 5, "round_to": 8}, "no width fits"),
        ({"flops": 0.5, "round_to": 0}, "round_to=0 was given"),
        ({"flops": 0.5, "round_to": {"nothing*": 8}}, "matches no group"),
        ({"flops": 0.5, "ignore": ["nothing*"]}, "matches no group"),
        ({"flops": 0.5, "steps": 0}, "steps=0 was given"),
        ({"flops": 0.5, "steps": 2.5}, "steps=2.5 was given"),
        ({"flops": 0.5, "tau": 0.0}, "tau=0.0 was given"),
        ({"flops": 0.5, "noise": (0.3, -1)}, "noise="),
        ({"flops": 0.5, "noise": (0.3, 0.2, 0.1)}, "noise="),
    ],
)
def test_bad_budgets_are_refused_and_change_nothing(arguments: dict[str, Any], message: str) -> None:
    gated = mlp()
    with pytest.raises(BudgetError, match=message):
        Budget(gated, **{"steps": 10, **arguments})
    assert gated.prunegate.phase == "open"
    assert not gated.logits.any()


class Opposed(nn.Module):
    """A choice between an operator with many FLOPs and one with many parameters."""

    def __init__(self) -> None:
        super().__init__()
        at_every_pixel = nn.Sequential(nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        at_none = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
        self.choice = prunegate.Choice([at_every_pixel, at_none])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 8, 16, 16] to [N, 3]."""
        return self.head(self.choice(x))


def test_budgets_that_exclude_one_another_say_what_each_can_reach() -> None:
    torch.manual_seed(0)
    gated = prunegate.attach(Opposed(), torch.randn(1, 8, 16, 16))
    costs = []
    for operator in ("0", "1"):
        gated.choose({"choice": operator})
        costs.append((gated.cost.flops(gated.mask), gated.cost.params(gated.mask)))
        gated.mask = None
    (many, few_params), (few, many_params) = costs
    assert few < 5000 < many
    assert few_params < many_params
    # All units stay: only the operators are left to choose.
    whole = {"steps": 10, "min_keep": 1.0}
    Budget(gated, flops=5000, **whole)
    Budget(gated, params=few_params / gated.cost.params(), **whole)
    with pytest.raises(BudgetError, match="cannot be met together") as caught:
        Budget(gated, flops=5000, params=few_params / gated.cost.params(), **whole)
    flops, params = str(caught.value).split("together. ")[1].split("; ")
    assert flops == (
        f"flops: 5,000 was asked for, reachable is {few:,} to {many:,} alone, and beside the other budgets "
        f"{many:,} or more"
    )
    assert params.startswith(
        f"params: {few_params:,} was asked for, reachable is {few_params:,} to {many_params:,} alone, and beside the "
        f"other budgets {many_params:,} or more. Raise one of them"
    )


def test_the_reachable_range_can_be_asked_for() -> None:
    gated = mlp()
    with pytest.raises(BudgetError) as caught:
        Budget(gated, params=1e-9, steps=10)
    least = float(str(caught.value).split("a share of ")[1].split(" ")[0])
    Budget(gated, params=least, steps=10).finish()
    assert [int(gated.mask[group.slice].sum()) for group in gated.groups] == [1, 1]


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"expected the gated model that prunegate\.attach returned"):
        Budget(nn.Linear(3, 3), flops=0.5, steps=10)


def test_param_groups_hold_every_weight_once_and_no_logits() -> None:
    gated = mlp()
    budget = Budget(gated, params=0.5, steps=10)
    for decay in (None, 0.05):
        groups = budget.param_groups(1e-3, decay)
        listed = [p for group in groups for p in group["params"]]
        weights = [p for name, p in gated.named_parameters() if name != "prunegate.logits"]
        assert {id(p) for p in listed} == {id(p) for p in weights}
        assert len(listed) == len(weights)
        assert all(p.ndim > 1 for p in groups[0]["params"])
        assert groups[0].get("weight_decay") == decay
        assert groups[1]["weight_decay"] == 0
        torch.optim.AdamW(groups)


# ---------------------------------------------------------------------- its parts


def test_initial_logits_standardise_logs_inside_groups() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.lognormal(0, 2, 12), generator.lognormal(3, 1, 12)
    widths = [Width(slice(0, 5), 1, 5), Width(slice(5, 12), 1, 7)]
    expected = np.zeros(12)
    for s in (slice(0, 5), slice(5, 12)):
        for score in (a, b):
            logs = np.log(score[s])
            expected[s] += (logs - logs.mean()) / logs.std()
    expected /= expected.std()
    found = initial_ranks([torch.from_numpy(a), torch.from_numpy(b)], widths)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    alike = initial_ranks([torch.ones(12, dtype=torch.float64)], widths)
    assert not alike.any()


def test_magnitudes_sum_what_a_unit_makes_and_what_it_feeds() -> None:
    gated = mlp()
    weights = dict(gated.named_parameters())
    found = magnitudes(gated.logits.numel(), gated.gate_map.dims, weights.items())
    first, second = gated.groups
    made = weights["0.weight"].detach().double().pow(2).sum(1)
    fed = weights["2.weight"].detach().double().pow(2).sum(0)
    torch.testing.assert_close(found[first.slice], made + fed)
    made = weights["2.weight"].detach().double().pow(2).sum(1)
    fed = weights["4.weight"].detach().double().pow(2).sum(0)
    torch.testing.assert_close(found[second.slice], made + fed)


def test_gradients_are_per_cost_and_groups_outweigh_units() -> None:
    widths = [Width(slice(0, 2), 1, 2), Width(slice(2, 5), 1, 3)]
    learner = Learner(widths, 5)
    gradient = torch.tensor([1.0, 3.0, 2.0, 2.0, -1.0], dtype=torch.float64)
    price = torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    per_cost = gradient / (price / price.mean())
    expected = torch.cat([3 * g.mean() + 0.3 * (g - g.mean()) for g in (per_cost[:2], per_cost[2:])])
    torch.testing.assert_close(learner.shape(gradient, price), expected)


def test_the_pace_of_logits_does_not_depend_on_the_size_of_gradients() -> None:
    results = []
    for size in (1e-8, 1.0, 1e8):
        learner = Learner([Width(slice(0, 6), 1, 6)], 6)
        ranks = torch.zeros(6, dtype=torch.float64)
        for i in range(50):
            generator = torch.Generator().manual_seed(i)
            gradient = size * torch.randn(6, dtype=torch.float64, generator=generator)
            moved = learner.step(ranks, gradient, torch.ones(6, dtype=torch.float64))
            assert float((moved - ranks).abs().max()) < 0.3
            ranks = moved
        results.append(ranks)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[1], results[2])
    assert 0.05 < float(results[0].std()) < 3


@pytest.mark.parametrize("noise", [1.0, 0.3, 0.02])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_the_shift_is_the_root_of_the_expected_cost(noise: float, share: float) -> None:
    builder = PolynomialBuilder(40)
    builder.add(5, [torch.arange(20), torch.arange(20, 40)])
    builder.add(2, [torch.arange(20), torch.arange(20)])
    cost = builder.build()
    ranks = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    widths = [Width(slice(0, 20), 0, 20), Width(slice(20, 40), 0, 20)]
    found = project(ranks, [(cost, share * cost.dense)], noise, widths, start=5.0)
    root = brentq(lambda b: float(cost.expected(torch.sigmoid((ranks - b) / noise))) - share * cost.dense, -50, 50)
    assert found.shift == pytest.approx(root, abs=1e-3)
    assert float(cost.expected(torch.sigmoid(found.logits / noise))) == pytest.approx(share * cost.dense, rel=1e-4)


def test_a_group_that_would_vanish_keeps_its_best_units_open() -> None:
    builder = PolynomialBuilder(40)
    builder.add(5, [torch.arange(20), torch.arange(20, 40)])
    cost = builder.build()
    ranks = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ranks[20:] -= 10
    widths = [Width(slice(0, 20), 1, 6), Width(slice(20, 40), 3, 20)]
    found = project(ranks, [(cost, 0.1 * cost.dense)], 0.1, widths)
    p = torch.sigmoid(found.logits / 0.1)
    best = torch.topk(ranks[20:], 3).indices
    assert float(p[20:][best].min()) > 0.98
    assert int((p[:20] > 0.02).sum()) <= 6
    assert torch.equal(found.logits[20:].argsort(), ranks[20:].argsort())


@pytest.mark.parametrize("steps", [1, 7, 50, 400])
def test_schedules_are_complete(steps: int) -> None:
    schedule = Schedule.of(steps, score=True)
    assert schedule.scoring == min(20, steps // 10)
    assert schedule.scoring < schedule.moving <= steps
    assert schedule.target(schedule.scoring, 100, 30) == 100
    assert schedule.target(schedule.moving, 100, 30) == schedule.target(steps, 100, 30) == 30


# ---------------------------------------------------------------------- several ranks


def _train_replicas(rank: int, folder: str) -> None:
    gated = mlp(seed=rank)
    budget = Budget(gated, params=0.5, steps=20)
    replicas = nn.parallel.DistributedDataParallel(gated)
    optimizer = torch.optim.AdamW(replicas.parameters(), lr=1e-2)
    replicas.train()
    torch.manual_seed(rank)
    for _ in range(20):
        loss = replicas(torch.randn(8, 32)).square().mean() + budget.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        budget.step()
    torch.save({"mask": gated.mask, **gated.state_dict()}, f"{folder}/replica{rank}.pt")


def _rank(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    gated = mlp(seed=rank)
    budget = Budget(gated, params=0.5, steps=30)
    for i in range(24):
        generator = torch.Generator().manual_seed(100 * rank + i)
        if not (rank == 1 and i == 7):  # a rank without a gradient takes part
            give_gradient(gated, torch.randn(gated.logits.numel(), generator=generator))
        budget.step()
    torch.save(gated.logits.detach(), f"{folder}/{rank}.pt")
    _train_replicas(rank, folder)
    torch.distributed.destroy_process_group()


def test_ranks_move_together_by_the_mean_gradient(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(*found)
    replicas = [torch.load(tmp_path / f"replica{rank}.pt") for rank in range(2)]
    assert all(torch.equal(value, replicas[1][key]) for key, value in replicas[0].items())
    alone = mlp(seed=0)
    budget = Budget(alone, params=0.5, steps=30)
    for i in range(24):
        gradients = [torch.randn(alone.logits.numel(), generator=torch.Generator().manual_seed(100 * rank + i))
                     for rank in range(2)]  # fmt: skip
        if i == 7:
            gradients[1].zero_()
        give_gradient(alone, (gradients[0] + gradients[1]) / 2)
        budget.step()
    torch.testing.assert_close(found[0], alone.logits.detach())


def test_a_copy_of_the_model_for_averaging_follows_the_search() -> None:
    gated = mlp()
    Budget(gated, params=0.5, steps=20).finish()
    duplicate = copy.deepcopy(gated)
    assert torch.equal(duplicate.mask, gated.mask)
