"""Pruning without a search: units are scored once, the least important go."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from prunegate.attaching import attach
from prunegate.budget import Budget
from prunegate.budget.learner import initial_ranks
from prunegate.errors import PruneGateError
from prunegate.gated import GatedModel
from prunegate.scores import Batches, Loss, Score, score_units
from prunegate.select import Width

__all__ = ["one_shot"]


def one_shot(model: nn.Module, example_input: Any = None, score: str | Score | Tensor = "magnitude", *,
             batches: Batches = None, loss: Loss = None, units: Collection[str] = ("channel", "head"),
             **budget: Any) -> nn.Module:  # fmt: skip
    """Cuts a trained model to a budget by a score, without training.

    What stays is chosen as at the end of a search, by :class:`prunegate.Budget`, with logits that rank the units of
    each group by their scores. Scores of different layers are not compared: every group starts alike, or, with
    ``calibration=``, keeps what is measured to change the output least.

    Args:
        model: Any model that ``attach`` takes, or a gated one (its mask is then set).
        example_input: As for ``attach``; left out for a gated model.
        score: ``"magnitude"``, ``"taylor"``, ``"bn"``, ``"random"``, ``"fpgm"`` (see ``prunegate.scores``), a function
            ``(gated, batches, loss) -> [n_gates]``, or the scores themselves, ``[n_gates]``.
        batches: Inputs, or pairs of inputs and labels, for scores that need data.
        loss: ``loss(output, labels)`` for scores that need one; cross-entropy by default.
        units: As for ``attach``.
        **budget: ``flops=``, ``params=``, ``round_to=``, ``calibration=`` and all else that :class:`prunegate.Budget`
            takes.

    Returns:
        The slim model, in the mode (train or eval) of ``model``.

    Raises:
        PruneGateError: The score, a batch or a budget is malformed, or the budget is out of reach.

    Example:
        >>> import torch, prunegate
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2))
        >>> prunegate.one_shot(net, torch.randn(1, 64), flops=0.5)[0].out_features
        64
    """
    if "steps" in budget:
        raise PruneGateError("one_shot() does not train and takes no steps=; use prunegate.Budget for a search")
    if isinstance(model, GatedModel) and example_input is not None:
        raise PruneGateError("the gated model has its own example input; leave example_input out")
    gated = model if isinstance(model, GatedModel) else attach(model, example_input, units)
    scores = score_units(gated, score, batches, loss)
    widths = [Width(group.slice, 1, group.size) for group in gated.groups]
    ranks = initial_ranks([scores], widths)
    # All logits at 0 would mean that nothing was set; then the budget would score by itself.
    ranks[0] += 1e-6
    with torch.no_grad():
        gated.logits.copy_(ranks)
    Budget(gated, steps=1, **budget).finish()
    return gated.export()
