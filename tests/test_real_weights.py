"""The check on real weights: its measures, and a row of each method on made-up crops."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
# Last, for that folder has a module of the name of a standard one.
sys.path.append(str(ROOT / "tools"))

import real_weights  # noqa: E402


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 7)).eval()  # fmt: skip


@torch.no_grad()
def _crops(model: nn.Module, n: int) -> real_weights.Crops:
    images = torch.randn(n, 3, 12, 12)
    return real_weights.Crops(images, model(images))


def test_agreement_and_error_are_those_of_the_logits() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.0, 3.0, 0.0], [0.0, 0.0, 5.0], [2.0, 1.0, 0.0]])
    crops = real_weights.Crops(logits, logits)
    assert real_weights.compare(nn.Identity(), crops) == {"agreement": 100.0, "error": 0.0}

    class Other(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([2 * x[:3] + 7, x[3:].flip(1) - 1])  # a constant says nothing about classes

    found = real_weights.compare(Other(), crops)
    centred = logits - logits.mean(1, keepdim=True)
    oracle = ((centred[:3] ** 2).sum() + 2 * 2**2) / (centred**2).sum()
    assert found["agreement"] == 75.0
    assert found["error"] == pytest.approx(float(oracle**0.5))


@pytest.mark.parametrize("method", ["prunegate", "torch-pruning taylor local"])
def test_a_row_keeps_to_the_budget_and_learns_from_the_dense_network(method: str) -> None:
    if method != "prunegate":
        pytest.importorskip("torch_pruning")
    dense = _network()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    args = Namespace(size=12, steps=60, batch=16, lr=0.01)
    training, other = _crops(dense, 100), _crops(dense, 50)
    row = real_weights.measure(dense, {"method": method, "budget": 0.5, "seed": 0}, args, {}, training, other, other)
    assert 0.4 < row["share"] <= 0.5
    assert row["imagenet"] == row["held_out"]
    assert row["imagenet"]["error"] < 0.95
    for name, value in dense.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_must_be_installed_is_named() -> None:
    with pytest.raises(SystemExit, match="no_such_package"):
        real_weights._file("no_such_package", "x")
