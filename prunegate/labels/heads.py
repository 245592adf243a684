"""Positions inside heads as units of their own.

Attention ties the channels of a head: they are removed together. What may be removed besides is the same position of
every head, which narrows the heads. A dimension that holds heads then carries two planes, one of heads and one of
positions inside them, and an element is gone when its head or its position is. The second kind of labels is called
inner; it flows by the same rules, and where it varies along heads, it is they that are tied.

How wide heads are is known only after a forward has been labelled, so the model is labelled once more with inner labels
on the dimensions that were found to hold heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prunegate.labels.algebra import Algebra
from prunegate.labels.planes import place, varying
from prunegate.labels.record import Node
from prunegate.labels.unionfind import FROZEN, Reason

__all__ = ["head_roots", "label_inside_heads", "positions_in_heads"]


def head_roots(algebra: Algebra) -> Tensor:
    """Roots of the live classes that are heads."""
    planes = [plane.flatten() for kind, plane in algebra.kinds if kind == "head"]
    roots = torch.unique(algebra.labels.find(torch.cat(planes))) if planes else torch.zeros(0, dtype=torch.int64)
    return roots[roots != FROZEN]


def positions_in_heads(algebra: Algebra, tensors: Mapping[str, Node]) -> dict[tuple[str, int], Tensor]:
    """Where positions inside heads may become units.

    Args:
        algebra: A finished labelling.
        tensors: Its parameters and buffers.

    Returns:
        For each (tensor name, dimension) on which every head has the same number of positions, more than one: the
        number of each position inside its head, int64 ``[size]``; -1 where there is no head.
    """
    is_head = torch.zeros(len(algebra.labels), dtype=torch.bool)
    is_head[head_roots(algebra)] = True
    found = {}
    for name, node in tensors.items():
        for plane in node.planes:
            roots = algebra.labels.find(plane.flatten())
            heads = is_head[roots]
            owners, counts = torch.unique(roots[heads], return_counts=True)
            width = int(counts[0]) if len(owners) > 1 and bool((counts == counts[0]).all()) else 1
            if width > 1:
                numbers = torch.full_like(roots, -1)
                for owner in owners:
                    numbers[roots == owner] = torch.arange(width)
                found[name, next(iter(varying(plane)))] = numbers
    return found


def label_inside_heads(tensors: Mapping[str, Node], algebra: Algebra, inside: Mapping[tuple[str, int], Tensor],
                       ignore: Callable[[str], bool]) -> None:  # fmt: skip
    """Adds a plane of inner labels to each of the dimensions of :func:`positions_in_heads`."""
    for (name, dim), numbers in inside.items():
        node = tensors[name]
        algebra.born.append((len(algebra.labels), name, dim))
        labels = algebra.labels.fresh(int(numbers.max()) + 1, strong=node.source is node, inner=True)
        own = torch.where(numbers < 0, FROZEN, labels[numbers])
        node.planes = [*node.planes, place(own, dim, node.ndim)]
        if ignore(name):
            algebra.labels.freeze(labels, Reason("ignored on request"))
