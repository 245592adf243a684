"""What a mask costs: FLOPs and parameters as polynomials in the gates, exact for every hard mask."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunegate.blocks import factors_of
from prunegate.flops import call_terms, op_terms
from prunegate.gates import Gates
from prunegate.groups import GateMap
from prunegate.labels.paths import Path
from prunegate.labels.record import Call, FrameRecord, Node, Op
from prunegate.labels.trace import Trace
from prunegate.operators import PathLengths
from prunegate.polynomial import Polynomial, PolynomialBuilder

__all__ = ["Cost"]

Term = tuple[int, list[int | Tensor]]
"""A coefficient and the live lengths that it is multiplied by."""


@dataclass(frozen=True, eq=False)
class Cost:
    """FLOPs and parameters of a gated model under any mask.

    One multiply-add counts as one FLOP, as in fvcore. FLOPs are counted at the batch size of the example input.

    Operations are counted when somebody first asks: that takes about as long as labelling them, and whoever sets a mask
    and exports needs no costs.
    """

    _counted: Callable[[], tuple[dict[str, Polynomial], dict[str, list[Term]]]]
    _gates: Gates

    @property
    def polynomials(self) -> Mapping[str, Polynomial]:
        """``"flops"`` and ``"params"``."""
        return self._counted()[0]

    @property
    def parts(self) -> Mapping[str, Sequence[Term]]:
        """The terms of each module that computes something itself, by qualified name."""
        return self._counted()[1]

    @classmethod
    def of_trace(cls, trace: Trace, gate_map: GateMap, gates: Gates) -> Cost:
        """The costs of the operations and parameters of a labelled forward, whose labels are final."""
        return cls(functools.cache(lambda: _count(trace, gate_map)), gates)

    def of(self, gates: Gates) -> Cost:
        """The same costs for a copy of the gates."""
        return Cost(self._counted, gates)

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
            builder = PolynomialBuilder(self.polynomials["flops"].n_gates, self.polynomials["flops"].start)
            for coefficient, factors in terms:
                builder.add(coefficient, factors)
            costs[name] = _exact(builder.build(), mask)
        return costs


def _count(trace: Trace, gate_map: GateMap) -> tuple[dict[str, Polynomial], dict[str, list[Term]]]:
    """The polynomials of all operations and parameters, and the terms of each module."""
    n = gate_map.n_gates
    lengths = _Lengths(trace, gate_map)
    paths = PathLengths(trace, gate_map)
    start = gate_map.start()
    flops, params = PolynomialBuilder(n, start), PolynomialBuilder(n, start)
    parts: dict[str, list[Term]] = {}

    by_event, by_tensor = factors_of(gate_map.blocks)

    def count(event: Op | Call, frame: FrameRecord | None, terms: Any, path: Path) -> None:
        for coefficient, dims in terms:
            for product in lengths.products(dims):
                factors = product + paths.of(path) + by_event.get(id(event), [])
                flops.add(coefficient, factors)
                parts.setdefault(trace.algebra.module_name(frame), []).append((coefficient, factors))

    for op in trace.ops:
        count(op, op.call.frame if op.call else None, op_terms(op.name, op.args, op.kwargs, op.out), op.path)
    for call in trace.calls:
        count(call, call.frame, call_terms(call.name, call.args, call.kwargs, call.out), call.path)
    for name in trace.tensors:
        if name in trace.parameters:
            node = trace.tensors[name]
            dims, shared = paths.shared_positions(name)
            for own in lengths.products((node, dim) for dim in range(node.ndim) if dim not in dims):
                for coefficient, there in paths.of_tensor(name):
                    params.add(coefficient, [*own, *shared, *there, *by_tensor.get(name, [])])
    return {"flops": flops.build(), "params": params.build()}, parts


def _exact(polynomial: Polynomial, mask: Tensor | None) -> int:
    return polynomial.dense if mask is None else polynomial.exact(mask.detach().cpu())


class _Lengths:
    """The live length of a node's dimension: an integer, or the gate of each of its positions."""

    def __init__(self, trace: Trace, gate_map: GateMap) -> None:
        self._trace = trace
        self._of_label = gate_map.of_label
        # By identity of the plane, which is kept so that the identity stays its own.
        self._known: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._equal: dict[bytes, Tensor] = {}

    def products(self, dims: Iterable[tuple[Node, int]]) -> list[list[int | Tensor]]:
        """The product of some (node, dimension) lengths, as a sum of products."""
        return [
            [factor for each in chosen for factor in each]
            for chosen in itertools.product(*(self._sum(node, dim) for node, dim in dims))
        ]

    def _sum(self, node: Node, dim: int) -> list[list[int | Tensor]]:
        """A length as a sum of products: of one factor, but where both heads and positions inside them are gated."""
        planes = self._trace.planes_along(node, dim) if self._trace.labels.has_inner else []
        if len(planes) < 2:
            return [[self.of(node, dim)]]
        outer, inner = (self._of_label[plane.flatten()] for plane in planes)
        heads, head = torch.unique(outer, return_inverse=True)
        places, at = torch.unique(inner, return_inverse=True)
        counts = torch.zeros((len(heads), len(places)), dtype=torch.int64)
        counts.index_put_((head, at), torch.ones_like(head), accumulate=True)
        rows, row = torch.unique(counts, dim=0, return_inverse=True)
        return [
            [self._shared(heads[row == which]), self._shared(places.repeat_interleave(times))]
            for which, times in enumerate(rows)
        ]

    def _shared(self, gates: Tensor) -> Tensor:
        return self._equal.setdefault(gates.numpy().tobytes(), gates)

    def of(self, node: Node, dim: int) -> int | Tensor:
        """The length of ``node`` along ``dim``."""
        plane = self._trace.plane_along(node, dim)
        if plane is None:
            return node.shape[dim]
        known = self._known.get(id(plane))
        if known is None:
            known = self._known[id(plane)] = plane, self._gates(plane.flatten())
        return node.shape[dim] if known[1] is None else known[1]

    def _gates(self, labels: Tensor) -> Tensor | None:
        gates = self._of_label[labels]
        if not bool((gates >= 0).any()):
            return None
        # One tensor for equal lengths: the builder knows it again.
        return self._equal.setdefault(gates.numpy().tobytes(), gates)
