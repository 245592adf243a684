"""Where the gate of an operator can act so that backward keeps nothing for it.

The gate of an operator multiplies its output, and a product of two tensors keeps both for backward: one activation more
for every operator that runs. Two kinds of operators need none:

- Where the output is linear in some parameters together (the scale and shift of a last normalisation, the weight and
  bias of a last convolution or matrix product), the gate multiplies those instead: ``g * (a * x + b)`` is
  ``(g * a) * x + g * b``, and the gradient that reaches ``g`` is the same number.
- Where the output is linear in the operator's input (a skip, a pooling mean), the gate multiplies the input. One tensor
  serves all operators that read it, and backward often keeps it anyway.

An operator whose output is zero whatever comes in needs no gate: its gradient is zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.utils._pytree import tree_leaves

from prunegate.labels.record import Node, Op, nodes_in
from prunegate.labels.trace import Trace

__all__ = ["Ending", "endings"]


@dataclass(frozen=True)
class Ending:
    """How the gate of one operator acts.

    Attributes:
        kind: ``"output"`` (on what the operator gives), ``"input"`` (on what it gets), ``"parameters"`` (on those that
            ``parameters`` names), ``"none"`` (nowhere: the output is zero).
        parameters: Qualified names.
    """

    kind: Literal["output", "input", "parameters", "none"]
    parameters: tuple[str, ...] = ()


_OUTPUT = Ending("output")

# Positions of weight and bias in operations whose result is linear in the two together.
_AFFINE = {
    "native_batch_norm": (1, 2), "native_batch_norm_legit": (1, 2), "native_batch_norm_legit_no_training": (1, 2),
    "batch_norm_no_update": (1, 2), "batch_norm_with_update": (1, 2), "cudnn_batch_norm": (1, 2),
    "native_layer_norm": (2, 3), "native_group_norm": (1, 2), "fused_rms_norm": (2,),
    "convolution": (1, 2), "mm": (1,), "mv": (0,), "addmm": (2, 0),
}  # fmt: skip

# Operations whose result is linear in their first operand, the others being sizes, positions and the like.
_LINEAR = frozenset(
    "view unsafe_view reshape_alias permute transpose t expand squeeze unsqueeze slice select narrow unfold alias "
    "clone contiguous to_copy roll flip repeat pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle "
    "index_select avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool2d adaptive_avg_pool3d mean sum neg "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d".split()
)


def endings(trace: Trace) -> dict[str, tuple[Ending, ...]]:
    """For every choice of a trace, by its site, how the gates of its operators act."""
    uses = _Uses(trace)
    found: dict[str, tuple[Ending, ...]] = {}
    for run in trace.runs:
        if run.site in found:  # it runs more than once: what one run scales, another would scale again
            found[run.site] = tuple(_OUTPUT for _ in run.outputs)
            continue
        found[run.site] = tuple(_ending(uses, run, index) for index in range(len(run.outputs)))
    return found


class _Uses:
    """Who makes and who reads each tensor of a trace."""

    def __init__(self, trace: Trace) -> None:
        self.parameters = trace.parameters
        self.made: dict[int, Op] = {}
        self.read: dict[int, list[Op]] = {}
        self.written: set[int] = set()
        for op in trace.ops:
            read = list(nodes_in((op.args, op.kwargs)))
            for node in read:
                self.read.setdefault(node.uid, []).append(op)
                if node.source is not None and node.source is not node:
                    self.read.setdefault(node.source.uid, []).append(op)
            for node in nodes_in(op.out):
                self.made[node.uid] = op
            for node in op.written:
                self.written |= {node.uid, *(() if node.base is None else (node.base.uid,))}

    def is_written(self, nodes: Iterable[Node]) -> bool:
        """Whether an operation changes one of these, or what shares its memory, in place."""
        return any(node.uid in self.written or (node.base is not None and node.base.uid in self.written)
                   for node in nodes)  # fmt: skip


@dataclass(eq=False)
class _Chain:
    """What was met on the way from an operator's output back to where its gate can act.

    Attributes:
        reads: The reads that pass the factor on: an operation's identity and a tensor's uid.
        nodes: What operations gave.
        parameters: Where the way ended.
        reaches_input: Whether it ended at the operator's input, too.
    """

    reads: set[tuple[int, int]] = field(default_factory=set)
    nodes: list[Node] = field(default_factory=list)
    parameters: list[Node] = field(default_factory=list)
    reaches_input: bool = False

    def end_at(self, parameter: Node, op: Op) -> None:
        """The factor acts on ``parameter``, which ``op`` reads."""
        self.parameters.append(parameter)
        self.reads.add((id(op), parameter.uid))


def _ending(uses: _Uses, run: Any, index: int) -> Ending:
    inputs = [leaf for leaf in tree_leaves(run.inputs) if isinstance(leaf, Node)]
    output = run.outputs[index]
    if len(inputs) != 1 or not isinstance(output, Node):
        return _OUTPUT
    given, chain = inputs[0], _Chain()
    linear = _follow(uses, output, given, chain)
    if linear is None:
        return _OUTPUT
    if not linear:
        return Ending("none")
    if chain.reaches_input == bool(chain.parameters):
        return _OUTPUT
    path = (*run.path, (run.name, index))
    for node in [*chain.nodes, *chain.parameters, *([given] if chain.reaches_input else [])]:
        for op in uses.read.get(node.uid, []):
            if node in (given, output) and op.path[: len(path)] != path:
                continue  # the sum over the operators, and what else reads the input
            rearranges = isinstance(op.out, Node) and op.out.source is node
            if (id(op), node.uid) not in chain.reads and not rearranges:
                return _OUTPUT  # something reads it that must not be scaled
    if chain.reaches_input:
        # The operator may give what it got, and then so does the choice.
        aliases = [given, output, *(node for node in [run.total] if isinstance(node, Node))]
        return _OUTPUT if uses.is_written(aliases) else Ending("input")
    names = [str(node.name) for node in chain.parameters]
    return Ending("parameters", tuple(dict.fromkeys(names)))


def _follow(uses: _Uses, node: Node, given: Node, chain: _Chain) -> bool | None:
    """Goes back from ``node``; ``None``: cannot be scaled, ``False``: is zero, ``True``: as ``chain`` says."""
    if node is given:
        chain.reaches_input = True
        return True
    op = uses.made.get(node.uid)
    first = next(nodes_in(op.out), None) if op is not None else None
    if op is None or first is not node or uses.is_written([node]):
        return None
    chain.nodes.append(node)
    if op.name == "zeros_like":
        return False
    if op.name in _AFFINE:
        return _affine(uses, op, chain)
    if op.name in ("add", "sub"):
        return _sum(uses, op, given, chain)
    if op.name in ("mul", "div"):
        return _product(uses, op, given, chain)
    source = op.args[0] if op.args else None
    if op.name in _LINEAR and isinstance(source, Node):
        chain.reads.add((id(op), source.uid))
        return _follow(uses, source, given, chain)
    return None


def _affine(uses: _Uses, op: Op, chain: _Chain) -> bool | None:
    values = [op.args[at] if at < len(op.args) else None for at in _AFFINE[op.name]]
    if not isinstance(values[0], Node):
        return None
    for value in values:
        if isinstance(value, Node):
            if value.source is None or value.source.name not in uses.parameters:
                return None
            chain.end_at(value.source, op)
        elif value is not None:
            return None
    # Factors of addmm other than 1 are no matter; a bias that is not there, neither.
    return True


def _sum(uses: _Uses, op: Op, given: Node, chain: _Chain) -> bool | None:
    found = []
    for term in op.args[:2]:
        if not isinstance(term, Node):
            return None
        chain.reads.add((id(op), term.uid))
        found.append(_follow(uses, term, given, chain))
    return None if None in found else any(found)


def _product(uses: _Uses, op: Op, given: Node, chain: _Chain) -> bool | None:
    a, b = op.args[:2]
    if isinstance(a, Node) and isinstance(b, (int, float)):
        chain.reads.add((id(op), a.uid))
        return False if op.name == "mul" and b == 0 else _follow(uses, a, given, chain)
    for factor in (b, a) if op.name == "mul" else (a,):
        if isinstance(factor, Node) and factor.source is not None and factor.source.name in uses.parameters:
            chain.end_at(factor.source, op)
            return True
    return None
