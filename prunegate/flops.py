"""What an operation costs: one table, read by the FLOP counter and by the symbolic cost of every mask.

One multiply-add counts as one FLOP, as in fvcore, whose conventions for normalisations, pooling and interpolation are
kept. A rule maps an operation's arguments to terms, each a coefficient times the sizes of some dimensions of its
tensors. ``count_flops`` evaluates the rules at the sizes of a graph that fvcore traces; the cost of a mask evaluates
the same rules at live lengths.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from prunegate.labels.record import Node, nodes_in
from prunegate.tensors import tensor_caches

__all__ = ["Term", "call_terms", "count_flops", "op_terms"]

Term = tuple[int, list[tuple[Node, int]]]
"""A coefficient, and the (tensor, dimension) pairs whose sizes it is multiplied with."""

_Rule = Callable[[Sequence[Any], Mapping[str, Any], Any], list[Term]]
_OPS: dict[str, _Rule] = {}
_CALLS: dict[str, _Rule] = {}

# fvcore sees these whole. They are made of operations that have rules, so their cost is found by taking them apart.
_COMPOSITE = frozenset(
    "einsum tensordot inner chain_matmul linalg_multi_dot linalg_matmul bilinear lstm gru rnn_tanh rnn_relu".split()
)
# Names that look like contractions and are none (or whose contraction is another operation beside them).
_FREE = frozenset(
    "upsample_linear1d upsample_trilinear3d upsample_bilinear2d_aa thnn_fused_lstm_cell thnn_fused_gru_cell "
    "mkldnn_reorder_conv2d_weight".split()
)
_CONTRACTIONS = frozenset("mm bmm addmm baddbmm addbmm mv addmv dot vdot inner tensordot gemm".split())
_CONTRACTION_STEMS = ("conv", "matmul", "linear", "attention", "attn", "einsum", "lstm", "gru", "rnn")


def op_terms(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """FLOPs of one ATen operation.

    Args:
        name: Its plain name, such as ``"convolution"``; leading and trailing underscores do not matter.
        args: Positional arguments, every tensor replaced by its node.
        kwargs: Keyword arguments, likewise.
        out: What it returned, likewise.

    Returns:
        Terms whose sum is the operation's cost; empty where it is free. An operation that looks like a contraction but
        has no rule is counted as free with a warning.
    """
    name = name.strip("_")
    rule = _OPS.get(name)
    if rule is not None:
        return rule(args, kwargs, out)
    if _looks_like_contraction(name):
        _warn_uncounted(name)
    return []


def call_terms(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    """FLOPs that belong to a Python-level call and cannot be seen in the ATen operations that it makes.

    Args:
        name: Plain name of the function, such as ``"adaptive_avg_pool2d"``.
        args: Positional arguments, every tensor replaced by its node.
        kwargs: Keyword arguments, likewise.
        out: What it returned, likewise.
    """
    rule = _CALLS.get(name)
    return [] if rule is None else rule(args, kwargs, out)


def count_flops(model: nn.Module, example_input: Any) -> int:
    """Counts the FLOPs of one eval-mode forward; one multiply-add is one FLOP.

    fvcore's ``FlopCountAnalysis`` walks the traced graph, with a handle for every contraction, among them those that
    fvcore by itself leaves out (attention, matrix-vector products, recurrent layers, ...).

    Args:
        model: Any module that ``torch.jit`` can trace. It is left as it was.
        example_input: A tensor, a tuple of positional or a mapping of keyword arguments; its batch size counts.

    Returns:
        FLOPs of the whole batch.

    Example:
        >>> from torch import nn
        >>> count_flops(nn.Linear(8, 4), torch.zeros(2, 8))
        64
    """
    with warnings.catch_warnings():
        # Its other modules compile scripts when imported, and torch warns about that.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

    leaves, tree = tree_flatten(example_input if isinstance(example_input, (tuple, Mapping)) else (example_input,))
    wrapper = _Flat(model, leaves, tree)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    with _untouched(model), torch.no_grad(), _slow_attention():
        analysis = FlopCountAnalysis(wrapper, tensors)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        analysis.set_op_handle(**_handles())
        total = analysis.total()
        unknown = list(analysis.unsupported_ops())
        inlined = {kind: _subgraph_flops for kind in unknown if kind.startswith("prim::PythonOp")}
        if inlined:
            total = analysis.set_op_handle(**inlined).total()
    for kind in unknown:
        name = kind.rpartition("::")[2].strip("_")
        if kind not in inlined and _looks_like_contraction(name):
            _warn_uncounted(name)
    return int(total)


# ---------------------------------------------------------------------- rules


def _rule(*names: str, table: dict[str, _Rule] = _OPS) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        table.update(dict.fromkeys(names, rule))
        return rule

    return register


def _sizes(node: Node, dims: Iterable[int] | None = None) -> list[tuple[Node, int]]:
    return [(node, dim) for dim in (range(node.ndim) if dims is None else dims)]


def _first(out: Any) -> Node:
    return next(nodes_in(out))


def _batch(a: Node, b: Node) -> list[tuple[Node, int]]:
    """Sizes of all dimensions but the last two, broadcast."""
    rank = max(a.ndim, b.ndim)
    found = []
    for back in range(rank, 2, -1):
        sized = [node for node in (a, b) if node.ndim >= back]
        node = next((node for node in sized if node.shape[-back] != 1), sized[0])
        found.append((node, node.ndim - back))
    return found


@_rule("mm", "bmm", "matmul")
def _matmul(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    a, b = args[:2]
    if a.ndim == 1:
        return [(1, _sizes(b))]
    if b.ndim == 1:
        return [(1, _sizes(a))]
    return [(1, [*_batch(a, b), *_sizes(a, (a.ndim - 2, a.ndim - 1)), (b, b.ndim - 1)])]


@_rule("addmm", "baddbmm", "addbmm", "addmv", "addmm_activation")
def _matmul_added(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    return _matmul(args[1:], kwargs, out)


@_rule("mv", "dot", "vdot")
def _first_operand(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    return [(1, _sizes(args[0]))]


@_rule("linear")
def _linear(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    # A vector for a weight makes a single output.
    return [(1, [*_sizes(args[0]), *_sizes(args[1], range(args[1].ndim - 1))])]


@_rule("trilinear")
def _trilinear(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    operands, expansions = args[:3], args[3:6]
    rank = operands[0].ndim + len(expansions[0])
    factors = []
    for dim in range(rank):
        node, missing = next(
            (n, e) for n, e in zip(operands, expansions, strict=True) if dim not in [d % rank for d in e]
        )
        factors.append((node, dim - sum(d % rank < dim for d in missing)))
    return [(1, factors)]


def _convolve(x: Node, weight: Node, moved: Node) -> list[Term]:
    return [(1, [(x, 0), *_sizes(weight), *_sizes(moved, range(2, moved.ndim))])]


@_rule("convolution", "convolution_overrideable")
def _convolution(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    transposed = args[6] if len(args) > 6 else kwargs["transposed"]
    return _convolve(args[0], args[1], args[0] if transposed else _first(out))


@_rule("convolution_mode", "cudnn_convolution", "mkldnn_convolution", "miopen_convolution", "slow_conv2d_forward",
       "slow_conv3d_forward", "conv_depthwise2d", "conv_depthwise3d", "slow_conv_dilated2d",
       "slow_conv_dilated3d")  # fmt: skip
def _forward_convolution(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    return _convolve(args[0], args[1], _first(out))


@_rule("cudnn_convolution_transpose", "slow_conv_transpose2d", "slow_conv_transpose3d")
def _transposed_convolution(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    return _convolve(args[0], args[1], args[0])


@_rule("conv_tbc")
def _time_first_convolution(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    return [(1, [*_sizes(_first(out), (0, 1)), *_sizes(args[1])])]


@_rule("scaled_dot_product_attention", "scaled_dot_product_flash_attention_for_cpu",
       "scaled_dot_product_flash_attention", "scaled_dot_product_efficient_attention",
       "scaled_dot_product_cudnn_attention", "scaled_dot_product_fused_attention_overrideable")  # fmt: skip
def _attention(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    query, key, value = args[:3]
    # With grouped queries the keys' heads are fewer, and every query head counts.
    scores = [*_sizes(query, range(query.ndim - 1)), (key, key.ndim - 2)]
    return [(1, [*scores, (query, query.ndim - 1)]), (1, [*scores, (value, value.ndim - 1)])]


@_rule("mkldnn_rnn_layer")
def _recurrent_layer(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    return [(1, [*_sizes(args[0], (0, 1)), *_sizes(weight)]) for weight in args[1:3]]


@_rule("cudnn_rnn", "miopen_rnn")
def _recurrent_network(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    return [(1, [*_sizes(args[0], (0, 1)), *_sizes(weight)]) for weight in args[1] if weight.ndim == 2]


@_rule("layer_norm", "native_layer_norm", "group_norm", "native_group_norm")
def _normalise(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    at = 1 if isinstance(args[1], Node) or args[1] is None else 2
    weight = args[at] if len(args) > at else kwargs.get("weight")
    return [(4 if weight is None else 5, _sizes(args[0]))]


def _batch_statistics(x: Node, weight: Node | None, training: bool) -> list[Term]:
    return [((4 if training else 1) + (weight is not None), _sizes(x))]


@_rule("batch_norm", "native_batch_norm", "native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm",
       "instance_norm")  # fmt: skip
def _batch_norm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    # One overload has no running statistics; its training flag stands where they would begin.
    training = args[3] if isinstance(args[3], bool) else args[5]
    return _batch_statistics(args[0], args[1], training)


@_rule("native_batch_norm_legit_no_training", "batch_norm_no_update")
def _batch_norm_in_eval(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    return _batch_statistics(args[0], args[1], False)


@_rule("batch_norm_with_update")
def _batch_norm_in_training(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    return _batch_statistics(args[0], args[1], True)


@_rule("upsample_nearest2d")
def _copied(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    return [(1, _sizes(_first(out)))]


@_rule("upsample_bilinear2d", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def _interpolated(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    return [(4, _sizes(_first(out)))]


# Below autograd, pooling to one pixel is a mean like any other, and means are free: only the call tells them apart.
@_rule("adaptive_avg_pool2d", table=_CALLS)
def _pool(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    return [(1, _sizes(args[0] if args else kwargs["input"]))]


@_rule("interpolate", "upsample", table=_CALLS)
def _resize(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Term]:
    x = args[0] if args else kwargs["input"]
    mode = args[3] if len(args) > 3 else kwargs.get("mode", "nearest")
    return [(1, _sizes(x))] if mode == "area" and x.ndim == 4 else []


def _looks_like_contraction(name: str) -> bool:
    if name in _FREE or name in _OPS or name in _COMPOSITE:
        return False
    return any(part in _CONTRACTIONS or part.startswith(_CONTRACTION_STEMS) for part in name.split("_"))


def _warn_uncounted(name: str) -> None:
    warnings.warn(f"the operation {name!r} looks like a contraction but its FLOPs are unknown: counted as 0",
                  stacklevel=3)  # fmt: skip


# ---------------------------------------------------------------------- fvcore


def _evaluate(terms: list[Term]) -> int:
    return sum(coefficient * math.prod(node.shape[dim] for node, dim in sizes) for coefficient, sizes in terms)


@lru_cache(maxsize=1)
def _handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """A handle for every rule, under each spelling of the operation's name."""
    handles: dict[str, Callable[[list[Any], list[Any]], int]] = {}
    for name, rule in {**_OPS, "adaptive_avg_pool2d": _pool}.items():
        handle = _handle(rule)
        handles.update({f"aten::{name}": handle, f"aten::_{name}": handle, f"aten::{name}_": handle})
    handles.update({f"aten::{name}": _composite_flops for name in _COMPOSITE})
    return handles


def _handle(rule: _Rule) -> Callable[[list[Any], list[Any]], int]:
    def flops(inputs: list[Any], outputs: list[Any]) -> int:
        return _evaluate(rule([_read(v) for v in inputs], {}, [_read(v) for v in outputs]))

    return flops


def _read(value: Any) -> Any:
    """A node of the graph's value if it is a tensor, a list of what it is made of, or the constant that it is."""
    if value.isCompleteTensor():
        return Node(tuple(value.type().sizes()), torch.float32)
    if value.node().kind() in ("prim::ListConstruct", "prim::TupleConstruct"):
        return [_read(item) for item in value.node().inputs()]
    return value.toIValue()


def _composite_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Runs the operation on tensors without data and counts what it is made of."""
    node = outputs[0].node()
    schema = torch._C.parse_schema(node.schema())
    packet = getattr(torch.ops.aten, schema.name.rpartition("::")[2])
    function = getattr(packet, schema.overload_name or "default")
    values = tree_map(lambda leaf: torch.empty(leaf.shape, device="meta") if isinstance(leaf, Node) else leaf,
                      [_read(v) for v in inputs])  # fmt: skip
    args, kwargs = [], {}
    for argument, value in zip(schema.arguments, values, strict=True):
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    with _Tally() as tally:
        function(*args, **kwargs)
    return tally.total


class _Tally(TorchDispatchMode):
    """Adds up the FLOPs of the operations below."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        nodes = tree_map(lambda leaf: Node(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf,
                         (args, kwargs or {}, out))  # fmt: skip
        self.total += _evaluate(op_terms(func._schema.name.rpartition("::")[2], *nodes))
        return out


def _subgraph_flops(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """FLOPs inside a ``torch.autograd.Function``, which fvcore does not look into."""
    handles = _handles()
    counts: Counter[str] = Counter()
    node = outputs[0].node()
    if node.hasAttribute("Subgraph"):
        for inner in node.g("Subgraph").nodes():
            kind = inner.kind()
            if kind == "prim::PythonOp":
                counts += _subgraph_flops(list(inner.inputs()), list(inner.outputs()))
            elif kind in handles:
                counts[kind] += handles[kind](list(inner.inputs()), list(inner.outputs()))
            elif _looks_like_contraction(kind.rpartition("::")[2].strip("_")):
                _warn_uncounted(kind)
    return counts


class _Flat(nn.Module):
    """A model whose arguments and results are flat tuples of tensors, as the tracer wants them."""

    def __init__(self, model: nn.Module, leaves: list[Any], tree: Any) -> None:
        super().__init__()
        self.model = model
        self.leaves = leaves
        self.tree = tree
        self.training = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        inputs = tree_unflatten(leaves, self.tree)
        out = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(*inputs)
        return tuple(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; modes, hooks and cached tensors as they were outside, whatever happens inside."""
    states = [
        (module, module.training, list(module._forward_pre_hooks), list(module._forward_hooks))
        for module in model.modules()
    ]
    caches = [(cache, dict(cache)) for cache in tensor_caches(model)]
    for module, *_ in states:
        module.training = False
    try:
        yield
    finally:
        for module, training, before, after in states:
            module.training = training
            for hooks, known in ((module._forward_pre_hooks, before), (module._forward_hooks, after)):
                for key in [key for key in hooks if key not in known]:
                    del hooks[key]
        for cache, content in caches:
            cache.clear()
            cache.update(content)


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Keeps torch's attention modules off the fused path that they take in eval mode: it hides its contractions."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
