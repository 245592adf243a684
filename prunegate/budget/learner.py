"""Where logits start from, and how a task's gradient moves them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunegate.select import Width

__all__ = ["Learner", "initial_ranks", "magnitudes"]

_RATE = 0.1  # a short search, of sixty steps, must be able to move one group past another: 0.03 was too slow
_MOMENTUM = 0.9
_SECOND_MOMENT = 0.999
_BETWEEN_GROUPS = 3.0
_INSIDE_GROUPS = 0.3
_LARGEST = 8.0
_CHEAPEST = 1e-3  # costs below this share of the mean do not enlarge a gradient further


def magnitudes(n_gates: int, dims: Mapping[tuple[str, int], Tensor], weights: Iterable[tuple[str, Tensor]]) -> Tensor:
    """Squared norm of all weight slices that a unit makes or consumes, float64 ``[n_gates]``.

    Args:
        n_gates: Number of gates.
        dims: For each (weight name, dimension), the gate of each position, -1 where there is none.
        weights: Named parameters; vectors (biases, scales) say little about a unit and are left out.
    """
    total = torch.zeros(n_gates, dtype=torch.float64)
    by_name = {name: weight for name, weight in weights if weight.ndim > 1}
    for (name, dim), gates in dims.items():
        if name in by_name:
            others = [d for d in range(by_name[name].ndim) if d != dim]
            norms = by_name[name].detach().double().pow(2).sum(others)
            norms = getattr(norms, "full_tensor", lambda own=norms: own)().cpu()  # of a sharded weight, all of it
            gates = gates.cpu()
            total.index_add_(0, gates[gates >= 0], norms[gates >= 0])
    return total


def initial_ranks(scores: Sequence[Tensor], widths: Sequence[Width]) -> Tensor:
    """Logits from scores: logarithms, standardised inside each group, added, and scaled to a standard deviation of 1.

    Raw scores compare units of different layers badly (whole layers would vanish), so every group starts alike.

    Args:
        scores: Each float64 ``[n_gates]``, at least 0.
        widths: Where the groups stand.

    Returns:
        float64 ``[n_gates]``; 0 where a group's units cannot be told apart or are held open.
    """
    ranks = torch.zeros_like(scores[0])
    chosen = [width.slice for width in widths if not width.held and not width.one_of]
    for score in scores:
        for own in chosen:
            logs = torch.log(score[own] + 1e-12 * score[own].max().clamp(min=1e-280))
            spread = logs.std(correction=0)
            if float(spread) > 1e-9:
                ranks[own] += (logs - logs.mean()) / spread
    free = torch.cat([ranks[own] for own in chosen]) if chosen else ranks
    spread = free.std(correction=0)
    return ranks / spread if float(spread) > 1e-9 else ranks


class Learner:
    """Moves logits by their gradient: an optimizer of their own, whatever the user's is.

    What is learned is above all how much each group keeps: the mean gradient of a group counts ten times what sets its
    units apart. One second moment is shared by all, so gradients keep their proportions.

    Args:
        widths: Where the groups stand.
        n_gates: Number of gates.
    """

    def __init__(self, widths: Sequence[Width], n_gates: int) -> None:
        self._group = torch.zeros(n_gates, dtype=torch.int64)
        for number, width in enumerate(widths, start=1):
            self._group[width.slice] = number
        self._sizes = torch.bincount(self._group, minlength=len(widths) + 1).clamp(min=1).double()
        self._runs, self._lengths = torch.unique_consecutive(self._group, return_counts=True)
        self._first = torch.zeros(n_gates, dtype=torch.float64)
        self._second = 0.0
        self._steps = 0

    def shape(self, gradient: Tensor, price: Tensor) -> Tensor:
        """The gradient per unit of cost, and the groups' means set off against what is inside them.

        Args:
            gradient: float64 ``[n_gates]``, of the loss by the logits.
            price: float64 ``[n_gates]``, what opening each gate costs.
        """
        relative = price / price.mean().clamp(min=1e-300)
        gradient = gradient / relative.clamp(min=_CHEAPEST)
        runs = torch.segment_reduce(gradient, "sum", lengths=self._lengths, unsafe=True)
        sums = torch.zeros_like(self._sizes).index_add(0, self._runs, runs)
        mean = (sums / self._sizes)[self._group]
        return _BETWEEN_GROUPS * mean + _INSIDE_GROUPS * (gradient - mean)

    def step(self, ranks: Tensor, gradient: Tensor, price: Tensor, trust: float = 1.0) -> Tensor:
        """The ranks after one step, ``trust`` times as long as usual, centred and clamped, float64 ``[n_gates]``."""
        shaped = self.shape(gradient, price)
        self._steps += 1
        self._first = _MOMENTUM * self._first + (1 - _MOMENTUM) * shaped
        self._second = _SECOND_MOMENT * self._second + (1 - _SECOND_MOMENT) * float(shaped.pow(2).mean())
        first = self._first / (1 - _MOMENTUM**self._steps)
        scale = (self._second / (1 - _SECOND_MOMENT**self._steps)) ** 0.5
        moved = ranks - trust * _RATE * first / scale if scale > 0 else ranks
        return (moved - moved.mean()).clamp(-_LARGEST, _LARGEST)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed search needs."""
        return {"first": self._first.clone(), "second": self._second, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self._first = state["first"].clone()
        self._second, self._steps = float(state["second"]), int(state["steps"])
