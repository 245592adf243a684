"""One-shot scores against their definitions, computed by hand, and the cut that follows from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunegate
from prunegate.scores import SCORES, score_units
from tests import models


class Net(nn.Module):
    """One group of six channels, with a batch norm, that a second convolution consumes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.norm(self.first(x)))).mean((2, 3))


@pytest.fixture
def net() -> Net:
    return models.randomise(Net()).eval()


@pytest.fixture
def gated(net: Net) -> prunegate.GatedModel:
    return prunegate.attach(net, torch.randn(1, 3, 6, 6, dtype=torch.float64))


def batches(count: int, labelled: bool) -> list:
    inputs = [torch.randn(5, 3, 6, 6, dtype=torch.float64) for _ in range(count)]
    return [(x, torch.randint(0, 4, (5,))) for x in inputs] if labelled else inputs


def test_magnitude_is_the_norm_of_all_slices(net: Net, gated: prunegate.GatedModel) -> None:
    expected = torch.stack([
        torch.cat([net.first.weight[i].flatten(), net.second.weight[:, i].flatten()]).norm() for i in range(6)
    ])  # fmt: skip
    torch.testing.assert_close(score_units(gated, "magnitude"), expected.detach())


def test_bn_is_the_scale(net: Net, gated: prunegate.GatedModel) -> None:
    torch.testing.assert_close(score_units(gated, "bn"), net.norm.weight.detach().abs())


def test_fpgm_is_the_sum_of_distances(net: Net, gated: prunegate.GatedModel) -> None:
    rows = [torch.cat([net.first.weight[i].flatten(), net.second.weight[:, i].flatten()]) for i in range(6)]
    expected = torch.stack([sum((a - b).norm() for b in rows) for a in rows])
    torch.testing.assert_close(score_units(gated, "fpgm"), expected.detach())


def test_taylor_is_the_squared_derivative_by_each_gate(net: Net, gated: prunegate.GatedModel) -> None:
    data = batches(3, labelled=True)

    def loss_at(gates: Tensor, x: Tensor, y: Tensor) -> Tensor:
        hidden = F.relu(net.norm(net.first(x))) * gates[:, None, None]
        return F.cross_entropy(net.second(hidden).mean((2, 3)), y)

    step, expected = 1e-6, torch.zeros(6, dtype=torch.float64)
    for x, y in data:
        for i in range(6):
            up, down = torch.ones(2, 6, dtype=torch.float64)
            up[i] += step
            down[i] -= step
            with torch.no_grad():
                expected[i] += ((loss_at(up, x, y) - loss_at(down, x, y)) / (2 * step)) ** 2 / 3
    found = score_units(gated, "taylor", data)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)
    assert gated.prunegate.phase == "open"


def test_taylor_without_labels_draws_them_from_the_predictions(gated: prunegate.GatedModel) -> None:
    """Many draws come near to the Fisher information, which sums over all labels."""
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    chances = gated(x).softmax(1)[0].detach()
    exact = sum(chances[c] * score_units(gated, "taylor", [(x, torch.tensor([c]))]) for c in range(4))
    found = score_units(gated, "taylor", [x] * 1000)
    torch.testing.assert_close(found, exact, rtol=0.25, atol=0.02 * float(exact.max()))


@pytest.mark.parametrize("score", SCORES)
def test_the_cut_meets_the_budget_and_drops_low_scores(net: Net, score: str) -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    gated = prunegate.attach(net, x[:1])
    torch.manual_seed(3)
    scores = score_units(gated, score, batches(2, labelled=True)) if score != "random" else None
    torch.manual_seed(3)
    slim = prunegate.one_shot(gated, score=score if scores is None else scores, flops=0.5)
    assert 2 <= slim.first.out_channels <= 3
    assert prunegate.count_flops(slim, x[:1]) <= prunegate.count_flops(net, x[:1]) / 2
    if scores is not None:
        assert scores[gated.mask].min() >= scores[~gated.mask].max()


def test_a_model_of_its_own_is_left_as_it_is() -> None:
    dense = models.build("resnet18", num_classes=5)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    slim = prunegate.one_shot(dense, torch.randn(1, 3, 64, 64, dtype=torch.float64), "bn", flops=0.4, round_to=8)
    assert type(slim) is type(dense)
    assert 0.35 <= prunegate.count_flops(slim, torch.zeros(1, 3, 64, 64).double()) / prunegate.count_flops(
        dense, torch.zeros(1, 3, 64, 64).double()) <= 0.4  # fmt: skip
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"score": "magic", "flops": 0.5}, "expected one of magnitude"),
        ({"score": "taylor", "flops": 0.5}, "needs batches="),
        ({"score": torch.ones(3), "flops": 0.5}, r"expected a tensor of shape \(6,\)"),
        ({"score": -torch.ones(6), "flops": 0.5}, "negative"),
        ({"flops": 0.5, "steps": 4}, "takes no steps="),
        ({}, "no budget was given"),
        ({"score": "taylor", "batches": ["text"], "flops": 0.5}, "expected a tensor"),
    ],
)
def test_bad_input(gated: prunegate.GatedModel, arguments: dict, words: str) -> None:
    with pytest.raises(prunegate.PruneGateError, match=words):
        prunegate.one_shot(gated, **arguments)


def test_a_model_without_batch_norm_is_refused_for_bn() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(prunegate.PruneGateError, match="no batch norm"):
        prunegate.one_shot(net, torch.randn(1, 4), "bn", flops=0.5)
