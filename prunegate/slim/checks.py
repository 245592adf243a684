"""Checks in a model's own code that a cut model does not pass: ``if x.shape[-1] != self.width: raise ...``.

The number that the size is compared with is the size of a whole model, which the cut one must compare with its own.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor, nn

from prunegate.slim.source import FunctionSource, method_running, read_source

__all__ = ["FailedCheck", "failed_check"]


@dataclass(frozen=True, eq=False)
class FailedCheck:
    """A number that a module compares a size with.

    Attributes:
        module: The module that has the number.
        name: Its attribute.
        size: What it was compared with.
    """

    module: nn.Module
    name: str
    size: int


def failed_check(error: BaseException) -> FailedCheck | None:
    """The comparison for which an exception was raised; ``None`` where it was for something else.

    Args:
        error: What a model's forward raised: by ``raise`` under an ``if``, by ``assert``, or by a function such as
            ``torch._assert``.
    """
    found: tuple[FrameType, int] | None = None
    trace = error.__traceback__
    while trace is not None:  # from the outermost frame to the innermost
        if isinstance(_first_argument(trace.tb_frame), nn.Module):
            found = trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next
    if found is None:
        return None
    frame, line = found
    owner: Any = _first_argument(frame)
    cls: Any = type(owner)
    method = method_running(cls, frame.f_code)
    source = None if method is None else read_source(method)
    if source is None:
        return None
    for compare in _comparisons(source, line):
        for number, size in ((compare.left, compare.comparators[0]), (compare.comparators[0], compare.left)):
            place, value = _attribute_of(number, owner, source), _size(size, frame)
            if place is not None and value is not None and getattr(*place) != value:
                return FailedCheck(*place, value)
    return None


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _comparisons(source: FunctionSource, line: int) -> list[ast.Compare]:
    """The comparisons, for equality, that decide whether a line raises: the nearest first."""

    def covers(node: ast.stmt) -> bool:
        return node.lineno <= line <= (node.end_lineno or node.lineno)

    tests: list[ast.AST] = []
    for node in ast.walk(source.definition):
        if isinstance(node, ast.If) and any(map(covers, node.body)):
            tests.insert(0, node.test)
        elif isinstance(node, ast.Assert | ast.Expr) and covers(node):
            tests.insert(0, node)
    compared = [each for test in tests for each in ast.walk(test) if isinstance(each, ast.Compare)]
    return [each for each in compared if len(each.ops) == 1 and isinstance(each.ops[0], ast.Eq | ast.NotEq)]


def _attribute_of(node: ast.expr, owner: nn.Module, source: FunctionSource) -> tuple[nn.Module, str] | None:
    """The module and attribute that ``self.x`` or ``self.child.x`` names, if that is a whole number."""
    steps: list[str] = []
    while isinstance(node, ast.Attribute):
        steps.insert(0, node.attr)
        node = node.value
    if not steps or not isinstance(node, ast.Name) or node.id != source.parameters[0]:
        return None
    module: Any = owner
    for step in steps[:-1]:
        module = getattr(module, step, None)
    if not isinstance(module, nn.Module) or type(module.__dict__.get(steps[-1])) is not int:
        return None
    return module, steps[-1]


def _size(node: ast.expr, frame: FrameType) -> int | None:
    """What an expression that only looks up a size gives: a local name, ``x.shape[1]``, ``x.size(1)``."""
    value = _looked_up(node, frame)
    return value if type(value) is int else None


def _looked_up(node: ast.expr, frame: FrameType) -> Any:
    if isinstance(node, ast.Name):
        return frame.f_locals.get(node.id)
    if isinstance(node, ast.Attribute) and node.attr == "shape":
        tensor = _looked_up(node.value, frame)
        return tensor.shape if isinstance(tensor, Tensor) else None
    if isinstance(node, ast.Subscript):
        return _entry(_looked_up(node.value, frame), node.slice)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "size":
        tensor = _looked_up(node.func.value, frame)
        sizes = tensor.shape if isinstance(tensor, Tensor) else None
        return _entry(sizes, node.args[0]) if node.args else sizes
    return None


def _entry(sizes: Any, index: ast.expr) -> int | None:
    try:
        at = ast.literal_eval(index)
    except ValueError:
        return None
    return sizes[at] if isinstance(sizes, tuple) and isinstance(at, int) and -len(sizes) <= at < len(sizes) else None
