"""Latency tables against a timer whose times are a known function of the shapes."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import prunegate
from prunegate import Budget, BudgetError, GatedModel
from prunegate.budget.latency import LatencyTable, _model_key
from prunegate.budget.stopwatch import Pool, time_in_turn
from prunegate.budget.timed import find_operators
from prunegate.groups import Group
from tests.timers import Stopwatch, chain


def made_up(function: Any, args: Any, kwargs: Any) -> float:
    """Milliseconds that are a constant and a bilinear function of the operands' sizes; calls the function too."""
    function(*args, **kwargs)
    first, *others = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    total = 0.01 + 1e-6 * first.numel()
    if "convolution" in str(function) or "addmm" in str(function):
        total += 1e-7 * others[0].numel()
    return total


def make(name: str) -> tuple[GatedModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 64)
    options = {"img_size": 64} if "vit" in name else {}
    return prunegate.attach(timm.create_model(name, num_classes=10, **options).eval(), x), x


@functools.lru_cache
def made(name: str) -> tuple[GatedModel, Tensor, LatencyTable]:
    gated, x = make(name)
    return gated, x, LatencyTable.measure(gated, timer=made_up)


def small() -> GatedModel:
    return chain(8, 96, 200, 160, 64)


def random_mask(gated: GatedModel, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(gated.logits.numel(), dtype=torch.bool)
    for group in gated.groups:
        kept = int(torch.randint(max(1, group.size // 4), group.size + 1, (1,), generator=generator))
        mask[group.slice.start + torch.randperm(group.size, generator=generator)[:kept]] = True
    return mask


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "vit_tiny_patch16_224"])
def test_predictions_agree_with_the_times_of_the_exported_model(name: str) -> None:
    gated, x, table = made(name)
    cost = table.polynomial(gated)
    for seed in range(3):
        mask = random_mask(gated, seed)
        gated.mask = mask
        slim = gated.export().eval()
        with torch.no_grad(), Stopwatch(made_up) as watch:
            slim(x)
        assert table.predict(gated, mask) == pytest.approx(watch.total, rel=0.03)
        assert cost.exact(mask) / 1e9 == pytest.approx(watch.total, rel=0.03)
        gated.mask = None
    assert cost.dense / 1e9 == pytest.approx(table.predict(gated), rel=0.01)


def stepwise(function: Any, args: Any, kwargs: Any) -> float:
    """Times of kernels that work on blocks of 16, with a fast case where all sizes are whole blocks."""
    sizes = [size for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) for size in leaf.shape[:2]]
    odd = any(size > 16 and size % 16 for size in sizes)
    return 1e-6 * math.prod(-(-size // 16) * 16 for size in sizes[:4]) * (1.5 if odd else 1)


def fits(gated: GatedModel, table: LatencyTable, share: float, group: Group, step: int) -> bool:
    """Whether a group could be one step wider."""
    mask = gated.mask
    closed = group.slice.start + torch.nonzero(~mask[group.slice]).flatten()
    mask[closed[:step]] = True
    return len(closed) >= step and table.predict(gated, mask) <= share * table.predict(gated)


@pytest.mark.parametrize("share", [0.7, 0.5, 0.3])
@pytest.mark.parametrize("round_to", [1, 8])
def test_a_latency_budget_holds_where_times_rise_in_steps(share: float, round_to: int) -> None:
    gated = small()
    table = LatencyTable.measure(gated, timer=stepwise)
    budget = Budget(gated, latency=share, latency_table=table, steps=10, round_to=round_to)
    budget.finish()
    used = table.predict(gated, gated.mask) / table.predict(gated)
    assert used <= share
    assert used > 0.97 * share or not any(fits(gated, table, share, group, round_to) for group in gated.groups)
    assert ("one step more of any group would exceed" in budget.report()) == (used < 0.99 * share)
    assert budget.expected("latency") == pytest.approx(used * table.predict(gated), rel=1e-6)
    assert f"({used / share:.2%} of the budget)" in budget.report()


def test_a_budget_that_only_the_narrowest_cut_meets() -> None:
    gated = small()
    table = LatencyTable.measure(gated, timer=stepwise)
    narrowest = torch.zeros(gated.logits.numel(), dtype=torch.bool)
    narrowest[[group.slice.start for group in gated.groups]] = True
    least = table.predict(gated, narrowest) / table.predict(gated)
    budget = Budget(gated, latency=1.0001 * least, latency_table=table, steps=10)
    budget.finish()
    assert table.predict(gated, gated.mask) <= 1.0001 * least * table.predict(gated)
    with pytest.raises(BudgetError, match=r"latency=.* is out of reach"):
        Budget(gated, latency=0.999 * least, latency_table=table, steps=10)


def test_operators_are_called_in_the_layout_of_the_model() -> None:
    torch.manual_seed(0)
    block = timm.models.vision_transformer.Block(48, 4, qkv_bias=True)
    gated = prunegate.attach(nn.Sequential(nn.Linear(8, 48), block, nn.Linear(48, 2)), torch.randn(2, 10, 8))
    found = find_operators(gated)
    pool = Pool(2**20, torch.device("cpu"))
    attention = next(operator for operator in found if "attention" in operator.op.name)
    args, _ = attention.arguments([3 if size == 4 else size for size in attention.dense()], pool, torch.device("cpu"))
    # Queries are a third of what one layer makes, with the heads next to one another: of three heads 3 * 3 * 12.
    assert args[0].shape == (2, 3, 10, 12)
    assert args[0].stride() == (10 * 108, 12, 108, 1)
    product = next(operator for operator in found if operator.op.name == "addmm" and 144 in operator.dense())
    args, _ = product.arguments([2 * size // 3 for size in product.dense()], pool, torch.device("cpu"))
    weight = args[2]
    assert weight.stride() == (1, weight.shape[0])  # a linear layer's weight, transposed
    assert "/1,48" in product.key


def test_calls_get_memory_that_was_not_used_for_long() -> None:
    pool = Pool(2**24, torch.device("cpu"))
    layouts = [((64, 256), (256, 1), torch.float32), ((3, 5), (1, 3), torch.float32), ((7,), (1,), torch.float64)]
    starts = set()
    for _ in range(2**24 // (4 * 64 * 256) - 2):
        first, second, third = pool.take(layouts)
        assert first.shape == (64, 256)
        assert second.stride() == (1, 3)
        assert third.dtype == torch.float64
        assert second.data_ptr() >= first.data_ptr() + 4 * first.numel()
        assert all(tensor.data_ptr() % 64 == 0 for tensor in (first, second, third))
        starts.add(first.data_ptr())
    assert len(starts) == 2**24 // (4 * 64 * 256) - 2
    large = pool.take([((2**13, 2**10), (2**10, 1), torch.float32)] * 2)
    assert large[1].data_ptr() - large[0].data_ptr() == 4 * 2**23


def test_a_latency_budget_is_met() -> None:
    shared, _, table = made("resnet18")
    gated = copy.deepcopy(shared)
    budget = Budget(gated, latency=0.6, flops=0.9, latency_table=table, steps=10)
    assert budget.target("latency") == pytest.approx(table.predict(gated), rel=0.01)
    budget.finish()
    assert 0.594 < table.predict(gated, gated.mask) / table.predict(gated) <= 0.6
    assert gated.cost.flops(gated.mask) <= 0.9 * gated.cost.flops()
    absolute = 0.7 * table.predict(gated)
    Budget(gated, latency_ms=absolute, latency_table=table, steps=10).finish()
    assert 0.99 * absolute < table.predict(gated, gated.mask) <= absolute


def test_what_is_between_operators_is_a_constant_and_a_factor() -> None:
    gated, _, measured = made("resnet18")
    table = copy.deepcopy(measured)
    mask, plain = random_mask(gated, 0), measured.predict(gated, random_mask(gated, 0))
    assert not measured.overhead, "a timer of the user's own has nothing to be set off against"
    (key,) = [_model_key(find_operators(gated))]
    table.overhead[key] = (2.0, 1.5)
    assert table.predict(gated, mask) == pytest.approx(2.0 + 1.5 * plain)
    assert table.polynomial(gated).exact(mask) / 1e9 == pytest.approx(2.0 + 1.5 * plain, rel=0.03)


def test_tables_are_files(tmp_path: Path) -> None:
    gated, _, table = made("resnet18")
    table.save(tmp_path / "table.json")
    loaded = LatencyTable.load(tmp_path / "table.json")
    assert loaded == table
    mask = random_mask(gated, 0)
    assert loaded.predict(gated, mask) == table.predict(gated, mask)
    Budget(gated, latency=0.5, latency_table=tmp_path / "table.json", steps=10)


def test_a_table_is_extended_by_what_it_lacks() -> None:
    first, _, table = made("resnet18")
    second = small()
    calls = []

    def counting(function: Any, args: Any, kwargs: Any) -> float:
        calls.append(function)
        return made_up(function, args, kwargs)

    assert LatencyTable.measure(first, timer=counting, known=table).operators == table.operators
    assert not calls
    both = LatencyTable.measure(second, timer=counting, known=table)
    assert calls
    assert both.predict(first) == table.predict(first)
    assert both.predict(second) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(device="another"), "was measured on 'another'"),
        (lambda t: t["operators"].pop(next(iter(t["operators"]))), r"does not know 1 of .*tools/latency\.py"),
        (lambda t: t.update(format=99), "not a latency table"),
        (lambda t: t.pop("operators"), "not a latency table"),
        (lambda t: next(iter(t["operators"].values()))["ms"].pop(), "do not fill their grid"),
        (lambda t: next(iter(t["operators"].values()))["ms"].__setitem__(0, -1), "numbers of at least 0"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    gated = small()
    LatencyTable.measure(gated, timer=made_up).save(tmp_path / "table.json")
    content = json.loads((tmp_path / "table.json").read_text())
    change(content)
    (tmp_path / "table.json").write_text(json.dumps(content))
    with pytest.raises(BudgetError, match=message):
        Budget(gated, latency=0.5, latency_table=tmp_path / "table.json", steps=10)
    assert gated.prunegate.phase == "open"


def test_a_table_in_another_type_is_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    table = LatencyTable.measure(prunegate.attach(net, torch.randn(1, 8)), timer=made_up)
    other = prunegate.attach(net.to(torch.bfloat16), torch.randn(1, 8, dtype=torch.bfloat16))
    with pytest.raises(BudgetError, match="was measured in float32, the model computes in bfloat16"):
        Budget(other, latency=0.5, latency_table=table, steps=10)


@pytest.mark.parametrize(
    "arguments",
    [{"latency": 1.5}, {"latency": 2000}, {"latency_ms": 0}, {"latency_ms": 1e-6}, {"latency": 0.5, "latency_ms": 3}],
)
def test_malformed_latency_budgets_are_refused(arguments: dict[str, float]) -> None:
    gated, _, table = made("resnet18")
    with pytest.raises(BudgetError, match="latency"):
        Budget(gated, latency_table=table, steps=10, **arguments)


def test_measuring_on_this_device() -> None:
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    gated = prunegate.attach(net, torch.randn(64, 256))
    net.train()
    table = LatencyTable.measure(gated)
    assert {operator.op.name for operator in find_operators(gated)} == {"addmm", "relu"}
    assert table.predict(gated) > 0
    half = torch.zeros(gated.logits.numel(), dtype=torch.bool)
    half[:64] = True
    assert table.predict(gated, half) < table.predict(gated)
    assert (time_in_turn([lambda: torch.add(torch.ones(3), 1)], False, 0.0) > 0).all()
    assert net.training
