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


@pytest.mark.parametrize("method", ["nothing cut", "prunegate", "prunegate, refit",
                                    "prunegate, one-shot, refit", "torch-pruning taylor local"])  # fmt: skip
def test_a_row_keeps_to_the_budget_and_learns_from_the_dense_network(method: str) -> None:
    if method.startswith("torch-pruning"):
        pytest.importorskip("torch_pruning")
    dense = _network()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    args = Namespace(size=12, steps=60, batch=16, lr=0.01)
    training, other = _crops(dense, 100), _crops(dense, 50)
    row = real_weights.measure(dense, {"method": method, "budget": 0.5, "seed": 0}, args, {}, training, other, other)
    if method == "nothing cut":
        assert row["share"] == 1
    else:
        assert 0.4 < row["share"] <= 0.5
    assert row["imagenet"] == row["held_out"]
    assert row["imagenet"]["error"] < 0.95
    for name, value in dense.state_dict().items():
        assert torch.equal(value, before[name])


def test_batch_norms_take_statistics_over_without_changing_the_network() -> None:
    dense = _network()
    norm = dense[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        for values, low, high in ((norm.running_mean, -1, 1), (norm.running_var, 0.1, 4), (norm.weight, -2, 2),
                                  (norm.bias, -1, 1)):  # fmt: skip
            assert values is not None
            values.uniform_(low, high)
    images, unseen = 3 + 2 * torch.randn(150, 3, 12, 12), torch.randn(9, 3, 12, 12)
    with torch.no_grad():
        wanted, inputs = dense(unseen), dense[0](images)
    real_weights.adopt_statistics(dense, images)
    with torch.no_grad():
        torch.testing.assert_close(dense(unseen), wanted)
    torch.testing.assert_close(norm.running_mean, inputs.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, inputs.var((0, 2, 3), correction=0))


def test_statistics_are_the_mean_over_all_images() -> None:
    model = _network()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    images = 3 + 2 * torch.randn(128, 3, 12, 12)
    real_weights.reestimate(model, images)
    with torch.no_grad():
        inputs = model[0](images)
    parts = torch.stack([part.var((0, 2, 3)) for part in inputs.split(64)])
    torch.testing.assert_close(norm.running_mean, inputs.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, parts.mean(0))
    assert norm.momentum == 0.1
    assert not any(module.training for module in model.modules())


def test_what_must_be_installed_is_named() -> None:
    with pytest.raises(SystemExit, match="no_such_package"):
        real_weights._file("no_such_package", "x")
