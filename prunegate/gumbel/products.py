"""A tensor times gates along one of its dimensions, with both gradients in one visit to memory.

Torch's operations pass over tensors of the size of the product eight times, forward and backward. One kernel in C does
with five; where it cannot run, and where something looks on that must see torch's operations, those are used.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from prunegate.gumbel import cpu
from prunegate.gumbel.arguments import is_plain_eager

__all__ = ["gated_product"]

def gated_product(x: Tensor, gate: Tensor) -> Tensor:
    """``x`` times ``gate``, in the dtype of ``x``.

    Args:
        x: What is gated, of any shape.
        gate: Gates, of a shape that broadcasts to that of ``x``; differentiated through.

    Returns:
        The product, with the shape and dtype of ``x``.

    Example:
        >>> gated_product(torch.ones(2, 3), torch.tensor([[1.0, 0.0, 1.0]]))
        tensor([[1., 0., 1.],
                [1., 0., 1.]])
    """
    if x.dtype == gate.dtype == torch.float32 and is_plain_eager(x) and type(gate) is Tensor and _on_cpu(x, gate):
        view = _rows_of(x.shape, x.stride(), gate.shape) if gate.is_contiguous() else None
        if view is not None:
            return _Product.apply(x, gate, view)
    return x * gate.to(x.dtype)


def _on_cpu(x: Tensor, gate: Tensor) -> bool:
    return x.is_cpu and gate.is_cpu and cpu.load()[0] is not None


@functools.lru_cache(maxsize=4096)
def _rows_of(shape: torch.Size, stride: tuple[int, ...], gate: torch.Size) -> tuple[int, int, int] | None:
    """Numbers of rows, channels and elements in a run, as which a tensor lies in memory; ``None`` where it does not."""
    dims = [dim - len(gate) for dim, size in enumerate(gate) if size > 1]
    count = shape.numel()
    if len(dims) != 1 or len(gate) > len(shape) or shape[dims[0]] != gate[dims[0]] or not count:
        return None
    dim = dims[0] % len(shape)
    # Dimensions from the one that varies slowest: rows, channels, then runs; dimensions of size 1 lie anywhere.
    order = sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: -stride[d])
    run = 1
    for d in reversed(order):
        if stride[d] != run:
            return None
        run *= shape[d]
    return count // (shape[dim] * stride[dim]), shape[dim], stride[dim]


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, view: tuple[int, int, int]) -> Tensor:
        out = torch.empty_like(x)
        cpu.product_forward(x, gate, view, out)
        ctx.save_for_backward(x, gate)
        ctx.view = view
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, gate = ctx.saved_tensors
        to_x, to_gate, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or not is_plain_eager(gradient) or not _alike(gradient, x):
            return gradient * gate if to_x else None, (gradient * x).sum_to_size(gate.shape) if to_gate else None, None
        out = torch.empty_like(x) if to_x else None
        if to_gate:
            return out, cpu.product_backward(gradient, x, gate, ctx.view, out), None
        assert out is not None
        cpu.product_forward(gradient, gate, ctx.view, out)
        return out, None, None


def _alike(gradient: Tensor, x: Tensor) -> bool:
    """Whether both lie in memory in the same way; where a dimension of size 1 lies says nothing."""
    if gradient.dtype != x.dtype:
        return False
    strides = zip(gradient.stride(), x.stride(), x.shape, strict=True)
    return gradient.stride() == x.stride() or all(own == other or size == 1 for own, other, size in strides)
