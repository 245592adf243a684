"""One number shifts all logits so that the expected cost meets its target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunegate.budget.mixing import Mixing
from prunegate.polynomial import Polynomial
from prunegate.select import Width

__all__ = ["Projection", "project"]

_MARGIN = 4.0  # in units of the noise: a gate with this logit is open in 98 of 100 draws
_TOLERANCE = 1e-5
_ALMOST_DENSE = 0.9995  # finite logits cannot reach the dense cost itself
_EVALUATIONS = 60
_PIN_ROUNDS = 8
_OVERSHOOT = 2.0
_LEAST_STEP = 1e-4


@dataclass(frozen=True, eq=False)
class Projection:
    """Logits whose expected cost meets the target.

    Attributes:
        logits: float64 ``[n_gates]``.
        shift: The number that was taken off every logit.
    """

    logits: Tensor
    shift: float


def project(ranks: Tensor, costs: Sequence[tuple[Polynomial, float]], noise: float, widths: Sequence[Width],
            start: float = 0.0, mixing: Mixing | None = None) -> Projection:  # fmt: skip
    """Finds the shift ``b`` at which the expected costs of ``ranks - b`` meet their targets, the tightest exactly.

    Groups that must keep units keep their best: where fewer than ``low`` logits stand clear of 0, the best ``low`` are
    raised, and where more than ``high`` do not stand clear below it, the others are lowered.

    Args:
        ranks: float64 ``[n_gates]``, logits up to a shift.
        costs: Each cost with its target.
        noise: Scale of the logistic noise, above 0; a gate is open with probability ``sigmoid(logit / noise)``.
        widths: What each group may keep.
        start: Where to look first.
        mixing: The choices of operators, if there are any; the shift tilts them.
    """
    raised = torch.zeros(ranks.numel(), dtype=torch.bool)
    lowered = torch.zeros_like(raised)
    margin = _MARGIN * noise
    for width in widths:
        raised[width.slice] = width.held
    pinned = bool(raised.any())

    def logits_at(shift: float) -> Tensor:
        logits = ranks - shift if mixing is None else mixing.settle(ranks - mixing.taken(shift))
        if pinned:
            logits = torch.where(raised, logits.clamp(min=margin), logits)
            logits = torch.where(lowered, logits.clamp(max=-margin), logits)
        return logits

    def excess(shift: float) -> float:
        """Logarithm of the tightest ratio of cost to target: falls as the shift grows."""
        logits = logits_at(shift) / noise
        p = torch.sigmoid(logits) if mixing is None else mixing.chances(logits)
        return max(math.log(max(float(cost.expected(p)), 1e-300)
                            / (min(target, _ALMOST_DENSE * cost.dense) if mixing is None else target))
                   for cost, target in costs)  # fmt: skip

    low, high = float(ranks.min()) - 20 * noise, float(ranks.max()) + 20 * noise
    if mixing is not None:
        up, down = mixing.reach
        low, high = low * down, high * up
    shift = min(max(start, low), high)
    for _ in range(_PIN_ROUNDS):
        shift = _root(excess, shift, low, high)
        if not _pin(logits_at(shift), margin, widths, raised, lowered):
            break
        pinned = True
    return Projection(logits_at(shift), shift)


def _root(function: Callable[[float], float], start: float, low: float, high: float) -> float:
    """Zero of a falling function by false position with bisection; an end of [low, high] if it has none there."""
    left = right = start
    value = at_left = at_right = function(start)
    evaluations = 1
    # Logits spread over about 1, so a cost's logarithm falls by about as much as the shift grows.
    step = max(_OVERSHOOT * abs(value), _LEAST_STEP)
    while value > _TOLERANCE and right < high:
        left, at_left = right, at_right
        right = min(high, right + step)
        value = at_right = function(right)
        step, evaluations = 2 * step, evaluations + 1
    while value < -_TOLERANCE and left > low and at_left < 0:
        right, at_right = left, at_left
        left = max(low, left - step)
        value = at_left = function(left)
        step, evaluations = 2 * step, evaluations + 1
    if at_left <= 0 or at_right >= 0:
        return left if abs(at_left) <= abs(at_right) else right
    halve = False
    while evaluations < _EVALUATIONS:
        middle = (left + right) / 2 if halve else left + (right - left) * at_left / (at_left - at_right)
        value = function(middle)
        evaluations += 1
        if abs(value) <= _TOLERANCE:
            return middle
        # False position creeps when one end stays: every other time the interval is halved.
        halve = not halve
        if value > 0:
            left, at_left = middle, value
        else:
            right, at_right = middle, value
    return right


def _pin(logits: Tensor, margin: float, widths: Sequence[Width], raised: Tensor, lowered: Tensor) -> bool:
    """Marks gates that must be open or closed for the widths; returns whether there are new ones."""
    clear = logits >= margin * (1 - 1e-6)
    possible = logits > -margin * (1 - 1e-6)
    changed = False
    starts = torch.tensor([width.slice.start for width in widths] + [width.slice.stop for width in widths])
    total_clear = torch.cat([torch.zeros(1, dtype=torch.int64), clear.cumsum(0)])[starts].view(2, -1)
    total_possible = torch.cat([torch.zeros(1, dtype=torch.int64), possible.cumsum(0)])[starts].view(2, -1)
    open_now = (total_clear[1] - total_clear[0]).tolist()
    may_open = (total_possible[1] - total_possible[0]).tolist()
    for width, n_open, n_may in zip(widths, open_now, may_open, strict=True):
        if width.one_of:
            continue
        own = slice(width.slice.start, width.slice.stop)
        if n_open < width.low:
            raised[own.start + torch.topk(logits[own], width.low).indices] = True
            changed = True
        if n_may > width.high:
            worst = torch.topk(logits[own], own.stop - own.start - width.high, largest=False).indices + own.start
            lowered[worst[~raised[worst]]] = True
            changed = True
    return changed
