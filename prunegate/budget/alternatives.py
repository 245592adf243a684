"""Which memory a forward holds where choices of operators stand, depending on what is chosen.

A trace runs all operators of a choice one after the other and adds up what they give; a cut model runs one. So a piece
of memory is held at some moment *on conditions*: that the operators on whose path it was made are the chosen ones, that
those on whose path the moment lies are, and, where what a choice gave is held, that the operator that made it is. An
operator that gives what it got (a skip) makes nothing: its input is held for longer instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations

from torch.utils._pytree import tree_leaves

from prunegate.labels.paths import ALL, Path
from prunegate.labels.record import Node
from prunegate.labels.trace import Trace

__all__ = ["Condition", "Origins", "disjoint", "either", "together"]

Condition = frozenset[tuple[str, int]]
"""Pairs of a choice's name and the number of an operator, all of which must be chosen."""

ALWAYS: Condition = frozenset()


def together(*conditions: Condition | Path) -> Condition | None:
    """The condition that all of some conditions hold; ``None`` if they contradict one another."""
    steps = frozenset(step for condition in conditions for step in condition if step[1] != ALL)
    return steps if len({name for name, _ in steps}) == len(steps) else None


def either(conditions: Iterable[Condition]) -> frozenset[Condition]:
    """Conditions of which one must hold, without those that follow from others."""
    found = set(conditions)
    return frozenset(each for each in found if not any(other < each for other in found))


def disjoint(conditions: Iterable[Condition]) -> Iterator[tuple[int, Condition]]:
    """Coefficients and conditions that add up to 1 where one of ``conditions`` holds: inclusion and exclusion."""
    ordered = sorted(conditions, key=sorted)
    for count in range(1, len(ordered) + 1):
        for some in combinations(ordered, count):
            joint = together(*some)
            if joint is not None:
                yield (-1) ** (count + 1), joint


class Origins:
    """Where what a choice gave comes from.

    Args:
        trace: A labelling.
        memory_of: The memory that a node's tensor lay in, by the uid of the node that it was made for; ``None`` for
            weights and inputs, which are there anyway.
    """

    def __init__(self, trace: Trace, memory_of: Callable[[Node], int | None]) -> None:
        self._memory_of = memory_of
        self._given: dict[int, list[tuple[Condition, Node]]] = {}
        for run in trace.runs:
            outputs = [tree_leaves(output) for output in run.outputs]
            for at, total in enumerate(tree_leaves(run.total)):
                if isinstance(total, Node):
                    self._given[total.uid] = [
                        (frozenset([(run.name, index)]), leaves[at]) for index, leaves in enumerate(outputs)
                    ]
        self._known: dict[int, list[tuple[Condition, int]]] = {}

    def of(self, uid: int) -> Sequence[tuple[Condition, int]]:
        """The pieces of memory that one stands for, each on a condition; itself, if it is no choice's."""
        if uid not in self._given:
            return [(ALWAYS, uid)]
        if uid not in self._known:
            found = []
            for chosen, node in self._given[uid]:
                memory = self._memory_of(node)
                for condition, origin in [] if memory is None else self.of(memory):
                    joint = together(chosen, condition)
                    if joint is not None:
                        found.append((joint, origin))
            self._known[uid] = found
        return self._known[uid]
