"""Peak memory of a forward as a cost of the mask.

What counts: weights and buffers, the example input, and the activations of an eager eval-mode forward without
gradients, each as long as Python code or a view holds it; the lifetimes are observed on one forward. The peak is the
largest sum while any operation runs. What does not count: the scratch space of an operation's own kernel, and what an
allocator holds back.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunegate.errors import BudgetError
from prunegate.gated import GatedModel
from prunegate.groups import ALWAYS
from prunegate.labels.record import Node
from prunegate.labels.trace import call_model
from prunegate.polynomial import Polynomial, PolynomialBuilder

__all__ = ["MemoryModel"]

_SHARES = (1.0, 0.75, 0.5, 0.25)


class MemoryModel:
    """Which tensors are held together during a forward, and what they take under a mask.

    Args:
        gated: The gated model; it is run once on its example input.

    Raises:
        BudgetError: That forward is not the one that was traced.
    """

    def __init__(self, gated: GatedModel) -> None:
        if gated.gate_map.choices:
            raise BudgetError(
                "memory_mb= cannot be used with a model that has choices of operators: what is held together depends "
                "on which of them run. Use flops=, params= or latency="
            )
        self._gated = gated
        spans = _observe(gated)
        last = len(gated.trace.ops)
        live = [frozenset(span.node.uid for span in spans if span.made <= t <= span.gone) for t in range(last)]
        self._nodes = {span.node.uid: span.node for span in spans}
        self.points = sorted(set(live), key=lambda held: (-len(held), sorted(held)))
        self._kept = list(gated.trace.tensors.values())
        self._given = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(gated.example_input)
                          if isinstance(leaf, Tensor))  # fmt: skip
        self._gates: dict[tuple[int, int], Tensor | None] = {}

    def peak(self, mask: Tensor | None = None) -> tuple[int, int]:
        """Bytes at the peak of the model cut by ``mask`` (``None``: dense), and the number of the point that has it."""
        n = self._gated.logits.numel()
        open_to = torch.ones(n + 1, dtype=torch.bool)  # the last serves positions without a gate
        if mask is not None:
            open_to[:n] = mask.cpu()
        always = self._given + sum(self._bytes(node, open_to) for node in self._kept)
        sizes = {uid: self._bytes(node, open_to) for uid, node in self._nodes.items()}
        totals = [sum(sizes[uid] for uid in held) for held in self.points]
        largest = max(totals, default=0)
        return always + largest, totals.index(largest) if totals else 0

    def likely(self) -> list[int]:
        """The points that have the peak when every group keeps an equal share of its units."""
        found = []
        for share in _SHARES:
            mask = torch.zeros(self._gated.logits.numel(), dtype=torch.bool)
            for group in self._gated.groups:
                mask[group.slice.start : group.slice.start + max(1, round(share * group.size))] = True
            found.append(self.peak(mask)[1])
        return list(dict.fromkeys(found))

    def cost(self, point: int) -> Polynomial:
        """Bytes held at one point, as a polynomial."""
        builder = PolynomialBuilder(self._gated.logits.numel())
        builder.add(self._given, [])
        held = self.points[point] if self.points else ()
        for node in [*self._kept, *(self._nodes[uid] for uid in held)]:
            factors: list[int | Tensor] = []
            for dim, size in enumerate(node.shape):
                gates = self._gates_along(node, dim)
                factors.append(size if gates is None else gates)
            builder.add(node.dtype.itemsize, factors)
        return builder.build()

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
    """Follows every new piece of memory until the last tensor that looks at it is gone."""

    def __init__(self, outputs: Sequence[tuple[str, list[Node]]], known: Sequence[Tensor]) -> None:
        super().__init__()
        self.outputs = outputs
        self.time = 0
        self.spans: list[_Span] = []
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
        span.holders += 1

        def release(_: Any, span: _Span = span, key: int = key) -> None:
            span.holders -= 1
            if span.holders == 0:
                # It was still there while the operation that ran last did.
                span.gone = self.time - 1
                self._of_storage.pop(key, None)

        self._alive.append(weakref.ref(tensor, release))


def _observe(gated: GatedModel) -> list[_Span]:
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
        with torch.no_grad(), watch:
            result = call_model(gated.model, gated.example_input)
            spans = list(watch.spans)
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
    return spans
