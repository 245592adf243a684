"""Batches as users have them: inputs alone, or inputs with their labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from prunegate.errors import PruneGateError
from prunegate.tensors import fit_inputs

__all__ = ["Chunks", "logits_of", "split_batch"]


def split_batch(batch: Any, model: nn.Module) -> tuple[Any, Any]:
    """Inputs, moved to where ``model`` is, and labels or ``None``.

    Args:
        batch: A tensor, a mapping of keyword inputs, or a pair of inputs and labels, as loaders give it.
        model: What the inputs are for.

    Raises:
        PruneGateError: It is none of these.
    """
    inputs, labels = batch if isinstance(batch, list | tuple) and len(batch) == 2 else (batch, None)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        raise PruneGateError(
            f"a batch of type {type(batch).__name__} was given; expected a tensor, a mapping of keyword inputs, or a "
            "pair of inputs and labels"
        )
    if isinstance(inputs, list):
        inputs = tuple(inputs)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return fit_inputs(inputs, model), labels.to(device) if isinstance(labels, Tensor) else labels


class Chunks:
    """The inputs of batches, several batches put together at a time, as often as they are wanted.

    Args:
        batches: Inputs, or pairs of inputs and labels. An iterator, which gives them only once, is kept as a list.
        model: What the inputs are for.
        at_once: How many images (lengths of the first dimension) a chunk has at most; a larger batch is one by itself.
    """

    def __init__(self, batches: Iterable[Any], model: nn.Module, at_once: int) -> None:
        self._batches = list(batches) if isinstance(batches, Iterator) else batches
        self._model = model
        self._at_once = at_once

    def __iter__(self) -> Iterator[Any]:
        waiting: list[Any] = []
        size = 0
        for batch in self._batches:
            inputs = split_batch(batch, self._model)[0]
            length = max((leaf.shape[0] for leaf in tree_leaves(inputs) if _is_batched(leaf)), default=1)
            if waiting and (size + length > self._at_once or _kind(inputs) != _kind(waiting[0])):
                yield _joined(waiting)
                waiting, size = [], 0
            waiting.append(inputs)
            size += length
        if waiting:
            yield _joined(waiting)


def _is_batched(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _kind(inputs: Any) -> tuple[Any, ...]:
    """What two batches must have in common to be put together."""
    leaves, layout = tree_flatten(inputs)
    return layout, *((leaf.shape[1:], leaf.dtype) if _is_batched(leaf) else repr(leaf) for leaf in leaves)


def _joined(parts: list[Any]) -> Any:
    layout = tree_flatten(parts[0])[1]
    leaves = zip(*(tree_leaves(part) for part in parts), strict=True)
    return tree_unflatten([torch.cat(leaf) if _is_batched(leaf[0]) else leaf[0] for leaf in leaves], layout)


def logits_of(output: Any) -> Tensor:
    """A classifier's scores ``[..., classes]`` from what a model returns: itself, its ``.logits`` or its first tensor.

    Raises:
        PruneGateError: There is no floating-point tensor in it.
    """
    found = getattr(output, "logits", output)
    for leaf in tree_leaves(found):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise PruneGateError(f"the model returns a {type(output).__name__} without a floating-point tensor; pass loss=")
