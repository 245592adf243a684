"""Results of the heavy operations without computing them.

Labels depend on shapes, never on activation values, and a forward's time is in its contractions. So while a model is
traced, convolutions and matrix products return zeros of the right shape and layout. Whatever is out of the ordinary
(types or devices that differ, sizes that do not fit) is left to the real operation, which says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ShapesOnly", "result_without_computing"]


class ShapesOnly(TorchDispatchMode):
    """Runs a model for its shapes: contractions give zeros, the rest is computed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs or skips one operation."""
        result = None if kwargs else result_without_computing(plain_name(func), args)
        return func(*args, **(kwargs or {})) if result is None else result


def plain_name(func: Any) -> str:
    """Name of an ATen operation without namespace, overload and the underscores around it."""
    name: str = func._schema.name.split("::")[-1].strip("_")
    return name


def result_without_computing(name: str, args: Sequence[Any]) -> Tensor | None:
    """What the ATen operation ``name`` would return, as zeros; ``None`` where the operation must run."""
    shape = _SHAPES.get(name)
    if shape is None:
        return None
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    first = tensors[0]
    if any(t.dtype != first.dtype or t.device != first.device or t.layout != torch.strided for t in tensors):
        return None
    sizes = shape(*args)
    if sizes is None:
        return None
    result = torch.zeros(sizes, dtype=first.dtype, device=first.device)
    if name == "convolution" and _channels_last(args[0], args[1]):
        return result.contiguous(memory_format=torch.channels_last)
    return result


def _channels_last(source: Tensor, weight: Tensor) -> bool:
    """Whether a convolution of these keeps channels innermost."""
    return any(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
               for t in (source, weight))  # fmt: skip


def _convolution(source: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
                 dilation: list[int], transposed: bool, output_padding: list[int],
                 groups: int) -> list[int] | None:  # fmt: skip
    n = source.dim() - 2
    if transposed or n < 1 or weight.dim() != source.dim() or source.shape[1] != weight.shape[1] * groups:
        return None
    if weight.shape[0] % groups or (bias is not None and bias.shape != (weight.shape[0],)):
        return None
    sizes = [source.shape[0], weight.shape[0]]
    for at in range(n):
        s, p, d = (each[at if len(each) > 1 else 0] for each in (stride, padding, dilation))
        sizes.append((source.shape[2 + at] + 2 * p - d * (weight.shape[2 + at] - 1) - 1) // s + 1)
    return sizes if min(sizes) > 0 else None


def _mm(a: Tensor, b: Tensor) -> list[int] | None:
    return [a.shape[0], b.shape[1]] if a.shape[1] == b.shape[0] else None


def _addmm(bias: Tensor, a: Tensor, b: Tensor) -> list[int] | None:
    sizes = _mm(a, b)
    fits = sizes is not None and bias.dim() <= 2 and all(
        have in (1, want) for have, want in zip(reversed(bias.shape), reversed(sizes), strict=False)
    )  # fmt: skip
    return sizes if fits else None


def _bmm(a: Tensor, b: Tensor) -> list[int] | None:
    fits = a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1]
    return [a.shape[0], a.shape[1], b.shape[2]] if fits else None


_SHAPES: dict[str, Callable[..., list[int] | None]] = {
    "convolution": _convolution,
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
}
