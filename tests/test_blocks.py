"""Branches that may vanish: which are found, masked equals slim, exact costs, plans, nested masks and budgets."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import prunegate
from prunegate.errors import MaskError
from prunegate.gated import GatedModel
from prunegate.groups import GateMap
from prunegate.labels.trace import call_model
from prunegate.plan import Plan
from prunegate.slim.apply import plan_of
from tests.models import build, random_mask, randomise, relative_error

UNITS = ("channel", "head", "block")
EXACT = 1e-8


class Residual(nn.Module):
    """Branches in every form that the source of a sum takes, one inside another, and some that are no branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.nested = Nested()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 6)
        self.c, self.act = nn.Linear(6, 6), nn.ReLU(inplace=True)
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 8)
        self.wide = nn.Linear(8, 6)
        self.used, self.shared = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.nested(self.stem(x))
        x = x + self.b(torch.relu(self.a(x)))  # an expression
        shortcut = x
        x = self.c(x)
        x += shortcut  # a statement, written into afterwards
        x = self.act(x)
        x = self.wide(torch.add(self.left(x), self.right(x)))  # a projection: the first of two alike
        y = self.used(x)
        x = x + y
        x = x * y  # the branch is used elsewhere
        for _ in range(2):
            x = x + self.shared(x)  # one line, two sums
        return self.head(x)


class Nested(nn.Module):
    """Nothing but a branch and a sum; in the branch there is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 6)
        self.inner = nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y + self.inner(y)) + x


def attach(model: nn.Module, example: Any, units: tuple[str, ...] = UNITS) -> GatedModel:
    return prunegate.attach(model, example, units=units).eval()


def example_of(model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, *model.pretrained_cfg["input_size"], dtype=dtype)


def hand_made() -> GatedModel:
    torch.manual_seed(0)
    model = randomise(Residual()).eval()
    return attach(model, torch.randn(3, 4, dtype=torch.float64))


def blocks_of(gated: GatedModel) -> list[int]:
    return [group.slice.start for group in gated.groups if group.kind == "block"]


def closed(gated: GatedModel, *gates: int) -> Tensor:
    mask = torch.ones(gated.logits.numel(), dtype=torch.bool)
    mask[list(gates)] = False
    return mask


def check(gated: GatedModel, mask: Tensor) -> nn.Module:
    model, example = gated._dense, gated.example_input
    with torch.no_grad():
        gated.mask = mask
        masked, slim = call_model(gated, example), gated.export()
        assert type(slim).__name__ == type(model).__name__
        assert relative_error(masked, call_model(slim, example)) <= EXACT
        assert gated.cost.params(gated.mask) == sum(p.numel() for p in slim.parameters())
        assert gated.cost.flops(gated.mask) == prunegate.count_flops(slim, example)
    return slim


# ---------------------------------------------------------------------- what is found


def test_the_exact_blocks() -> None:
    found = {block.replaced for block in hand_made().gate_map.blocks.values()}
    assert found == {("nested",), ("nested.inner",), ("a", "b"), ("c",), ("left",)}


def test_a_removed_branch_is_not_run_and_not_there() -> None:
    gated = hand_made()
    slim = check(gated, closed(gated, *blocks_of(gated)))
    for name in ("nested", "a", "b", "c", "left"):
        assert isinstance(slim.get_submodule(name), nn.Identity), name
    with torch.no_grad():  # what is left, written down by hand
        x = torch.randn(5, 4, dtype=torch.float64)
        m = gated._dense
        y = m.wide(m.right(torch.relu(m.stem(x))))
        y = (y + m.used(y)) * m.used(y)
        for _ in range(2):
            y = y + m.shared(y)
        torch.testing.assert_close(slim(x), m.head(y), rtol=1e-12, atol=1e-12)


def test_every_set_of_blocks() -> None:
    gated = hand_made()
    gates = blocks_of(gated)
    for bits in itertools.product([False, True], repeat=len(gates)):
        mask = random_mask(gated, seed=sum(bits))
        mask[gates] = torch.tensor(bits)
        check(gated, mask)


def test_blocks_are_units_only_on_request() -> None:
    gated = hand_made()
    plain = prunegate.attach(gated._dense, gated.example_input)
    assert "block" not in {group.kind for group in plain.groups}
    alone = attach(gated._dense, gated.example_input, ("block",))
    assert {group.kind for group in alone.groups} == {"block"}
    check(alone, closed(alone, *blocks_of(alone)))


def test_ignored_branches_get_no_gate() -> None:
    gated = hand_made()
    some = prunegate.attach(gated._dense, gated.example_input, units=UNITS, ignore=("nested.*", "c"))
    assert {block.replaced for block in some.gate_map.blocks.values()} == {("a", "b"), ("left",)}


# ---------------------------------------------------------------------- training, plans, masks


def test_the_slim_model_trains() -> None:
    """The rectifier after a removed sum writes in place; what came before it must not be overwritten."""
    gated = hand_made()
    slim = check(gated, closed(gated, *blocks_of(gated))).train()
    assert isinstance(slim.c, nn.Identity)
    slim(gated.example_input).square().sum().backward()
    assert all(parameter.grad is not None for parameter in slim.parameters())


def test_closed_branches_get_the_gradient_of_what_they_would_add() -> None:
    gated = hand_made()
    gated.prunegate.logits.data = torch.zeros_like(gated.logits.data, dtype=torch.float64)
    gate = next(g for g, block in gated.gate_map.blocks.items() if block.replaced == ("a", "b"))
    gated.mask = closed(gated, gate)
    (gradient,) = torch.autograd.grad(call_model(gated, gated.example_input).sum(), gated.logits)

    m = gated._dense
    z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    handle = m.b.register_forward_hook(lambda module, args, out: out * z)
    (expected,) = torch.autograd.grad(m(gated.example_input).sum(), z)
    handle.remove()
    assert float(4 * gradient[gate]) == pytest.approx(float(expected), rel=1e-9)  # the relaxed gate's slope is 1/4


def test_plans_go_to_json_and_back() -> None:
    gated = hand_made()
    mask = random_mask(gated, 1)
    mask[blocks_of(gated)] = False
    slim = check(gated, mask)
    plan = plan_of(slim)
    assert plan.removed
    assert Plan.from_json(plan.to_json()) == plan
    again = prunegate.slim.apply.apply_plan(gated._dense, Plan.from_json(plan.to_json()))
    assert torch.equal(again(gated.example_input), slim(gated.example_input))


def test_a_slim_model_is_pruned_again() -> None:
    gated = hand_made()
    first = next(g for g, block in gated.gate_map.blocks.items() if block.replaced == ("a", "b"))
    mask = random_mask(gated, 1)
    mask[blocks_of(gated)] = True
    mask[first] = False
    slim = check(gated, mask)
    second = attach(slim, gated.example_input)
    mask = random_mask(second, 2)
    mask[blocks_of(second)] = False
    twice = check(second, mask)
    at_once = prunegate.slim.apply.apply_plan(gated._dense, plan_of(twice))
    assert torch.equal(at_once(gated.example_input), twice(gated.example_input))


def test_an_optimizer_is_carried_through_a_cut() -> None:
    gated = hand_made()
    optimizer = torch.optim.SGD(gated.parameters(), 0.1, momentum=0.9)
    gated(gated.example_input).sum().backward()
    optimizer.step()
    slim = check(gated, closed(gated, *blocks_of(gated)))
    moved = prunegate.transfer_optimizer(optimizer, gated, slim)
    kept = {id(parameter) for group in moved.param_groups for parameter in group["params"]}
    assert kept == {id(parameter) for parameter in slim.parameters()}


def test_a_choice_beside_branches_keeps_both() -> None:
    torch.manual_seed(0)
    choice = prunegate.Choice([nn.Linear(6, 6), nn.Identity()])
    model = nn.Sequential(nn.Linear(4, 6), choice, Nested(), nn.Linear(6, 2))
    gated = attach(randomise(model).eval(), torch.randn(3, 4, dtype=torch.float64))
    assert {block.replaced for block in gated.gate_map.blocks.values()} == {("2",), ("2.inner",)}
    mask = gated.mask
    mask[blocks_of(gated)] = False
    check(gated, mask)
    gated.choose({"1": "1"})
    assert isinstance(check(gated, gated.mask)[2], nn.Identity)


def test_predicted_latency_leaves_removed_branches_out() -> None:
    torch.manual_seed(0)
    gated = attach(Residual().eval(), torch.randn(3, 4), ("block",))
    table = prunegate.LatencyTable.measure(gated)
    table.overhead.clear()  # of a model so small that it is nearly all there is
    polynomial, everything = table.polynomial(gated), closed(gated)
    nothing = closed(gated, *blocks_of(gated))
    assert polynomial.exact(nothing) < polynomial.exact(everything)
    assert table.predict(gated, nothing) < table.predict(gated, everything)


def test_a_branch_is_worth_what_goes_with_it() -> None:
    branch = SimpleNamespace(tensors={"branch.weight"}, call=object(), calls=frozenset())
    dims = {("branch.weight", 0): torch.tensor([0, 2]), ("other.weight", 0): torch.tensor([1])}
    gate_map = GateMap(torch.zeros(1, dtype=torch.int64), dims, 4, blocks={3: branch})
    worth = gate_map.worth(torch.tensor([0.5, 0.25, 2.0, 0.1]))
    torch.testing.assert_close(worth, torch.tensor([0.5, 0.25, 2.0, 0.1 * (1 + 0.5 + 2.0)]))


def test_masks_inside_a_removed_branch_are_free() -> None:
    """No layer of a branch that is gone needs to keep a unit; one that is there does."""
    gated = hand_made()
    gate = next(g for g, block in gated.gate_map.blocks.items() if block.replaced == ("nested",))
    inside = gated.gate_map.inside[gate]
    mask = closed(gated, gate, *inside.tolist())
    slim = check(gated, mask)
    assert isinstance(slim.nested, nn.Identity)
    assert torch.isfinite(call_model(gated, gated.example_input)).all()
    mask[gate] = True
    with pytest.raises(MaskError, match="at least one unit"):
        gated.mask = mask


def test_expected_cost_is_the_mean_over_all_masks() -> None:
    gated = attach(hand_made()._dense, torch.randn(3, 4, dtype=torch.float64), ("block",))
    n = gated.logits.numel()
    gated.logits.data = torch.linspace(-1, 1, n)
    p = gated.prunegate.probabilities().detach().double()
    mean = 0.0
    for bits in itertools.product([False, True], repeat=n):
        mask = torch.tensor(bits)
        mean += float(torch.where(mask, p, 1 - p).prod()) * gated.cost.flops(mask)
    assert float(gated.cost.expected_flops().detach()) == pytest.approx(mean, rel=1e-6)


# ---------------------------------------------------------------------- networks


@pytest.mark.parametrize(("name", "count"), [
    ("test_vit", 12),
    ("test_resnet", 4),
    ("convnext_atto", 12),
    ("mobilenetv2_100", 10),
    pytest.param("mixer_s32_224", 16, marks=pytest.mark.slow),
    pytest.param("deit_tiny_patch16_224", 24, marks=pytest.mark.slow),
    pytest.param("swin_tiny_patch4_window7_224", 24, marks=pytest.mark.slow),
    pytest.param("resnet50", 16, marks=pytest.mark.slow),
])  # fmt: skip
def test_networks(name: str, count: int, tmp_path: Path) -> None:
    model = build(name)
    gated = attach(model, example_of(model))
    gates = blocks_of(gated)
    assert len(gates) == count
    for seed in range(2):
        mask = random_mask(gated, seed)
        mask[gates] = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
        mask[gates[seed]] = False
        slim = check(gated, mask)
        assert type(slim) is type(model)
        with torch.no_grad():
            assert relative_error(call_model(model, gated.example_input), slim(gated.example_input)) > 0.05
    path = tmp_path / "slim.safetensors"
    prunegate.save(slim, path)
    again = prunegate.load(path).eval()
    with torch.no_grad():
        assert torch.equal(again(gated.example_input), slim(gated.example_input))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_budget_is_filled(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    gated = prunegate.attach(model, example_of(model, torch.float32), units=UNITS)
    budget = prunegate.Budget(gated, flops=0.5, steps=12)
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    gated.train()
    for _ in range(12):
        (gated(x).square().mean() + budget.loss()).backward()
        budget.step()
    used = prunegate.count_flops(gated.export().eval(), gated.example_input) / (0.5 * gated.cost.flops())
    assert 0.99 <= used <= 1


class TwoBranches(nn.Module):
    """Two residual branches that cost nearly all there is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.first = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        self.second = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        return self.head(x + self.second(x))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_the_final_choice_keeps_branches_that_the_search_kept(share: float) -> None:
    """Inside a branch that is gone units are free: were their scores not lost with it, branches would close."""
    torch.manual_seed(0)
    gated = prunegate.attach(TwoBranches(), torch.randn(1, 4), units=UNITS)
    gated.logits.data.fill_(4.0)
    for group in gated.groups:
        if group.size == 32:  # units that the search could not tell apart
            gated.logits.data[group.slice] = torch.linspace(0.01, -0.01, 32)
    budget = prunegate.Budget(gated, flops=share, steps=1, ignore=["stem"])
    budget.finish()
    assert bool(gated.mask[blocks_of(gated)].all())
    assert 0.95 * share < gated.cost.flops(gated.mask) / gated.cost.flops() <= share


def test_the_final_choice_closes_a_branch_that_the_search_closed() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    gated = prunegate.attach(model, example_of(model, torch.float32), units=UNITS)
    gate = blocks_of(gated)[1]
    gated.logits.data = torch.randn(gated.logits.numel())
    gated.logits.data[blocks_of(gated)] = 4.0
    gated.logits.data[gate] = -8.0
    budget = prunegate.Budget(gated, flops=0.6, steps=1)
    budget.finish()
    assert not bool(gated.mask[gate])
    assert bool(gated.mask[blocks_of(gated)].any())
