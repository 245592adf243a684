"""Latency tables against a timer whose times are a known function of the shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import prunegate
from prunegate import Budget, BudgetError, GatedModel
from prunegate.budget.latency import LatencyTable
from prunegate.budget.stopwatch import time_call
from prunegate.budget.timed import find_operators


def made_up(function: Any, args: Any, kwargs: Any) -> float:
    """Milliseconds that are a constant and a bilinear function of the operands' sizes; calls the function too."""
    function(*args, **kwargs)
    first, *others = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    total = 0.01 + 1e-6 * first.numel()
    if "convolution" in str(function) or "addmm" in str(function):
        total += 1e-7 * others[0].numel()
    return total


class Stopwatch(TorchDispatchMode):
    """Adds up the made-up times of what really runs."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Times an operation that is not a view."""
        if not func.is_view and "unsafe_view" not in str(func) and any(isinstance(a, Tensor) for a in args):
            self.total += made_up(func, [a.clone() if isinstance(a, Tensor) else a for a in args], kwargs or {})
        return func(*args, **(kwargs or {}))


def make(name: str) -> tuple[GatedModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 64)
    options = {"img_size": 64} if "vit" in name else {}
    return prunegate.attach(timm.create_model(name, num_classes=10, **options).eval(), x), x


def random_mask(gated: GatedModel, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(gated.logits.numel(), dtype=torch.bool)
    for group in gated.groups:
        kept = int(torch.randint(max(1, group.size // 4), group.size + 1, (1,), generator=generator))
        mask[group.slice.start + torch.randperm(group.size, generator=generator)[:kept]] = True
    return mask


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "vit_tiny_patch16_224"])
def test_predictions_agree_with_the_times_of_the_exported_model(name: str) -> None:
    gated, x = make(name)
    table = LatencyTable.measure(gated, timer=made_up)
    cost = table.polynomial(gated)
    for seed in range(3):
        mask = random_mask(gated, seed)
        gated.mask = mask
        slim = gated.export().eval()
        with torch.no_grad(), Stopwatch() as watch:
            slim(x)
        assert table.predict(gated, mask) == pytest.approx(watch.total, rel=0.03)
        assert cost.exact(mask) / 1e9 == pytest.approx(watch.total, rel=0.03)
        gated.mask = None
    assert cost.dense / 1e9 == pytest.approx(table.predict(gated), rel=0.01)


def test_a_latency_budget_is_met() -> None:
    gated, _ = make("resnet18")
    table = LatencyTable.measure(gated, timer=made_up)
    budget = Budget(gated, latency=0.6, flops=0.9, latency_table=table, steps=10)
    assert budget.target("latency") == pytest.approx(table.predict(gated), rel=0.01)
    budget.finish()
    assert 0.58 < table.predict(gated, gated.mask) / table.predict(gated) < 0.61
    assert gated.cost.flops(gated.mask) <= 0.9 * gated.cost.flops()
    absolute = 0.7 * table.predict(gated)
    Budget(gated, latency_ms=absolute, latency_table=table, steps=10).finish()
    assert 0.97 * absolute < table.predict(gated, gated.mask) < 1.01 * absolute


def test_tables_are_files(tmp_path: Path) -> None:
    gated, _ = make("resnet18")
    table = LatencyTable.measure(gated, timer=made_up)
    table.save(tmp_path / "table.json")
    loaded = LatencyTable.load(tmp_path / "table.json")
    assert loaded == table
    mask = random_mask(gated, 0)
    assert loaded.predict(gated, mask) == table.predict(gated, mask)
    Budget(gated, latency=0.5, latency_table=tmp_path / "table.json", steps=10)


def test_a_table_is_extended_by_what_it_lacks() -> None:
    first, _ = make("resnet18")
    second, _ = make("mobilenetv2_100")
    table = LatencyTable.measure(first, timer=made_up)
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
    gated, _ = make("resnet18")
    LatencyTable.measure(gated, timer=made_up).save(tmp_path / "table.json")
    content = json.loads((tmp_path / "table.json").read_text())
    change(content)
    (tmp_path / "table.json").write_text(json.dumps(content))
    with pytest.raises(BudgetError, match=message):
        Budget(gated, latency=0.5, latency_table=tmp_path / "table.json", steps=10)
    assert gated.prunegate.phase == "open"


@pytest.mark.parametrize(
    "arguments",
    [{"latency": 1.5}, {"latency": 2000}, {"latency_ms": 0}, {"latency_ms": 1e-6}, {"latency": 0.5, "latency_ms": 3}],
)
def test_malformed_latency_budgets_are_refused(arguments: dict[str, float]) -> None:
    gated, _ = make("resnet18")
    table = LatencyTable.measure(gated, timer=made_up)
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
    assert time_call(torch.add, [torch.ones(3), torch.ones(3)], {}) > 0
    assert net.training
