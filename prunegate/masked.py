"""Statistics over kept positions only.

Every function here has the signature ``masked(function, keep, *args, **kwargs)``: ``function`` is what the model called
with these arguments and ``keep`` holds 0 and 1, shaped to broadcast against the call's first tensor. The result equals
what ``function`` returns once the positions with 0 are cut away, at every position that stays. ``keep`` is
differentiated through: a mean is ``sum(keep * x) / sum(keep)``, a softmax multiplies ``exp`` by ``keep``; maxima pass
it no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunegate.gumbel import masked_layer_norm, masked_rms_norm

__all__ = ["MASKED_CALLS"]

Function = Callable[..., Any]

_MAX_EXPONENT = 60.0  # exp(60) is 1e26, finite in float32 and bfloat16


def _dims(dim: int | Sequence[int] | None, ndim: int) -> list[int]:
    if dim is None or (not isinstance(dim, int) and not len(dim)):
        return list(range(ndim))
    return [d % ndim for d in ([dim] if isinstance(dim, int) else dim)]


def _count(keep: Tensor, x: Tensor, dims: Sequence[int]) -> Tensor:
    """How many positions of ``x`` are kept along ``dims``, reduced dimensions kept at size 1."""
    keep = keep.reshape((1,) * (x.dim() - keep.dim()) + keep.shape)
    repeated = 1
    for dim in dims:
        repeated *= x.shape[dim] if keep.shape[dim] == 1 else 1
    return keep.sum(list(dims), keepdim=True) * repeated


def _moments(x: Tensor, keep: Tensor, dims: Sequence[int], correction: float = 0.0) -> tuple[Tensor, Tensor]:
    count = _count(keep, x, dims)
    mean = (x * keep).sum(list(dims), keepdim=True) / count
    variance = ((x - mean).square() * keep).sum(list(dims), keepdim=True) / (count - correction)
    return mean, variance


def _drop(statistic: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    return statistic if keepdim else statistic.squeeze(tuple(dims))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


def _normalised(input: Tensor, keep: Tensor, dims: Sequence[int], weight: Tensor | None, bias: Tensor | None,
                eps: float) -> Tensor:  # fmt: skip
    """Normalised over ``dims``, with scale and shift for each channel of dimension 1."""
    mean, variance = _moments(input, keep, dims)
    shape = (1, -1) + (1,) * (input.dim() - 2)
    return _affine(
        (input - mean) * (variance + eps).rsqrt(),
        None if weight is None else weight.reshape(shape),
        None if bias is None else bias.reshape(shape),
    )


def _flat(keep: Tensor, input: Tensor, normalized_shape: Sequence[int]) -> Tensor | None:
    """``keep`` as a vector over the last dimension, if that is what it is and what is normalised."""
    last = input.shape[-1]
    return keep.reshape(-1) if len(normalized_shape) == 1 and keep.shape[-1:] == (last,) == (keep.numel(),) else None


def _as_autocast(input: Tensor) -> Tensor:
    """``input`` in the precision in which a GPU's autocast runs norms; elsewhere they keep that of their input."""
    return input.float() if input.is_cuda and torch.is_autocast_enabled("cuda") else input


def _layer_norm(function: Function, keep: Tensor, input: Tensor, normalized_shape: Sequence[int],
                weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
                **_: Any) -> Tensor:  # fmt: skip
    flat = _flat(keep, input, normalized_shape)
    if flat is not None:
        return masked_layer_norm(_as_autocast(input), flat, weight, bias, eps)
    dims = list(range(input.dim() - len(normalized_shape), input.dim()))
    mean, variance = _moments(input, keep, dims)
    return _affine((input - mean) * (variance + eps).rsqrt(), weight, bias)


def _rms_norm(function: Function, keep: Tensor, input: Tensor, normalized_shape: Sequence[int],
              weight: Tensor | None = None, eps: float | None = None) -> Tensor:  # fmt: skip
    flat = _flat(keep, input, normalized_shape)
    if flat is not None:
        return masked_rms_norm(_as_autocast(input), flat, weight, eps)
    dims = list(range(input.dim() - len(normalized_shape), input.dim()))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    power = (input.square() * keep).sum(dims, keepdim=True) / _count(keep, input, dims)
    return _affine(input * (power + eps).rsqrt(), weight, None)


def _group_norm(function: Function, keep: Tensor, input: Tensor, num_groups: int, weight: Tensor | None = None,
                bias: Tensor | None = None, eps: float = 1e-5, *_: Any) -> Tensor:  # fmt: skip
    # Only a norm over one group is a statistic over units; of several groups whole ones go.
    return _normalised(input, keep, list(range(1, input.dim())), weight, bias, eps)


def _batch_norm(function: Function, keep: Tensor, input: Tensor, running_mean: Tensor | None = None,
                running_var: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None,
                training: bool = False, momentum: float = 0.1, eps: float = 1e-5, *_: Any) -> Tensor:  # fmt: skip
    # Batch statistics over units come from weights that are standardised over their fan-in.
    return _normalised(input, keep, [dim for dim in range(input.dim()) if dim != 1], weight, bias, eps)


def _mean(function: Function, keep: Tensor, input: Tensor, dim: int | Sequence[int] | None = None,
          keepdim: bool = False, **_: Any) -> Tensor:  # fmt: skip
    dims = _dims(dim, input.dim())
    return _drop(_moments(input, keep, dims)[0], dims, keepdim)


def _correction(unbiased: bool, correction: float | None) -> float:
    return float(unbiased) if correction is None else float(correction)


def _variance(function: Function, keep: Tensor, input: Tensor, dim: int | Sequence[int] | None = None,
              unbiased: bool = True, keepdim: bool = False, *, correction: float | None = None) -> Tensor:  # fmt: skip
    dims = _dims(dim, input.dim())
    return _drop(_moments(input, keep, dims, _correction(unbiased, correction))[1], dims, keepdim)


def _deviation(function: Function, keep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _variance(function, keep, *args, **kwargs).sqrt()


def _variance_mean(function: Function, keep: Tensor, input: Tensor, dim: int | Sequence[int] | None = None,
                   unbiased: bool = True, keepdim: bool = False, *,
                   correction: float | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    dims = _dims(dim, input.dim())
    mean, variance = _moments(input, keep, dims, _correction(unbiased, correction))
    return _drop(variance, dims, keepdim), _drop(mean, dims, keepdim)


def _deviation_mean(function: Function, keep: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    variance, mean = _variance_mean(function, keep, *args, **kwargs)
    return variance.sqrt(), mean


def _zeroed(function: Function, keep: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Sums and norms do not see zeros."""
    return function(input * keep, *args, **kwargs)


def _largest(function: Function, keep: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    return function(input.masked_fill(keep == 0, -math.inf), *args, **kwargs)


def _smallest(function: Function, keep: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    return function(input.masked_fill(keep == 0, math.inf), *args, **kwargs)


def _softmax(function: Function, keep: Tensor, input: Tensor, dim: int, *_: Any,
             dtype: torch.dtype | None = None, **__: Any) -> Tensor:  # fmt: skip
    input = input if dtype is None else input.to(dtype)
    top = input.detach().masked_fill(keep == 0, -math.inf).amax(dim, keepdim=True)
    # Removed positions may lie far above the kept ones: their weight is zero, but it must come from a finite number.
    weight = (input - top).clamp(max=_MAX_EXPONENT).exp() * keep
    return weight / weight.sum(dim, keepdim=True)


MASKED_CALLS: dict[str, Callable[..., Any]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "mean": _mean,
    "var": _variance,
    "std": _deviation,
    "var_mean": _variance_mean,
    "std_mean": _deviation_mean,
    "softmax": _softmax,
    **dict.fromkeys(("sum", "norm", "vector_norm", "linalg_vector_norm", "normalize"), _zeroed),
    **dict.fromkeys(("amax", "max"), _largest),
    **dict.fromkeys(("amin", "min"), _smallest),
}
"""The Python-level torch calls that have a masked form, by their plain names."""
