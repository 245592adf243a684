"""An example input as data: shapes and types of its tensors and how they are nested, never their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunegate.errors import PlanError

__all__ = ["describe_example", "example_from"]

_MAX_DEPTH = 8
_MAX_ELEMENTS = 2**40
_TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
                  torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
}  # fmt: skip


def describe_example(inputs: Any) -> Any:
    """An example input as JSON data, or ``None`` where it holds something that JSON cannot name."""
    try:
        return _described(inputs)
    except TypeError:
        return None


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if name not in _TYPES or value.layout != torch.strided:
            raise TypeError(name)
        return {"tensor": list(value.shape), "type": name}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float) and math.isfinite(value):
        return value
    if type(value) is list:
        return [_described(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [_described(item) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _described(item) for key, item in value.items()}}
    raise TypeError(type(value).__name__)


def example_from(described: Any, device: torch.device | str = "meta", most: int = _MAX_ELEMENTS, depth: int = 0) -> Any:
    """An input of the shapes and types that :func:`describe_example` told, all zeros.

    Args:
        described: JSON data, which need not be trusted.
        device: Where its tensors are made.
        most: How many elements a tensor may have.
        depth: How deep ``described`` is nested in something else.

    Raises:
        PlanError: It is not such data.
    """
    if depth > _MAX_DEPTH:
        raise PlanError("the plan's example input is nested too deeply")
    if described is None or isinstance(described, bool | int | float | str):
        return described
    if isinstance(described, list):
        return [example_from(item, device, most, depth + 1) for item in described]
    match described:
        case {"tensor": list(sizes), "type": str(name), **rest} if not rest and name in _TYPES:
            fits = all(type(size) is int and 0 <= size <= most for size in sizes) and len(sizes) <= 16
            if fits and math.prod(sizes) <= most:
                return torch.zeros(sizes, dtype=_TYPES[name], device=device)
        case {"tuple": list(items), **rest} if not rest:
            return tuple(example_from(item, device, most, depth + 1) for item in items)
        case {"dict": dict(items), **rest} if not rest:
            return {str(key): example_from(item, device, most, depth + 1) for key, item in items.items()}
    raise PlanError(f"the plan's example input is malformed: {str(described)[:60]}")
