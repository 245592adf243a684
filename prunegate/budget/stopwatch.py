"""How long a call takes, on arguments that lie as far away as a model's do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["Layout", "Pool", "Timer", "time_call", "time_in_turn"]

Timer = Callable[[Callable[..., Any], Sequence[Any], dict[str, Any]], float]
"""Milliseconds of one call, given the function, its positional and its keyword arguments."""

Layout = tuple[Sequence[int], Sequence[int], torch.dtype]
"""Shape, strides (elements) and element type of a tensor."""

_LEAST_POOL = 2**24  # bytes; more than the caches next to one core hold
_MOST_POOL = 2**28
_ALIGNMENT = 64  # bytes, as torch's own allocator


class Pool:
    """Memory as large as a model, out of which the arguments of one call after another are taken.

    In a forward an operator finds neither its weights nor, as a rule, its inputs in the nearest cache: everything that
    other layers used came in between. Called over and over on the same tensors it would find all of them there, and
    small operators would look up to five times faster than they are.

    Args:
        size: Bytes, about those of the model's weights.
        device: Where the memory is.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = min(max(size, _LEAST_POOL), _MOST_POOL)
        self._device = device
        self._memory: dict[torch.dtype, Tensor] = {}
        self._next: dict[torch.dtype, int] = {}

    def take(self, layouts: Sequence[Layout]) -> list[Tensor]:
        """Tensors of random numbers in [0, 1), none of which overlap, that were not handed out for long."""
        spans = [_span(shape, strides, dtype) for shape, strides, dtype in layouts]
        for dtype in dict.fromkeys(dtype for *_, dtype in layouts):
            needed = sum(span for span, (*_, own) in zip(spans, layouts, strict=True) if own == dtype)
            if dtype not in self._memory or self._memory[dtype].numel() < needed:
                count = max(needed, self._size // dtype.itemsize)
                self._memory[dtype] = torch.rand(count, dtype=dtype, device=self._device)
                self._next[dtype] = 0
            elif self._next[dtype] + needed > self._memory[dtype].numel():
                self._next[dtype] = 0
        taken = []
        for span, (shape, strides, dtype) in zip(spans, layouts, strict=True):
            taken.append(self._memory[dtype].as_strided(tuple(shape), tuple(strides), self._next[dtype]))
            self._next[dtype] += span
        return taken

    def refresh(self) -> None:
        """New random numbers, after calls that may have written into the old ones."""
        self._memory.clear()


def _span(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> int:
    """How many elements a tensor's memory spans, rounded up so that the next one is aligned."""
    step = max(1, _ALIGNMENT // dtype.itemsize)
    if 0 in shape:
        return 0
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return -(-span // step) * step


def time_call(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], least_seconds: float = 0.004,
              least_calls: int = 5) -> float:  # fmt: skip
    """Median milliseconds of one call, over and over with the same arguments.

    With one CPU thread it is the thread's own time, so that other programs on the machine do not count.
    """
    return time_in_turn(function, lambda: (args, kwargs), least_seconds, least_calls)


def time_in_turn(function: Callable[..., Any], make: Callable[[], tuple[Sequence[Any], dict[str, Any]]],
                 least_seconds: float = 0.004, least_calls: int = 5) -> float:  # fmt: skip
    """Median milliseconds of one call, each with arguments that are made for it (which is not timed).

    With one CPU thread it is the thread's own time, so that other programs on the machine do not count.
    """
    args, kwargs = make()
    cuda = any(leaf.is_cuda for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    clock = time.thread_time if not cuda and torch.get_num_threads() == 1 else time.perf_counter
    taken: list[float] = []
    function(*args, **kwargs)
    until = time.perf_counter() + least_seconds
    while len(taken) < least_calls or time.perf_counter() < until:
        args, kwargs = make()
        if cuda:
            torch.cuda.synchronize()
        start = clock()
        function(*args, **kwargs)
        if cuda:
            torch.cuda.synchronize()
        taken.append(clock() - start)
    return 1000 * float(np.median(taken))
