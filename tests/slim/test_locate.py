"""A recorded call is found in the source, also where several calls end at one place or begin on other lines."""

import ast
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunegate.labels.record import FrameRecord, capture_frame
from prunegate.plan import CallSite, Step
from prunegate.slim.locate import locate, locate_call


class Watch(TorchFunctionMode):
    """Keeps the name and frame of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, FrameRecord | None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ != "__get__":
            self.calls.append((func.__name__, capture_frame(sys._getframe(1))))
        return func(*args, **(kwargs or {}))


def helper(x: Tensor) -> Tensor:
    return inner(x) + 1


def inner(x: Tensor) -> Tensor:
    return x.abs().abs()


class Forms(nn.Module):
    """Calls of every form."""

    def forward(self, x: Tensor) -> Tensor:
        y = (
            x.relu()
            .relu()
            .reshape(
                -1,
            )
            .neg()
        )
        z = (y * y) @ y.relu() - y[1:][0].neg()
        parts = [part.exp() for part in (y, z)]
        z *= parts[0].sum()
        z = self.other(helper(z))
        return helper(z) + (lambda t: t.cos())(z)

    def other(self, x: Tensor) -> Tensor:
        x[...] = torch.zeros(())
        return x


FORWARD = f"{__name__}:Forms.forward"


def expected(call: str, ordinal: int, function: str = FORWARD, *via: Step) -> CallSite:
    return CallSite("net", function, call, ordinal, via)


def test_every_call_is_found_in_order() -> None:
    model, watch, x = Forms(), Watch(), torch.randn(3)
    with watch:
        model(x)
    sites = [locate(frame, name, {id(model): "net"}) for name, frame in watch.calls]
    in_helper = [
        (
            expected("abs", 0, f"{__name__}:inner", Step(FORWARD, "helper", n), Step(f"{__name__}:helper", "inner", 0)),
            expected("abs", 1, f"{__name__}:inner", Step(FORWARD, "helper", n), Step(f"{__name__}:helper", "inner", 0)),
            expected("__add__", 0, f"{__name__}:helper", Step(FORWARD, "helper", n)),
        )
        for n in range(2)
    ]  # fmt: skip
    assert sites == [
        expected("relu", 0), expected("relu", 1), expected("reshape", 0), expected("neg", 0),
        expected("__mul__", 0), expected("relu", 2), expected("__matmul__", 0),
        expected("__getitem__", 0), expected("__getitem__", 1), expected("neg", 1), expected("__sub__", 0),
        expected("exp", 0), expected("exp", 0), expected("sum", 0), expected("__imul__", 0),
        *in_helper[0],
        expected("zeros", 0, f"{__name__}:Forms.other"), expected("__setitem__", 0, f"{__name__}:Forms.other"),
        *in_helper[1], expected("cos", 0), expected("__add__", 0),
    ]  # fmt: skip


def test_node_is_the_call() -> None:
    model, watch, x = Forms(), Watch(), torch.randn(3)
    with watch:
        model(x)
    texts = []
    for name, frame in watch.calls[:4]:
        located = locate_call(frame, name)
        assert located is not None
        assert isinstance(located.call.node, ast.Call)
        texts.append(ast.unparse(located.call.node))
    assert texts == ["x.relu()", "x.relu().relu()", "x.relu().relu().reshape(-1)", "x.relu().relu().reshape(-1).neg()"]


def test_what_has_no_place_in_a_module() -> None:
    watch, x = Watch(), torch.randn(3)
    with watch:
        helper(x)
    assert [locate(frame, name, {}) for name, frame in watch.calls] == [None] * 3
    assert locate(None, "relu", {}) is None


@pytest.mark.parametrize("modules", [{}, {1: "net"}])
def test_module_without_a_name(modules: dict[int, str]) -> None:
    model, watch, x = Forms(), Watch(), torch.randn(3)
    with watch:
        model(x)
    name, frame = watch.calls[0]
    assert locate(frame, name, modules) is None
