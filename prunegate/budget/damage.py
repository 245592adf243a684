"""What a network's output suffers as units go: by that, unlike by scores, groups can be compared.

Each group alone loses more and more of its units, those of least rank first, and the output is set against the whole
network's on the same inputs. That what is measured includes the interaction of units inside a group is what sets it
apart from the sum of their scores: a stream of sixteen channels is worth far more than sixteen times a channel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from prunegate.batches import split_batch
from prunegate.gated import GatedModel, drawn_alike
from prunegate.select import Limit, Width, select

__all__ = ["marginal_damage", "shared_out"]

_SHARES = (0.1, 0.2, 0.35, 0.5, 0.7, 0.85)  # of a group's units, closed together
_LEAST_DAMAGE = 1e-9
_BEYOND = 0.3  # of the spread of a group's ranks: how far the threshold lies below all of them where every unit stays


def marginal_damage(gated: GatedModel, ranks: Tensor, widths: Sequence[Width], batches: Iterable[Any]) -> Tensor:
    """What each unit's removal adds to the change of the output, where its group goes in the order of the ranks.

    The change is the squared difference of the outputs as a share of their variance over the inputs, a mean over all
    tensors of the output. It is measured at a few shares of each group and interpolated; later units of a group never
    count less than earlier ones, whatever the measurements say, as a group that has begun to lose units does not get
    better at it. Batch norms normalise by the batch, as they will in training; all else is as in eval mode. The model's
    state and modes are left as they were.

    Args:
        gated: The gated model.
        ranks: float64 ``[n_gates]``; in a group the least go first.
        widths: The groups. Those of which nothing may go are not measured.
        batches: At least one: inputs, or pairs of inputs and labels (which are not looked at), of several images each.

    Returns:
        float64 ``[n_gates]``, above 0; 1 where nothing was measured.
    """
    inputs = [split_batch(batch, gated)[0] for batch in batches]
    damage = torch.ones(ranks.numel(), dtype=torch.float64)
    with _measuring(gated):
        wanted = [_outputs(gated, each) for each in inputs]
        for width in widths:
            size = width.slice.stop - width.slice.start
            may_go = size - width.low
            if may_go < 1:
                continue
            order = torch.argsort(ranks[width.slice], stable=True) + width.slice.start
            counts = sorted({min(may_go, max(1, round(share * size))) for share in _SHARES})
            changes = []
            for count in counts:
                mask = gated.gate_map.start()
                mask[order[:count]] = False
                gated.mask = mask
                found = [_change(_outputs(gated, each), whole) for each, whole in zip(inputs, wanted, strict=True)]
                changes.append(sum(found) / len(found))
            lost = np.interp(np.arange(size + 1), [0, *counts], np.maximum.accumulate([0.0, *changes]))
            damage[order] = torch.from_numpy(np.maximum.accumulate(np.diff(lost))) + _LEAST_DAMAGE
    return damage


def shared_out(ranks: Tensor, damage: Tensor, limits: Sequence[Limit], widths: Sequence[Width]) -> Tensor:
    """Ranks moved group by group, so that a threshold of 0 leaves of each group what loses least under the limits.

    Args:
        ranks: float64 ``[n_gates]``.
        damage: float64 ``[n_gates]``, comparable between groups, in the order of the ranks inside them.
        limits: Of which none is exceeded.
        widths: What each group may keep.

    Returns:
        float64 ``[n_gates]``; inside a group the differences stay.
    """
    mask = select(damage, limits, widths).mask
    moved = ranks.clone()
    for width in widths:
        if width.held:
            continue
        own = ranks[width.slice].sort(descending=True).values
        kept = int(mask[width.slice].sum())
        spread = _BEYOND * float(own[0] - own[-1])
        above = float(own[kept - 1]) if kept else float(own[0]) + spread
        below = float(own[kept]) if kept < own.numel() else float(own[-1]) - spread
        moved[width.slice] -= (above + below) / 2
    return moved


@contextlib.contextmanager
def _measuring(gated: GatedModel) -> Iterator[None]:
    """Eval mode, but for batch norms, without gradients; whatever it changes is put back."""
    gates = gated.prunegate
    phase, fixed = gates.phase, gates.fixed_mask.clone()
    modes = [(module, module.training) for module in (*gated.modules(), gated.model)]
    norms = [module for module in gated.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm.momentum, _copied(norm.num_batches_tracked)) for norm in norms]
    try:
        with torch.no_grad():
            gated.mask = gated.gate_map.start()
            gated.eval()
            for norm in norms:
                norm.train()
                norm.momentum = 0.0  # running statistics stay
            yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)
        for module, training in modes:
            module.training = training
        gates.fixed_mask.copy_(fixed)
        gates.phase = phase


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _outputs(gated: GatedModel, inputs: Any) -> list[Tensor]:
    """What the model computes; one that draws numbers in eval mode draws the same each time."""
    output = drawn_alike(gated, inputs, gated.logits.device)
    return [leaf.double() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _change(found: Sequence[Tensor], whole: Sequence[Tensor]) -> float:
    """The squared change as a share of the variance over the first dimension, a mean over the tensors."""
    shares = []
    for one, other in zip(found, whole, strict=True):
        centred = other - other.mean(0) if other.dim() and other.shape[0] > 1 else other
        shares.append(float((one - other).square().sum() / centred.square().sum().clamp(min=1e-30)))
    return sum(shares) / max(len(shares), 1)
