"""Times of one operator over a grid of sizes: measured, interpolated, and fitted by products of the sizes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunegate.budget.stopwatch import Pool, Timer, time_operator
from prunegate.budget.timed import Operator
from prunegate.errors import BudgetError

__all__ = ["fit", "interpolate", "measure_operator", "non_negative_least_squares"]

_SHARES = {1: (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0), 2: (0.125, 0.375, 0.625, 0.8125, 1.0)}
_SHARES_OF_MANY = (0.25, 0.625, 1.0)
_MOST_VARIABLES = 3
_BLOCK = 16  # elements that a kernel's innermost loop takes at once, at most


def measure_operator(operator: Operator, pool: Pool, timer: Timer | None) -> dict[str, list[Any]]:
    """Times an operator over a grid of the sizes that pruning changes.

    Args:
        operator: The operator.
        pool: Where its arguments are taken from.
        timer: Another engine's timer; this device's clock if ``None``.

    Returns:
        ``"sizes"``: along each changing dimension; ``"ms"``: milliseconds at each point of that grid, row by row.

    Raises:
        BudgetError: The timer gave something else than a number of at least 0.
    """
    dense = operator.dense()
    shares = _SHARES.get(len(dense), _SHARES_OF_MANY)
    axes = [_grid(size, shares) if i < _MOST_VARIABLES else [size] for i, size in enumerate(dense)]
    times = []
    for sizes in itertools.product(*axes):
        try:
            if timer is None:
                make = functools.partial(operator.arguments, sizes, pool, pool.device)
                taken = time_operator(operator.op.func, make)
            else:
                taken = timer(operator.op.func, *operator.arguments(sizes, pool, pool.device))
        except (RuntimeError, IndexError, ValueError):
            # Some operations cannot run at sizes of our choosing; they are taken to be proportional to their size.
            times.append(math.nan)
            continue
        if not isinstance(taken, (int, float)) or not math.isfinite(taken) or taken < 0:
            raise BudgetError(
                f"the timer gave {taken!r} for {operator.key} at the sizes {list(sizes)}; expected milliseconds of one "
                "call, a number of at least 0 (an operation that cannot run there raises a RuntimeError)"
            )
        times.append(taken)
    if operator.writes():
        pool.refresh()
    filled = np.array(times)
    if np.isnan(filled).any():
        if np.isnan(filled[-1]):
            return {"sizes": [[size] for size in dense], "ms": [0.0]}
        relative = np.array([math.prod(sizes) for sizes in itertools.product(*axes)]) / max(1, math.prod(dense))
        filled = np.where(np.isnan(filled), filled[-1] * relative, filled)
    return {"sizes": axes, "ms": [float(f"{ms:.4g}") for ms in filled]}


def interpolate(entry: Mapping[str, list[Any]], sizes: Sequence[int]) -> float:
    """Milliseconds at other sizes than those of the grid."""
    values = np.array(entry["ms"]).reshape([len(axis) for axis in entry["sizes"]])
    for axis, size in zip(entry["sizes"], sizes, strict=True):
        # The first axis is resolved each time. Below the smallest size the line goes on, but not below 0, and a
        # line that rises towards nothing is noise.
        i = min(max(int(np.searchsorted(axis, size)) - 1, 0), len(axis) - 2) if len(axis) > 1 else 0
        if len(axis) == 1:
            values = values[0]
        else:
            at = (size - axis[i]) / (axis[i + 1] - axis[i])
            line = np.maximum(values[i] * (1 - at) + values[i + 1] * at, 0)
            values = np.minimum(line, values[0]) if at < 0 else line
    return float(values)


def _grid(size: int, shares: Sequence[float]) -> list[int]:
    """Sizes to measure at, the dense one among them.

    Kernels work on blocks, so times rise in steps. Points in the middle of a block, and in no multiple of 8, make the
    line between them an average of the steps; points at their edges would make it a lower bound.
    """
    sizes = [max(1, round(size * share)) for share in shares]
    if size >= 4 * _BLOCK:
        sizes = [at if at == size else min(at // _BLOCK * _BLOCK + _BLOCK // 2 + 1, size) for at in sizes]
    return sorted(set(sizes))


def fit(entry: dict[str, list[Any]]) -> list[tuple[tuple[int, ...], float]]:
    """Milliseconds as a sum of products of shares of the dense sizes, with coefficients of at least 0.

    Returns:
        (numbers of the changing dimensions, coefficient) for every product.
    """
    axes = [np.array(axis, dtype=np.float64) / axis[-1] for axis in entry["sizes"]]
    moving = [i for i, axis in enumerate(axes) if len(axis) > 1]
    points = np.array(list(itertools.product(*axes)), dtype=np.float64).reshape(len(entry["ms"]), len(axes))
    times = np.array(entry["ms"], dtype=np.float64)
    products = [c for n in range(len(moving) + 1) for c in itertools.combinations(moving, n)]
    columns = np.stack([points[:, list(c)].prod(axis=1) for c in products], axis=1)
    # Errors count relative to the time, but no time is trusted to less than a hundredth of the longest.
    weight = 1 / np.maximum(times, 0.01 * max(times.max(), 1e-9))
    coefficients = non_negative_least_squares(columns * weight[:, None], times * weight)
    return [(c, float(value)) for c, value in zip(products, coefficients, strict=True) if value > 0]


def non_negative_least_squares(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The best of all subsets of columns whose unconstrained solution is not negative (eight columns at most)."""
    best, solution = math.inf, np.zeros(a.shape[1])
    for n in range(1, a.shape[1] + 1):
        for chosen in itertools.combinations(range(a.shape[1]), n):
            found = np.linalg.lstsq(a[:, chosen], b, rcond=None)[0]
            error = float(np.square(a[:, chosen] @ found - b).sum())
            if (found >= 0).all() and error < best * (1 - 1e-9):
                best, solution = error, np.zeros(a.shape[1])
                solution[list(chosen)] = found
    return solution
