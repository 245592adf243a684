"""The operations of a traced forward that take time, and how to call each at other widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from prunegate.budget.stopwatch import Layout, Pool
from prunegate.gated import GatedModel
from prunegate.groups import ALWAYS
from prunegate.labels.paths import ALL
from prunegate.labels.record import Node, Op, nodes_in
from prunegate.operators import PathLengths

__all__ = ["Operator", "find_operators"]

_FREE = frozenset("unsafe_view alias detach lift_fresh empty zeros ones arange full scalar_tensor".split())


@dataclass(eq=False)
class Operator:
    """One operation of the forward, with the dimensions that pruning changes.

    Attributes:
        key: Describes it completely at dense size: operations of equal keys take equal times.
        op: The recorded operation.
        gates: For each changing dimension that differs from the others, the gate of each position.
        places: (tensor number, dimension) to the number of the changing dimension.
        there: Of an operation inside operators of choices, their gates: it runs where all are open.
    """

    key: str
    op: Op
    gates: list[Tensor] = field(default_factory=list)
    places: dict[tuple[int, int], int] = field(default_factory=dict)
    there: list[Tensor] = field(default_factory=list)

    def runs(self, mask: Tensor) -> bool:
        """Whether it runs under a mask."""
        return all(bool(mask[gate].all()) for gate in self.there)

    def dense(self) -> list[int]:
        """Dense sizes of the changing dimensions."""
        return [gates.numel() for gates in self.gates]

    def live(self, mask: Tensor) -> list[int]:
        """Their sizes under a mask."""
        open_to = torch.cat([mask.cpu(), torch.ones(1, dtype=torch.bool)])  # the last serves positions without a gate
        return [int(open_to[gates].sum()) for gates in self.gates]

    def writes(self) -> bool:
        """Whether it changes one of its arguments."""
        return self.op.func._schema.is_mutable

    def arguments(self, sizes: Sequence[int], pool: Pool, device: torch.device) -> tuple[list[Any], dict[str, Any]]:
        """Arguments for a call at other sizes of the changing dimensions, in the memory layout that the model has."""
        nodes = list(nodes_in((self.op.args, self.op.kwargs)))
        shapes = [
            [sizes[self.places[i, dim]] if (i, dim) in self.places else size for dim, size in enumerate(node.shape)]
            for i, node in enumerate(nodes)
        ]
        layouts: list[Layout] = []
        for node, shape in zip(nodes, shapes, strict=True):
            if _is_real(node):
                layouts.append((shape, _strides(node, shape), node.dtype))
        taken = iter(pool.take(layouts))
        made = []
        for node, shape in zip(nodes, shapes, strict=True):
            if _is_real(node):
                made.append(next(taken))
            elif node.value is not None and list(node.value.shape) == shape:
                made.append(node.value.to(device))
            else:
                made.append(torch.zeros(shape, device=device, dtype=node.dtype))
        tensors = iter(made)
        args, kwargs = tree_map(
            lambda leaf: next(tensors) if isinstance(leaf, Node) else leaf, (list(self.op.args), dict(self.op.kwargs))
        )
        return _follow(self.op, args, nodes, shapes), kwargs


def _is_real(node: Node) -> bool:
    return node.dtype.is_floating_point or node.dtype.is_complex


def _strides(node: Node, shape: Sequence[int]) -> list[int]:
    """Strides at another size: the same order of dimensions, the same gaps between them in proportion."""
    strides = [0] * len(shape)
    dense_block = block = 1
    known = node.strides or _contiguous(node.shape)
    for dim in sorted(range(len(shape)), key=lambda dim: (known[dim], node.shape[dim] != 1, -dim)):
        if known[dim] == 0 and node.shape[dim] > 1:
            continue  # one value, expanded
        strides[dim] = block
        if node.shape[dim] > 1:
            strides[dim] = max(1, round(known[dim] / dense_block * block))
            dense_block = known[dim] * node.shape[dim]
        block = strides[dim] * shape[dim]
    return strides


def _contiguous(shape: Sequence[int]) -> list[int]:
    return [int(torch.Size(shape[dim + 1 :]).numel()) for dim in range(len(shape))]


def _follow(op: Op, args: list[Any], nodes: Sequence[Node], shapes: Sequence[list[int]]) -> list[Any]:
    """Arguments that are sizes follow the tensors."""
    if op.name == "convolution" and args[8] > 1 and shapes[1][1] == nodes[1].shape[1]:
        args[8] = args[8] * shapes[0][1] // nodes[0].shape[1]
    elif op.name == "native_layer_norm":
        args[1] = shapes[0][-len(args[1]) :]
    elif op.name == "native_group_norm":
        args[4] = shapes[0][1]
        args[6] = args[6] if shapes[0][1] % args[6] == 0 else 1
    return args


def find_operators(gated: GatedModel) -> list[Operator]:
    """The operations of the traced forward that take time, in order."""
    found = []
    paths = PathLengths(gated.trace, gated.gate_map)
    for op in gated.trace.ops:
        if any(index == ALL for _, index in op.path):
            continue  # adds up what operators give; only the trace runs several
        nodes = list(nodes_in((op.args, op.kwargs)))
        if not nodes or op.func.is_view or op.name in _FREE:
            continue
        operator = _operator(gated, op, nodes)
        operator.there = paths.of(op.path)
        found.append(operator)
    return found


def _operator(gated: GatedModel, op: Op, nodes: list[Node]) -> Operator:
    operator = Operator("", op)
    known: dict[bytes, int] = {}
    tags = []
    for number, node in enumerate(nodes):
        dims = []
        for dim, size in enumerate(node.shape):
            labels = gated.trace.along(node, dim)
            gates = None if labels is None else gated.gate_map.of_label[labels]
            if gates is None or not bool((gates != ALWAYS).any()):
                dims.append(str(size))
                continue
            name = gates.numpy().tobytes()
            if name not in known:
                known[name] = len(known)
                operator.gates.append(gates)
            operator.places[number, dim] = known[name]
            dims.append(f"{'abcdefghijklmnop'[known[name] % 16]}:{size}")
        tags.append(f"{str(node.dtype).removeprefix('torch.')}[{','.join(dims)}]{_layout(node)}")
    names = iter(tags)
    described = tree_map(lambda leaf: next(names) if isinstance(leaf, Node) else leaf, (op.args, op.kwargs))
    operator.key = f"{op.name}{described[0]}{described[1] or ''}".replace("'", "")
    return operator


def _layout(node: Node) -> str:
    """The strides of what is not simply contiguous."""
    usual = _contiguous(node.shape)
    strides = node.strides or usual
    if all(a == b for a, b, size in zip(strides, usual, node.shape, strict=True) if size > 1):
        return ""
    return f"/{','.join(map(str, strides))}"
