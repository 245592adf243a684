"""Gates on a contraction's input or on its weight, whichever is smaller: the same values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import prunegate
from prunegate import install
from tests.models import random_mask, randomise
from tests.oracle import check_against_the_oracle


class Both(nn.Module):
    """Convolutions, one of them grouped, and matrices, whose weights are much larger than small inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, padding=1, padding_mode="circular")
        self.second = nn.Conv2d(24, 32, 3, padding=1, groups=2)
        self.third = nn.Conv2d(32, 20, 3, stride=2, padding=1)
        self.fourth = nn.Linear(20, 40)
        self.last = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.first(x))
        x = torch.sigmoid(self.third(torch.sigmoid(self.second(x))))
        return self.last(torch.sigmoid(self.fourth(x.mean((2, 3)))))


@pytest.fixture
def gated_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    product = install.gated_product

    def seen(x: Tensor, gate: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return product(x, gate)

    monkeypatch.setattr(install, "gated_product", seen)
    return shapes


@pytest.mark.parametrize("batch", [1, 64])
def test_either_agrees_with_the_oracle(batch: int, gated_shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model = randomise(Both(), seed=1)
    check_against_the_oracle(model, torch.randn(batch, 3, 4, 4, dtype=torch.float64))
    inputs = {(batch, 32, 4, 4), (batch, 20), (batch, 40)}
    weights = {tuple(layer.weight.shape) for layer in (model.third, model.fourth, model.last)}
    assert set(gated_shapes) >= (inputs if batch == 1 else weights)
    assert not set(gated_shapes) & (weights if batch == 1 else inputs)
    assert (batch, 24, 4, 4) not in gated_shapes, "a grouped convolution's input has other channels than its weight"


@pytest.mark.parametrize("batch", [1, 64])
def test_what_a_hook_makes_of_the_input_is_gated(batch: int) -> None:
    torch.manual_seed(0)
    model = randomise(Both(), seed=1).eval()
    model.fourth.register_forward_pre_hook(lambda module, args: (torch.cos(args[0]),))
    x = torch.randn(batch, 3, 4, 4, dtype=torch.float64)
    gated = prunegate.attach(model, x[:1])
    gated.mask = random_mask(gated, seed=0)
    torch.testing.assert_close(gated(x), gated.export()(x), rtol=1e-12, atol=1e-12)
