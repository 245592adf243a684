"""A vectorised union-find over labels, which remembers why a label was frozen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FROZEN", "Labels", "Reason"]

FROZEN = 0
"""The label of everything that cannot be removed. It is always the root of its class."""

# Pointer chains stay short by themselves; flattening all of them now and then keeps `find` at two gathers
# without paying for the whole table at every union.
_UNIONS_BETWEEN_FLATTENING = 64


@dataclass(frozen=True)
class Reason:
    """Why labels joined the frozen class.

    Attributes:
        why: The rule that decided it, in words.
        operation: Name of the operation that was being handled.
        module: Qualified name of the module that called it, empty for the top module.
    """

    why: str
    operation: str = ""
    module: str = ""


class Labels:
    """Disjoint sets of integer labels. The root of a class is its smallest member, so class 0 has root 0.

    A label is *strong* when a parameter made it and *weak* when a buffer did: a class is worth a gate only if one
    of its members is strong.
    """

    def __init__(self) -> None:
        self._parent = torch.zeros(1, dtype=torch.int64)
        self._strong = torch.ones(1, dtype=torch.bool)
        self._unions = 0
        self._reasons: list[Reason] = []
        self._frozen_by = torch.full((1,), -1, dtype=torch.int64)

    def __len__(self) -> int:
        return self._parent.numel()

    def fresh(self, count: int, strong: bool = True) -> Tensor:
        """Makes ``count`` new labels, each a class of its own. Returns them, int64 ``[count]``."""
        start = len(self)
        new = torch.arange(start, start + count)
        self._parent = torch.cat([self._parent, new])
        self._strong = torch.cat([self._strong, torch.full((count,), strong)])
        self._frozen_by = torch.cat([self._frozen_by, torch.full((count,), -1)])
        return new

    def find(self, labels: Tensor) -> Tensor:
        """Roots of ``labels`` (any shape)."""
        root = self._parent[labels]
        while True:
            above = self._parent[root]
            if torch.equal(above, root):
                return root
            root = above

    def roots(self) -> Tensor:
        """The root of every label, int64 ``[len(self)]``."""
        self._flatten()
        return self._parent.clone()

    def is_strong(self, roots: Tensor) -> Tensor:
        """Whether each class, given by its root, has a strong member."""
        return self._strong[roots]

    def union(self, a: Tensor, b: Tensor, reason: Reason) -> bool:
        """Joins the classes of ``a`` and ``b``, position by position (broadcasting). Returns whether any changed."""
        a, b = torch.broadcast_tensors(self.find(a), self.find(b))
        different = a != b
        if not bool(different.any()):
            return False
        a, b = a[different], b[different]
        touched = torch.unique(torch.cat([a, b]))
        strong = self._strong[touched]
        # Hook every larger root onto the smallest root it must join; repeat on what is still apart.
        while a.numel():
            low, high = torch.minimum(a, b), torch.maximum(a, b)
            self._parent.scatter_reduce_(0, high, low, "amin")
            a, b = self.find(low), self.find(high)
            apart = a != b
            a, b = a[apart], b[apart]
        roots = self.find(touched)
        self._strong[roots[strong]] = True
        if bool(((roots == FROZEN) & (touched != FROZEN)).any()):
            self._remember(reason)
        self._unions += 1
        if self._unions % _UNIONS_BETWEEN_FLATTENING == 0:
            self._flatten()
        return True

    def freeze(self, labels: Tensor, reason: Reason) -> None:
        """Joins ``labels`` with the frozen class."""
        self.union(labels.reshape(-1), torch.zeros(1, dtype=torch.int64), reason)

    def reason(self, label: int) -> Reason | None:
        """Why ``label`` is frozen; ``None`` where it is free or was born frozen."""
        index = int(self._frozen_by[label])
        return None if index < 0 else self._reasons[index]

    def _remember(self, reason: Reason) -> None:
        # Every label that now finds 0 and has no reason yet was frozen by this very union.
        new = (self.find(torch.arange(len(self))) == FROZEN) & (self._frozen_by < 0)
        new[FROZEN] = False
        self._reasons.append(reason)
        self._frozen_by[new] = len(self._reasons) - 1

    def _flatten(self) -> None:
        self._parent = self.find(self._parent)
