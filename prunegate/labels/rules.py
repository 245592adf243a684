"""One table: how labels pass through each ATen operation.

A rule is justified by what the operation computes, never by the model that calls it. An operation without a rule
freezes what enters it. Names are those of the ATen schema without leading and trailing underscores, so that in-place
and out-of-place forms share a rule.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunegate.labels.algebra import Algebra, Reduction
from prunegate.labels.planes import place, varying
from prunegate.labels.record import Node, Op, nodes_in
from prunegate.labels.shapes import plain_name

__all__ = ["MAKES_TENSORS", "apply_rule", "rule_for"]

Rule = Callable[[Algebra, Op], None]

_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule under the names of the operations that it serves."""

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


@functools.cache
def rule_for(func: Any) -> Rule:
    """The rule that serves an operation: its own, else the one for its kind, else the one that freezes."""
    name = plain_name(func)
    if func.namespace != "aten":
        return unknown
    own = _RULES.get(name)
    if own is not None:
        return own
    if torch.Tag.pointwise in func.tags or name in _POINTWISE:
        return pointwise
    if func.is_view or name in _MOVEMENT or _is_view_in_place(func, name):
        return movement
    return unknown


def _is_view_in_place(func: Any, name: str) -> bool:
    """Whether an operation makes of a tensor what another returns as a view of it (``transpose_``)."""
    if torch.Tag.inplace not in func.tags:
        return False
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(getattr(packet, overload).is_view for overload in packet.overloads())


def apply_rule(algebra: Algebra, op: Op) -> None:
    """Lets labels flow through ``op``."""
    algebra.op = op
    try:
        rule_for(op.func)(algebra, op)
    finally:
        algebra.op = None


MAKES_TENSORS = frozenset("zeros ones full empty new_zeros new_ones new_full new_empty".split())
"""Operations whose results may carry labels although no operand does."""

# Element-wise operations that ATen does not tag as such.
_POINTWISE = frozenset(
    "hardswish hardsigmoid hardtanh mish celu prelu prelu_kernel softplus silu gelu elu selu relu6 threshold lerp "
    "masked_fill clamp log_sigmoid_forward rrelu_with_noise native_dropout complex polar".split()
)
# Rearrangements that are not views.
_MOVEMENT = frozenset(
    "clone to_copy contiguous unsafe_view reshape_alias roll flip repeat repeat_interleave pixel_shuffle "
    "pixel_unshuffle lift_fresh unsafe_split unsafe_split_with_sizes "
    "split_with_sizes tril triu rot90 alias expand_copy view_copy unfold_copy index_select gather embedding "
    "reshape_copy".split()
)


def _bound(op: Op) -> dict[str, Any]:
    """The arguments of ``op`` by their schema names, defaults included."""
    names, defaults = _arguments(op.func)
    return defaults | dict(zip(names, op.args, strict=False)) | op.kwargs


@functools.cache
def _arguments(func: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of an operation's arguments, in order, and their defaults; ``None`` where there is none."""
    arguments = func._schema.arguments
    return tuple(argument.name for argument in arguments), {
        argument.name: argument.default_value if argument.has_default_value() else None for argument in arguments
    }


# ---------------------------------------------------------------------- kinds


def unknown(algebra: Algebra, op: Op) -> None:
    """An operation that nobody taught: whatever enters it stays."""
    for node in op.inputs:
        algebra.freeze_node(node, "no rule for this operation")


def pointwise(algebra: Algebra, op: Op) -> None:
    """Operands align by the dimensions on which they vary."""
    operands = op.inputs
    if len(operands) == len(op.outputs) == 1 and operands[0].ndim == op.outputs[0].ndim:
        if op.outputs[0] is not operands[0]:
            op.outputs[0].planes = list(operands[0].planes)
        return
    for out in op.outputs:
        alike = algebra.elementwise_alike(operands, out.ndim, "element-wise")
        if alike is not None and out.base is None:
            out.planes = alike
            continue
        planes = algebra.elementwise(operands, out.ndim, "element-wise") if alike is None else alike
        if out in operands and out.base is not None:
            # Written in place into a view: what else looks at this memory knows only the labels it had before.
            known = {varying(plane) for plane in algebra.get(out)}
            for plane in planes:
                if varying(plane) not in known:
                    algebra.freeze(plane, "written into a view")
        algebra.put(out, planes)


def movement(algebra: Algebra, op: Op) -> None:
    """The operation itself is executed on the plane, expanded to where the operation needs it."""
    source = op.args[0]
    for node in nodes_in((op.args[1:], op.kwargs)):
        algebra.freeze_node(node, "used as an index")
    # A rearranged parameter keeps its own labels, by which a consumer finds the parameter's dimension again.
    algebra.own_labels(source)
    raw = source.source is not None or algebra.only_plane(source) is not None
    planes = source.planes if raw else algebra.get(source)
    outs = op.outputs
    moved: list[list[Tensor]] = [[] for _ in outs]
    for plane in planes:
        for at, piece in enumerate(_move(op, plane, source.shape)):
            moved[at].append(piece)
    for out, pieces in zip(outs, moved, strict=True):
        out.source = source.source
        algebra.put(out, pieces)


def _move(op: Op, plane: Tensor, shape: Sequence[int]) -> Sequence[Tensor]:
    if op.name in ("view", "unsafe_view", "reshape_alias", "reshape_copy"):
        return [_reshaped(plane, shape, op.out.shape)]
    if op.name in ("clone", "to_copy", "contiguous", "lift_fresh", "detach", "alias"):
        return [plane]
    dims = op.args[_WITHIN_DIMS.get(op.name, len(op.args)) :][:1]  # a roll need not name any: then it is one of all
    if dims and dims[0] != []:
        within = {dim % len(shape) for dim in (dims if isinstance(dims[0], int) else dims[0])}
        if within.isdisjoint(varying(plane)):
            return [plane]
    out = op.func(plane.expand(shape), *_plain(op.args[1:]), **_plain(op.kwargs))
    return [out] if isinstance(out, Tensor) else list(out)


# Rearrangements that copy, and where among their arguments they name the dimensions in which they move positions: a
# plane that does not vary along those is as it was.
_WITHIN_DIMS = {"roll": 2, "flip": 1, "index_select": 1}


def _reshaped(plane: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """``plane`` of a tensor of shape ``before`` when that is viewed in the shape ``after``.

    Dimensions are taken in the smallest runs that hold equally many positions before and after. A run along which the
    plane does not vary stays of size 1, so that neither batch nor resolution costs anything.
    """
    if 0 in before:
        return plane.expand(tuple(before)).reshape(tuple(after))
    sizes: list[int] = []
    wanted: list[int] = []
    at = to = 0
    while at < len(before) or to < len(after):
        start, first = at, to
        inside = math.prod(before[at : at + 1])
        outside = math.prod(after[to : to + 1])
        at, to = at + 1, to + 1
        while inside != outside:
            if inside < outside:
                inside, at = inside * before[at], at + 1
            else:
                outside, to = outside * after[to], to + 1
        varies = max(plane.shape[start:at], default=1) > 1
        sizes += before[start:at] if varies else plane.shape[start:at]
        wanted += after[first:to] if varies else [1] * len(after[first:to])
    return plane.expand(sizes).reshape(wanted)


def _plain(tree: Any) -> Any:
    """Arguments with the index tensors that the tracer kept beside their nodes."""
    if isinstance(tree, Node):
        if tree.value is None:
            raise RuntimeError("an index tensor was not kept by the tracer")
        return tree.value.cpu()  # planes are, wherever the model is
    if isinstance(tree, (list, tuple)):
        return type(tree)(_plain(item) for item in tree)
    if isinstance(tree, dict):
        return {key: _plain(item) for key, item in tree.items()}
    return tree


@rule("embedding")
def _embedding(algebra: Algebra, op: Op) -> None:
    weight, index = op.args[:2]
    algebra.freeze_node(index, "used as an index")
    rows = [plane for plane in algebra.get(weight) if 0 in varying(plane)]
    for plane in rows:
        algebra.freeze(plane, "rows are chosen by the input")
    algebra.put(op.out, [plane.reshape((1,) * (op.out.ndim - 1) + (-1,)) for plane in algebra.get(weight)])


@rule("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
def _same_shape(algebra: Algebra, op: Op) -> None:
    """The operand's values do not reach the result, but its shape does: it is cut as the operand is."""
    if op.out.dtype.is_floating_point:
        algebra.put(op.out, algebra.get(op.args[0]))


@rule(*MAKES_TENSORS)
def _filled(algebra: Algebra, op: Op) -> None:
    """A table made on the way is like a buffer: its positions take the labels of what they meet."""
    if op.out.dtype.is_floating_point:
        sizes = [(dim, size) for dim, size in enumerate(op.out.shape) if size > 1]
        algebra.put(op.out, [place(algebra.labels.fresh(size, strong=False), dim, op.out.ndim) for dim, size in sizes])


@rule("new_empty_strided", "bernoulli", "uniform", "normal", "fill", "zero",
      "assert_async", "assert_tensor_metadata", "local_scalar_dense", "is_same_size", "sym_size")  # fmt: skip
def _no_values(algebra: Algebra, op: Op) -> None:
    """Nothing of the operand's values reaches the result."""


@rule("copy")
def _copy(algebra: Algebra, op: Op) -> None:
    target, source = op.args[0], op.args[1]
    if target.base is None:
        algebra.put(target, algebra.elementwise([source], target.ndim, "copy"))
        return
    # The write reaches everything else that looks at the same memory: both sides must already agree.
    algebra.align([algebra.operand(target, target.ndim), algebra.operand(source, target.ndim)], "written into a view")


@rule("as_strided")
def _as_strided(algebra: Algebra, op: Op) -> None:
    source, size = op.args[:2]
    if tuple(size) != source.shape:
        unknown(algebra, op)
    elif op.out is not source:
        algebra.put(op.out, algebra.get(source))


# ---------------------------------------------------------------------- movement with a twist


@rule("constant_pad_nd")
def _constant_pad(algebra: Algebra, op: Op) -> None:
    source, pad = op.args[0], list(op.args[1])
    planes = []
    for plane in algebra.get(source):
        widths = list(pad)
        for i in range(len(widths) // 2):
            if plane.shape[source.ndim - 1 - i] == 1:
                widths[2 * i] = widths[2 * i + 1] = 0
        planes.append(F.pad(plane, widths))  # new positions get label 0: they stay
    algebra.put(op.out, planes)


@rule("view_as_complex")
def _view_as_complex(algebra: Algebra, op: Op) -> None:
    """The two halves of a number go together."""
    source = op.args[0]
    last = source.ndim - 1
    planes = [algebra.coarsen_or_freeze(plane, varying(plane) & {last}, "parts of one number")
              for plane in algebra.get(source)]  # fmt: skip
    algebra.put(op.out, [plane.squeeze(last) for plane in planes])


@rule("view_as_real")
def _view_as_real(algebra: Algebra, op: Op) -> None:
    algebra.put(op.out, [plane.unsqueeze(-1) for plane in algebra.get(op.args[0])])


@rule("diagonal")
def _diagonal(algebra: Algebra, op: Op) -> None:
    """A position's row and column have units of their own, without which it would be another one's."""
    source, bound = op.args[0], _bound(op)
    crossed = {bound["dim1"] % source.ndim, bound["dim2"] % source.ndim}
    planes = [algebra.coarsen_or_freeze(plane, varying(plane) & crossed, "the diagonal of positions")
              for plane in algebra.get(source)]  # fmt: skip
    where = bound["offset"], bound["dim1"], bound["dim2"]
    algebra.put(op.out, [op.func(plane.expand(source.shape), *where) for plane in planes])


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(algebra: Algebra, op: Op) -> None:
    """Channels go to where they go now only if every group of them loses the same ones."""
    source, groups = op.args[:2]
    planes = []
    for plane in algebra.get(source):
        if 1 in varying(plane):
            one = algebra.coarsen_or_freeze(plane.unflatten(1, (groups, -1)), [1], "shuffled with other groups")
            plane = one.transpose(1, 2).expand(-1, -1, groups, *plane.shape[2:]).flatten(1, 2)
        planes.append(plane)
    algebra.put(op.out, planes)


@rule("cat")
def _cat(algebra: Algebra, op: Op) -> None:
    tensors = [node for node in op.args[0] if node.numel()]
    bound = _bound(op)
    ndim = op.out.ndim
    dim = int(bound["dim"] or 0) % ndim
    own = [algebra.only_plane(node) for node in tensors]
    simple = [plane for plane in own if plane is not None and plane.shape[dim] > 1]
    if len(simple) == len(tensors):
        algebra.pass_on(op.out, torch.cat(simple, dim))
        return
    across, pieces = [], []
    within: list[Tensor | None] = []
    for node in tensors:
        planes = algebra.get(node)
        inside = [plane for plane in planes if plane.shape[dim] > 1]
        inner = [plane for plane in inside if algebra.is_inner(plane)] if len(inside) > 1 else []
        within.append(inner[0] if inner else None)
        inside = [plane for plane in inside if plane is not within[-1]]
        for extra in inside[1:]:
            algebra.freeze(extra, "two kinds of units on a concatenated dimension")
        base = inside[0] if inside else torch.zeros((1,) * ndim, dtype=torch.int64)
        sizes = list(base.shape)
        sizes[dim] = node.shape[dim]
        pieces.append(algebra.labels.find(base).expand(sizes))
        real = frozenset(d for d, size in enumerate(node.shape) if size > 1 and d != dim)
        across.append(([plane for plane in planes if plane.shape[dim] == 1], real))
    shared = algebra.align(across, "concatenated") if len(across) > 1 else list(across[0][0]) if across else []
    largest = [max(piece.shape[d] for piece in pieces) for d in range(ndim)]
    pieces = [piece.expand([piece.shape[d] if d == dim else largest[d] for d in range(ndim)]) for piece in pieces]
    algebra.put(op.out, [*shared, torch.cat(pieces, dim), *_cat_inner(algebra, tensors, within, dim)])


def _cat_inner(algebra: Algebra, tensors: list[Node], within: list[Tensor | None], dim: int) -> list[Tensor]:
    """Positions inside heads along the concatenated dimension; those of an operand without any stay."""
    if all(plane is None for plane in within):
        return []
    planes = [torch.zeros((1,) * node.ndim, dtype=torch.int64) if plane is None else algebra.labels.find(plane)
              for node, plane in zip(tensors, within, strict=True)]  # fmt: skip
    largest = [max(plane.shape[d] for plane in planes) for d in range(planes[0].dim())]
    sized = [plane.expand([node.shape[d] if d == dim else size for d, size in enumerate(largest)])
             for node, plane in zip(tensors, planes, strict=True)]  # fmt: skip
    return [torch.cat(sized, dim)]


@rule("stack")
def _stack(algebra: Algebra, op: Op) -> None:
    dim = int(_bound(op)["dim"] or 0) % op.out.ndim
    planes = [[plane.unsqueeze(dim) for plane in algebra.get(node)] for node in op.args[0]]
    if all(len(each) == 1 and each[0].shape == planes[0][0].shape for each in planes):
        algebra.put(op.out, [torch.cat([each[0] for each in planes], dim)])
        return
    real = frozenset(d for d, size in enumerate(op.out.shape) if size > 1 and d != dim)
    algebra.put(op.out, algebra.align([(each, real) for each in planes], "stacked"))


@rule("index")
def _index(algebra: Algebra, op: Op) -> None:
    source, indices = op.args[:2]
    for node in nodes_in(indices):
        algebra.freeze_node(node, "used as an index")
    if any(_is_valueless(node) for node in nodes_in(indices)):
        # On the meta device nobody knows which positions are taken: those along indexed dimensions stay.
        taken = frozenset(dim for dim, index in enumerate(indices) if index is not None)
        for plane in algebra.get(source):
            algebra.coarsen_or_freeze(plane, varying(plane) & taken, "taken by an index without values")
        given = [None if index is None else torch.zeros(index.shape, dtype=torch.int64) for index in indices]
        algebra.put(op.out, [op.func(p.expand(source.shape), given) for p in algebra.get(source)])
        return
    algebra.put(op.out, [op.func(p.expand(source.shape), _plain(list(indices))) for p in algebra.get(source)])


def _is_valueless(node: Node) -> bool:
    return node.value is not None and node.value.is_meta


@rule("im2col")
def _im2col(algebra: Algebra, op: Op) -> None:
    source, kernel = op.args[:2]
    planes = algebra.leave_spatial(source, (source.ndim - 2, source.ndim - 1), "unfolded positions")
    area = kernel[0] * kernel[1]
    algebra.put(op.out, [plane.select(-1, 0).repeat_interleave(area, source.ndim - 3) for plane in planes])


@rule("col2im")
def _col2im(algebra: Algebra, op: Op) -> None:
    source, kernel = op.args[0], op.args[2]
    area = kernel[0] * kernel[1]
    planes = []
    for plane in algebra.leave_spatial(source, (source.ndim - 1,), "folded positions"):
        if plane.shape[-2] > 1:
            taps = plane.reshape(*plane.shape[:-2], -1, area)
            algebra.union(taps, taps[..., :1], "folded positions")
            plane = algebra.labels.find(taps[..., :1])
        planes.append(plane.reshape(*plane.shape[: source.ndim - 2], -1, 1, 1))
    algebra.put(op.out, planes)


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d", "max_pool2d_with_indices", "max_pool3d_with_indices",
      "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest_exact2d", "upsample_linear1d",
      "upsample_bilinear2d", "upsample_bilinear2d_aa", "upsample_bicubic2d", "upsample_bicubic2d_aa",
      "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")  # fmt: skip
def _spatial(algebra: Algebra, op: Op) -> None:
    """Positions are mixed, channels are not."""
    source = op.args[0]
    mixed = [d for d in range(source.ndim) if d >= source.ndim - _spatial_dims(op.name)]
    planes = algebra.leave_spatial(source, mixed, "mixed positions")
    for out in op.outputs:
        algebra.put(out, planes)


def _spatial_dims(name: str) -> int:
    return next((n for n in (3, 2, 1) if f"{n}d" in name), 2)


@rule("grid_sampler_2d")
def _grid_sampler(algebra: Algebra, op: Op) -> None:
    algebra.freeze_node(op.args[1], "sampling positions")
    algebra.put(op.out, algebra.leave_spatial(op.args[0], (2, 3), "mixed positions"))


# ---------------------------------------------------------------------- contractions


@rule("mm")
def _mm(algebra: Algebra, op: Op) -> None:
    if _plain_product(algebra, op, op.args[0], op.args[1]):
        return
    algebra.put(op.out, algebra.contract(op.args[0], op.args[1], "nk", "km", "nm", "matrix product"))


def _plain_product(algebra: Algebra, op: Op, a: Node, b: Node) -> bool:
    """The common case: features in, features out, by a transposed parameter."""
    plane = algebra.only_plane(a)
    if plane is None or plane.shape[1] == 1 or b.source is None or len(b.planes) != 2:
        return False
    by_dim = {dim: each for each in b.planes for dim in varying(each)}
    if set(by_dim) != {0, 1}:
        return False
    algebra.union_later(plane, by_dim[0], "matrix product")
    algebra.consume((a, frozenset([1])), (b, frozenset([0])))
    algebra.pass_on(op.out, by_dim[1])
    return True


@rule("mv")
def _mv(algebra: Algebra, op: Op) -> None:
    algebra.put(op.out, algebra.contract(op.args[0], op.args[1], "nk", "k", "n", "matrix product"))


@rule("dot", "vdot")
def _dot(algebra: Algebra, op: Op) -> None:
    algebra.put(op.out, algebra.contract(op.args[0], op.args[1], "k", "k", "", "inner product"))


@rule("bmm")
def _bmm(algebra: Algebra, op: Op) -> None:
    algebra.put(op.out, algebra.contract(op.args[0], op.args[1], "bnk", "bkm", "bnm", "batched product"))


@rule("addmm", "addbmm")
def _addmm(algebra: Algebra, op: Op) -> None:
    bias, a, b = op.args[:3]
    if bias.ndim == 1 and bias.is_vector and _plain_product(algebra, op, a, b):
        algebra.join_vector(op.out.planes[0].flatten(), bias, "bias")
        return
    _add_bias(algebra, op, bias, algebra.contract(a, b, "nk", "km", "nm", "matrix product"))


@rule("addmv")
def _addmv(algebra: Algebra, op: Op) -> None:
    bias, a, b = op.args[:3]
    _add_bias(algebra, op, bias, algebra.contract(a, b, "nk", "k", "n", "matrix product"))


@rule("baddbmm")
def _baddbmm(algebra: Algebra, op: Op) -> None:
    bias, a, b = op.args[:3]
    _add_bias(algebra, op, bias, algebra.contract(a, b, "bnk", "bkm", "bnm", "batched product"))


def _add_bias(algebra: Algebra, op: Op, bias: Node, planes: list[Tensor]) -> None:
    out = op.out
    real = frozenset(dim for dim, size in enumerate(out.shape) if size > 1)
    algebra.put(out, algebra.align([(planes, real), algebra.operand(bias, out.ndim)], "bias"))


@rule("scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_flash_attention",
      "scaled_dot_product_efficient_attention", "scaled_dot_product_attention_math",
      "scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_cudnn_attention")  # fmt: skip
def _attention(algebra: Algebra, op: Op) -> None:
    query = op.args[0]
    key, value = (_repeated_heads(algebra, node, query.shape[1]) for node in op.args[1:3])
    bound = _bound(op)
    mask = bound.get("attn_mask", bound.get("attn_bias"))
    scores = Node((*query.shape[:-1], key.shape[-2]), query.dtype)
    algebra.put(scores, algebra.contract(query, key, "bhnd", "bhmd", "bhnm", "attention scores"))
    if isinstance(mask, Node):
        real = frozenset(dim for dim, size in enumerate(scores.shape) if size > 1)
        algebra.put(scores, algebra.align([(algebra.get(scores), real), algebra.operand(mask, 4)], "attention mask"))
    # Tokens are not units here: a softmax over fewer of them has no masked form inside the fused kernel.
    algebra.put(scores, algebra.reduce(scores, [3], "softmax over tokens", keep=True, maskable=False))
    outs = op.outputs
    algebra.put(outs[0], algebra.contract(scores, value, "bhnm", "bhmd", "bhnd", "attention output"))


def _repeated_heads(algebra: Algebra, node: Node, heads: int) -> Node:
    """Keys or values as the queries' heads see them: one head for several of theirs."""
    times = heads // node.shape[1]
    if times == 1:
        return node
    seen = Node((node.shape[0], heads, *node.shape[2:]), node.dtype, depends=node.depends)
    planes = algebra.get(node)
    algebra.put(seen, [p.repeat_interleave(times, 1) if p.shape[1] > 1 else p for p in planes])
    return seen


@rule("convolution", "mkldnn_convolution", "convolution_overrideable")
def _convolution(algebra: Algebra, op: Op) -> None:
    bound = _bound(op)
    if _plain_convolution(algebra, op, int(bound["groups"]), bool(bound.get("transposed"))):
        return
    source, weight, bias = op.args[:3]
    groups, transposed = int(bound["groups"]), bool(bound.get("transposed"))
    labels, out, ndim = algebra.labels, op.out, op.out.ndim
    inputs_dim, outputs_dim = (0, 1) if transposed else (1, 0)
    for node in nodes_in((source, weight, bias)):
        algebra.freeze_inner(node, "positions inside heads in a convolution")

    for plane in algebra.get(weight):
        if any(dim >= 2 for dim in varying(plane)):
            algebra.coarsen_or_freeze(plane, [d for d in varying(plane) if d >= 2], "kernel positions")
    for plane in algebra.get(weight):
        if {0, 1} <= varying(plane):
            algebra.coarsen(plane, [inputs_dim], "a weight that is one piece")

    passing: list[Tensor] = []
    channels: Tensor | None = None
    for plane in algebra.get(source):
        mixed = [dim for dim in varying(plane) if dim >= 2]
        untouched = not transposed and all(
            weight.shape[dim] == 1 and source.shape[dim] == out.shape[dim] for dim in mixed
        )
        if mixed and not (untouched and 1 not in varying(plane)):
            plane = algebra.coarsen_or_freeze(plane, mixed, "mixed positions")
        if {0, 1} <= varying(plane):
            plane = algebra.coarsen(plane, [1], "a batch that carries units")
        if 1 in varying(plane):
            channels = plane.flatten()
        elif varying(plane):
            passing.append(plane)

    weight_planes = algebra.get(weight)
    inputs = next((p.flatten() for p in weight_planes if varying(p) == {inputs_dim}), None)
    outputs = next((p.flatten() for p in weight_planes if varying(p) == {outputs_dim}), None)
    if groups == 1:
        _join_or_freeze(algebra, op, channels, inputs, inputs_dim)
        made = outputs
    elif transposed:
        made = _transposed_grouped(algebra, channels, inputs, outputs, groups, out.shape[1])
    else:
        made = _grouped(algebra, op, channels, inputs, outputs, groups)
    if isinstance(bias, Node):
        bias_labels = next((plane.flatten() for plane in algebra.get(bias)), None)
        if made is not None and bias_labels is not None:
            algebra.union(made, bias_labels, "bias")
        elif bias_labels is not None:
            algebra.freeze(bias_labels, "bias of channels that stay")
        elif made is not None and bias.numel() > 1:
            algebra.freeze(made, "a bias that cannot be cut")
    if made is not None:
        passing.append(place(labels.find(made), 1, ndim))
    algebra.put(out, passing)


def _plain_convolution(algebra: Algebra, op: Op, groups: int, transposed: bool) -> bool:
    """The common case: channels in, channels out, by a parameter as it is; dense or depthwise."""
    source, weight, bias = op.args[:3]
    channels = algebra.only_plane(source)
    depthwise = groups == source.shape[1] == weight.shape[0]
    if transposed or weight.source is not weight or not (groups == 1 or depthwise):
        return False
    if channels is None or channels.shape[1] == 1 or (bias is not None and not bias.is_vector):
        return False
    inputs = 0 if depthwise else 1
    adopts = weight.unread is not None and weight.shape[inputs] > 1
    if adopts:
        algebra.adopt(weight, inputs, channels.flatten())
    by_dim = {dim: plane for plane in weight.planes for dim in varying(plane)}
    if 0 not in by_dim or (1 in by_dim) == depthwise or len(by_dim) != len(weight.planes):
        return False
    for dim, plane in by_dim.items():
        if dim >= 2:
            algebra.freeze_later(plane, "kernel positions")
    if not adopts:
        algebra.union_later(channels, by_dim[inputs], "a group's inputs and outputs" if depthwise else "convolution")
    if not depthwise:
        algebra.consume((source, frozenset([1])), (weight, frozenset([1])))
    outputs = by_dim[0].flatten()
    if bias is not None:
        algebra.join_vector(outputs, bias, "bias")
    algebra.pass_on(op.out, place(outputs, 1, op.out.ndim))
    return True


def _join_or_freeze(algebra: Algebra, op: Op, channels: Tensor | None, inputs: Tensor | None,
                    inputs_dim: int) -> None:  # fmt: skip
    """Input channels join the weight's input dimension and end here."""
    source, weight = op.args[:2]
    if channels is not None and inputs is not None:
        algebra.union(channels, inputs, "convolution")
        algebra.consume((source, frozenset([1])), (weight, frozenset([inputs_dim])))
    elif source.shape[1] > 1:
        for plane in (channels, inputs):
            if plane is not None:
                algebra.freeze(plane, "convolution: summed against positions that cannot be removed")


def _grouped(algebra: Algebra, op: Op, channels: Tensor | None, inputs: Tensor | None, outputs: Tensor | None,
             groups: int) -> Tensor | None:  # fmt: skip
    """Either whole groups go, or (groups few and wide) the same position of every group."""
    source, weight = op.args[:2]
    per_group, labels = source.shape[1] // groups, algebra.labels
    if groups < per_group and channels is not None and inputs is not None and outputs is not None:
        rows = channels.view(groups, per_group)
        algebra.union(rows, rows[:1], "the same position of every group")
        algebra.union(rows[0], inputs, "the same position of every group")
        made = outputs.view(groups, -1)
        algebra.union(made, made[:1], "the same position of every group")
        algebra.consume((weight, frozenset([1])))
        return labels.find(outputs)
    if inputs is not None:
        algebra.freeze(inputs, "positions inside a convolution's group")
    if outputs is None and channels is not None and 0 in weight.repeated:
        # One filter for every group: a view that repeats it has no positions of its own, and can repeat it less often.
        outputs = labels.fresh(weight.shape[0], strong=False)
        algebra.put(weight, [*algebra.get(weight), place(outputs, 0, weight.ndim)])
    elif outputs is not None and _alike_in_groups(algebra, outputs, groups):
        # Samples that became groups: each group has the same units, which share no labels with what it reads.
        if channels is not None:
            algebra.freeze(channels, "grouped convolution: meets positions that cannot be removed")
        return labels.find(outputs)
    if channels is None or outputs is None:
        for plane in (channels, outputs):
            if plane is not None:
                algebra.freeze(plane, "grouped convolution: meets positions that cannot be removed")
        return None
    rows, made = channels.view(groups, per_group), outputs.view(groups, -1)
    algebra.union(rows, rows[:, :1], "channels of one group")
    algebra.union(made, made[:, :1], "channels of one group")
    algebra.union(rows[:, :1], made[:, :1], "a group's inputs and outputs")
    if per_group > 1:
        algebra.kinds.append(("conv_group", rows[:, :1]))
    return labels.find(outputs)


def _alike_in_groups(algebra: Algebra, outputs: Tensor, groups: int) -> bool:
    """Whether several positions of a group carry different labels, and those of all groups the same."""
    rows = algebra.labels.find(outputs).view(groups, -1)
    return bool((rows == rows[:1]).all() and (rows != rows[:, :1]).any())


def _transposed_grouped(algebra: Algebra, channels: Tensor | None, inputs: Tensor | None, outputs: Tensor | None,
                        groups: int, out_channels: int) -> Tensor | None:  # fmt: skip
    if outputs is not None:
        algebra.freeze(outputs, "positions inside a convolution's group")
    if channels is None or inputs is None:
        for plane in (channels, inputs):
            if plane is not None:
                algebra.freeze(plane, "grouped convolution: meets positions that cannot be removed")
        return None
    algebra.union(channels, inputs, "a group's inputs")
    rows = channels.view(groups, -1)
    algebra.union(rows, rows[:, :1], "channels of one group")
    whole = algebra.labels.find(rows[:, :1])
    return whole.expand(groups, out_channels // groups).reshape(-1)


# ---------------------------------------------------------------------- reductions and normalisation


@rule("mean", "sum", "var", "var_mean", "std", "std_mean", "amax", "amin", "linalg_vector_norm", "norm", "max", "min",
      "logsumexp", "prod", "argmax", "argmin", "any", "all")  # fmt: skip
def _reduction(algebra: Algebra, op: Op) -> None:
    source = op.args[0]
    if len(op.args) > 1 and isinstance(op.args[1], Node):
        pointwise(algebra, op)
        return
    bound = _bound(op)
    dims = bound.get("dim")
    dims = [] if dims is None else [dims] if isinstance(dims, int) else list(dims)
    dims = [d % source.ndim for d in dims] or list(range(source.ndim))
    maskable = op.name not in ("logsumexp", "prod", "argmax", "argmin", "any", "all")
    planes = algebra.reduce(source, dims, f"{op.name} over units", maskable=maskable)
    if not bound.get("keepdim"):
        for dim in sorted(dims, reverse=True):
            planes = [plane.select(dim, 0) for plane in planes]
    for out in op.outputs:
        algebra.put(out, planes)


@rule("softmax", "safe_softmax", "log_softmax")
def _softmax(algebra: Algebra, op: Op) -> None:
    source = op.args[0]
    maskable = op.name != "log_softmax"
    algebra.put(op.out, algebra.reduce(source, [op.args[1] % source.ndim], "softmax over units",
                                       keep=True, maskable=maskable))  # fmt: skip


@rule("cumsum", "cumprod", "sort", "topk", "logcumsumexp", "cummax")
def _ordered(algebra: Algebra, op: Op) -> None:
    source = op.args[0]
    dim = _bound(op)["dim"]
    for plane in algebra.get(source):
        if varying(plane) == {dim % source.ndim}:
            algebra.freeze(plane, "the order of positions matters")
    planes = algebra.reduce(source, [dim % source.ndim], "the order of positions matters", keep=True, maskable=False)
    for out in op.outputs:
        algebra.put(out, planes)


@rule("native_layer_norm", "fused_rms_norm")
def _layer_norm(algebra: Algebra, op: Op) -> None:
    source, shape = op.args[:2]
    affine = [node for node in op.args[2:4] if isinstance(node, Node)]
    out = op.outputs[0]
    start = source.ndim - len(shape)
    plane = algebra.only_plane(source)
    if len(shape) == 1 and plane is not None and plane.shape[-1] > 1 and all(n.is_vector for n in affine):
        algebra.reductions.append(Reduction(op, source, plane))
        labels = plane.flatten()
        for node in affine:
            algebra.join_vector(labels, node, "scale and shift")
        algebra.pass_on(out, plane)
        return
    planes = algebra.reduce(source, range(start, source.ndim), "normalised positions", keep=True)
    real = frozenset(dim for dim, size in enumerate(source.shape) if size > 1)
    operands = [(planes, real), *(algebra.operand(node, source.ndim) for node in affine)]
    algebra.put(out, algebra.align(operands, "scale and shift") if affine else planes)


@rule("native_group_norm")
def _group_norm(algebra: Algebra, op: Op) -> None:
    source, groups = op.args[0], int(op.args[6])
    planes = []
    for plane in algebra.leave_spatial(source, range(2, source.ndim), "normalised positions"):
        if plane.shape[1] > 1 and groups > 1:
            members = plane.reshape(plane.shape[0], groups, -1)
            algebra.union(members, members[:, :, :1], "channels normalised together")
            algebra.kinds.append(("norm_group", members[:, :, :1]))
        planes.append(plane)
    algebra.put(op.outputs[0], planes)
    if groups == 1:
        algebra.reduce(source, range(1, source.ndim), "normalised positions", keep=True)
    _per_channel(algebra, op, source, [n for n in op.args[1:3] if isinstance(n, Node)], planes)


@rule("native_batch_norm", "native_batch_norm_legit", "native_batch_norm_legit_no_training", "batch_norm_no_update",
      "batch_norm_with_update", "cudnn_batch_norm")  # fmt: skip
def _batch_norm(algebra: Algebra, op: Op) -> None:
    source, bound = op.args[0], _bound(op)
    training = bool(bound.get("training", bound.get("train", False)))
    vectors = [node for node in op.args[1:5] if isinstance(node, Node)]
    plane = algebra.only_plane(source)
    if not training and plane is not None and plane.shape[1] > 1 and all(node.is_vector for node in vectors):
        labels = plane.flatten()
        for node in vectors:
            algebra.join_vector(labels, node, "scale and shift")
        algebra.pass_on(op.outputs[0], plane)
        return
    planes = algebra.get(source)
    if training:
        others = [dim for dim in range(source.ndim) if dim != 1]
        planes = algebra.reduce(source, others, "normalised positions", keep=True)
    _per_channel(algebra, op, source, vectors, planes)


def _per_channel(algebra: Algebra, op: Op, source: Node, vectors: list[Node], planes: list[Tensor]) -> None:
    """Scale, shift and statistics are one number a channel, along dimension 1."""
    ndim = source.ndim
    real = frozenset(dim for dim, size in enumerate(source.shape) if size > 1)
    operands = [(planes, real)]
    for node in vectors:
        shaped = [place(plane.flatten(), 1, ndim) for plane in algebra.get(node)]
        operands.append((shaped, frozenset([1]) if node.numel() > 1 else frozenset()))
    algebra.put(op.outputs[0], algebra.align(operands, "scale and shift") if vectors else planes)
