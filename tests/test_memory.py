"""The memory model against what torch's allocator reports, and budgets on it."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import prunegate
from prunegate import Budget, BudgetError, GatedModel
from prunegate.budget.memory import MemoryModel
from prunegate.select import Width, least_cost

# Convolutions' kernels take scratch space (for odd widths more), which is not in the model.
SCRATCH = 0.06


def make(name: str) -> tuple[GatedModel, Tensor]:
    torch.manual_seed(0)
    # Large enough for activations to outweigh scratch space.
    size = 64 if "vit" in name else 160
    x = torch.randn(4, 3, size, size)
    options = {"img_size": size} if "vit" in name else {}
    return prunegate.attach(timm.create_model(name, num_classes=10, **options).eval(), x), x


def measured_peak(model: nn.Module, x: Tensor) -> int:
    """Bytes of weights, buffers, input, and the most that the allocator held during a forward."""
    model.eval()
    with torch.no_grad():
        model(x)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model(x)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    own = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    return peak + own + x.numel() * x.element_size()


def random_mask(gated: GatedModel, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(gated.logits.numel(), dtype=torch.bool)
    for group in gated.groups:
        kept = int(torch.randint(max(1, group.size // 4), group.size + 1, (1,), generator=generator))
        mask[group.slice.start : group.slice.start + kept] = True
    return mask


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_the_modelled_peak_is_the_measured_one(name: str) -> None:
    gated, x = make(name)
    model = MemoryModel(gated)
    assert model.peak()[0] == pytest.approx(measured_peak(gated.model, x), rel=SCRATCH)
    for seed in range(2):
        gated.mask = random_mask(gated, seed)
        assert model.peak(gated.mask)[0] == pytest.approx(measured_peak(gated.export(), x), rel=SCRATCH)


def test_the_polynomial_of_a_point_is_what_is_held_there() -> None:
    gated, _ = make("resnet18")
    model = MemoryModel(gated)
    for seed in range(3):
        mask = random_mask(gated, seed)
        peak, point = model.peak(mask)
        assert model.cost(point).exact(mask) == peak
        assert all(model.cost(other).exact(mask) <= peak for other in range(0, len(model.points), 7))


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_a_memory_budget_is_met(share: float) -> None:
    gated, x = make("resnet18")
    dense = MemoryModel(gated).peak()[0] / 2**20
    budget = Budget(gated, memory_mb=share * dense, flops=0.9, steps=20)
    assert budget.target("memory") == pytest.approx(dense)
    for _ in range(20):
        budget.step()
    assert 0.97 * share * dense < budget.expected("memory") <= share * dense
    assert "MB" in budget.report()
    assert measured_peak(gated.export(), x) / 2**20 <= (1 + SCRATCH) * share * dense


def test_out_of_reach() -> None:
    gated, _ = make("resnet18")
    model = MemoryModel(gated)
    least = least_cost(model.cost(model.peak()[1]), [Width(group.slice, 1, group.size) for group in gated.groups])
    for asked in (least / 2**20 * 0.99, 1e6, 0, -1, float("nan")):
        with pytest.raises(BudgetError, match=r"memory_mb=.* MB to .* MB"):
            Budget(gated, memory_mb=asked, steps=10)
