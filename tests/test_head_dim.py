"""Positions inside heads as units: exact sets, equality, costs, the scale, masks and budgets."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunegate
from prunegate.errors import MaskError
from prunegate.gated import GatedModel
from prunegate.labels.trace import call_model
from tests.models import build, random_mask, randomise, relative_error
from tests.oracle import masked_outputs
from tests.zoo import ZOO

UNITS = ("channel", "head", "head_dim")
EXACT = 1e-8


class GroupedAttention(nn.Module):
    """Four query heads, two key and value heads, a rotary table, keys wider than values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 4 * 4), nn.Linear(6, 2 * 4), nn.Linear(6, 2 * 3)
        self.proj = nn.Linear(4 * 3, 2)
        angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.1])
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())

    def rotate(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * self.cos + torch.cat([-right, left], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.rotate(self.q(x).view(b, n, 4, 4).transpose(1, 2))
        k = self.rotate(self.k(x).view(b, n, 2, 4).transpose(1, 2)).repeat_interleave(2, 1)
        v = self.v(x).view(b, n, 2, 3).transpose(1, 2).repeat_interleave(2, 1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)


def units_of(gated: GatedModel, kind: str) -> list[dict[tuple[str, int], list[int]]]:
    """For each gate of a kind, the positions that it removes."""
    found = []
    for group in gated.groups:
        for gate in range(group.slice.start, group.slice.stop) if group.kind == kind else ():
            mask = torch.ones(gated.logits.numel(), dtype=torch.bool)
            mask[gate] = False
            kept = gated.gate_map.kept(mask)
            found.append({key: torch.nonzero(~at).flatten().tolist() for key, at in kept.items() if not at.all()})
    return found


def attach(model: nn.Module, example: object) -> GatedModel:
    return prunegate.attach(model, example, units=UNITS).eval()


def check(gated: GatedModel, example: object, seeds: range) -> None:
    model = gated._dense
    with torch.no_grad():
        for seed in seeds:
            gated.mask = random_mask(gated, seed)
            masked, slim = call_model(gated, example), gated.export()
            assert relative_error(masked, call_model(slim, example)) <= EXACT
            assert relative_error(call_model(model, example), masked) > 1e-3
            assert gated.cost.params(gated.mask) == sum(p.numel() for p in slim.parameters())
            assert gated.cost.flops(gated.mask) == prunegate.count_flops(slim, example)


def zoo(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    model = randomise(ZOO[name](), seed=2).eval()
    return model, model.example()


# ---------------------------------------------------------------------- exact sets


def test_a_view_of_queries_keys_and_values_at_once_ties_their_positions() -> None:
    """Rows laid out [3][head][d] and viewed as that box lose position d of queries, keys and values together."""
    gated = attach(*zoo("FusedQkv"))
    expected = []
    for d in range(4):
        rows = [12 * part + 4 * head + d for part in range(3) for head in range(3)]
        columns = [4 * head + d for head in range(3)]
        expected.append({("qkv.weight", 0): rows, ("qkv.bias", 0): rows, ("proj.weight", 1): columns})
    assert units_of(gated, "head_dim") == expected
    assert len(units_of(gated, "head")) == 3


def test_rows_by_head_give_keys_and_values_widths_of_their_own() -> None:
    gated = attach(*zoo("FusedQkvHeadFirst"))
    expected = []
    for d in range(4):
        rows = sorted(12 * head + 4 * part + d for part in range(2) for head in range(3))
        expected.append({("qkv.weight", 0): rows, ("qkv.bias", 0): rows})
    for d in range(4):
        rows = [12 * head + 8 + d for head in range(3)]
        columns = [4 * head + d for head in range(3)]
        expected.append({("qkv.weight", 0): rows, ("qkv.bias", 0): rows, ("proj.weight", 1): columns})
    found = units_of(gated, "head_dim")
    assert len(found) == len(expected)
    assert all(unit in expected for unit in found)


def test_grouped_queries_and_a_rotary_table() -> None:
    """Positions that a rotation mixes go in pairs, the same ones of every head, whatever the number of heads."""
    torch.manual_seed(0)
    gated = attach(randomise(GroupedAttention()).eval(), torch.randn(2, 5, 6, dtype=torch.float64))
    expected: list[dict[tuple[str, int], list[int]]] = []
    for pair in range(2):
        q, k = ([4 * head + pair + 2 * half for head in range(n) for half in range(2)] for n in (4, 2))
        expected.append({("q.weight", 0): q, ("q.bias", 0): q, ("k.weight", 0): k, ("k.bias", 0): k,
                         ("cos", 1): [pair, pair + 2], ("sin", 1): [pair, pair + 2]})  # fmt: skip
    for d in range(3):
        v, columns = [d, 3 + d], [3 * head + d for head in range(4)]
        expected.append({("v.weight", 0): v, ("v.bias", 0): v, ("proj.weight", 1): columns})
    found = units_of(gated, "head_dim")
    assert len(found) == len(expected)
    assert all(unit in expected for unit in found)
    assert len(units_of(gated, "head")) == 2
    check(gated, gated.example_input, range(4))


# ---------------------------------------------------------------------- equality


LAYOUTS = ("FusedQkv", "FusedQkvHeadFirst", "GroupedQueries", "TalkingHeads", "CrossCovariance", "Rotary",
           "RotaryBeforeHeads", "LogitScale", "BiasTable", "Halo")  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    model, example = zoo(name)
    check(attach(model, example), example, range(3))


@pytest.mark.parametrize("name", LAYOUTS)
def test_masked_forward_and_gradient_against_the_oracle(name: str) -> None:
    model, example = zoo(name)
    gated = attach(model, example)
    gated.prunegate.logits.data = torch.zeros_like(gated.logits.data, dtype=torch.float64)
    gated.mask = random_mask(gated, seed=3)
    gates = gated.mask.double().requires_grad_()
    expected = masked_outputs(model, example, gated.trace, gated.gate_map.of_label, gates)
    actual = call_model(gated, example)
    assert relative_error(expected, actual) <= 1e-10
    weight = torch.randn_like(expected)
    (by_oracle,) = torch.autograd.grad((expected * weight).sum(), gates)
    (by_logits,) = torch.autograd.grad((actual * weight).sum(), gated.logits)
    scale = by_oracle.abs().max()
    torch.testing.assert_close(4 * by_logits.double() / scale, by_oracle / scale, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "heads", "positions"), [
    ("test_vit", 12, 6 * 32),
    pytest.param("deit_tiny_patch16_224", 36, 12 * 64, marks=pytest.mark.slow),
    pytest.param("vit_tiny_patch16_224", 36, 12 * 64, marks=pytest.mark.slow),
    pytest.param("swin_tiny_patch4_window7_224", 138, 12 * 32, marks=pytest.mark.slow),
    pytest.param("beit_base_patch16_224", 144, 12 * 64, marks=pytest.mark.slow),
])  # fmt: skip
def test_networks(name: str, heads: int, positions: int) -> None:
    model = build(name)
    gated = attach(model, torch.randn(1, *model.pretrained_cfg["input_size"], dtype=torch.float64))
    sizes = {kind: sum(g.size for g in gated.groups if g.kind == kind) for kind in ("head", "head_dim")}
    assert sizes == {"head": heads, "head_dim": positions}
    check(gated, gated.example_input, range(2))


# ---------------------------------------------------------------------- around it


def test_the_score_scale_stays_that_of_the_dense_width() -> None:
    """Removing positions in which queries and keys are zero changes nothing: the scale must not follow the width."""
    model, example = zoo("FusedQkvHeadFirst")
    gated = attach(model, example)
    group = next(g for g in gated.groups if g.kind == "head_dim" and ("proj.weight", 1) not in g.members)
    gate = group.slice.start
    unit = units_of(gated, "head_dim")[[g for g in gated.groups if g.kind == "head_dim"].index(group) * group.size]
    with torch.no_grad():
        for (name, _), rows in unit.items():
            model.get_parameter(name)[rows] = 0
        mask = torch.ones(gated.logits.numel(), dtype=torch.bool)
        mask[gate] = False
        gated.mask = mask
        torch.testing.assert_close(gated.export()(example), model(example), rtol=1e-12, atol=1e-12)


def test_expected_cost_is_the_mean_over_all_masks() -> None:
    gated = attach(*zoo("GroupedQueries"))
    n = gated.logits.numel()
    gated.logits.data = torch.linspace(-1, 1, n)
    p = gated.prunegate.probabilities().detach().double()
    mean = 0.0
    for bits in itertools.product([False, True], repeat=n):
        mask = torch.tensor(bits)
        mean += float(torch.where(mask, p, 1 - p).prod()) * gated.cost.flops(mask)
    assert float(gated.cost.expected_flops().detach()) == pytest.approx(mean, rel=1e-6)


def test_heads_of_no_width_are_refused() -> None:
    gated = attach(*zoo("FusedQkvHeadFirst"))
    mask = torch.ones(gated.logits.numel(), dtype=torch.bool)
    group = next(g for g in gated.groups if g.kind == "head_dim")
    mask[group.slice] = False
    with pytest.raises(MaskError, match="every position inside the heads"):
        gated.mask = mask


def test_positions_inside_heads_are_units_only_on_request() -> None:
    model, example = zoo("FusedQkv")
    assert "head_dim" not in {group.kind for group in prunegate.attach(model, example).groups}
    alone = prunegate.attach(model, example, units=("head_dim",))
    assert {group.kind for group in alone.groups} == {"head_dim"}


def test_a_budget_is_filled() -> None:
    model, example = zoo("FusedQkvHeadFirst")
    gated = attach(model.float(), example.float())
    budget = prunegate.Budget(gated, flops=0.5, steps=10)
    for _ in range(10):
        (gated(example.float()).square().mean() + budget.loss()).backward()
        budget.step()
    slim = gated.export()
    assert 0.9 <= prunegate.count_flops(slim, example.float()) / (0.5 * gated.cost.flops()) <= 1
