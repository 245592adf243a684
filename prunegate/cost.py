"""What a mask costs: FLOPs and parameters as polynomials in the gates, exact for every hard mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prunegate.flops import call_terms, op_terms
from prunegate.gates import Gates
from prunegate.groups import GateMap
from prunegate.labels.record import FrameRecord, Node
from prunegate.labels.trace import Trace
from prunegate.polynomial import Polynomial, PolynomialBuilder

__all__ = ["Cost"]

Term = tuple[int, list[int | Tensor]]
"""A coefficient and the live lengths that it is multiplied by."""


@dataclass(frozen=True, eq=False)
class Cost:
    """FLOPs and parameters of a gated model under any mask.

    One multiply-add counts as one FLOP, as in fvcore. FLOPs are counted at the batch size of the example input.

    Attributes:
        polynomials: ``"flops"`` and ``"params"``.
        parts: The terms of each module that computes something itself, by qualified name.
    """

    polynomials: Mapping[str, Polynomial]
    parts: Mapping[str, Sequence[Term]]
    _gates: Gates

    @classmethod
    def of_trace(cls, trace: Trace, gate_map: GateMap, gates: Gates) -> Cost:
        """Counts the operations and parameters of a labelled forward."""
        n = gate_map.n_gates
        lengths = _Lengths(trace, gate_map)
        flops, params = PolynomialBuilder(n), PolynomialBuilder(n)
        parts: dict[str, list[Term]] = {}

        def count(frame: FrameRecord | None, terms: Any) -> None:
            for coefficient, dims in terms:
                factors = [lengths.of(node, dim) for node, dim in dims]
                flops.add(coefficient, factors)
                parts.setdefault(trace.algebra.module_name(frame), []).append((coefficient, factors))

        for op in trace.ops:
            count(op.call.frame if op.call else None, op_terms(op.name, op.args, op.kwargs, op.out))
        for call in trace.calls:
            count(call.frame, call_terms(call.name, call.args, call.kwargs, call.out))
        for name in trace.tensors:
            if name in trace.parameters:
                node = trace.tensors[name]
                params.add(1, [lengths.of(node, dim) for dim in range(node.ndim)])
        return cls({"flops": flops.build(), "params": params.build()}, parts, gates)

    def of(self, gates: Gates) -> Cost:
        """The same costs for a copy of the gates."""
        return Cost(self.polynomials, self.parts, gates)

    def flops(self, mask: Tensor | None = None) -> int:
        """FLOPs of the model cut by ``mask`` (bool ``[n_gates]``; ``None``: dense). Equals ``count_flops`` of it."""
        return _exact(self.polynomials["flops"], mask)

    def params(self, mask: Tensor | None = None) -> int:
        """Parameters of the model cut by ``mask`` (bool ``[n_gates]``; ``None``: dense); tied ones count once."""
        return _exact(self.polynomials["params"], mask)

    def expected_flops(self) -> Tensor:
        """Expected FLOPs if every gate is drawn on its own; a scalar, differentiable in the logits."""
        return self.polynomials["flops"].expected(self._gates.probabilities())

    def expected_params(self) -> Tensor:
        """Expected number of parameters if every gate is drawn on its own; differentiable in the logits."""
        return self.polynomials["params"].expected(self._gates.probabilities())

    def flops_by_module(self, mask: Tensor | None = None) -> dict[str, int]:
        """FLOPs of each module's own operations, by qualified name; they add up to :meth:`flops`."""
        costs = {}
        for name, terms in self.parts.items():
            builder = PolynomialBuilder(self.polynomials["flops"].n_gates)
            for coefficient, factors in terms:
                builder.add(coefficient, factors)
            costs[name] = _exact(builder.build(), mask)
        return costs


def _exact(polynomial: Polynomial, mask: Tensor | None) -> int:
    return polynomial.dense if mask is None else polynomial.exact(mask.detach().cpu())


class _Lengths:
    """The live length of a node's dimension: an integer, or the gate of each of its positions."""

    def __init__(self, trace: Trace, gate_map: GateMap) -> None:
        self._trace = trace
        self._of_label = gate_map.of_label
        self._known: dict[tuple[int, int], int | Tensor] = {}
        self._equal: dict[bytes, Tensor] = {}

    def of(self, node: Node, dim: int) -> int | Tensor:
        """The length of ``node`` along ``dim``."""
        key = (node.uid, dim)
        if key not in self._known:
            labels = self._trace.along(node, dim)
            gates = None if labels is None else self._of_label[labels]
            if gates is None or not bool((gates >= 0).any()):
                self._known[key] = node.shape[dim]
            else:  # one tensor for equal lengths: the builder knows it again
                self._known[key] = self._equal.setdefault(gates.numpy().tobytes(), gates)
        return self._known[key]
