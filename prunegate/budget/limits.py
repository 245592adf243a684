"""What a user may ask for, checked and made precise: budgets in units of cost, widths in units of a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunegate.errors import BudgetError
from prunegate.groups import BLOCK, Group
from prunegate.operators import ONE_OF
from prunegate.polynomial import Polynomial
from prunegate.select import Limit, Width, greatest_mask, least_mask, least_masks

__all__ = ["MEGABYTE", "PICOSECONDS", "check_together", "make_limits", "make_widths", "show", "tile_of"]

_LEAST_ABSOLUTE = 1000
_AUTO_CUDA = 8  # elements of the tiles that tensor cores work on
_AUTO_CPU = {"AVX512": 16}  # 32-bit elements of one register; AVX2 and anything else: 8
_BLOCKS = 8  # fewer blocks in a group would be too coarse a choice
_MOST_ELEMENTS = 64  # of a block


PICOSECONDS = 10**9
"""Latencies are counted in picoseconds, and asked for and shown in milliseconds."""

MEGABYTE = 2**20
"""Memory is counted in bytes, and asked for and shown in megabytes of this size."""


_ABSOLUTE = {
    "latency_ms": ("a number of milliseconds above 0", PICOSECONDS),
    "memory_mb": ("a number of megabytes above 0", MEGABYTE),
}
_COST_OF = {"latency_ms": "latency", "memory_mb": "memory"}


def make_limits(asked: Mapping[str, Any], costs: Mapping[str, Polynomial], widths: Sequence[Width],
                exact: Mapping[str, Callable[[Tensor], int]] | None = None) -> list[Limit]:  # fmt: skip
    """Budgets as limits in units of the cost.

    Args:
        asked: Value by name, of a cost (a share, or an absolute number of 1000 or more), or ``"latency_ms"`` or
            ``"memory_mb"`` (an absolute number above 0); ``None`` means no budget.
        costs: The costs by name.
        widths: What each group may keep.
        exact: Costs that their polynomial only comes close to, as functions of the mask.

    Raises:
        BudgetError: There is no budget, a value is malformed, or it is out of reach (with the reachable range).
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if not given:
        names = ", ".join(f"{name}=" for name in asked)
        raise BudgetError(
            f"no budget was given; pass at least one of {names}: a share of the dense cost in (0, 1], or an absolute "
            f"number of {_LEAST_ABSOLUTE} or more (latency_ms: milliseconds, memory_mb: megabytes)"
        )
    limits = []
    for name, value in given.items():
        cost = costs[_COST_OF.get(name, name)]
        measured = (exact or {}).get(_COST_OF.get(name, name), cost.exact)
        limits.append(_limit(name, value, cost, measured, widths))
    return limits


def _limit(name: str, value: Any, cost: Polynomial, exact: Callable[[Tensor], int], widths: Sequence[Width]) -> Limit:
    in_time = name.startswith("latency")
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if name in _ABSOLUTE:
        expected, unit = _ABSOLUTE[name]
        absolute = number and value > 0
    else:
        expected, unit = f"a share of the dense cost in (0, 1], or an absolute number of {_LEAST_ABSOLUTE} or more", 1
        absolute = number and value >= _LEAST_ABSOLUTE and not in_time
        if in_time:
            expected = "a share of the dense latency in (0, 1] (latency_ms= takes milliseconds)"
    least, greatest, dense = exact(least_mask(cost, widths)), exact(greatest_mask(cost, widths)), exact(cost.start)
    reachable = (
        f"reachable is {show(name, least)} to {show(name, greatest)}, or a share of "
        f"{_share_up(least, dense)} to 1 of the dense model"
    )
    share = number and name not in _ABSOLUTE and 0 < value <= 1
    if not number or not math.isfinite(value) or not (absolute or share):
        raise BudgetError(f"{name}={value!r} was given; expected {expected}; {reachable}")
    most = math.floor(value * unit) if absolute else math.floor(value * dense)
    if not least <= most <= greatest:
        remedy = "lower min_keep, round_to or ignore, or ask for more" if most < least else "ask for less"
        raise BudgetError(f"{name}={value!r} is out of reach: that is {show(name, most)}, and {reachable}; {remedy}")
    return Limit(_COST_OF.get(name, name), cost, most)


def check_together(limits: Sequence[Limit], widths: Sequence[Width]) -> None:
    """Refuses budgets each of which can be met, but not all of them at once: operators differ in what they are dear by.

    Raises:
        BudgetError: No choice of operators that was tried keeps within all; says what each can reach, alone and beside
            the others.
    """
    first: dict[str, int] = {}  # where each budget's limit stands; one on memory has a limit for every point
    for at, limit in enumerate(limits):
        first.setdefault(limit.name, at)
    if len(first) < 2:
        return
    costs: list[list[int]] = []
    keeps: list[list[bool]] = []
    for mask in least_masks(limits, widths):
        costs.append([limit.cost.exact(mask) for limit in limits])
        keeps.append([cost <= limit.most for cost, limit in zip(costs[-1], limits, strict=True)])
        if all(keeps[-1]):
            return
    said = []
    for name, at in first.items():
        cost = limits[at].cost
        least, most = cost.exact(least_mask(cost, widths)), cost.exact(greatest_mask(cost, widths))
        others = [i for i, limit in enumerate(limits) if limit.name != name]
        beside = [own[at] for own, kept in zip(costs, keeps, strict=True) if all(kept[i] for i in others)]
        found = f"{show(name, min(beside))} or more" if beside else "nothing, as those exclude one another"
        said.append(
            f"{name}: {show(name, limits[at].most)} was asked for, reachable is {show(name, least)} to "
            f"{show(name, most)} alone, and beside the other budgets {found}"
        )
    raise BudgetError(
        f"the budgets cannot be met together. {'; '.join(said)}. Raise one of them, or lower min_keep, round_to or "
        "ignore"
    )


def show(name: str, value: float) -> str:
    """A cost for people to read."""
    if name.startswith("latency"):
        return f"{value / PICOSECONDS:.3f} ms"
    return f"{value / MEGABYTE:.2f} MB" if name.startswith("memory") else f"{int(value):,}"


def _share_up(part: int, whole: int) -> float:
    """The share to four digits, rounded up, so that it can be asked for."""
    return math.ceil(part / max(whole, 1) * 10_000) / 10_000


def make_widths(groups: Sequence[Group], params: Polynomial, tile: int, round_to: int | str | Mapping[str, Any],
                min_keep: float | Mapping[str, float] | None, max_keep: float | Mapping[str, float] | None,
                ignore: Collection[str]) -> list[Width]:  # fmt: skip
    """What each group may keep.

    Args:
        groups: The groups.
        params: The parameter count, from which the width of a unit is known (a head of 64 channels is 64 wide).
        tile: What ``"auto"`` begins with, from :func:`tile_of`.
        round_to: Widths are multiples of this; one number or ``"auto"``, or by pattern of group names.
        min_keep: Least share (float in (0, 1]) or number (int) of units; one, or by pattern.
        max_keep: Greatest share or number of units, likewise.
        ignore: Patterns of groups that are held open.

    Raises:
        BudgetError: A value is malformed, a pattern matches no group, or nothing fits.
    """
    held = set()
    for pattern in ignore:
        found = {group.name for group in groups if fnmatchcase(group.name, pattern)}
        if not found:
            raise _unmatched("ignore", pattern, groups)
        held |= found
    positions = params.positions()
    rounding = _by_group("round_to", round_to, groups, 1)
    least = _by_group("min_keep", 1 if min_keep is None else min_keep, groups, 1)
    greatest = _by_group("max_keep", 1.0 if max_keep is None else max_keep, groups, 1.0)
    widths = []
    for group, step, low, high in zip(groups, rounding, least, greatest, strict=True):
        unit = int(np.gcd.reduce(positions[group.slice].numpy()))
        if step == "auto":
            step = _auto(unit * group.size, tile)
        if not isinstance(step, int) or isinstance(step, bool) or step < 1:
            raise BudgetError(
                f"round_to={step!r} was given for {group.name!r}; expected a whole number of 1 or more, or 'auto'"
            )
        if group.kind == ONE_OF:
            widths.append(Width(group.slice, 1, 1, one_of=True, options=(0,) if group.name in held else None))
            continue
        if group.name in held:
            widths.append(Width(group.slice, group.size, group.size))
            continue
        if group.kind == BLOCK:
            # A branch may go; a rule for all groups is about what a layer keeps, so only one of its own holds it.
            asked = isinstance(min_keep, Mapping) and any(fnmatchcase(group.name, each) for each in min_keep)
            widths.append(Width(group.slice, int(asked), 1))
            continue
        multiple = step // math.gcd(step, unit) if unit else step
        width = Width(group.slice, max(1, _units("min_keep", low, group)), max(1, _units("max_keep", high, group)),
                      multiple)  # fmt: skip
        if width.low > width.high:
            raise BudgetError(
                f"min_keep={low!r} is above max_keep={high!r} for {group.name!r}, a group of {group.size} units"
            )
        width.allowed()
        widths.append(width)
    return widths


def _by_group(name: str, value: Any, groups: Sequence[Group], default: Any) -> list[Any]:
    """One value per group; of several patterns the last that matches counts."""
    if not isinstance(value, Mapping):
        return [value] * len(groups)
    for pattern in value:
        if not any(fnmatchcase(group.name, pattern) for group in groups):
            raise _unmatched(name, pattern, groups)
    found = []
    for group in groups:
        matching = [v for pattern, v in value.items() if fnmatchcase(group.name, pattern)]
        found.append(matching[-1] if matching else default)
    return found


def _unmatched(name: str, pattern: str, groups: Sequence[Group]) -> BudgetError:
    names = ", ".join(repr(group.name) for group in groups[:4])
    return BudgetError(f"{name}: the pattern {pattern!r} matches no group; groups are {names}, ... (see gated.groups)")


def _units(name: str, value: Any, group: Group) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return min(value, group.size)
    if isinstance(value, float) and 0 < value <= 1:
        # A share is kept on either side: at least so many, at most so many.
        exact = value * group.size
        return math.ceil(exact - 1e-9) if name == "min_keep" else math.floor(exact + 1e-9)
    raise BudgetError(
        f"{name}={value!r} was given for {group.name!r}; expected a share of its units (a float in (0, 1]) or their "
        "number (an int of 1 or more)"
    )


def tile_of(device: torch.device) -> int:
    """Elements that the device's arithmetic works on at once, in float32 on a CPU, in half precision on others."""
    return _AUTO_CUDA if device.type != "cpu" else _AUTO_CPU.get(torch.backends.cpu.get_cpu_capability(), 8)


def _auto(elements: int, tile: int) -> int:
    """What ``"auto"`` rounds a group of so many elements to.

    Convolutions and matrix products run fastest on blocks of several tiles, up to 64 elements (oneDNN's and the
    tensor cores' alike). The tile is doubled up to that while a block is at most an eighth of the group.
    """
    step = tile
    while 2 * step <= min(_MOST_ELEMENTS, elements // _BLOCKS):
        step *= 2
    return step
