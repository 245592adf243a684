"""Kernel sizes that share one weight: equality with plain convolutions, exact costs, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunegate
from prunegate import Choice, Kernel
from tests.models import randomise, relative_error


class Net(nn.Module):
    """A free convolution, a depthwise one with stride, and one inside a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Kernel(nn.Conv2d(3, 8, 5, padding=2), (3, 5))
        self.expand = nn.Conv2d(8, 12, 1)
        self.depthwise = Kernel(nn.Conv2d(12, 12, 7, stride=2, padding=3, groups=12, bias=False))
        self.norm = nn.BatchNorm2d(12)
        self.last = Choice([Kernel(nn.Conv2d(12, 12, 5, padding=4, dilation=2), (1, 5)), nn.Identity()])
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, 4]."""
        x = F.hardswish(self.expand(F.relu(self.stem(x))))
        x = F.relu(self.norm(self.depthwise(x)))
        return self.head(self.last(x).mean((2, 3)))


def made() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return randomise(Net()).eval(), torch.randn(2, 3, 12, 12, dtype=torch.float64)


@pytest.mark.parametrize("stem", ["3", "5"])
@pytest.mark.parametrize("depthwise", ["3", "5", "7"])
@pytest.mark.parametrize("last", ["0.1", "0.5", "1"])
def test_export_has_plain_convolutions_that_compute_the_same(stem: str, depthwise: str, last: str) -> None:
    model, x = made()
    gated = prunegate.attach(model, x)
    place, _, size = last.partition(".")
    wanted = {"stem": stem, "depthwise": depthwise, "last": place}
    gated.choose(wanted | ({"last.operators.0": size} if size else {}))
    generator = torch.Generator().manual_seed(1)
    mask = gated.mask
    for group in gated.groups:
        if group.kind != "choice":
            mask[group.slice] = torch.rand(group.size, generator=generator) < 0.6
            mask[group.slice.start] = True
    gated.mask = mask
    slim: Any = gated.export()
    assert relative_error(gated(x), slim(x)) < 1e-8
    assert gated.cost.flops(mask) == prunegate.count_flops(slim, x)
    assert gated.cost.params(mask) == sum(p.numel() for p in slim.parameters())
    assert type(slim.stem) is nn.Conv2d
    assert slim.stem.kernel_size == (int(stem),) * 2
    assert slim.depthwise.kernel_size == (int(depthwise),) * 2
    assert slim.depthwise.groups == slim.depthwise.out_channels == slim.expand.out_channels
    assert slim.depthwise.padding == (int(depthwise) // 2,) * 2
    plan = prunegate.Plan.from_json(gated.plan().to_json())
    torch.testing.assert_close(prunegate.apply_plan(model, plan)(x), slim(x), rtol=0, atol=0)


def test_small_kernels_are_the_centre_of_the_large_one() -> None:
    conv = nn.Conv2d(3, 4, 7, padding=3, stride=2)
    gated = prunegate.attach(nn.Sequential(Kernel(conv), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.zeros(1, 3, 9, 9))
    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(gated(x), gated.model(x))
    for size in (3, 5, 7):
        gated.choose({"0": str(size)})
        cut = (7 - size) // 2
        weight = conv.weight[:, :, cut : 7 - cut, cut : 7 - cut]
        expected = F.conv2d(x, weight, conv.bias, stride=2, padding=size // 2)
        torch.testing.assert_close(gated.export()[0](x), expected)


def test_expected_parameters_of_a_kernel_are_exact() -> None:
    net = nn.Sequential(Kernel(nn.Conv1d(2, 2, 5, padding=2, bias=False), (1, 3, 5)), nn.Conv1d(2, 2, 1, bias=False))
    gated = prunegate.attach(net, torch.zeros(1, 2, 8), units=())
    gated.logits.data = torch.tensor([0.3, -0.2, 0.9])
    chances = torch.softmax(gated.logits.detach(), 0).double()
    sizes = torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(gated.cost.expected_params().detach().double(), (chances * (4 * sizes + 4)).sum(),
                               rtol=1e-6, atol=0)  # fmt: skip
    assert gated.cost.params() == 24


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, x = made()
    gated = prunegate.attach(model, x)
    gated.choose({"stem": "3", "depthwise": "5", "last.operators.0": "1"})
    slim = gated.export()
    prunegate.save(slim, tmp_path / "slim.safetensors", builder=Net)
    twin = prunegate.load(tmp_path / "slim.safetensors", allow=("tests.test_kernel_choice",))
    torch.testing.assert_close(twin(x), slim(x), rtol=0, atol=0)


def test_search_brings_kernels_to_a_budget() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 3, 12, 12)
    gated = prunegate.attach(net, x)
    budget = prunegate.Budget(gated, flops=0.3, steps=20)
    for _ in range(20):
        (gated(x).square().mean() + budget.loss()).backward()
        budget.step()
    assert gated.cost.flops(gated.mask) <= 0.3 * gated.cost.flops()
    assert prunegate.count_flops(gated.export(), x) == gated.cost.flops(gated.mask)


@pytest.mark.parametrize(
    ("conv", "sizes", "message"),
    [
        (nn.Linear(2, 2), (3, 5), "a Linear"),
        (nn.Conv2d(2, 2, 5, padding=2), (4, 5), "odd"),
        (nn.Conv2d(2, 2, 5, padding=2), (5,), "two or more"),
        (nn.Conv2d(2, 2, 5, padding=2), (5, 5), "all different"),
        (nn.Conv2d(2, 2, 5, padding=2), (3, 7), "largest size"),
        (nn.Conv2d(2, 2, (5, 3), padding=2), (3, 5), "every dimension"),
        (nn.Conv2d(2, 2, 5), (3, 5), "pad by more"),
        (nn.Conv2d(2, 2, 5, padding="same"), (3, 5), "by numbers"),
        (nn.Conv2d(2, 2, 5, padding=2, padding_mode="reflect"), (3, 5), "zeros"),
    ],
)
def test_what_does_not_fit_is_refused(conv: nn.Module, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(prunegate.AttachError, match=message):
        Kernel(conv, sizes)
