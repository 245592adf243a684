"""The methods: each takes the dense network to a trained network within the budget, in the same number of steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

import prunegate
from comparison.images import Images
from comparison.networks import Network
from comparison.peers import Costs, kirigami, torch_pruning
from comparison.training import Recipe, accuracy, batches_for, optimizer_for, train
from prunegate.budget.learner import initial_ranks
from prunegate.scores import score_units
from prunegate.select import Width
from prunegate.slim.apply import plan_of

__all__ = ["METHODS", "Cell", "Outcome"]

_SEARCH_SHARE = 0.2
_SCORING_BATCHES = 20
_CALIBRATION_BATCHES = 2
_REFIT_BATCHES = 4

Batches = Iterator[tuple[Tensor, Tensor]]
Cut = Callable[["Cell"], nn.Module]


@dataclass
class Cell:
    """One network, one budget, one seed.

    Attributes:
        network: What is pruned.
        dense: Its trained weights; methods copy it.
        share: FLOPs that may stay.
        seed: Decides about batches and draws.
        recipe: What is equal for all.
        training: Training images.
        validation: What intermediate accuracies are measured on.
        distil: Whether the dense network teaches.
        options: For ``prunegate.Budget``, in place of its defaults.
        costs: What a peer's cuts of this network cost, as far as they were tried for other budgets.
        found: The network that the gates left in this cell, if they have been run.
    """

    network: Network
    dense: nn.Module
    share: float
    seed: int
    recipe: Recipe
    training: Images
    validation: Images
    distil: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    costs: Costs = field(default_factory=dict)
    found: nn.Module | None = None

    @property
    def example(self) -> Tensor:
        """One input."""
        return torch.zeros(1, 1, self.network.size, self.network.size)

    @property
    def most(self) -> float:
        """The budget in FLOPs."""
        return self.share * prunegate.count_flops(self.dense, self.example)

    @property
    def teacher(self) -> nn.Module | None:
        """Who teaches, if anybody does."""
        return self.dense if self.distil else None

    def scoring(self) -> Batches:
        """Batches for scores, the same for every method."""
        return self.training.batches(self.recipe.batch, _SCORING_BATCHES, 5000 + self.seed)

    def unlabelled(self, count: int) -> list[Tensor]:
        """The images of the first so many of these."""
        return [images for images, _ in islice(self.scoring(), count)]


@dataclass
class Outcome:
    """What a method left.

    Attributes:
        model: The trained network, in eval mode.
        before: Validation accuracy right after the cut, before fine-tuning.
    """

    model: nn.Module
    before: float


def _gates(cell: Cell, calibrated: bool = False, refitted: bool = False) -> Outcome:
    """``prunegate.Budget`` with nothing but the budget and the steps; one learning-rate cycle over both phases.

    With ``calibrated`` it measures the groups first, on two of the batches that other methods score with; with
    ``refitted`` the cut is repaired on four of them before fine-tuning.
    """
    steps = cell.recipe.steps
    gated = prunegate.attach(copy.deepcopy(cell.dense), cell.example)
    search = max(1, round(cell.options.get("search", _SEARCH_SHARE) * steps))
    options = {key: value for key, value in cell.options.items() if key != "search"}
    if calibrated:
        options["calibration"] = cell.unlabelled(_CALIBRATION_BATCHES)
    budget = prunegate.Budget(gated, flops=cell.share, steps=search, **options)
    optimizer = optimizer_for(gated, cell.recipe, without=gated.logits)
    batches = batches_for(cell.training, cell.recipe, steps, cell.seed)
    train(gated, batches, optimizer, cell.recipe, range(search), steps, cell.teacher, budget.step)
    budget.finish()
    slim = gated.export()
    if refitted:
        prunegate.refit(slim, cell.dense, [torch.cat(cell.unlabelled(_REFIT_BATCHES))])
    before = accuracy(slim, cell.validation)
    optimizer = prunegate.transfer_optimizer(optimizer, gated, slim)
    train(slim, batches, optimizer, cell.recipe, range(search, steps), steps, cell.teacher)
    return Outcome(slim, before)


def _cut_first(cut: Cut, cell: Cell) -> Outcome:
    """Cut at once, then fine-tune for all steps."""
    return _fine_tuned(cut(cell), cell, cell.recipe.steps, cell.teacher)


def _fine_tuned(model: nn.Module, cell: Cell, steps: int, teacher: nn.Module | None) -> Outcome:
    before = accuracy(model, cell.validation)
    batches = batches_for(cell.training, cell.recipe, steps, cell.seed)
    train(model, batches, optimizer_for(model, cell.recipe), cell.recipe, range(steps), steps, teacher)
    return Outcome(model.eval(), before)


def _from_scratch(cell: Cell) -> Outcome:
    """The architecture that the gates found, with random weights, for as many steps as dense, search and tuning."""
    found = _gates(cell).model if cell.found is None else cell.found
    fresh = prunegate.apply_plan(cell.network.fresh(7000 + cell.seed), plan_of(found))
    return _fine_tuned(fresh, cell, cell.recipe.dense_steps + cell.recipe.steps, None)


def _one_shot(score: str, cell: Cell) -> nn.Module:
    model = copy.deepcopy(cell.dense)
    if score != "combined":
        return prunegate.one_shot(model, cell.example, score, batches=cell.scoring(), flops=cell.share)
    gated = prunegate.attach(model, cell.example)
    scores = [score_units(gated, "magnitude"), score_units(gated, "taylor", cell.scoring())]
    widths = [Width(group.slice, 1, group.size) for group in gated.groups]
    return prunegate.one_shot(gated, score=initial_ranks(scores, widths).exp(), flops=cell.share)


def _refitted(cell: Cell) -> nn.Module:
    """One-shot, with its consumers fitted to the dense outputs in closed form, and batch norms re-estimated."""
    slim = _one_shot("combined", cell)
    prunegate.refit(slim, cell.dense, cell.scoring())
    return slim


def _peer(method: Callable[..., nn.Module], options: dict[str, bool], cell: Cell) -> nn.Module:
    return method(cell.dense, cell.example, cell.most, cell.scoring(), cell.costs, **options)


_CUTS: dict[str, Cut] = {
    "torch-pruning taylor global": partial(_peer, torch_pruning, {"taylor": True, "everywhere": True}),
    "torch-pruning taylor local": partial(_peer, torch_pruning, {"taylor": True, "everywhere": False}),
    "torch-pruning magnitude global": partial(_peer, torch_pruning, {"taylor": False, "everywhere": True}),
    "torch-pruning magnitude local": partial(_peer, torch_pruning, {"taylor": False, "everywhere": False}),
    "kirigami taylor": partial(_peer, kirigami, {"taylor": True}),
    "kirigami magnitude": partial(_peer, kirigami, {"taylor": False}),
    **{f"one-shot {score}": partial(_one_shot, score) for score in ("combined", "taylor", "magnitude", "random")},
    "one-shot combined, refit": _refitted,
}

METHODS: dict[str, Callable[[Cell], Outcome]] = {
    "prunegate": _gates,
    "prunegate, calibrated": partial(_gates, calibrated=True),
    "prunegate, refit": partial(_gates, refitted=True),
    **{name: partial(_cut_first, cut) for name, cut in _CUTS.items()},
    "from scratch": _from_scratch,
}
"""By name."""
