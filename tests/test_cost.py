"""Expected costs of real networks against masks drawn at random, and their gradient against finite differences."""

from __future__ import annotations

import functools

import pytest
import timm
import torch

import prunegate
from prunegate import GatedModel

SAMPLES = 20_000
# In each of them a stream is the input and the output of one layer, so a product holds the same gates twice: of n such
# gates E[n * n] is by 1/n more than E[n] * E[n], many times the error of the mean.
NAMES = ("resnet18", "vit_tiny_patch16_224", "convnext_atto")


@functools.lru_cache
def gated_with_logits(name: str) -> GatedModel:
    torch.manual_seed(0)
    options = {"img_size": 64} if "vit" in name else {}
    gated = prunegate.attach(timm.create_model(name, num_classes=10, **options), torch.randn(1, 3, 64, 64))
    with torch.no_grad():
        gated.logits.copy_(3 * torch.randn(gated.logits.numel()))
    return gated


@pytest.mark.parametrize("which", ["flops", pytest.param("params", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_the_expectation_is_the_mean_over_drawn_masks(name: str, which: str) -> None:
    gated = gated_with_logits(name)
    generator = torch.Generator().manual_seed(1)
    p = gated.prunegate.probabilities().detach()
    count = getattr(gated.cost, which)
    costs = torch.tensor(
        [count(torch.rand(p.numel(), generator=generator) < p) for _ in range(SAMPLES)], dtype=torch.float64
    )
    expected = float(getattr(gated.cost, f"expected_{which}")().detach())
    error = float(costs.std()) / SAMPLES**0.5
    assert abs(expected - float(costs.mean())) < 4 * error
    assert error < 1e-3 * expected, "the samples tell nothing"


@pytest.mark.parametrize("name", NAMES)
def test_its_gradient_agrees_with_finite_differences(name: str) -> None:
    gated = gated_with_logits(name)
    (gradient,) = torch.autograd.grad(gated.cost.expected_flops(), gated.logits)
    flops, logits = gated.cost.polynomials["flops"], gated.logits.detach().double()
    for seed in range(5):
        direction = torch.randn(logits.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        step = 1e-4 * direction
        ends = [float(flops.expected(torch.sigmoid(logits + sign * step))) for sign in (1, -1)]
        assert float(gradient.double() @ direction) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3)
