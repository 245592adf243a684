"""Batches as users have them: inputs alone, or inputs with their labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from prunegate.errors import PruneGateError
from prunegate.tensors import fit_inputs

__all__ = ["joined_inputs", "logits_of", "split_batch"]


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


def joined_inputs(batches: Iterable[Any], model: nn.Module) -> Any:
    """The inputs of all batches as one batch; labels are left out.

    Raises:
        PruneGateError: There is no batch, or they do not fit together.
    """
    parts = [tree_flatten(split_batch(batch, model)[0]) for batch in batches]
    if not parts:
        raise PruneGateError("batches= is empty; expected an iterable with at least one batch of inputs")
    layout = parts[0][1]
    if any(other != layout for _, other in parts):
        raise PruneGateError("the batches differ in kind; expected all of them to be like the first")
    try:
        leaves = [torch.cat(leaf) if isinstance(leaf[0], Tensor) else leaf[0]
                  for leaf in zip(*(leaves for leaves, _ in parts), strict=True)]  # fmt: skip
    except RuntimeError as error:
        raise PruneGateError(f"the batches cannot be put together: {error}; give inputs of one size") from error
    return tree_unflatten(leaves, layout)


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
