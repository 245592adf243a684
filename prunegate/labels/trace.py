"""Run a model once and let labels flow beside the values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from prunegate.choice import conducted
from prunegate.errors import AttachError
from prunegate.labels.algebra import Algebra
from prunegate.labels.heads import label_inside_heads
from prunegate.labels.paths import ChoiceRecord, Paths, Run
from prunegate.labels.planes import compress, is_line, varying
from prunegate.labels.record import Call, FrameRecord, Node, Op, capture_frame, nodes_in
from prunegate.labels.rules import MAKES_TENSORS, apply_rule
from prunegate.labels.shapes import Blanks, plain_name
from prunegate.labels.unionfind import FROZEN, Labels, Reason
from prunegate.tensors import attributes_kept, call_model, modules_of, named_tensors

__all__ = ["Trace", "call_model", "describe_inputs", "trace"]

_NODE = "_prunegate_node"
_MAX_RECTANGLE_ROUNDS = 8

# Python-level accesses that compute nothing: recording them would only cost time.
QUIET = frozenset(
    "__get__ __set__ size dim numel stride is_contiguous is_floating_point ndimension __len__ type data_ptr "
    "get_device item __bool__ is_complex __hash__ has_names element_size __format__ __repr__ tolist __int__ "
    "__float__ __index__ nelement is_signed is_inference".split()
)


@dataclass(eq=False)
class Trace:
    """What one labelled forward leaves behind.

    Attributes:
        model: The model that was traced.
        algebra: The labels and the events (consumptions, reductions).
        tensors: Node of every parameter, buffer and plain tensor attribute, by its first qualified name.
        aliases: Other qualified names of the same tensors (tied weights), to the first one.
        changed: Attributes that the forward changed (and that were put back), with the values it found.
        nodes: What the operations returned, in order.
        ops: The ATen operations, in order.
        calls: The Python-level torch calls, in order.
        outputs: Nodes of the model's outputs.
        modules: Qualified name of every module, by identity.
        choices: The choices all of whose operators were run, by name.
        runs: Each run of one of them, every tensor replaced by its ``Node``.
    """

    model: nn.Module
    algebra: Algebra
    tensors: dict[str, Node]
    aliases: dict[str, str]
    changed: dict[tuple[str, str], Any]
    nodes: list[Node]
    ops: list[Op]
    calls: list[Call]
    modules: dict[int, str]
    parameters: frozenset[str]
    outputs: list[Node] = field(default_factory=list)
    choices: Mapping[str, ChoiceRecord] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    @property
    def precision(self) -> torch.dtype:
        """The least precise floating-point type that the forward passes through, whatever the weights are in."""
        types = {node.dtype for node in (*self.nodes, *self.tensors.values()) if node.dtype.is_floating_point}
        return max(types, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)

    @property
    def labels(self) -> Labels:
        """The union-find."""
        return self.algebra.labels

    def along(self, node: Node, dim: int) -> Tensor | None:
        """Canonical labels of ``node`` along ``dim``, int64 ``[node.shape[dim]]``; ``None`` where it has none.

        Where both heads and positions inside them are removed, these are the heads' labels: see :meth:`planes_along`.
        """
        plane = self.plane_along(node, dim)
        return None if plane is None else plane.flatten()

    def plane_along(self, node: Node, dim: int) -> Tensor | None:
        """The canonical plane of ``node`` along ``dim`` alone; nodes whose labels came from one plane share it."""
        return next(iter(self.planes_along(node, dim)), None)

    def planes_along(self, node: Node, dim: int) -> list[Tensor]:
        """All canonical planes of ``node`` along ``dim`` alone: a position is gone when one of its labels is."""
        return [
            plane for plane in self.algebra.get(node) if plane.shape[dim] > 1 and plane.shape[dim] == plane.numel()
        ]


def describe_inputs(inputs: Any) -> str:
    """Shapes, types and devices of an example input, for messages."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in tensors) or repr(type(inputs).__name__)


class _Dispatch(TorchDispatchMode):
    """Gives every tensor a node and lets labels flow through every ATen operation."""

    def __init__(self, algebra: Algebra, paths: Paths) -> None:
        super().__init__()
        self.algebra = algebra
        self.paths = paths
        self.ops: list[Op] = []
        self.nodes: list[Node] = []
        self.call: Call | None = None
        self.blanks = Blanks()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = plain_name(func)
        inputs: list[Node] = []
        node_args, node_kwargs = to_nodes(args, inputs), to_nodes(kwargs, inputs)
        out = self.blanks.run(func, name, args, kwargs)
        depends = labelled = False
        for node in inputs:
            depends |= node.depends
            labelled |= node.is_labelled
        outputs: list[Node] = []
        is_view = func.is_view
        if args and out is args[0] and isinstance(out, Tensor):
            is_view |= _renew(out)
        out_nodes = to_nodes(out, outputs)
        for node in outputs:
            node.depends |= depends
            if is_view and inputs and node is not inputs[0]:
                node.base = inputs[0].base or inputs[0]
        self.nodes += outputs
        op = Op(func, name, node_args, node_kwargs, out_nodes, inputs, outputs, self.call, self.paths.current)
        self.ops.append(op)
        if labelled or name in MAKES_TENSORS:
            apply_rule(self.algebra, op)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # What runs here is never compiled anyway; torch would wrap it once more at every operation.
        return False


class _Record(TorchFunctionMode):
    """Records every torch call that Python code makes, and from where."""

    def __init__(self, dispatch: _Dispatch) -> None:
        super().__init__()
        self.dispatch = dispatch
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in QUIET:
            out = func(*args, **kwargs)
            if func is _DATA_GETTER:
                setattr(out, _NODE, node_of(args[0]))
            return out
        call = Call(func, name, to_nodes(args), to_nodes(kwargs), None, capture_frame(sys._getframe(1)),
                    self.dispatch.paths.current)  # fmt: skip
        outer, self.dispatch.call = self.dispatch.call, call
        try:
            out = func(*args, **kwargs)
        finally:
            self.dispatch.call = outer
        call.out = to_nodes(out)
        self.calls.append(call)
        return out


def _renew(tensor: Tensor) -> bool:
    """Whether the tensor has got another shape in place (``transpose_``): then it is a view, by a node of its own."""
    node = node_of(tensor)
    if node.shape == tuple(tensor.shape) and node.strides == tensor.stride():
        return False
    delattr(tensor, _NODE)
    return True


_DATA_GETTER = torch.Tensor.data.__get__  # type: ignore[attr-defined]


def node_of(tensor: Tensor) -> Node:
    """The node of a tensor; a tensor that was never seen is a constant without labels."""
    node: Node | None = getattr(tensor, _NODE, None)
    if node is None:
        node = Node(tuple(tensor.shape), tensor.dtype)
        node.strides = strides = tensor.stride()
        if 0 in strides:
            node.repeated = frozenset(d for d, s in enumerate(strides) if s == 0 and node.shape[d] > 1)
        if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
            node.value = tensor.detach() if tensor.requires_grad else tensor
        setattr(tensor, _NODE, node)
    return node


def to_nodes(tree: Any, found: list[Node] | None = None) -> Any:
    """Replaces every tensor in nested arguments by its node, and appends these, in order, to ``found``."""
    kind = type(tree)
    if kind in _LEAVES:
        return tree
    if isinstance(tree, Tensor):
        node = node_of(tree)
        if found is not None:
            found.append(node)
        return node
    if kind is tuple or kind is list:
        return kind([to_nodes(item, found) for item in tree])
    if kind is dict:
        return {key: to_nodes(item, found) for key, item in tree.items()} if tree else tree
    return tree_map(lambda leaf: to_nodes(leaf, found) if isinstance(leaf, Tensor) else leaf, tree)


_LEAVES = frozenset([int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size, slice, complex])


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[dict[tuple[str, str], Any]]:
    """Eval mode, no gradients and no cached tensors inside; everything as it was outside."""
    fused, attention = torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()
    with attributes_kept(model) as changed:
        model.eval()
        try:
            # Without the fused CPU kernels recurrent and attention layers decompose into what has rules.
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
            torch.backends.mha.set_fastpath_enabled(False)
            with torch.no_grad():
                yield changed
        finally:
            torch.backends.mkldnn.enabled = fused
            torch.backends.mha.set_fastpath_enabled(attention)


def trace(model: nn.Module, inputs: Any, ignore: Callable[[str], bool] = lambda name: False,
          choices: Mapping[str, ChoiceRecord] | None = None,
          inside: Mapping[tuple[str, int], Tensor] | None = None) -> Trace:  # fmt: skip
    """Labels every removable position of ``model`` by one forward in eval mode; the model is left as it was.

    Args:
        model: The model.
        inputs: A tensor, a tuple of positional or a mapping of keyword arguments.
        ignore: Says of a parameter's qualified name whether nothing in it may be removed.
        choices: The choices to run every operator of, from ``find_choices``; others run their chosen one.
        inside: For a (tensor name, dimension), numbers of positions inside heads, from ``positions_in_heads``: they are
            units beside the heads.

    Returns:
        The trace, its labels final: outputs frozen, dead and weak labels frozen, every tensor that Python sees a box.

    Raises:
        AttachError: The model does not run on the input.
    """
    algebra = Algebra()
    modules = {id(module): name for name, module in modules_of(model)}
    algebra.module_name = lambda frame: _owner_name(frame, modules)
    paths = Paths(choices or {})
    dispatch = _Dispatch(algebra, paths)
    record = _Record(dispatch)
    tagged: list[Tensor] = []
    try:
        tensors, aliases, parameters = _label_tensors(model, algebra, ignore, tagged)
        label_inside_heads(tensors, algebra, inside or {}, ignore)
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                tagged.append(leaf)
                node_of(leaf).depends = True
        with _evaluation(model) as changed:
            try:
                with dispatch, record, conducted(paths):
                    output = call_model(model, inputs)
            except AttachError:
                raise
            except Exception as error:
                raise AttachError(
                    f"the model does not run on its example input ({describe_inputs(inputs)}): "
                    f"{type(error).__name__}: {error}. Pass example_input= of the shape, type and device that "
                    "the model expects."
                ) from error
        outputs = list(nodes_in(to_nodes(output)))
        runs = [replace(run, inputs=to_nodes(run.inputs), outputs=to_nodes(run.outputs), total=to_nodes(run.total))
                for run in paths.runs]  # fmt: skip
    finally:
        for tensor in tagged:
            if hasattr(tensor, _NODE):
                delattr(tensor, _NODE)
    result = Trace(
        model, algebra, tensors, aliases, changed, dispatch.nodes, dispatch.ops, record.calls,
        modules, parameters, outputs, choices or {}, runs
    )  # fmt: skip
    _settle(result)
    return result


def _owner_name(frame: FrameRecord | None, modules: Mapping[int, str]) -> str:
    while frame is not None:
        if frame.owner is not None:
            return modules.get(id(frame.owner), "")
        frame = frame.caller
    return ""


def _label_tensors(model: nn.Module, algebra: Algebra, ignore: Callable[[str], bool],
                   tagged: list[Tensor]) -> tuple[dict[str, Node], dict[str, str], frozenset[str]]:  # fmt: skip
    """Nodes of all parameters and buffers, which get labels when they are first read; tied tensors have one node."""
    tensors: dict[str, Node] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    parameters = set()
    for name, tensor, is_parameter in named_tensors(model):
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        tagged.append(tensor)
        if hasattr(tensor, _NODE):
            delattr(tensor, _NODE)
        node = node_of(tensor)
        node.name = name
        tensors[name] = node
        if is_parameter:
            parameters.add(name)
            node.source = node
        if tensor.is_floating_point() and tensor.numel() > 1:
            node.unread = algebra.give_birth
            if ignore(name):
                for plane in node.planes:
                    algebra.labels.freeze_later(plane, Reason("ignored on request"))
    return tensors, aliases, frozenset(parameters)


def _settle(result: Trace) -> None:
    """Freezes what cannot be a unit, until every tensor that Python sees stays a box after any cut."""
    algebra = result.algebra
    for node in result.tensors.values():
        _ = node.planes  # those that no operation has read get labels, too
    for node in result.outputs:
        for plane in algebra.get(node):
            algebra.labels.freeze(plane, Reason("the model's output"))
    _freeze_unused(result)
    make_rectangular(result)
    _freeze_whole_layers(result)
    classes = result.labels.classes()
    weak = classes[~result.labels.is_strong(classes)]
    algebra.labels.freeze(weak, Reason("only buffers carry it"))


def _freeze_unused(result: Trace) -> None:
    """Labels that no operation on the input touched (rows of a table beyond the input's size) are not units."""
    labels = result.labels
    planes = {id(plane): plane for node in result.nodes if node.depends for plane in node.planes}
    touched = [plane.flatten() for plane in planes.values()]
    seen = torch.zeros(len(labels), dtype=torch.bool)
    roots = labels.roots()
    if touched:
        seen[roots[torch.cat(touched)]] = True
    classes = labels.classes()
    labels.freeze(classes[~seen[classes]], Reason("no operation on the input uses it"))


def _freeze_whole_layers(result: Trace) -> None:
    """A class that holds every position of some dimension would empty a layer: it is no unit."""
    labels = result.labels
    shared = {id(plane): plane for name in result.parameters for plane in result.tensors[name].planes}
    planes = [plane.flatten() for plane in shared.values()]
    if not planes:
        return
    flat = labels.roots()[torch.cat(planes)].numpy()
    starts = np.cumsum([0, *(plane.numel() for plane in planes[:-1])])
    lowest = np.minimum.reduceat(flat, starts)
    whole = torch.from_numpy(np.unique(lowest[lowest == np.maximum.reduceat(flat, starts)]))
    labels.freeze(whole[whole != FROZEN], Reason("a layer would vanish with one unit"))


def make_rectangular(result: Trace) -> None:
    """Ties planes that vary along several dimensions of a tensor that Python code sees.

    Such a tensor would not be a box after a cut. Of its dimensions the one that keeps most labels stays free.
    """
    algebra = result.algebra
    joint = {node.uid for node in result.nodes if not all(map(is_line, node.planes))}
    if not joint:
        return
    nodes: dict[int, Node] = {}
    for call in result.calls:
        nodes |= {node.uid: node for node in nodes_in((call.args, call.kwargs, call.out)) if node.uid in joint}
    # The cost of a contraction is a product of lengths, so its operands must be boxes too.
    for consumption in algebra.consumptions:
        operands = (*consumption.op.inputs, *consumption.op.outputs)
        nodes |= {node.uid: node for node in operands if node.uid in joint}
    for _ in range(_MAX_RECTANGLE_ROUNDS):
        changed = False
        for node in nodes.values():
            for plane in algebra.get(node):
                dims = varying(plane)
                if len(dims) > 1:
                    # Positions inside heads are told apart by a later dimension than queries, keys and values are.
                    order = sorted(dims, reverse=algebra.is_inner(plane))
                    best = max(order, key=lambda dim: _classes_left(plane, dim))
                    algebra.coarsen_or_freeze(plane, dims - {best}, "a cut must leave a box")
                    changed = True
        if not changed:
            return


def _classes_left(plane: Tensor, dim: int) -> int:
    """How many classes remain when ``plane`` is tied along every dimension but ``dim``."""
    values, compact = torch.unique(plane, return_inverse=True)
    local = Labels()
    start = local.fresh(values.numel())
    if int(values[0]) == FROZEN:
        local.freeze(start[:1], Reason("frozen"))
    compact = compact.reshape(plane.shape) + 1
    first = compact
    for other in varying(plane) - {dim}:
        first = first.narrow(other, 0, 1)
    local.union(compact, first, Reason("trial"))
    left = torch.unique(compress(local.find(first)))
    return int((left != FROZEN).sum())
