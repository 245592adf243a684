"""Peak memory of a forward as a cost of the mask.

What counts: weights and buffers, the example input, and the activations of an eager eval-mode forward without
gradients, each as long as Python code or a view holds it; the lifetimes are observed on one forward. The peak is the
largest sum while any operation runs. What does not count: the scratch space of an operation's own kernel, and what an
allocator holds back.

What is held at one moment is a polynomial in the gates, so its expectation is exact. The peak is the largest of many
such sums; the largest of their expectations is a lower bound of its expectation. For one mask the peak is exact.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunegate.budget.alternatives import Condition, Origins, disjoint, either, together
from prunegate.choice import Choice, Conductor, conducted
from prunegate.errors import BudgetError
from prunegate.gated import GatedModel
from prunegate.groups import ALWAYS
from prunegate.labels.paths import ALL, ChoiceRecord, Path, Paths
from prunegate.labels.record import Node
from prunegate.labels.trace import Trace, call_model
from prunegate.operators import PathLengths, chosen_by
from prunegate.polynomial import Polynomial, PolynomialBuilder

__all__ = ["MemoryModel"]

_SHARES = (1.0, 0.75, 0.5, 0.25)


Point = frozenset[tuple[int, frozenset[Condition]]]
"""The pieces of memory that are held at one moment, by uid, each with conditions of which one must hold."""


class MemoryModel:
    """Which tensors are held together during a forward, and what they take under a mask.

    Args:
        gated: The gated model; it is run once on its example input, through all operators of its choices.

    Attributes:
        points: What is held while an operation runs, without repetitions.

    Raises:
        BudgetError: That forward is not the one that was traced.
    """

    def __init__(self, gated: GatedModel) -> None:
        self._gated = gated
        trace, gate_map = gated.trace, gated.gate_map
        watch = _observe(gated)
        self._nodes = {span.node.uid: span.node for span in watch.spans}
        self.points = sorted(set(_points(trace, watch)), key=lambda held: (-len(held), _order(held)))
        self._paths = PathLengths(trace, gate_map)
        self._gates: dict[tuple[int, int], Tensor | None] = {}
        given = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(gated.example_input)
                    if isinstance(leaf, Tensor))  # fmt: skip
        self._always: list[tuple[int, list[int | Tensor]]] = [(given, [])]
        for name, node in trace.tensors.items():
            dims, shared = self._paths.shared_positions(name)
            own = self._lengths(node, [dim for dim in range(node.ndim) if dim not in dims])
            for coefficient, there in self._paths.of_tensor(name):
                self._always.append((coefficient * node.dtype.itemsize, [*own, *shared, *there]))
        builder = self._builder()
        for coefficient, factors in self._always:
            builder.add(coefficient, factors)
        self._held_always = builder.build()

    def peak(self, mask: Tensor | None = None) -> tuple[int, int]:
        """Bytes at the peak of the model cut by ``mask`` (``None``: dense), and the number of the point that has it."""
        mask = self._gated.gate_map.start() if mask is None else mask.cpu()
        open_to = torch.cat([mask, torch.ones(1, dtype=torch.bool)])  # the last serves positions without a gate
        chosen = set(chosen_by(self._gated.gate_map, mask).items())
        sizes = {uid: self._bytes(node, open_to) for uid, node in self._nodes.items()}
        totals = [
            sum(sizes[uid] for uid, conditions in held if any(each <= chosen for each in conditions))
            for held in self.points
        ]
        largest = max(totals, default=0)
        return self._held_always.exact(mask) + largest, totals.index(largest) if totals else 0

    def likely(self) -> list[int]:
        """The points that have the peak when every group keeps an equal share of its units, for some operators."""
        choices = self._gated.gate_map.choices.values()
        found = []
        for share, operator in itertools.product(_SHARES, range(max([1, *(own.stop - own.start for own in choices)]))):
            mask = torch.zeros(self._gated.logits.numel(), dtype=torch.bool)
            for group in self._gated.groups:
                mask[group.slice.start : group.slice.start + max(1, round(share * group.size))] = True
            for own in choices:
                mask[own] = False
                mask[min(own.start + operator, own.stop - 1)] = True
            found.append(self.peak(mask)[1])
        return list(dict.fromkeys(found))

    def cost(self, point: int) -> Polynomial:
        """Bytes held at one point, as a polynomial; where the point's operator is not chosen, weights and input alone.

        It never exceeds the peak, and at one of the points it is the peak.
        """
        builder = self._builder()
        for coefficient, factors in self._always:
            builder.add(coefficient, factors)
        for uid, conditions in self.points[point] if self.points else ():
            node = self._nodes[uid]
            own = self._lengths(node, range(node.ndim))
            for coefficient, condition in disjoint(conditions):
                there = self._paths.of(tuple(sorted(condition)))
                builder.add(coefficient * node.dtype.itemsize, [*own, *there])
        return builder.build()

    def _builder(self) -> PolynomialBuilder:
        return PolynomialBuilder(self._gated.logits.numel(), self._gated.gate_map.start())

    def _lengths(self, node: Node, dims: Iterable[int]) -> list[int | Tensor]:
        found = [(node.shape[dim], self._gates_along(node, dim)) for dim in dims]
        return [size if gates is None else gates for size, gates in found]

    def _bytes(self, node: Node, open_to: Tensor) -> int:
        size = node.dtype.itemsize
        for dim, dense in enumerate(node.shape):
            gates = self._gates_along(node, dim)
            size *= dense if gates is None else int(open_to[gates].sum())
        return size

    def _gates_along(self, node: Node, dim: int) -> Tensor | None:
        key = (node.uid, dim)
        if key not in self._gates:
            labels = self._gated.trace.along(node, dim)
            gates = None if labels is None else self._gated.gate_map.of_label[labels]
            self._gates[key] = None if gates is None or not bool((gates != ALWAYS).any()) else gates
        return self._gates[key]


class _Span:
    """A piece of memory: who made it, and the operations between which it is held."""

    def __init__(self, node: Node, made: int) -> None:
        self.node = node
        self.made = made
        self.gone = 2**62
        self.holders = 0


class _Watch(TorchDispatchMode):
    """Follows every new piece of memory until the last tensor that looks at it is gone.

    Attributes:
        spans: The pieces.
        memory_of: By a node's uid, the uid of the node that its memory was made for; weights and inputs are left out.
    """

    def __init__(self, outputs: Sequence[tuple[str, list[Node]]], known: Sequence[Tensor]) -> None:
        super().__init__()
        self.outputs = outputs
        self.time = 0
        self.spans: list[_Span] = []
        self.memory_of: dict[int, int] = {}
        self.matches = True
        self._of_storage: dict[int, _Span | None] = {tensor.untyped_storage()._cdata: None for tensor in known}
        self._alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        name = func._schema.name.split("::")[-1].strip("_")
        here = self.outputs[self.time] if self.time < len(self.outputs) else ("", [])
        if here[0] != name or len(here[1]) != len(tensors):
            self.matches = False
            return out
        for tensor, node in zip(tensors, here[1], strict=True):
            self._hold(tensor, node)
        self.time += 1
        return out

    def _hold(self, tensor: Tensor, node: Node) -> None:
        key = tensor.untyped_storage()._cdata
        if key not in self._of_storage:
            self._of_storage[key] = _Span(node, self.time)
            self.spans.append(self._of_storage[key])  # type: ignore[arg-type]
        span = self._of_storage[key]
        if span is None:
            return
        self.memory_of[node.uid] = span.node.uid
        span.holders += 1

        def release(_: Any, span: _Span = span, key: int = key) -> None:
            span.holders -= 1
            if span.holders == 0:
                # It was still there while the operation that ran last did.
                span.gone = self.time - 1
                self._of_storage.pop(key, None)

        self._alive.append(weakref.ref(tensor, release))


def _points(trace: Trace, watch: _Watch) -> Iterator[Point]:
    """What is held while each operation of a cut model runs."""
    paths: list[Path] = [op.path for op in trace.ops]
    origins = Origins(trace, lambda node: watch.memory_of.get(node.uid))
    # What adds up the outputs of operators runs in no cut model; what it gave stands for one of them.
    for now, path in enumerate(paths):
        if path and path[-1][1] == ALL:
            continue
        held: dict[int, set[Condition]] = {}
        for span in watch.spans:
            if span.made <= now <= span.gone:
                added = paths[span.made]
                for condition, uid in origins.of(span.node.uid):
                    joint = together(condition, added, path)
                    if joint is not None:
                        held.setdefault(uid, set()).add(joint)
        yield frozenset((uid, either(conditions)) for uid, conditions in held.items())


def _order(held: Point) -> list[tuple[int, list[list[tuple[str, int]]]]]:
    return sorted((uid, sorted(sorted(condition) for condition in conditions)) for uid, conditions in held)


def _running_choices(gated: GatedModel) -> dict[str, ChoiceRecord]:
    """The gated choices, as the modules that run."""
    return {
        name: replace(record, sites={site: cast(Choice, gated.model.get_submodule(site)) for site in record.sites})
        for name, record in gated.trace.choices.items()
    }


def _observe(gated: GatedModel) -> _Watch:
    outputs = [
        (op.name, [leaf for leaf in tree_leaves(op.out) if isinstance(leaf, Node)]) for op in gated.trace.ops
    ]  # fmt: skip
    inputs = [leaf for leaf in tree_leaves(gated.example_input) if isinstance(leaf, Tensor)]
    modes = [(module, module.training) for module in (*gated.modules(), gated.model)]
    gates = gated.prunegate
    phase = gates.phase
    watch = _Watch(outputs, [*gated.parameters(), *gated.buffers(), *inputs])
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        gates.phase = "open"
        gates.draw(False)
        torch.backends.mha.set_fastpath_enabled(False)
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), watch, conducted(_forgetting(Paths(_running_choices(gated)))):
            result = call_model(gated.model, gated.example_input)
        del result
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        gates.phase = phase
        for module, training in modes:
            module.training = training
    if not watch.matches or watch.time != len(outputs):
        raise BudgetError(
            "the forward that memory was to be observed on differs from the traced one (the model's course depends on "
            "something that changes); memory_mb= cannot be used with it"
        )
    return watch


def _forgetting(paths: Paths) -> Conductor:
    """Runs all operators, and keeps nothing of what they gave."""

    def run(choice: Choice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = paths(choice, args, kwargs)
        paths.runs.clear()
        return given

    return run
