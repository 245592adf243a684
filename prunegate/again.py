"""Values that backward can make again from what it keeps anyway.

The gradient of a gate on a skip is the product of the skip's value with the gradient that arrives there. To keep the
value would be to keep an activation that the network without gates does not: a sum keeps nothing of its terms. But what
the sum was made of is mostly there: a batch norm keeps its input and its statistics, a pooling and a convolution their
input, a rectifier its result. So the value is made again, by a few steps, when its turn comes: whatever it was made of
is upstream, and backward frees nothing there before it has been here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["carry"]

_MOST_STEPS = 24


def carry(value: Tensor, weight: Tensor) -> Tensor:
    """``value``, as the product with a factor that is 1: not copied, and kept only if it cannot be made again.

    Args:
        value: Any floating-point tensor.
        weight: A tensor of no dimensions whose value is 1; it gets the gradient of the product.
    """
    return _Carry.apply(value, weight, _source_of(value))


class _Carry(torch.autograd.Function):
    """See :func:`carry`."""

    @staticmethod
    def forward(value: Tensor, weight: Tensor, source: Any) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Any], output: Tensor) -> None:
        value, weight, ctx.source = inputs
        ctx.kept = 1 if ctx.source is None else 0
        ctx.save_for_backward(weight, *([value] if ctx.source is None else []))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weight, *kept = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return gradient, None, None
        with torch.no_grad():
            value = kept[0] if kept else _Maker().value(ctx.source)
        found = torch.dot(gradient.reshape(-1), value.to(gradient.dtype).reshape(-1))
        return gradient, found.to(weight.dtype).reshape(weight.shape), None


def _source_of(value: Tensor) -> Any:
    """The node of the graph from which ``value`` can be made again, ``None`` if it must be kept."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or value.grad_fn is None:
        return None
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None  # what others keep in another way, checkpointing above all, may be read once only
    return value.grad_fn if _steps(value.grad_fn, {}) <= _MOST_STEPS else None


def _steps(node: Any, seen: dict[Any, int]) -> int:
    """How many steps make the value of ``node`` again; more than the most if it cannot be."""
    if node in seen:
        return 0
    seen[node] = 1
    name = _name(node)
    if name not in _MAKERS or not _KNOWN.get(name, lambda node: True)(node):
        return _MOST_STEPS + 1
    count = 1
    for before in _NEEDS[name](node):
        count += _MOST_STEPS + 1 if before is None else _steps(before, seen)
        if count > _MOST_STEPS:
            break
    return count


def _name(node: Any) -> str:
    return "carry" if isinstance(node, _Carry._backward_cls) else str(node.name())


class _Maker:
    """Makes values again, each once."""

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}

    def value(self, node: Any) -> Tensor:
        """The value that the forward gave at a node."""
        if node not in self._made:
            name = _name(node)
            self._made[node] = _MAKERS[name](node, [self.value(before) for before in _NEEDS[name](node)])
        return self._made[node]


def _before(node: Any, *numbers: int) -> list[Any]:
    return [node.next_functions[number][0] for number in numbers]


def _bias(node: Any) -> list[Any]:
    """The node of a bias, none where there is none."""
    return [before for before in _before(node, 2) if before is not None]


def _normalised(node: Any, before: list[Tensor]) -> Tensor:
    given = node._saved_input
    shape = [1, -1] + [1] * (given.ndim - 2)
    scale = node._saved_result2 * node._saved_weight
    return (given - node._saved_result1.view(shape)) * scale.view(shape) + before[0].view(shape)


def _convolved(node: Any, before: list[Tensor]) -> Tensor:
    return torch.ops.aten.convolution(
        node._saved_input, node._saved_weight, before[0] if before else None, node._saved_stride, node._saved_padding,
        node._saved_dilation, node._saved_transposed, node._saved_output_padding, node._saved_groups,
    )  # fmt: skip


def _pooled(node: Any, before: list[Tensor]) -> Tensor:
    return F.avg_pool2d(
        node._saved_self, node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_ceil_mode,
        node._saved_count_include_pad, node._saved_divisor_override,
    )  # fmt: skip


# By the name of a node of the graph: what it needs beside what it keeps, and how its value is made from both.
_NEEDS: dict[str, Callable[[Any], list[Any]]] = {
    "carry": lambda node: [] if node.kept else [node.source],
    "torch::autograd::AccumulateGrad": lambda node: [],
    "AddBackward0": lambda node: _before(node, 0, 1),
    "MulBackward0": lambda node: [] if node._saved_self is not None else _before(node, 0),
    "ReluBackward0": lambda node: [],
    "NativeBatchNormBackward0": lambda node: _before(node, 2),
    "ConvolutionBackward0": _bias,
    "AvgPool2DBackward0": lambda node: [],
}
_MAKERS: dict[str, Callable[[Any, list[Tensor]], Tensor]] = {
    "carry": lambda node, before: before[0] if before else node.saved_tensors[1],
    "torch::autograd::AccumulateGrad": lambda node, before: node.variable,
    "AddBackward0": lambda node, before: before[0] + before[1],
    "MulBackward0": lambda node, before: (before[0] if before else node._saved_self) * node._saved_other,
    "ReluBackward0": lambda node, before: node._saved_result,
    "NativeBatchNormBackward0": _normalised,
    "ConvolutionBackward0": _convolved,
    "AvgPool2DBackward0": _pooled,
}
_KNOWN: dict[str, Callable[[Any], bool]] = {
    "AddBackward0": lambda node: node._saved_alpha == 1,
    "MulBackward0": lambda node: node._saved_other is not None,
    "NativeBatchNormBackward0": lambda node: node._saved_training and node._saved_weight is not None,
}
