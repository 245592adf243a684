"""Where an operator's gate acts: the same gradient as a factor on the output, at next to no memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import prunegate
from prunegate import Choice, Kernel
from prunegate.gated import GatedModel
from prunegate.labels.endings import Ending, endings

WIDTH = 4


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


class Residual(nn.Module):
    """The input passes through unscaled if the last layer alone is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class TwoBranches(nn.Module):
    """Both branches end in parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.scale = nn.Parameter(torch.rand(WIDTH, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x.sin()) + self.b(x) * self.scale) / 2


class UsedTwice(nn.Module):
    """What the last layer gives is squared too, so its parameters must not be scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + y.square()


class TiedLayers(nn.Module):
    """One layer is the last and the first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu())


class Smoothed(nn.Module):
    """Linear in the input, which is read twice."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + F.avg_pool2d(x, 3, 1, 1)[..., :] - x.flip(-1)


class InnerChain(nn.Module):
    """The first layer would be scaled, and the last again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y + self.last(y)


class ChangedInPlace(nn.Module):
    """Linear in the input, until something is added to it in its place."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(x, 3, 1, 1)
        y.add_(1.0)
        return y


def conv_norm() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH))


OPERATORS: dict[str, tuple[Callable[[], nn.Module], str, set[str]]] = {
    "norm": (conv_norm, "parameters", {"2.weight", "2.bias"}),
    "convolution": (lambda: nn.Conv2d(WIDTH, WIDTH, 1), "parameters", {"weight", "bias"}),
    "dropout": (lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.Dropout(0.0)), "parameters",
                {"0.weight", "0.bias"}),
    "group norm": (lambda: nn.GroupNorm(2, WIDTH), "parameters", {"weight", "bias"}),
    "plain norm": (lambda: nn.BatchNorm2d(WIDTH, affine=False), "output", set()),
    "branches": (TwoBranches, "parameters", {"a.weight", "a.bias", "scale"}),
    "skip": (nn.Identity, "input", set()),
    "pool": (lambda: nn.AvgPool2d(3, 1, 1), "input", set()),
    "smoothed": (Smoothed, "input", set()),
    "nothing": (Nothing, "none", set()),
    "activation": (nn.ReLU, "output", set()),
    "residual": (Residual, "output", set()),
    "used twice": (UsedTwice, "output", set()),
    "tied": (TiedLayers, "output", set()),
    "chain": (InnerChain, "output", set()),
    "in place": (ChangedInPlace, "output", set()),
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, operators: list[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 1)
        self.choice = Choice(operators)
        self.head = nn.Conv2d(WIDTH, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.choice(x)).tanh())


def searching(operators: list[nn.Module], paths: str = "single") -> tuple[GatedModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    gated = prunegate.attach(Net(operators).double(), x[:1], units=(), paths=paths)
    gated.prunegate.phase = "search"
    return gated.train(), x


def expected_gradient(gated: GatedModel, x: Tensor, route: Any) -> Tensor:
    """Of the logits: the network written out, every output times a factor that is a leaf, then the sampler's part."""
    net: Any = copy.deepcopy(gated._dense).train()
    factors = route.weights.detach().double().requires_grad_()
    total = stem = net.stem(x)
    for index in route.running:
        total = total + factors[index] * net.choice.operators[index](stem)
    net.head(total.tanh()).square().sum().backward()
    (found,) = torch.autograd.grad(route.weights, gated.logits, factors.grad.to(route.weights.dtype))
    return found


@pytest.mark.parametrize("paths", ["single", "all", "topk"])
@pytest.mark.parametrize("name", OPERATORS)
def test_gradient_is_that_of_a_factor_on_the_output(name: str, paths: str) -> None:
    gated, x = searching([OPERATORS[name][0](), conv_norm(), nn.Tanh()], paths)
    seen = 0
    for seed in range(12):
        torch.manual_seed(seed)
        out = gated(x)
        route = gated.prunegate.sample.routes["choice"]
        seen += 0 in route.running
        out.square().sum().backward(retain_graph=True)
        found = gated.prunegate.take_gradient()
        if found is None:  # an operator without a gate ran alone
            assert name == "nothing"
            found = torch.zeros_like(gated.logits)
        expected = expected_gradient(gated, x, route)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert name == "nothing" or 0 not in route.running or bool(found.abs().max() > 1e-4)
    assert seen > 2


@pytest.mark.parametrize("name", OPERATORS)
def test_gates_act_where_it_is_cheap_and_nowhere_else(name: str) -> None:
    make, kind, parameters = OPERATORS[name]
    gated, _ = searching([make(), nn.Tanh()])
    first, second = endings(gated.trace)["choice"]
    assert first == Ending(kind, first.parameters)
    assert set(first.parameters) == {f"choice.operators.0.{name}" for name in parameters}
    assert second == Ending("output")


def test_parameters_that_others_read_are_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(WIDTH, WIDTH, 1)
            self.choice = Choice([nn.Sequential(nn.Tanh(), self.conv), nn.Tanh()])

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.choice(x))

    gated = prunegate.attach(Shared(), torch.randn(1, WIDTH, 3, 3), units=())
    assert endings(gated.trace)["choice"][0] == Ending("output")


def test_a_choice_that_runs_twice_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choice = Choice([nn.Conv2d(WIDTH, WIDTH, 1), nn.Identity()])

        def forward(self, x: Tensor) -> Tensor:
            return self.choice(self.choice(x).tanh())

    gated = prunegate.attach(Twice(), torch.randn(1, WIDTH, 3, 3), units=())
    assert {each.kind for each in endings(gated.trace)["choice"]} == {"output"}


def test_a_skip_that_is_changed_in_place_later_is_copied() -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, WIDTH, 1)
            self.choice = Choice([nn.Identity(), nn.Tanh()])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.choice(x)
            y += 1
            return y * x

    x = torch.randn(2, 3, 4, 4)
    gated = prunegate.attach(Changed(), x[:1], units=())
    assert endings(gated.trace)["choice"][0] == Ending("output")
    gated.prunegate.phase = "search"
    for _ in range(8):
        gated.train()(x).sum().backward()
    assert bool(gated.prunegate.take_gradient().any())


def test_an_outer_gate_acts_through_an_inner_choice() -> None:
    torch.manual_seed(0)
    inner = Choice([nn.Conv2d(WIDTH, WIDTH, 1), conv_norm()])
    gated, x = searching([nn.Sequential(nn.Tanh(), inner), nn.Tanh()])
    found = endings(gated.trace)
    outer, site = found["choice"][0], "choice.operators.0.1"
    assert outer.kind == "parameters"
    assert set(outer.parameters) == {name for each in found[site] for name in each.parameters}
    for _ in range(10):
        out = gated(x)
        routes = gated.prunegate.sample.routes
        assert routes is not None
        out.square().sum().backward()
        gradient = gated.prunegate.take_gradient()
        assert gradient is not None
        own, outer_slice = gated.gate_map.choices[site], gated.gate_map.choices["choice"]
        if routes["choice"].running == (0,):
            # The outer factor scales what the inner one scales, so both see one derivative, each times its sampler's.
            ran = routes[site].running[0]
            assert bool(gradient[own].any())
            assert float(gradient[outer_slice.start]) * float(gradient[own.start + ran]) > 0
        else:
            assert not bool(gradient[own].any())


class Cell(nn.Module):
    """A node that three edges lead to, and one after it: sums keep nothing for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.BatchNorm2d(WIDTH))
        self.edges = nn.ModuleList(
            Choice([conv_norm(), nn.AvgPool2d(3, 1, 1), nn.Identity(), Nothing()], ["conv", "pool", "skip", "none"])
            for _ in range(4)
        )
        self.head = conv_norm()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.edges[3](self.edges[0](x) + self.edges[1](x) + self.edges[2](x)))


def fixed_path(gated: GatedModel, chosen: dict[str, str]) -> nn.Module:
    """Makes every draw take these operators; the network that has no others, in train mode."""
    gated.choose(chosen)
    fixed = gated.export().train()
    with torch.no_grad():
        gated.logits.copy_(torch.where(gated.mask, 100.0, -100.0))
    gated.mask = None
    gated.prunegate.phase = "search"
    gated.train()
    return fixed


def peak_bytes(model: nn.Module, x: Tensor) -> int:
    """The most that the allocator held during a training step, above what was there before."""
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model(x).square().mean().backward()
    model.zero_grad(set_to_none=True)
    held = peak = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


PATHS = ["conv conv conv conv", "conv pool none conv", "skip skip skip skip", "pool skip conv skip",
         "none skip pool skip", "skip none none conv", "pool pool pool pool"]  # fmt: skip


def named(chosen: str) -> dict[str, str]:
    return {f"edges.{at}": name for at, name in enumerate(chosen.split())}


@pytest.mark.parametrize("chosen", PATHS)
def test_one_path_takes_the_memory_of_the_fixed_network(chosen: str) -> None:
    gated = prunegate.attach(Cell(), torch.randn(1, 3, 16, 16), units=())
    fixed = fixed_path(gated, named(chosen))
    x = torch.randn(8, 3, 16, 16)
    assert peak_bytes(gated, x) <= 1.1 * peak_bytes(fixed, x)


def test_values_that_are_made_again_are_those_that_would_be_kept() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    cell = Cell().double()
    for parameter in cell.parameters():  # norms that do something
        nn.init.normal_(parameter)
    gated = prunegate.attach(cell, x[:1], units=())
    gated.prunegate.phase = "search"
    gated.train()
    found = []
    for seed in range(25):
        for keep in (False, True):
            torch.manual_seed(seed)
            # Where somebody else decides how tensors are kept, none is made again.
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t) if keep else nullcontext():
                out = gated(x)
            out.square().sum().backward()
            gradient = gated.prunegate.take_gradient()
            found.append(torch.zeros_like(gated.logits) if gradient is None else gradient)
        torch.testing.assert_close(found[-2], found[-1], rtol=1e-5, atol=1e-6)
    assert bool(torch.stack(found).ne(0).any(0).all())


def test_gates_learn_the_same_under_activation_checkpointing() -> None:
    torch.manual_seed(0)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Cell()
            self.checkpoints = False

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.cell, x, use_reentrant=False) if self.checkpoints else self.cell(x)

    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    gated = prunegate.attach(Checkpointed().double(), x[:1], units=())
    gated.prunegate.phase = "search"
    gated.train()
    for seed in range(5):
        found = []
        for checkpoints in (False, True):
            gated.model.checkpoints = checkpoints
            torch.manual_seed(seed)
            gated(x).square().sum().backward()
            gradient = gated.prunegate.take_gradient()
            found.append(torch.zeros_like(gated.logits) if gradient is None else gradient)
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", ["3", "5"])
def test_kernels_are_scaled_in_their_weight(size: str) -> None:
    torch.manual_seed(0)
    kernel = Kernel(nn.Conv2d(WIDTH, WIDTH, 5, padding=2), sizes=(3, 5))
    x = torch.randn(2, WIDTH, 7, 7)
    factor = torch.tensor(0.7, requires_grad=True)
    index = kernel.names.index(size)
    scaled = kernel.run_scaled(index, (x,), {}, factor)
    torch.testing.assert_close(scaled, 0.7 * kernel.run(index, (x,), {}))
    scaled.square().sum().backward()
    expected = (2 * 0.7 * kernel.run(index, (x,), {}).square()).sum()
    torch.testing.assert_close(factor.grad, expected.detach())
