"""One training loop for every network and every method, and the accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comparison.images import Images

__all__ = ["Recipe", "accuracy", "batches_for", "divergence", "optimizer_for", "take_steps", "train"]

_WARMUP = 0.05
_TEACHER_SHARE = 0.7
_TEACHER_TEMPERATURE = 2.0


@dataclass(frozen=True)
class Recipe:
    """What is equal for all methods.

    Attributes:
        steps: Optimizer steps after the dense network, a search included.
        dense_steps: Optimizer steps of the dense network.
        batch: Images in a batch.
        lr: Peak learning rate of AdamW.
        weight_decay: Of matrices and filters; vectors are not decayed.
    """

    steps: int = 400
    dense_steps: int = 1200
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step: a short rise, then half a cosine to nought."""
        warm = max(1, round(_WARMUP * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def optimizer_for(model: nn.Module, recipe: Recipe, without: Tensor | None = None) -> torch.optim.AdamW:
    """AdamW; vectors, and what the model names, are not decayed. ``without`` is left out (a gated model's logits)."""
    keep = getattr(model, "no_weight_decay", None)
    undecayed = set(keep()) if callable(keep) else set()
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter is not without:
            groups[parameter.ndim <= 1 or name in undecayed].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": recipe.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        lr=recipe.lr,
    )


def batches_for(images: Images, recipe: Recipe, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that every method of a seed sees, in this order."""
    return images.batches(recipe.batch, steps, 1000 + seed)


def train(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer,
          recipe: Recipe, steps: range, total: int, teacher: nn.Module | None = None,
          after: Callable[[], None] = lambda: None) -> None:  # fmt: skip
    """Trains in place.

    Args:
        model: What is trained.
        batches: Where to take batches from.
        optimizer: Of the model's weights.
        recipe: Learning rates.
        steps: Which steps of the cycle these are.
        total: Length of the learning rate's cycle.
        teacher: A trained network whose predictions are learned from too.
        after: Called after every step.
    """

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        output = model(images)
        loss = F.cross_entropy(output, labels)
        if teacher is None:
            return loss
        with torch.no_grad():
            wanted = teacher(images)
        distance = divergence(output / _TEACHER_TEMPERATURE, wanted / _TEACHER_TEMPERATURE) * _TEACHER_TEMPERATURE**2
        return (1 - _TEACHER_SHARE) * loss + _TEACHER_SHARE * distance

    model.train()
    take_steps(batches, loss_of, optimizer, recipe, steps, total, after)
    model.eval()


def take_steps(batches: Iterator[tuple[Tensor, Tensor]], loss_of: Callable[[Tensor, Tensor], Tensor],
               optimizer: torch.optim.Optimizer, recipe: Recipe, steps: range, total: int,
               after: Callable[[], None]) -> None:  # fmt: skip
    """Lowers a loss of batches; arguments as those of :func:`train`."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, total)
        loss = loss_of(*next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """How far predictions are from wanted ones, both as logits ``[batch, classes]``: Kullback-Leibler, a mean."""
    return F.kl_div(F.log_softmax(logits, 1), F.log_softmax(wanted, 1), reduction="batchmean", log_target=True)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Top-1, in per cent, in eval mode."""
    was = model.training
    model.eval()
    correct = sum(
        int((model(part).argmax(1) == labels).sum())
        for part, labels in zip(images.images.split(500), images.labels.split(500), strict=True)
    )
    model.train(was)
    return 100 * correct / len(images.labels)
