"""Results without computing them.

Labels depend on shapes, never on activation values, and a forward's time is in its values. So while a model is traced,
convolutions and matrix products return *blanks*: tensors of the right shape and layout that nobody computed. What
element-wise operations, eval-mode batch norms, layer norms, softmaxes and concatenations make of blanks alone in
shape, is blank too, and so is what any operation makes of large ones, if it knows its result's shape without values.
Whatever is out of the ordinary (types or devices that differ, sizes that do not fit, layouts that
are neither contiguous nor channels-last) is left to the real operation, which says what is wrong.

All blanks of one type share one piece of memory, zeros at first. Real operations may write into it in place, so the
values of a blank mean nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = ["Blanks", "ShapesOnly", "plain_name"]

_BLANK = "_prunegate_blank"


class ShapesOnly(TorchDispatchMode):
    """Runs a model for its shapes: heavy operations give blanks, the rest is computed."""

    def __init__(self) -> None:
        super().__init__()
        self._blanks = Blanks()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs or skips one operation."""
        return self._blanks.run(func, plain_name(func), args, kwargs or {})


@functools.cache
def plain_name(func: Any) -> str:
    """Name of an ATen operation without namespace, overload and the underscores around it."""
    name: str = func._schema.name.split("::")[-1].strip("_")
    return name


class Blanks:
    """Makes blanks and knows them again. One for each run of a model."""

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def run(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the ATen operation ``func``, by its plain name ``name``, returns: blank where possible."""
        contraction = _CONTRACTIONS.get(name)
        if contraction is not None and not kwargs:
            result = self._contraction(contraction, args)
            if result is not None:
                return result
        if name in _ATTENTIONS:
            pair = self._attention(*args[:3])
            if pair is not None:
                return pair
        skip = _SKIPS.get(name)
        if skip is not None and any(map(_is_blank, args[0] if name == "cat" else args)):
            result = skip(self, func, args, kwargs)
            if result is not None:
                return result
        if not func.is_view and any(map(_is_large_blank, args)):
            result = self._inferred(func, args, kwargs)
            if result is not None:
                return result
        result = func(*args, **kwargs)
        if func.is_view and _is_blank(args[0]):
            for view in [result] if isinstance(result, Tensor) else result:
                setattr(view, _BLANK, True)
        return result

    def make(self, sizes: Sequence[int], like: Tensor, channels_last: bool = False) -> Tensor:
        """A blank of these sizes and of the type and device of ``like``."""
        count = 1
        for size in sizes:
            count *= size
        key = like.dtype, like.device
        memory = self._memory.get(key)
        if memory is None or memory.numel() < count:
            memory = self._memory[key] = _zeros(count, like)
        if channels_last:
            batch, channels, height, width = sizes
            blank = memory[:count].view(batch, height, width, channels).permute(0, 3, 1, 2)
        else:
            blank = memory[:count].view(tuple(sizes))
        setattr(blank, _BLANK, True)
        return blank

    def _inferred(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the operation returns by its own account of shapes, without a look at values; blank."""
        try:
            result = func(*tree_map(_without_values, args), **tree_map(_without_values, kwargs))
        except Exception:  # it needs values, or is wrong: the real operation says which
            return None
        if func._schema.is_mutable:
            changes_first = func._schema.arguments[0].alias_info is not None and isinstance(args[0], Tensor)
            same = changes_first and isinstance(result, Tensor) and result.stride() == args[0].stride()
            return args[0] if same and result.shape == args[0].shape else None
        like = next(arg for arg in args if _is_large_blank(arg))
        return tree_map(lambda leaf: self._as(leaf, like) if isinstance(leaf, Tensor) else leaf, result)

    def _as(self, bare: Tensor, like: Tensor) -> Tensor:
        """A blank of the sizes, strides and type of ``bare``, on the device of ``like``."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(bare.shape, bare.stride(), strict=True))
        flat = self.make((span if bare.numel() else 0,), like.new_empty(0, dtype=bare.dtype))
        blank = flat.as_strided(bare.shape, bare.stride())
        setattr(blank, _BLANK, True)
        return blank

    def again(self, blank: Tensor) -> Tensor:
        """Another blank like ``blank``."""
        other = blank.detach()
        setattr(other, _BLANK, True)
        return other

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """The output, its dimensions in memory in the query's order as torch has them, and the logsumexp."""
        operands = (query, key, value)
        if query.dtype not in (torch.float32, torch.float64) or any(each.dim() != 4 for each in operands):
            return None
        if any(each.dtype != query.dtype or each.device != query.device for each in operands):
            return None
        batch, heads, tokens, _ = query.shape
        width = value.shape[3]
        if query.stride(1) < query.stride(2):
            output = self.make((batch, tokens, heads, width), query).transpose(1, 2)
            setattr(output, _BLANK, True)
        else:
            output = self.make((batch, heads, tokens, width), query)
        return output, self.make((batch, heads, tokens), query)

    def _contraction(self, shape: Callable[..., list[int] | None], args: Sequence[Any]) -> Tensor | None:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        first = tensors[0]
        if not first.is_floating_point():
            return None
        if any(t.dtype != first.dtype or t.device != first.device or t.layout != torch.strided for t in tensors):
            return None
        sizes = shape(*args)
        if sizes is None:
            return None
        return self.make(sizes, first, shape is _convolution and _channels_last(args[0], args[1]))


def _zeros(count: int, like: Tensor) -> Tensor:
    """Zeros of the type and device of ``like``; on the CPU, memory that is not taken before someone writes to it."""
    if like.device.type != "cpu":
        return torch.zeros(count, dtype=like.dtype, device=like.device)
    return torch.from_numpy(np.zeros(count * like.element_size(), np.uint8)).view(like.dtype)


def _is_blank(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, _BLANK)


def _is_large_blank(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > _SMALL and hasattr(value, _BLANK)


_SMALL = 2**16
"""Up to here it takes less to compute with a blank than to ask what would come out."""


def _without_values(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _is_ordinary(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


# ---------------------------------------------------------------------- what keeps a blank blank


def _pointwise(blanks: Blanks, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
    in_place = func._schema.is_mutable
    first = tensors[0] if in_place else max((t for t in tensors if _is_blank(t)), key=Tensor.numel)
    if not _is_blank(first) or not _is_ordinary(first):
        return None
    for other in tensors:
        if other is not first:
            if other.dtype != first.dtype or other.device != first.device or not _broadcasts(other, first):
                return None
    return first if in_place else blanks.again(first)


def _broadcasts(other: Tensor, to: Tensor) -> bool:
    offset = to.dim() - other.dim()
    return offset >= 0 and all(size in (1, to.shape[offset + dim]) for dim, size in enumerate(other.shape))


def _clone(blanks: Blanks, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    layout = kwargs.get("memory_format")
    if layout == torch.contiguous_format:
        return blanks.make(args[0].shape, args[0])
    return blanks.again(args[0]) if layout is None and _is_ordinary(args[0]) else None


def _batch_norm(blanks: Blanks, func: Any, args: Sequence[Any],
                kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    source, training = args[0], args[5]
    if kwargs or training or not _is_ordinary(source):
        return None
    if any(isinstance(vector, Tensor) and vector.shape != (source.shape[1],) for vector in args[1:5]):
        return None
    nothing = source.new_empty(0)  # in eval mode there are no statistics of the batch
    return blanks.again(source), nothing, nothing


def _layer_norm(blanks: Blanks, func: Any, args: Sequence[Any],
                kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    source, shape = args[:2]
    n = len(shape)
    if kwargs or not source.is_contiguous() or list(source.shape[-n:]) != list(shape):
        return None
    if any(isinstance(affine, Tensor) and (list(affine.shape) != list(shape) or affine.dtype != source.dtype)
           for affine in args[2:4]):  # fmt: skip
        return None
    statistics = [*source.shape[:-n], *[1] * n]
    return blanks.again(source), blanks.make(statistics, source), blanks.make(statistics, source)


def _softmax(blanks: Blanks, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    source, to_float = args[0], len(args) > 2 and args[2]
    return blanks.again(source) if source.is_contiguous() and not to_float and not kwargs else None


def _unsafe_view(blanks: Blanks, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    result = func(*args, **kwargs)
    setattr(result, _BLANK, True)
    return result


def _mean(blanks: Blanks, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    source, dims = args[0], args[1] if len(args) > 1 else None
    if kwargs or not dims or not source.is_contiguous():
        return None
    reduced, keep = {dim % source.dim() for dim in dims}, len(args) > 2 and args[2]
    sizes = [1 if d in reduced else n for d, n in enumerate(source.shape) if keep or d not in reduced]
    return blanks.make(sizes, source)


def _cat(blanks: Blanks, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = tensors[0]
    dim %= first.dim()
    for other in tensors:
        if other.dtype != first.dtype or other.device != first.device or not other.is_contiguous():
            return None
        if other.dim() != first.dim() or any(
            a != b for at, (a, b) in enumerate(zip(other.shape, first.shape, strict=True)) if at != dim
        ):
            return None
    sizes = list(first.shape)
    sizes[dim] = sum(other.shape[dim] for other in tensors)
    return blanks.make(sizes, first)


_SKIPS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("add", "sub", "mul", "div", "relu", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh",
         "leaky_relu", "elu", "mish", "softplus", "exp", "clamp", "clamp_min", "pow", "neg", "rsqrt", "sqrt"),
        _pointwise),
    "mean": _mean,
    "unsafe_view": _unsafe_view,
    "clone": _clone,
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    "softmax": _softmax,
    "safe_softmax": _softmax,
    "cat": _cat,
}  # fmt: skip


# ---------------------------------------------------------------------- contractions


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


_ATTENTIONS = frozenset(["scaled_dot_product_flash_attention_for_cpu"])

_CONTRACTIONS: dict[str, Callable[..., list[int] | None]] = {
    "convolution": _convolution,
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
}
