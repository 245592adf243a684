"""Where the arguments of a call stand in its source."""

from __future__ import annotations

import ast
import types

from prunegate.plan import Argument
from prunegate.slim.source import ENTERED, FunctionSource, resolve

__all__ = [
    "MAKERS",
    "SEQUENCE",
    "SIZE_KEYWORDS",
    "find_argument",
    "gives_sequence",
    "is_method_call",
    "positional",
    "size_expressions",
    "subscript_items",
]

SEQUENCE = "sequence"
"""Name of a size argument that is an entry of a sequence which one expression gives."""

MAKERS = ("zeros", "ones", "empty", "full", "rand", "randn")
"""Functions that make a tensor of given sizes, which are their first arguments; others take a tensor before."""

SIZE_KEYWORDS = ("shape", "size", "sizes")
"""Keywords by which calls take sizes."""


def is_method_call(source: FunctionSource, node: ast.Call) -> bool:
    """Whether the callee is a method of a value, which then is argument 0, and not a function by itself."""
    if not isinstance(node.func, ast.Attribute):
        return False
    owner = resolve(source, node.func.value)
    return not isinstance(owner, types.ModuleType | type)


def positional(source: FunctionSource, node: ast.expr | ast.stmt) -> list[ast.expr]:
    """The positional arguments, with the object of a method or the operands of an operator as the first."""
    if isinstance(node, ast.Call):
        own = [node.func.value] if isinstance(node.func, ast.Attribute) and is_method_call(source, node) else []
        entered = isinstance(node.func, ast.Name) and node.func.id.startswith(ENTERED)
        return [*own, *node.args[entered:]]
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.AugAssign):
        return [node.target, node.value]
    return []


def size_expressions(source: FunctionSource, node: ast.Call) -> list[ast.expr]:
    """The expressions of a call's sizes: one for each, or fewer where one is starred or gives a whole sequence."""
    given = _sizes_in_place(source, node)
    for keyword in node.keywords:
        if keyword.arg in SIZE_KEYWORDS:
            given = [keyword.value]
    if len(given) == 1 and isinstance(given[0], ast.Tuple | ast.List):
        return list(given[0].elts)
    return given


def _sizes_in_place(source: FunctionSource, node: ast.Call) -> list[ast.expr]:
    """The positional arguments of a call that are its sizes: all, behind the tensor that most calls take first."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    given = positional(source, node)[name not in MAKERS :]
    return given[:1] if name in ("full", "new_full") else given  # a value stands behind their sizes


def gives_sequence(source: FunctionSource, node: ast.Call) -> bool:
    """Whether one expression that is no literal gives all the sizes of a call that was given them as a sequence."""
    given = [k.value for k in node.keywords if k.arg in SIZE_KEYWORDS] or _sizes_in_place(source, node)
    return len(given) == 1 and not isinstance(given[0], ast.Tuple | ast.List | ast.Starred)


def subscript_items(node: ast.Subscript) -> list[ast.expr]:
    """The items between the brackets."""
    return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]


def find_argument(source: FunctionSource, node: ast.expr | ast.stmt, argument: Argument) -> ast.expr | None:
    """The expression of an argument; ``None`` where the source has none for it alone."""
    if argument.kind in ("start", "stop", "index"):
        items = subscript_items(node) if isinstance(node, ast.Subscript) else []
        if argument.index >= len(items):
            return None
        item = items[argument.index]
        if argument.kind == "index":
            return item
        return {"start": item.lower, "stop": item.upper}[argument.kind] if isinstance(item, ast.Slice) else None
    if argument.kind == "size":
        if not isinstance(node, ast.Call) or argument.name == SEQUENCE:
            return None
        sizes = size_expressions(source, node)
        before = sizes[: argument.index + 1] if argument.index >= 0 else sizes[argument.index :]
        if any(isinstance(size, ast.Starred) for size in before) or not -len(sizes) <= argument.index < len(sizes):
            return None
        return sizes[argument.index]
    index, name = (1, "") if argument.kind == "split" else (argument.index, argument.name)
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg is not None and (
                keyword.arg == name
                or (argument.kind == "split" and keyword.arg not in ("dim", "input", "tensor", "self"))
            ):
                return keyword.value
    given = positional(source, node)
    if index >= len(given) or any(isinstance(each, ast.Starred) for each in given[: index + 1]):
        return None
    return given[index]
