"""How long a call takes, on arguments that lie as far away as a model's do."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["Layout", "Pool", "Timer", "device_name", "time_in_turn", "time_operator"]

Timer = Callable[[Callable[..., Any], Sequence[Any], dict[str, Any]], float]
"""Milliseconds of one call, given the function, its positional and its keyword arguments."""

Layout = tuple[Sequence[int], Sequence[int], torch.dtype]
"""Shape, strides (elements) and element type of a tensor."""

_LEAST_POOL = 2**24  # bytes; more than the caches next to one core hold
_MOST_POOL = 2**28
_ALIGNMENT = 64  # bytes, as torch's own allocator
_WARM_UP = 3  # calls
_TURN = 4  # calls, the first of which is not counted


class Pool:
    """Memory as large as a model, out of which the arguments of one call after another are taken.

    In a forward an operator finds neither its weights nor, as a rule, its inputs in the nearest cache: everything that
    other layers used came in between. Called over and over on the same tensors it would find all of them there, and
    small operators would look up to five times faster than they are.

    Args:
        size: Bytes, about those of the model's weights.
        device: Where the memory is.

    Attributes:
        device: As given.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = min(max(size, _LEAST_POOL), _MOST_POOL)
        self.device = device
        self._random = torch.Generator(device).manual_seed(0)  # the user's own random numbers stay what they are
        self._memory: dict[torch.dtype, Tensor] = {}
        self._next: dict[torch.dtype, int] = {}

    def take(self, layouts: Sequence[Layout]) -> list[Tensor]:
        """Tensors of random numbers in [0, 1), none of which overlap, that were not handed out for long."""
        spans = [_span(shape, strides, dtype) for shape, strides, dtype in layouts]
        for dtype in dict.fromkeys(dtype for *_, dtype in layouts):
            needed = sum(span for span, (*_, own) in zip(spans, layouts, strict=True) if own == dtype)
            if dtype not in self._memory or self._memory[dtype].numel() < needed:
                count = max(needed, self._size // dtype.itemsize)
                self._memory[dtype] = torch.rand(
                    count, dtype=dtype, device=self.device, generator=self._random
                )
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


def device_name(device: torch.device) -> str:
    """The device's own name; a CPU's with its number of threads, on which times depend."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        return f"{model or platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return str(device)


def time_operator(function: Callable[..., Any], make: Callable[[], tuple[Sequence[Any], dict[str, Any]]],
                  least_seconds: float = 0.004, least_calls: int = 5) -> float:  # fmt: skip
    """Milliseconds of one call, each with arguments that are made for it (which is not timed).

    It is the lower quartile: threads that wait for one another make whole series of calls several times longer as soon
    as another program takes a core, and with one operator after the other such a time would stand in a table for good.
    """
    args, kwargs = make()
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    clock = _Clock(any(tensor.is_cuda for tensor in tensors))
    taken: list[float] = []
    function(*args, **kwargs)
    until = time.perf_counter() + least_seconds
    while len(taken) < least_calls or time.perf_counter() < until:
        args, kwargs = make()
        taken.append(clock.milliseconds(functools.partial(function, *args, **kwargs)))
    return float(np.quantile(taken, 0.25))


def time_in_turn(calls: Sequence[Callable[[], object]], cuda: bool, least_seconds: float = 4.0,
                 least_rounds: int = 7) -> NDArray[np.float64]:  # fmt: skip
    """Milliseconds of several calls that take turns, so that a machine that grows slower or faster does so for all.

    A turn is a few calls of the same kind, of which the first is not counted. Libraries keep the kernels of the last
    some hundred operators ready: several models that alternate call by call throw out each other's, and each then looks
    slower by what it takes to make them again.

    Args:
        calls: What to time; each is called without arguments.
        cuda: Whether to wait for the GPU.
        least_seconds: How long to go on, at least.
        least_rounds: How many turns each has, at least.

    Returns:
        ``[n_rounds, n_calls]``, the median of each turn.
    """
    clock = _Clock(cuda)
    for call in calls:
        for _ in range(_WARM_UP):
            call()
    rounds: list[list[float]] = []
    started = time.perf_counter()
    while len(rounds) < least_rounds or time.perf_counter() - started < least_seconds:
        rounds.append([float(np.median([clock.milliseconds(call) for _ in range(_TURN)][1:])) for call in calls])
    return np.array(rounds)


class _Clock:
    """Times calls; with one CPU thread it is the thread's own time, so that other programs do not count."""

    def __init__(self, cuda: bool) -> None:
        self._wait = torch.cuda.synchronize if cuda else lambda: None
        self._now = time.thread_time if not cuda and torch.get_num_threads() == 1 else time.perf_counter

    def milliseconds(self, call: Callable[[], object]) -> float:
        self._wait()
        start = self._now()
        call()
        self._wait()
        return 1000 * (self._now() - start)
