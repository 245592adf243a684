"""One-shot scores: how much each unit matters, seen from a trained model without training.

Every function takes a gated model, batches and the loss, and returns one number per gate, float64 ``[n_gates]``, at
least 0; more is more important. Scores are compared inside a group, so their scale does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from prunegate.batches import logits_of, split_batch
from prunegate.budget.learner import magnitudes
from prunegate.errors import PruneGateError
from prunegate.gated import GatedModel
from prunegate.labels.trace import call_model

__all__ = ["SCORES", "Batches", "Loss", "Score", "score_units"]

Batches = Iterable[Any] | None
Loss = Callable[[Any, Any], Tensor] | None
Score = Callable[[GatedModel, Batches, Loss], Tensor]


def score_units(gated: GatedModel, score: str | Score | Tensor, batches: Batches = None, loss: Loss = None) -> Tensor:
    """The scores of all units.

    Args:
        gated: An attached model.
        score: A name in :data:`SCORES`, a function like those, or the scores themselves, ``[n_gates]``.
        batches: What ``"taylor"`` runs on: inputs, or pairs of inputs and labels.
        loss: ``loss(output, labels)``, a scalar; cross-entropy by default.

    Returns:
        float64 ``[n_gates]`` on the CPU.

    Raises:
        PruneGateError: The name is not known, batches are missing, or the scores are malformed.
    """
    if isinstance(score, str):
        if score not in SCORES:
            raise PruneGateError(
                f"score={score!r} was given; expected one of {', '.join(SCORES)}, a function, or a tensor"
            )
        found = SCORES[score](gated, batches, loss)
    else:
        found = score if isinstance(score, Tensor) else score(gated, batches, loss)
    expected = (gated.logits.numel(),)
    if not isinstance(found, Tensor) or tuple(found.shape) != expected:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise PruneGateError(f"the scores are {shape}; expected a tensor of shape {expected}, one for each gate")
    found = found.detach().double().cpu()
    if not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
        raise PruneGateError("the scores have negative or non-finite entries; expected numbers of at least 0")
    return found


def magnitude(gated: GatedModel, batches: Batches = None, loss: Loss = None) -> Tensor:
    """Euclidean norm of all weights that make or consume a unit (Li et al., arXiv 1608.08710; Fang et al., 2301.12900).

    The first scores a filter by its norm, the second a whole group of coupled slices.
    """
    return magnitudes(gated.logits.numel(), gated.gate_map.dims, gated.named_parameters()).sqrt()


def taylor(gated: GatedModel, batches: Batches = None, loss: Loss = None) -> Tensor:
    """Mean squared derivative of the loss by each gate (Molchanov et al., arXiv 1906.10771, equation 8).

    Where batches come without labels, labels are drawn from the model's own predictions: the Fisher information of
    the gates (Theis et al., arXiv 1801.05787).

    Raises:
        PruneGateError: There are no batches.
    """
    total, count = torch.zeros(gated.logits.numel(), dtype=torch.float64), 0
    gates, training = gated.prunegate, gated.training
    phase = gates.phase
    generator = torch.Generator().manual_seed(0)
    gated.eval()
    try:
        gates.phase = "score"
        for batch in batches if batches is not None else ():
            inputs, labels = split_batch(batch, gated)
            output = call_model(gated, inputs)
            if labels is None:
                scores = logits_of(output).flatten(0, -2)
                chances = scores.detach().float().softmax(-1).cpu()
                labels = torch.multinomial(chances, 1, generator=generator).flatten().to(scores.device)
                value = F.cross_entropy(scores, labels)
            else:
                value = F.cross_entropy(logits_of(output), labels) if loss is None else loss(output, labels)
            (gradient,) = torch.autograd.grad(value, gated.logits)
            total += gradient.double().square().cpu()
            count += 1
    finally:
        gates.phase = phase
        gated.train(training)
    if not count:
        raise PruneGateError("the taylor score needs batches=: an iterable of inputs, or of (inputs, labels)")
    return total / count


def bn(gated: GatedModel, batches: Batches = None, loss: Loss = None) -> Tensor:
    """Size of the scales of the batch norms that a unit passes (Liu et al., arXiv 1708.06519).

    Units that pass none are scored by :func:`magnitude`; no group mixes the two.

    Raises:
        PruneGateError: The model has no batch norm on any unit.
    """
    n = gated.logits.numel()
    total = torch.zeros(n, dtype=torch.float64)
    normed = torch.zeros(n, dtype=torch.bool)
    scales = {
        f"{name}.weight" if name else "weight": module.weight
        for name, module in gated.model.named_modules()
        if isinstance(module, _NormBase) and module.affine
    }
    for (name, _), index in gated.gate_map.dims.items():
        if name in scales:
            there = index >= 0
            total.index_add_(0, index[there], scales[name].detach().double().abs().cpu()[there])
            normed[index[there]] = True
    if not bool(normed.any()):
        raise PruneGateError(f"{type(gated.model).__name__} has no batch norm on a unit; use another score")
    fallback = magnitude(gated)
    for group in gated.groups:
        if not bool(normed[group.slice].all()):
            total[group.slice] = fallback[group.slice]
    return total


def random(gated: GatedModel, batches: Batches = None, loss: Loss = None) -> Tensor:
    """Uniform in (0, 1), from torch's global generator: the baseline to beat (Mittal et al., arXiv 1801.10447)."""
    return torch.rand(gated.logits.numel(), dtype=torch.float64)


def fpgm(gated: GatedModel, batches: Batches = None, loss: Loss = None) -> Tensor:
    """Sum of a unit's distances to the others of its group: units near the geometric median go (He et al., 1811.00250).

    A unit stands for all weights that make or consume it, as in :func:`magnitude`, not for one filter alone.
    """
    weights = {name: weight.detach() for name, weight in gated.named_parameters() if weight.ndim > 1}
    total = torch.zeros(gated.logits.numel(), dtype=torch.float64)
    for group in gated.groups:
        squares = torch.zeros(group.size, group.size, dtype=torch.float64)
        for name, dim in group.members:
            if name in weights:
                for part in _slices(weights[name], dim, gated.gate_map.dims[name, dim] - group.slice.start, group.size):
                    squares += torch.cdist(part, part, compute_mode="donot_use_mm_for_euclid_dist").square()
        total[group.slice] = squares.sqrt().sum(1)
    return total


def _slices(weight: Tensor, dim: int, index: Tensor, size: int) -> Iterator[Tensor]:
    """One row per unit and one matrix for each of a unit's positions along ``dim``, float64 ``[size, width]``."""
    rows = weight.movedim(dim, 0).flatten(1).double().cpu()
    own = (index >= 0) & (index < size)
    positions = torch.nonzero(own).flatten()
    order = positions[torch.argsort(index[positions], stable=True)]
    counts = torch.bincount(index[positions], minlength=size)
    if int(counts.min()) != int(counts.max()):
        return  # units of unequal widths cannot be compared position by position
    for turn in order.view(size, -1).T:
        yield rows[turn]


SCORES: dict[str, Score] = {"magnitude": magnitude, "taylor": taylor, "bn": bn, "random": random, "fpgm": fpgm}
"""The scores by name."""
