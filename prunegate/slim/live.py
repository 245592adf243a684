"""What a traced tensor keeps after a cut."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunegate.labels.record import Node

__all__ = ["Kept", "Live"]

Kept = Callable[[Node, int], Tensor | None]
"""Which positions of a node's dimension stay: bool ``[node.shape[dim]]``, or ``None`` for all."""


class Live:
    """Sizes of traced tensors after a cut.

    Args:
        kept: Which positions stay.
        written: Numbers (``uid``) of the nodes into whose memory something is written through a view of it.
    """

    def __init__(self, kept: Kept, written: frozenset[int] = frozenset()) -> None:
        self._kept = kept
        self._written = written
        self._positions: dict[tuple[int, int], Tensor | None] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}

    def positions(self, node: Node, dim: int) -> Tensor | None:
        """Which positions stay along ``dim``, bool; ``None`` where all do."""
        key = node.uid, dim
        if key not in self._positions:
            kept = self._kept(node, dim) if node.planes or node.name else None
            self._positions[key] = None if kept is None or bool(kept.all()) else kept
        return self._positions[key]

    def shape(self, node: Node) -> tuple[int, ...]:
        """The node's shape after the cut."""
        if node.uid not in self._shapes:
            self._shapes[node.uid] = tuple(
                size if (kept := self.positions(node, dim)) is None else int(torch.count_nonzero(kept))
                for dim, size in enumerate(node.shape)
            )
        return self._shapes[node.uid]

    def count(self, node: Node, dim: int, stop: int | None = None) -> int:
        """How many of the first ``stop`` positions along ``dim`` stay; of all, by default."""
        kept = self.positions(node, dim)
        stop = node.shape[dim] if stop is None else stop
        return stop if kept is None else int(torch.count_nonzero(kept[:stop]))

    def is_written(self, node: Node) -> bool:
        """Whether the node is a view, and views of its memory are written into."""
        return node.base is not None and node.base.uid in self._written

    def changes(self, node: Node) -> bool:
        """Whether the node loses positions."""
        return self.shape(node) != node.shape
