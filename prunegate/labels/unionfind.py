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
    of its members is strong. A label is *inner* when it names a position inside a head (see ``heads.py``); a class is
    when one of its members is.

    Attributes:
        version: Grows with every union that changes something; what was found under one version stays true in it.
    """

    def __init__(self) -> None:
        self.version = 0
        self._parent = torch.zeros(1, dtype=torch.int64)
        self._strong = torch.ones(1, dtype=torch.bool)
        self._inner = torch.zeros(1, dtype=torch.bool)
        self.has_inner = False
        # The same forest without the frozen class: from a frozen label up to the root by which it was frozen.
        self._unfrozen = torch.zeros(1, dtype=torch.int64)
        self._frozen_by = torch.full((1,), -1, dtype=torch.int64)
        self._reasons: list[Reason] = []
        self._later: list[tuple[Tensor, Tensor, Reason]] = []
        # Labels are made a few at a time; the tables grow when somebody looks.
        self._count = 1
        self._new: list[tuple[int, bool, bool]] = []
        self._has_weak = False
        self._strengthened: list[Tensor] = []

    def __len__(self) -> int:
        return self._count

    def fresh(self, count: int, strong: bool = True, inner: bool = False) -> Tensor:
        """Makes ``count`` new labels, each a class of its own.

        Args:
            count: How many.
            strong: Whether they are strong.
            inner: Whether they are inner.

        Returns:
            The labels, int64 ``[count]``, in increasing order.
        """
        start = self._count
        self._count += count
        self._new.append((count, strong, inner))
        self.has_inner |= inner
        self._has_weak |= not strong
        return torch.arange(start, self._count)

    def _grow(self) -> None:
        made, self._new = self._new, []
        counts = torch.tensor([count for count, _, _ in made])
        new = torch.arange(len(self._parent), self._count)
        self._parent = torch.cat([self._parent, new])
        self._unfrozen = torch.cat([self._unfrozen, new])
        self._strong = torch.cat([self._strong, torch.tensor([each for _, each, _ in made]).repeat_interleave(counts)])
        self._inner = torch.cat([self._inner, torch.tensor([each for _, _, each in made]).repeat_interleave(counts)])
        self._frozen_by = torch.cat([self._frozen_by, torch.full_like(new, -1)])

    def strengthen(self, labels: Tensor) -> None:
        """Makes the classes of ``labels`` strong, when somebody looks."""
        if self._has_weak:
            self._strengthened.append(labels.reshape(-1))

    def find(self, labels: Tensor) -> Tensor:
        """Roots of ``labels`` (any shape)."""
        self.settle()
        return _find(self._parent, labels)

    def roots(self) -> Tensor:
        """The root of every label, int64 ``[len(self)]``. Not to be written to."""
        self.settle()
        self._flatten()
        return self._parent

    def classes(self) -> Tensor:
        """The root of every class, in increasing order."""
        roots = self.roots()
        return torch.nonzero(roots == torch.arange(len(roots))).flatten()

    def is_strong(self, roots: Tensor) -> Tensor:
        """Whether each class, given by its root, has a strong member."""
        self.settle()
        return self._strong[roots]

    def is_inner(self, roots: Tensor) -> Tensor:
        """Whether each class, given by its root, has an inner member."""
        self.settle()
        return self._inner[roots]

    def union(self, a: Tensor, b: Tensor, reason: Reason) -> bool:
        """Joins the classes of ``a`` and ``b``, position by position (broadcasting). Returns whether any changed."""
        a, b = torch.broadcast_tensors(self.find(a), self.find(b))
        if torch.equal(a, b):
            return False
        self._reasons.append(reason)
        self._join(a.reshape(-1), b.reshape(-1), None)
        return True

    def union_later(self, a: Tensor, b: Tensor, reason: Reason) -> None:
        """As :meth:`union` of two tensors of one size, but only when somebody looks; many such are joined at once."""
        self._later.append((a.reshape(-1), b.reshape(-1), reason))

    def settle(self) -> None:
        """Does what :meth:`union_later` and others put off."""
        if self._new:
            self._grow()
        if self._later:
            self._join_later()
        if self._strengthened:
            labels, self._strengthened = torch.cat(self._strengthened), []
            self._strong[_find(self._parent, labels)] = True

    def _join_later(self) -> None:
        later, self._later = self._later, []
        first = len(self._reasons)
        self._reasons += [reason for _, _, reason in later]
        sizes = torch.tensor([a.numel() for a, _, _ in later])
        which = torch.arange(first, first + len(later)).repeat_interleave(sizes)
        self._join(torch.cat([a for a, _, _ in later]), torch.cat([b for _, b, _ in later]), which)

    def freeze(self, labels: Tensor, reason: Reason) -> None:
        """Joins ``labels`` with the frozen class."""
        self.union(labels.reshape(-1), torch.zeros(1, dtype=torch.int64), reason)

    def freeze_later(self, labels: Tensor, reason: Reason) -> None:
        """As :meth:`freeze`, but only when somebody looks."""
        self._later.append((labels.reshape(-1), torch.zeros(labels.numel(), dtype=torch.int64), reason))

    def _join(self, a: Tensor, b: Tensor, which: Tensor | None) -> None:
        """Joins pairs. ``which`` is the reason of each, by its number; ``None``: the last one for all."""
        a, b = _find(self._parent, a), _find(self._parent, b)
        different = a != b
        if not bool(different.all()):
            a, b = a[different], b[different]
            which = None if which is None else which[different]
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        touched = torch.cat([low, high])
        strong = touched[self._strong.index_select(0, touched)]
        inner = touched[torch.take(self._inner, touched)] if self.has_inner else touched[:0]
        # Hook every larger root onto the smallest root it must join; repeat on what is still apart.
        while low.numel():
            self._parent.scatter_reduce_(0, high, low, "amin")
            if bool(low.all()):  # FROZEN is 0
                self._unfrozen.scatter_reduce_(0, high, low, "amin")
            else:
                zero = low == FROZEN
                self._frozen_by[high[zero]] = len(self._reasons) - 1 if which is None else which[zero]
                self._unfrozen.scatter_reduce_(0, high[~zero], low[~zero], "amin")
            a, b = _find(self._parent, low), _find(self._parent, high)
            if torch.equal(a, b):
                break
            apart = a != b
            a, b = a[apart], b[apart]
            which = None if which is None else which[apart]
            low, high = torch.minimum(a, b), torch.maximum(a, b)
        if strong.numel():
            self._strong[_find(self._parent, strong)] = True
        if inner.numel():
            roots = _find(self._parent, inner)
            self._inner[roots[roots != FROZEN]] = True
        self.version += 1
        if self.version % _UNIONS_BETWEEN_FLATTENING == 0:
            self._flatten()

    def reasons(self, labels: Tensor) -> list[Reason | None]:
        """Why each of ``labels`` (one-dimensional) is frozen; ``None`` where it is free or was born frozen."""
        self.settle()
        events = self._frozen_by[_find(self._unfrozen, labels)].tolist()
        return [None if event < 0 else self._reasons[event] for event in events]

    def _flatten(self) -> None:
        self._parent = _find(self._parent, self._parent)


def _find(parent: Tensor, labels: Tensor) -> Tensor:
    root = parent.index_select(0, labels.reshape(-1))
    while True:
        above = parent.index_select(0, root)
        if torch.equal(above, root):
            return root.view(labels.shape)
        root = above
