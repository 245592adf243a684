"""An optimizer's state after a cut."""

import copy

import pytest
import torch
from torch import nn

import prunegate
from prunegate.errors import PruneGateError


def _trained(make):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    gated = prunegate.attach(net, torch.randn(1, 4).double())
    gated.mask = [True, False] * 4
    optimizer = make([p for p in gated.parameters() if p is not gated.logits])
    for _ in range(3):
        gated(torch.randn(5, 4).double()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return gated, optimizer


def _optimizers():
    return {
        "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1),
        "adam": lambda p: torch.optim.Adam(p, 0.01),
        "adamw": lambda p: torch.optim.AdamW([{"params": p[:2], "lr": 0.02}, {"params": p[2:]}], 0.01),
        "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    }


@pytest.mark.parametrize("name", _optimizers())
def test_the_slim_model_goes_on_as_the_masked_one_would(name):
    gated, optimizer = _trained(_optimizers()[name])
    slim = gated.export()
    moved = prunegate.transfer_optimizer(optimizer, gated, slim)
    x = torch.randn(6, 4).double()
    for _ in range(3):
        for model, its in ((gated, optimizer), (slim, moved)):
            its.zero_grad()
            model(x).square().sum().backward()
            its.step()
    again = gated.export()
    for ours, oracle in zip(slim.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)


def test_the_old_optimizer_is_left_alone():
    gated, optimizer = _trained(_optimizers()["adam"])
    before = copy.deepcopy(optimizer.state_dict())
    slim = gated.export()
    moved = prunegate.transfer_optimizer(optimizer, gated, slim)
    slim(torch.randn(2, 4).double()).sum().backward()
    moved.step()
    after = optimizer.state_dict()
    for key, state in before["state"].items():
        torch.testing.assert_close(after["state"][key], state, rtol=0, atol=0)


def test_logits_are_left_out():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    gated = prunegate.attach(net, torch.randn(1, 4))
    optimizer = torch.optim.AdamW(gated.parameters())
    gated.mask = [True] * 5 + [False] * 3
    moved = prunegate.transfer_optimizer(optimizer, gated, gated.export())
    assert [tuple(p.shape) for p in moved.param_groups[0]["params"]] == [(5, 4), (5,), (3, 5), (3,)]


def test_another_optimizer_takes_the_state_over_beside_parameters_of_its_own():
    gated, optimizer = _trained(lambda p: torch.optim.AdamW([*p, *nn.Linear(3, 2).double().parameters()], 0.01))
    slim, new = gated.export(), nn.Linear(3, 5)
    into = torch.optim.AdamW([{"params": new.parameters(), "lr": 0.5}, {"params": slim.parameters()}], 0.25)
    assert prunegate.transfer_optimizer(optimizer, gated, slim, into) is into
    assert [group["lr"] for group in into.param_groups] == [0.5, 0.25]
    assert not any(parameter in into.state for parameter in new.parameters())
    mine = optimizer.state[gated.get_parameter("0.weight")]
    moved = into.state[slim[0].weight]
    assert torch.equal(moved["exp_avg"], mine["exp_avg"][::2])
    assert int(moved["step"]) == 3
    with pytest.raises(PruneGateError, match=r"does not train '0\.weight'"):
        prunegate.transfer_optimizer(optimizer, gated, slim, torch.optim.AdamW(new.parameters()))


def test_what_does_not_belong_together_is_refused():
    gated, optimizer = _trained(_optimizers()["sgd"])
    slim = gated.export()
    gated.mask = [True] * 6 + [False] * 2
    with pytest.raises(PruneGateError, match="before the mask is changed"):
        prunegate.transfer_optimizer(optimizer, gated, slim)
    foreign = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(PruneGateError, match=r"made from gated\.parameters"):
        prunegate.transfer_optimizer(foreign, gated, slim)
