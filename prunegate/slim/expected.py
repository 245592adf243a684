"""The numbers that calls must be given after a cut.

One rule for each kind of torch call that takes numbers which depend on sizes: from the call of the dense model and the
positions that stay, it says what every such number must be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunegate.labels.record import Call, Node
from prunegate.plan import Argument
from prunegate.slim.arguments import MAKERS, SIZE_KEYWORDS
from prunegate.slim.attention import multi_head_attention_forward
from prunegate.slim.live import Live

__all__ = ["Given", "Number", "Unrepairable", "check_call", "same_call"]


class Unrepairable(Exception):
    """A call cannot be given numbers with which it does after the cut what it did before. Becomes an ExportError."""


@dataclass(frozen=True, eq=False)
class Number:
    """A number among the arguments of a call.

    Attributes:
        argument: Which one.
        given: What it is.
        right: What it must be.
        whole: Of a size, all the sizes that are given.
        sequence: Whether the sizes are given as one sequence, not as arguments of their own.
    """

    argument: Argument
    given: Any
    right: Any
    whole: tuple[Any, ...] = ()
    sequence: bool = False


@dataclass(eq=False)
class Given:
    """A call as it is made now, and as it was in the dense model.

    Attributes:
        call: The call of the dense model.
        args: Positional arguments now. They are corrected in place.
        kwargs: Keyword arguments now. They are corrected in place.
        live: What stays.
        func: What is called.
        numbers: The numbers that depend on sizes, right ones too.
    """

    call: Call
    args: list[Any]
    kwargs: dict[str, Any]
    live: Live
    func: Callable[..., Any]
    numbers: list[Number] = field(default_factory=list)

    @property
    def wrong(self) -> list[Number]:
        """The numbers that had to be corrected."""
        return [number for number in self.numbers if number.given != number.right]

    def shape(self, value: Tensor | Node) -> tuple[int, ...]:
        """Shape of an argument now."""
        return self.live.shape(value) if isinstance(value, Node) else tuple(value.shape)

    def get(self, index: int, name: str, default: Any = None) -> Any:
        """An argument now, by position or keyword."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def dense(self, index: int, name: str, default: Any = None) -> Any:
        """An argument in the dense model, by position or keyword."""
        call = self.call
        return call.args[index] if index < len(call.args) else call.kwargs.get(name, default)

    def correct(self, index: int, name: str, right: Any) -> None:
        """Notes that the argument at ``index``, or by keyword, must be ``right``, and makes it so."""
        given = self.get(index, name)
        given = tuple(given) if isinstance(given, list) else given
        self.numbers.append(Number(Argument("argument", index, name), given, right))
        if given != right:
            self.set(index, name, right)

    def set(self, index: int, name: str, value: Any) -> None:
        """Puts a value in the place of the argument at ``index``, or by keyword."""
        if index < len(self.args):
            self.args[index] = value
        else:
            self.kwargs[name] = value


def check_call(call: Call, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], live: Live) -> Given:
    """Compares the numbers that a call is given with those that it must be given.

    Args:
        call: The call of the dense model.
        func: What is called now.
        args: Positional arguments now; tensors, or the nodes of the dense model.
        kwargs: Keyword arguments now.
        live: What stays.

    Returns:
        The call, corrected, and what was wrong.

    Raises:
        Unrepairable: No numbers make the call right.
    """
    given = Given(call, list(args), dict(kwargs), live, func)
    RULES.get(call.name, _scalars)(given)
    return given


def same_call(call: Call, name: str) -> bool:
    """Whether a call of this name may stand where the dense model made ``call``."""
    return name == call.name or (name == "split" and call.name in _SPLITS)


# ---------------------------------------------------------------------- sizes


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _size_slot(args: Sequence[Any], kwargs: dict[str, Any], first: int) -> tuple[str | None, list[Any]]:
    """How a call takes sizes (``"each"``, ``"sequence"``, or the keyword), and the sizes."""
    for keyword in SIZE_KEYWORDS:
        if isinstance(kwargs.get(keyword), tuple | list):
            return keyword, list(kwargs[keyword])
    rest = args[first:]
    if rest and isinstance(rest[0], tuple | list):
        return "sequence", list(rest[0])
    if rest and all(_is_int(size) for size in rest):
        return "each", list(rest)
    return None, []


def _correct_sizes(given: Given, right: Sequence[int], first: int = 1) -> None:
    slot, sizes = _size_slot(given.args, given.kwargs, first)
    if slot is None or len(sizes) != len(right):
        return
    whole = tuple(sizes)
    for index, size in enumerate(whole):
        if _is_int(size) and size != -1:
            given.numbers.append(Number(Argument("size", index), size, right[index], whole, slot != "each"))
            sizes[index] = right[index]
    if slot == "each":
        given.args[first:] = sizes
    elif slot == "sequence":
        given.args[first] = sizes
    else:
        given.kwargs[slot] = sizes


def _sizes(given: Given) -> None:
    if isinstance(given.call.out, Node):
        _correct_sizes(given, given.live.shape(given.call.out))


def _made(given: Given) -> None:
    if isinstance(given.call.out, Node):
        _correct_sizes(given, given.live.shape(given.call.out), first=int(given.call.name not in MAKERS))


def _unflatten(given: Given) -> None:
    source, out = given.dense(0, "input"), given.call.out
    dim = given.dense(1, "dim") % source.ndim
    sizes = given.get(2, "sizes")
    right = given.live.shape(out)[dim : dim + len(sizes)]
    if any(now not in (-1, then) for now, then in zip(sizes, right, strict=True)):
        given.correct(2, "sizes", tuple(right))


def _repeat(given: Given) -> None:
    source, out = given.live.shape(given.dense(0, "input")), given.live.shape(given.call.out)
    padded = (1,) * (len(out) - len(source)) + source
    if any(now % then for now, then in zip(out, padded, strict=True) if then):
        raise Unrepairable("copies of different sizes")
    _correct_sizes(given, [now // then if then else 1 for now, then in zip(out, padded, strict=True)])


# ---------------------------------------------------------------------- parts of tensors

_SPLITS = ("chunk", "unsafe_chunk", "tensor_split", "split", "split_with_sizes", "unsafe_split")


def _parts(size: int, into: Any, name: str) -> list[int]:
    """Sizes of the parts that a call makes of ``size`` positions."""
    if not _is_int(into):
        if name != "tensor_split":
            return list(into)
        bounds = [0, *into, size]
        return [stop - start for start, stop in itertools.pairwise(bounds)]
    if name == "tensor_split":
        return [size // into + (at < size % into) for at in range(into)]
    step = -(-size // into) if "chunk" in name else into
    return [min(step, size - at) for at in range(0, size, step)] if step else [0]


def _split(given: Given) -> None:
    call, outs = given.call, given.call.out
    if not outs:
        return
    dim = given.dense(2, "dim", 0) % outs[0].ndim
    right = [given.live.shape(out)[dim] for out in outs]
    into = given.args[1] if len(given.args) > 1 else next(
        (value for name, value in given.kwargs.items() if name not in ("dim", "input", "tensor", "self")), None
    )  # fmt: skip
    name = getattr(given.func, "__name__", call.name)
    if into is None or isinstance(into, Tensor | Node):
        return
    now = _parts(given.shape(given.get(0, "input"))[dim], into, name)
    given.numbers.append(Number(Argument("split"), tuple(now), tuple(right)))
    if now == right:
        return
    given.func = torch.split
    given.args, given.kwargs = [given.get(0, "input"), right], {"dim": dim}


def _narrow(given: Given) -> None:
    source = given.dense(0, "input")
    dim, start, length = (given.dense(i, n) for i, n in ((1, "dim"), (2, "start"), (3, "length")))
    if isinstance(start, Node):
        return
    dim, start = dim % source.ndim, start % source.shape[dim] if source.shape[dim] else 0
    before = given.live.count(source, dim, start)
    given.correct(2, "start", before)
    given.correct(3, "length", given.live.count(source, dim, start + length) - before)


def _subscript(given: Given) -> None:
    source, dense_index, index = given.dense(0, "input"), given.call.args[1], given.args[1]
    dense_items = dense_index if isinstance(dense_index, tuple) else (dense_index,)
    items = list(index) if isinstance(index, tuple) else [index]
    if not isinstance(source, Node) or len(items) != len(dense_items):
        return
    consumed = sum(_consumes(item) for item in dense_items)
    dim = 0
    for at, item in enumerate(dense_items):
        if item is Ellipsis:
            dim += source.ndim - consumed
            continue
        if _consumes(item) and dim < source.ndim and given.live.positions(source, dim) is not None:
            items[at] = _subscript_item(given, source, dim, at, item, items[at])
        dim += _consumes(item)
    given.args[1] = tuple(items) if isinstance(index, tuple) else items[0]


def _consumes(item: Any) -> int:
    """How many dimensions an item of a subscript takes."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, Node):
        return item.ndim if item.dtype is torch.bool else 1
    return 1


def _subscript_item(given: Given, source: Node, dim: int, at: int, dense: Any, now: Any) -> Any:
    size, live = source.shape[dim], given.live
    if isinstance(dense, slice):
        start, stop, step = dense.indices(size)
        if step != 1:
            if isinstance(given.call.out, Node) and live.is_written(given.call.out):
                raise Unrepairable("every so many of positions that can be removed, written into")
            return _picked(given, Argument("index", at), source, dim, list(range(start, stop, step)), now)
        right = live.count(source, dim, start), live.count(source, dim, max(start, stop))
        bounds = now.indices(live.count(source, dim))[:2]
        for kind, is_now, must in zip(("start", "stop"), bounds, right, strict=True):
            given.numbers.append(Number(Argument(kind, at), is_now, must))  # type: ignore[arg-type]
        return slice(*right) if bounds != right else now
    if _is_int(dense):
        kept = live.positions(source, dim)
        assert kept is not None
        right_index = _place(kept, dense)
        given.numbers.append(Number(Argument("index", at), now % live.count(source, dim), right_index))
        return right_index
    return _picked(given, Argument("index", at), source, dim, _listed(dense), now)


def _listed(index: Any) -> list[int]:
    """The positions that an index picks one by one, known without an input."""
    if isinstance(index, Node) and index.value is not None and not index.depends and not index.value.is_meta:
        index = index.value.tolist() if index.dtype is not torch.bool else None
    if isinstance(index, list | tuple) and all(map(_is_int, index)):
        return list(index)
    raise Unrepairable("positions that can be removed, picked by a tensor that is no list of numbers")


def _picked(given: Given, argument: Argument, source: Node, dim: int, dense: Sequence[int], now: Any) -> Any:
    """Notes where the picked positions that stay are after the cut, and returns an index that picks them."""
    kept = given.live.positions(source, dim)
    if kept is None:
        return now
    rank = (torch.cumsum(kept, 0) - 1).tolist()
    right = tuple(rank[position] for position in dense if bool(kept[position]))
    is_now: Any = now
    if isinstance(now, slice):
        is_now = tuple(range(*now.indices(given.live.count(source, dim))))
    elif isinstance(now, Node):
        is_now = tuple(_listed(now))
    elif isinstance(now, Tensor):
        is_now = tuple(now.tolist())
    elif isinstance(now, list):
        is_now = tuple(now)
    given.numbers.append(Number(argument, is_now, right))
    if is_now == right:
        return now
    return now.new_tensor(right) if isinstance(now, Tensor) else list(right)


def _select(given: Given) -> None:
    source, dim, index = given.dense(0, "input"), given.dense(1, "dim"), given.dense(2, "index")
    kept = given.live.positions(source, dim % source.ndim)
    if kept is not None:
        given.correct(2, "index", _place(kept, index))


def _place(kept: Tensor, index: int) -> int:
    """Where a single position is after the cut."""
    if not bool(kept[index]):
        raise Unrepairable("a single position that was removed")
    return int(torch.count_nonzero(kept[: index % len(kept)]))


def _index_select(given: Given) -> None:
    source, dim, index = given.dense(0, "input"), given.dense(1, "dim"), given.dense(2, "index")
    dim %= source.ndim
    if given.live.positions(source, dim) is not None:
        now = given.get(2, "index")
        right = _picked(given, Argument("argument", 2, "index"), source, dim, _listed(index), now)
        if right is not now:
            given.set(2, "index", right)


def _roll(given: Given) -> None:
    source, shifts, dims = given.dense(0, "input"), given.dense(1, "shifts"), given.dense(2, "dims", ())
    if not given.live.changes(source):
        return
    of = (dims,) if _is_int(dims) else tuple(dims)
    by = (shifts,) if _is_int(shifts) else tuple(shifts)
    if not of:
        raise Unrepairable("positions that can be removed, rolled with those of other dimensions")
    right = tuple(_shift(given.live, source, dim, shift) for dim, shift in zip(of, by, strict=True))
    given.correct(1, "shifts", right[0] if _is_int(shifts) else right)


def _shift(live: Live, source: Node, dim: int, shift: int) -> int:
    """By how much positions that stay are rolled where all were rolled by ``shift``."""
    if live.positions(source, dim) is None:
        return shift
    size = source.shape[dim]
    return live.count(source, dim) - live.count(source, dim, size - shift % size)


def _triangle(given: Given) -> None:
    source, lower = given.dense(0, "input"), "tril" in given.call.name
    if not given.live.changes(source):
        return
    dense = getattr(torch.ones(source.shape[-2:], dtype=torch.bool), "tril" if lower else "triu")
    wanted = dense(given.dense(1, "diagonal", 0))
    for dim in (0, 1):
        kept = given.live.positions(source, source.ndim - 2 + dim)
        wanted = wanted if kept is None else wanted.index_select(dim, kept.nonzero().flatten())
    ones = torch.ones_like(wanted)
    for diagonal in range(-ones.shape[0], ones.shape[1] + 1):
        if torch.equal(ones.tril(diagonal) if lower else ones.triu(diagonal), wanted):
            given.correct(1, "diagonal", diagonal)
            return
    raise Unrepairable("a triangle that has other steps when positions are removed")


# ---------------------------------------------------------------------- layers


def _convolution(given: Given) -> None:
    source, weight = given.shape(given.get(0, "input")), given.shape(given.get(1, "weight"))
    groups = source[1 - len(weight)] // weight[1] if weight[1] else 1
    if groups != given.get(6, "groups", 1) or 6 < len(given.args) or "groups" in given.kwargs:
        given.correct(6, "groups", groups)


def _transposed_convolution(given: Given) -> None:
    groups = given.dense(6, "groups", 1)
    if groups != 1:
        source, weight = given.dense(0, "input"), given.dense(1, "weight")
        width = source.shape[-(weight.ndim - 1)] // groups
        given.correct(6, "groups", given.shape(given.get(0, "input"))[-(weight.ndim - 1)] // width)


def _normalized_shape(given: Given) -> None:
    shape = tuple(given.get(1, "normalized_shape"))
    given.correct(1, "normalized_shape", given.shape(given.get(0, "input"))[-len(shape) :])


def _group_norm(given: Given) -> None:
    source, groups = given.dense(0, "input"), given.dense(1, "num_groups")
    kept = given.live.positions(source, 1)
    if kept is not None and groups > 1:
        # Either whole groups go, or every group loses as much.
        given.correct(1, "num_groups", int(kept.view(groups, -1).any(1).sum()))


def _attention(given: Given) -> None:
    width = given.dense(0, "query").shape[-1]
    if given.get(6, "scale") is None and given.shape(given.get(0, "query"))[-1] != width:
        given.correct(6, "scale", width**-0.5)


def _multi_head_attention(given: Given) -> None:
    """Heads that no longer fill the width of the input."""
    first = given.call.args[0]
    if isinstance(first, tuple):  # the model was cut before
        heads, qk, v, scale = first
    else:
        qk = v = given.dense(3, "embed_dim_to_check")
        heads = given.dense(4, "num_heads")
        scale = qk // heads
    packed = given.dense(5 + isinstance(first, tuple), "in_proj_weight")
    if packed is not None:
        bounds = [given.live.count(packed, 0, stop) for stop in (qk, 2 * qk, 2 * qk + v)]
        left = [bounds[0], bounds[1] - bounds[0], bounds[2] - bounds[1]]
    else:
        weights = [given.call.kwargs[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        left = [given.live.count(weight, 0) for weight in weights]
        packed = weights[0]
    if left[0] != left[1]:
        raise Unrepairable("queries and keys of different widths")
    kept = given.live.positions(packed, 0)
    heads_left = heads if kept is None else int(kept[:qk].view(heads, -1).any(1).sum())
    right = (heads_left, left[0], left[2], scale)
    now = given.args[0] if isinstance(given.args[0], tuple) else None
    query = given.args[now is not None]
    if now is not None or right != (heads, qk, v, scale) or given.shape(query)[-1] != qk:
        given.numbers.append(Number(Argument("widths"), now, right))
        given.func = multi_head_attention_forward
        given.args[: now is not None] = [right]


def _scalars(given: Given) -> None:
    """Numbers that were computed from sizes (a scale from a width) keep the value that they had."""
    for at, (now, then) in enumerate(zip(given.args, given.call.args, strict=False)):
        if isinstance(now, int | float) and isinstance(then, int | float) and now != then:
            given.numbers.append(Number(Argument("argument", at), now, then))
            given.args[at] = then


def _nothing(given: Given) -> None:
    """Numbers of these calls are sizes, counts or outcomes of checks; what comes of them shows if they are right."""


RULES: dict[str, Callable[[Given], None]] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to"), _sizes),
    **dict.fromkeys((*MAKERS, "new_zeros", "new_ones", "new_empty", "new_full"), _made),
    "unflatten": _unflatten,
    "repeat": _repeat,
    **dict.fromkeys(_SPLITS, _split),
    "narrow": _narrow,
    **dict.fromkeys(("__getitem__", "__setitem__"), _subscript),
    "select": _select,
    "index_select": _index_select,
    "roll": _roll,
    **dict.fromkeys(("tril", "triu", "tril_", "triu_"), _triangle),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized_shape),
    "group_norm": _group_norm,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head_attention,
    **dict.fromkeys(
        ("_assert", "arange", "linspace", "eye", "repeat_interleave", "tile", "one_hot", "topk", "unfold",
         "as_strided"),
        _nothing,
    ),
}  # fmt: skip
"""For each torch call, by its plain name, the rule that corrects its numbers. Other calls: their numbers stay."""
