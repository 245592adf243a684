"""Who reads what a choice gives: an operator that lets nothing through leaves what stands before it unread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from prunegate.labels.endings import endings
from prunegate.labels.record import Node, nodes_in
from prunegate.labels.trace import Trace

__all__ = ["Readers"]


class Readers:
    """How likely it is that the model's output depends on what each choice gives.

    Seen from the graph alone: what an operation gives depends on all that it reads, except that an operator whose
    output is zero whatever comes in depends on nothing.

    Args:
        trace: A labelling.
        choices: Where the gates of each choice stand.
    """

    def __init__(self, trace: Trace, choices: Mapping[str, slice]) -> None:
        self._choices = choices
        self._runs = [(run.name, run.path) for run in trace.runs]
        reached = _Reached(trace)
        kinds = endings(trace)
        n = len(trace.runs)
        self._direct = _row(reached.by(trace.outputs), n)
        # For each run of a choice and each of its operators, the runs before it that the operator's output depends on.
        self._through: list[Tensor] = []
        for number, run in enumerate(trace.runs):
            rows = []
            for index, output in enumerate(run.outputs):
                nothing = kinds[run.site][index].kind == "none"
                rows.append(_row(0 if nothing else reached.by(nodes_in(output)) & ((1 << number) - 1), n))
            self._through.append(torch.stack(rows))

    def chances(self, p: Tensor) -> Tensor:
        """For every gate of a choice the chance that the choice is read, 1 for all other gates; float64 ``[n_gates]``.

        Exact for a mask. In between, the readers of a choice are taken to be independent of one another. Of a choice
        inside an operator it is the chance that it is read where that operator runs; 1 if it never does.

        Args:
            p: float64 ``[n_gates]``, the chance of every gate.
        """
        unread = 1 - self._direct
        for number, (name, _) in reversed(list(enumerate(self._runs))):
            passed = p[self._choices[name]] @ self._through[number]
            unread = unread * (1 - (1 - unread[number]) * passed)
        read: dict[str, float] = {}
        for (name, path), without in zip(self._runs, unread.tolist(), strict=True):
            runs = math.prod(float(p[self._choices[outer].start + index]) for outer, index in path)
            read[name] = max(read.get(name, 0.0), min(1.0, (1 - without) / runs) if runs > 0 else 1.0)
        found = torch.ones_like(p)
        for name, chance in read.items():
            found[self._choices[name]] = chance
        return found


class _Reached:
    """The runs of choices that each piece of memory depends on, as bits of a number.

    A choice stands for all that is before it. Tensors that share memory are taken for one.
    """

    def __init__(self, trace: Trace) -> None:
        totals = {node.uid: number for number, run in enumerate(trace.runs) for node in nodes_in(run.total)}
        self._bits: dict[int, int] = {}
        for op in trace.ops:
            before = self.by(op.inputs)
            for node in op.outputs:
                bits = 1 << totals[node.uid] if node.uid in totals else before
                self._add(node, bits)
            for node in op.written:
                self._add(node, before)

    def _add(self, node: Node, bits: int) -> None:
        key = (node.base or node).uid
        self._bits[key] = self._bits.get(key, 0) | bits

    def by(self, nodes: Iterable[Node]) -> int:
        """The runs that any of some tensors depends on."""
        bits = 0
        for node in nodes:
            bits |= self._bits.get((node.base or node).uid, 0)
        return bits


def _row(bits: int, n: int) -> Tensor:
    return torch.tensor([float(bits >> at & 1) for at in range(n)], dtype=torch.float64)
