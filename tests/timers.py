"""What tests of times share: a clock that adds up made-up times of operators, and a network to time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import prunegate
from prunegate import GatedModel


class Stopwatch(TorchDispatchMode):
    """Adds up the times of what really runs.

    Args:
        time_of: Milliseconds of an operator with its arguments; calls it too.
    """

    def __init__(self, time_of: Callable[[Any, Any, Any], float]) -> None:
        super().__init__()
        self.time_of = time_of
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Times an operation that is not a view."""
        if not func.is_view and "unsafe_view" not in str(func) and any(isinstance(a, Tensor) for a in args):
            self.total += self.time_of(func, [a.clone() if isinstance(a, Tensor) else a for a in args], kwargs or {})
        return func(*args, **(kwargs or {}))


def chain(*widths: int) -> GatedModel:
    """Convolutions from one width to the next on 6 by 6 pixels, then a classifier; gated."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
    head = nn.Linear(widths[-1] * 36, 5)
    return prunegate.attach(nn.Sequential(*layers, nn.Flatten(), head), torch.randn(1, widths[0], 6, 6))
