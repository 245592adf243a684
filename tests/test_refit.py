"""Repair after a cut: exact where an exact repair exists, and never worse where there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunegate
from tests import models


class Net(nn.Module):
    """Six channels that a second layer consumes; channel 5 is a linear combination of channels 0 and 1."""

    def __init__(self, groups: int = 1, norm: bool = False, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 4, 3, stride, 1, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.first(x))).relu().mean((2, 3)))


def dependent(net: Net) -> Net:
    models.randomise(net).eval()
    with torch.no_grad():
        for values in (net.first.weight, net.first.bias):
            values[5] = 2 * values[0] - 0.5 * values[1]
    return net


def cut(net: nn.Module, closed: list[int], example: Tensor, group: int = 0) -> nn.Module:
    gated = prunegate.attach(net, example)
    mask = gated.mask
    mask[gated.groups[group].slice.start + torch.tensor(closed)] = False
    gated.mask = mask
    return gated.export()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_channel_that_others_span_is_repaired_exactly(norm: bool, bias: bool, stride: int) -> None:
    net = dependent(Net(norm=norm, stride=stride, bias=bias))
    # Borders pad with zeros, and zero is spanned like anything else only where channels have no bias of their own.
    with torch.no_grad():
        net.first.bias.zero_()
    x = torch.randn(40, 3, 8, 8, dtype=torch.float64)
    slim = cut(net, [5], x[:1])
    broken = models.relative_error(slim(x), net(x))
    repair = prunegate.refit(slim, net, [x])
    fresh = torch.randn(10, 3, 8, 8, dtype=torch.float64)
    assert broken > 1e-2
    assert models.relative_error(slim(fresh), net(fresh)) < 1e-6
    assert [layer.name for layer in repair.layers] == ["second.weight"]
    assert repair.layers[0].after < 1e-9 < repair.layers[0].before


def test_a_constant_goes_into_the_bias() -> None:
    """A channel that always has one value: nothing is lost by removing it."""
    net = models.randomise(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))).eval()
    with torch.no_grad():
        net[0].weight[2].zero_()
        net[0].bias[2] = 7.0
    x = torch.randn(300, 5, dtype=torch.float64)
    slim = cut(net, [2], x[:1])
    assert models.relative_error(slim(x), net(x)) > 0.1
    prunegate.refit(slim, net, [x[:150], (x[150:], torch.zeros(150))])
    torch.testing.assert_close(slim(x), net(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slim[2].bias, net[2].bias + 7 * net[2].weight[:, 2], rtol=1e-5, atol=1e-5)


def test_the_solution_is_that_of_least_squares() -> None:
    net = models.randomise(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))).eval()
    x = torch.randn(4000, 5, dtype=torch.float64)
    slim = cut(net, [0, 4], x[:1])
    hidden = F.relu(slim[0](x)).detach()
    with_one = torch.cat([hidden, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    exact = torch.linalg.lstsq(with_one, net(x).detach()).solution
    repair = prunegate.refit(slim, net, [x])
    torch.testing.assert_close(slim[2].weight.T, exact[:-1], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(slim[2].bias, exact[-1], rtol=1e-2, atol=1e-2)
    assert repair.layers[0].after < repair.layers[0].before


@pytest.mark.parametrize("normed", [False, True], ids=["bias", "batch norm"])
@pytest.mark.parametrize("at_once", [60, 16, 1])
def test_chunks_give_what_all_inputs_at_once_give(at_once: int, normed: bool) -> None:
    """Against the formula on all rows together, with the ridge that was chosen; batches are of unequal sizes."""
    net = models.randomise(Net(norm=normed, bias=not normed, stride=2)).eval()
    x = torch.randn(60, 3, 8, 8, dtype=torch.float64)
    slim = cut(net, [1, 4], x[:1])
    old = slim.second.weight.detach().clone()
    rows = F.unfold(slim.first(x), 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1).detach()
    wanted = net.second(net.first(x)).movedim(1, -1).flatten(0, -2).detach()
    batches = [x[:25], (x[25:40], torch.zeros(15)), x[40:]]
    repair = prunegate.refit(slim, net, batches, at_once=at_once)
    ridge = repair.layers[0].ridge
    assert 0 < ridge < 1
    centred, outputs = rows - rows.mean(0), wanted - wanted.mean(0)
    gram = centred.T @ centred
    pull = ridge * gram.diagonal().mean()
    flat = old.flatten(1).T
    exact = torch.linalg.solve(gram + pull * torch.eye(len(gram)), centred.T @ outputs + pull * flat)
    torch.testing.assert_close(slim.second.weight.detach().flatten(1).T, exact, rtol=1e-6, atol=1e-7)
    here = rows @ exact
    if normed:
        moved = net.norm.running_mean + here.mean(0) - wanted.mean(0)
        torch.testing.assert_close(slim.norm.running_mean, moved, rtol=1e-6, atol=1e-7)
        ratio = here.var(0, correction=0) / wanted.var(0, correction=0)
        torch.testing.assert_close(slim.norm.running_var, net.norm.running_var * ratio, rtol=1e-6, atol=1e-7)
    else:
        torch.testing.assert_close(slim.second.bias.detach(), wanted.mean(0) - here.mean(0), rtol=1e-6, atol=1e-7)


def test_a_network_is_repaired_alike_in_one_pass_and_in_many() -> None:
    torch.manual_seed(0)
    net = models.timm.create_model("test_resnet", num_classes=10).double().eval()
    x = torch.randn(48, 3, 32, 32, dtype=torch.float64)
    one = prunegate.one_shot(net, x[:1], flops=0.6)
    many = copy.deepcopy(one)
    all_rows = {"rows": 10**6}
    first = prunegate.refit(one, net, [x], **all_rows)
    second = prunegate.refit(many, net, (part for part in x.split(12)), at_once=12, **all_rows)
    assert [layer.name for layer in first.layers] == [layer.name for layer in second.layers]
    assert first.norms == second.norms
    with torch.no_grad():
        wanted, a, b = net(x), one(x), many(x)
    # The halves on which ridges are chosen differ, so equal to a little only.
    assert (a - b).square().mean() < 0.05 * (a - wanted).square().mean()


def test_memory_is_that_of_one_chunk() -> None:
    """No call of either model ever sees more images than a chunk has."""
    net = models.randomise(Net(norm=True)).eval()
    x = torch.randn(40, 3, 8, 8, dtype=torch.float64)
    slim = cut(net, [5], x[:1])
    seen: list[int] = []
    for model in (net, slim):
        model.first.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    prunegate.refit(slim, net, x.split(4), at_once=8)
    assert max(seen) == 8
    assert sum(seen) >= 2 * 2 * 40  # a pass for the layer and one for the batch norm, of both models


def test_few_inputs_do_no_harm() -> None:
    """Fewer rows than unknowns: what was not seen is not made up."""
    net = models.randomise(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 3))).eval()
    x, fresh = torch.randn(20, 64, dtype=torch.float64), torch.randn(500, 64, dtype=torch.float64)
    slim = cut(net, list(range(0, 128, 2)), x[:1])
    before = (slim(fresh) - net(fresh)).square().mean()
    prunegate.refit(slim, net, [x])
    assert (slim(fresh) - net(fresh)).square().mean() < 1.05 * before


def test_padding_that_a_module_does_by_itself_is_seen() -> None:
    """Same-padding convolutions of timm pad in their own forward."""
    net = models.build("tf_efficientnet_lite0", num_classes=4)
    x = torch.randn(12, 3, 65, 65, dtype=torch.float64)
    slim = prunegate.one_shot(net, x[:1], flops=0.8)
    dense_before = copy.deepcopy(net.state_dict())
    repair = prunegate.refit(slim, net, [x])
    assert repair.skipped == {}
    assert len(repair.layers) > 30
    assert len(repair.norms) == sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert all(torch.equal(dense_before[name], value) for name, value in net.state_dict().items())


def test_batch_norms_follow_what_changed() -> None:
    """New statistics are the old ones, moved as the inputs' own statistics moved."""
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), head)
    models.randomise(net).eval()
    x = torch.randn(50, 3, 4, 4, dtype=torch.float64)
    slim = cut(net, [1], x[:1])
    prunegate.refit(slim, net, [x])
    there, here = net[:3](x), slim[:3](x)
    mean = net[3].running_mean + here.mean((0, 2, 3)) - there.mean((0, 2, 3))
    ratio = here.var((0, 2, 3), correction=0) / there.var((0, 2, 3), correction=0)
    torch.testing.assert_close(slim[3].running_mean, mean)
    torch.testing.assert_close(slim[3].running_var, net[3].running_var * ratio)


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "vit_tiny_patch16_224", "convnext_atto", "regnety_002"])
def test_real_architectures_come_nearer_to_the_dense_model(name: str) -> None:
    torch.manual_seed(0)
    net = models.timm.create_model(name, num_classes=10, **({"img_size": 64} if "vit" in name else {})).eval()
    x = torch.randn(48, 3, 64, 64)
    slim = prunegate.one_shot(net, x[:1], flops=0.7)
    with torch.no_grad():
        before = (slim(x) - net(x)).square().mean()
        repair = prunegate.refit(slim, net, [x])
        assert (slim(x) - net(x)).square().mean() < 0.75 * before
    assert len(repair.layers) >= 10


def test_bad_input() -> None:
    net = models.randomise(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))).eval()
    x = torch.randn(30, 5, dtype=torch.float64)
    slim = cut(net, [0], x[:1])
    other = models.randomise(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)))
    for arguments, words in (
        ((net, net, [x]), "was not cut"),
        ((slim, slim, [x]), "was cut itself"),
        ((slim, other, [x]), "pass the model that was cut"),
        ((slim, net, []), "batches= is empty"),
        ((slim, net, [x, x[:, :3]]), "cannot run on a batch of"),
    ):
        with pytest.raises(prunegate.PruneGateError, match=words):
            prunegate.refit(*arguments)
