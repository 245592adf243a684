"""Between a call that ran and its place in the source.

A call that was recorded at run time is known by a code object and an instruction. In the source it is an AST node, and
for a plan it is a ``CallSite``: function, name of the callee, and its ordinal among the calls of that name. The module
translates between the three.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import linecache
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from prunegate.labels.record import FrameRecord
from prunegate.plan import CallSite, Step

__all__ = [
    "CallNode",
    "FunctionSource",
    "Located",
    "find_call",
    "find_method",
    "locate",
    "locate_call",
    "method_running",
    "read_source",
    "resolve_callee",
]

SOURCE_OF_EDIT = "__prunegate_source__"
"""Attribute of a rewritten function: the name of the original and the place in it of each call, in order."""

CallLike = ast.Call | ast.Subscript | ast.BinOp | ast.AugAssign

_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "truediv", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.Pow: "pow", ast.MatMult: "matmul", ast.BitAnd: "and", ast.BitOr: "or", ast.BitXor: "xor",
    ast.LShift: "lshift", ast.RShift: "rshift",
}  # fmt: skip
_COMPREHENSIONS = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<lambda>"})
_MAX_WRAPPERS = 8


@dataclass(frozen=True, eq=False)
class CallNode:
    """A call in a function's source.

    Attributes:
        node: The call, subscript or operator.
        call: Name of the callee; in a rewritten function, of the original's call.
        ordinal: Which of the calls with that name it is, in order of evaluation, in the original.
    """

    node: CallLike
    call: str
    ordinal: int


@dataclass(frozen=True, eq=False)
class FunctionSource:
    """A function and its source.

    Attributes:
        function: The function, without decorators.
        name: ``"package.module:Qualified.name"`` of the function, or of the original that it was rewritten from.
        text: Source of the function, from the line of its first decorator, in UTF-8.
        first_line: Number, in the file, of the text's first line.
        definition: Its AST; line numbers are those of the file.
        calls: Its calls in order of evaluation.
    """

    function: FunctionType
    name: str
    text: bytes
    first_line: int
    definition: ast.FunctionDef
    calls: tuple[CallNode, ...]
    line_starts: tuple[int, ...] = field(repr=False)

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Where ``node`` begins and ends in ``text``."""
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def offset(self, line: int, column: int) -> int:
        """Offset in ``text`` of a position in the file."""
        return self.line_starts[line - self.first_line] + column

    @property
    def parameters(self) -> list[str]:
        """Names of the positional parameters."""
        arguments = self.definition.args
        return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]

    def find(self, call: str, ordinal: int) -> CallNode | None:
        """The call with this name and ordinal."""
        return next((node for node in self.calls if node.call == call and node.ordinal == ordinal), None)

    def at(self, code: CodeType, lasti: int, name: str = "") -> CallNode | None:
        """The call that an instruction makes.

        Args:
            code: The function's code, or that of a comprehension inside it.
            lasti: Index of the instruction in ``code``.
            name: Name of the called function, which decides where several calls end at one place.
        """
        position = next(_positions(code, lasti), None)
        if position is None or None in position:
            return None
        line, end_line, column, end_column = position
        ending = [
            node for node in self.calls if (node.node.end_lineno, node.node.end_col_offset) == (end_line, end_column)
        ]
        # The start of an instruction moves to the last line of a chained call, so it decides only where it is found.
        exact = [node for node in ending if (node.node.lineno, node.node.col_offset) == (line, column)]
        for choice in (exact, [n for n in ending if _plain(callee_name(n.node)) == _plain(name)], ending):
            if len(choice) == 1:
                return choice[0]
        return max(ending, key=lambda node: self.span(node.node)[1] - self.span(node.node)[0], default=None)


@dataclass(frozen=True, eq=False)
class Located:
    """A recorded call, found in the source.

    Attributes:
        owner: The module whose method runs.
        path: The calls that lead to it, the call itself last; those before it call free functions.
    """

    owner: nn.Module
    path: tuple[tuple[FunctionSource, CallNode], ...]

    @property
    def source(self) -> FunctionSource:
        """The function in which the call is written."""
        return self.path[-1][0]

    @property
    def call(self) -> CallNode:
        """The call."""
        return self.path[-1][1]

    def outer(self) -> Located:
        """The call of the free function in which this call is written."""
        return Located(self.owner, self.path[:-1])

    def site(self, modules: Mapping[int, str]) -> CallSite | None:
        """The name of this place in a plan; ``None`` where the module is not in ``modules``."""
        if id(self.owner) not in modules:
            return None
        *via, last = [Step(source.name, node.call, node.ordinal) for source, node in self.path]
        return CallSite(modules[id(self.owner)], last.function, last.call, last.ordinal, tuple(via))


def locate(frame: FrameRecord | None, name: str, modules: Mapping[int, str]) -> CallSite | None:
    """The place in the source of a module's method where a call was made.

    Args:
        frame: Where the call was made.
        name: Plain name of the called function.
        modules: Qualified name of every module, by identity.

    Returns:
        The place, or ``None`` where no module's method can be edited for it.
    """
    located = locate_call(frame, name)
    return None if located is None else located.site(modules)


def locate_call(frame: FrameRecord | None, name: str) -> Located | None:
    """Like :func:`locate`, with the nodes."""
    chain: list[FrameRecord] = []
    while frame is not None:
        chain.append(frame)
        if frame.owner is not None:
            break
        frame = frame.caller
    if not chain or chain[-1].owner is None:
        return None
    owner = chain[-1].owner
    path: list[tuple[FunctionSource, CallNode]] = []
    source: FunctionSource | None = None
    for record, inner in zip(reversed(chain), [*reversed(chain[:-1]), None], strict=True):
        if source is None:
            method = method_running(type(owner), record.code)
            source = None if method is None else read_source(method)
        elif record.code is not source.function.__code__ and not _is_inside(record.code, source.function.__code__):
            callee = resolve_callee(source, path.pop()[1].node) if path else None
            # What was entered must be what the source names, else a rewrite would change another function.
            if callee is None or innermost(callee, record.code) is None:
                return None
            path.append((source, _called(source, path_node)))
            source = read_source(innermost(callee, record.code))  # type: ignore[arg-type]
        if source is None:
            return None
        called = name if inner is None else inner.code.co_name
        path_node = source.at(record.code, record.lasti, called)
        if path_node is None:
            return None
        if path and path[-1][0] is source:
            path.pop()
        path.append((source, path_node))
    return Located(owner, tuple(path))
