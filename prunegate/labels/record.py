"""What a traced forward leaves behind: tensors without their data, and the Python-level calls that touched them."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

__all__ = ["Call", "FrameRecord", "Node", "Op", "capture_frame", "nodes_in"]

_uids = itertools.count()


class Node:
    """A tensor of the traced forward, without its data.

    Args:
        shape: The tensor's shape in the dense model.
        dtype: Its element type.
        depends: Whether the tensor depends on the model's input.

    Attributes:
        shape: As given.
        dtype: As given.
        depends: As given.
        strides: Where its elements stood in memory; empty where that is not known.
        name: Qualified name where the tensor is a parameter or buffer, else ``None``.
        source: The parameter that the tensor is only a rearrangement of, if there is one (itself for a parameter).
        repeated: Dimensions along which one value is expanded; they broadcast against anything.
        base: The tensor whose memory this one shares, where it is a view.
        value: The data itself, kept only of integer and boolean tensors that do not depend on the input's values
            (they are indices or masks).
        unread: What labels a parameter or buffer on the first look at its planes; ``None`` where it has been.
        adopted: Whether it took labels of what it met first, see ``Algebra.adopt``.
        known: The planes in canonical labels, as they were found last.
        known_at: The version of the labels at which they were found.
        uid: A number that is unique in the process.
    """

    __slots__ = ("_planes", "adopted", "base", "depends", "dtype", "known", "known_at", "name", "repeated", "shape",
                 "source", "strides", "uid", "unread", "value")  # fmt: skip

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, depends: bool = False) -> None:
        self.shape = shape
        self.dtype = dtype
        self.depends = depends
        self.strides: tuple[int, ...] = ()
        self._planes: list[Tensor] = []
        self.name: str | None = None
        self.source: Node | None = None
        self.repeated: frozenset[int] = frozenset()
        self.base: Node | None = None
        self.value: Tensor | None = None
        self.unread: Callable[[Node], list[Tensor]] | None = None
        self.adopted = False
        self.known: list[Tensor] | None = None
        self.known_at = -1
        self.uid = next(_uids)

    @property
    def planes(self) -> list[Tensor]:
        """Label planes, each broadcastable to ``shape`` (see ``planes.py``)."""
        if self.unread is not None:
            label, self.unread = self.unread, None
            self._planes = label(self)
        return self._planes

    @planes.setter
    def planes(self, planes: list[Tensor]) -> None:
        self.unread = None
        self._planes = planes

    @property
    def is_labelled(self) -> bool:
        """Whether there are planes, or will be on the first look."""
        return bool(self._planes) or self.unread is not None

    @property
    def is_vector(self) -> bool:
        """Whether there is one plane; a vector that nobody has looked at is not read for that."""
        return len(self.shape) == 1 if self.unread is not None else len(self._planes) == 1

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Number of elements in the dense model."""
        return math.prod(self.shape)


@dataclass(slots=True, frozen=True, eq=False)
class FrameRecord:
    """Where a call was made: enough to find its source later, cheap enough to take at every call.

    Attributes:
        code: The code object of the calling function.
        lasti: Index of the call instruction in ``code``.
        owner: The ``nn.Module`` bound to the function's first argument, if there is one.
        caller: The record of the function that called this one, if ``owner`` is ``None`` (a free function).
    """

    code: CodeType
    lasti: int
    owner: nn.Module | None
    caller: FrameRecord | None


@dataclass(slots=True, eq=False)
class Call:
    """One torch call made by Python code.

    Attributes:
        func: The function or method that was called.
        name: Its plain name, such as ``"reshape"``.
        args: Positional arguments, every tensor replaced by its ``Node``.
        kwargs: Keyword arguments, likewise.
        out: What it returned, likewise.
        frame: Where it was called from.
        path: The operators of choices that it is part of (see ``paths.py``).
    """

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    frame: FrameRecord | None
    path: tuple[tuple[str, int], ...] = ()


@dataclass(slots=True, eq=False)
class Op:
    """One ATen operation, below autograd, after composite operations decompose.

    Attributes:
        func: The overload that ran.
        name: Its plain name, such as ``"convolution"``, without leading or trailing underscores.
        args: Positional arguments, every tensor replaced by its ``Node``.
        kwargs: Keyword arguments, likewise.
        out: What it returned, likewise.
        inputs: The nodes among the arguments, in order.
        outputs: The nodes in what it returned, in order.
        call: The Python-level call that it is a part of, if there is one.
        path: The operators of choices that it is part of (see ``paths.py``).
    """

    func: OpOverload
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    inputs: Sequence[Node]
    outputs: Sequence[Node]
    call: Call | None
    path: tuple[tuple[str, int], ...] = ()

    @property
    def written(self) -> Iterator[Node]:
        """The nodes among the arguments that the operation changes, whether or not it returns them."""
        if not self.func._schema.is_mutable:
            return
        for number, argument in enumerate(self.func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from nodes_in(self.args[number] if number < len(self.args) else self.kwargs.get(argument.name))


# Frames of these packages stand between the user's line and the mode that sees the call; they are never edited.
_INTERNAL = ("/torch/overrides.py", "/torch/functional.py", "/torch/nn/functional.py", "/torch/_tensor.py",
             "/torch/_jit_internal.py", "/torch/utils/_contextlib.py", "/torch/_compile.py",
             "/torch/_dynamo/eval_frame.py", "/prunegate/labels/", "/prunegate/slim/")  # fmt: skip
_MAX_CALLERS = 4


@functools.cache
def _is_internal(filename: str) -> bool:
    return any(part in filename for part in _INTERNAL)


def capture_frame(frame: FrameType | None, depth: int = 0) -> FrameRecord | None:
    """Records the innermost frame, from ``frame`` outward, that is not internal to torch or to the tracer."""
    while frame is not None and _is_internal(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return None
    code = frame.f_code
    owner = None
    if code.co_argcount and not code.co_flags & inspect.CO_GENERATOR:
        owner = frame.f_locals.get(code.co_varnames[0])
    if not isinstance(owner, nn.Module):
        owner = None
    caller = None
    if owner is None and depth < _MAX_CALLERS:
        caller = capture_frame(frame.f_back, depth + 1)
    return FrameRecord(code, frame.f_lasti, owner, caller)


def nodes_in(tree: Any) -> Iterator[Node]:
    """The nodes anywhere in a nested structure of arguments, in order."""
    found: list[Node] = []
    _gather(tree, found)
    return iter(found)


def _gather(tree: Any, found: list[Node]) -> None:
    kind = type(tree)
    if kind is Node:
        found.append(tree)
    elif kind in _LEAVES:
        pass
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            _gather(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _gather(item, found)
    else:
        found += [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Node)]


_LEAVES = frozenset([int, float, bool, str, type(None), torch.dtype, torch.device, slice, complex])
