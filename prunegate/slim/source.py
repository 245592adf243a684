"""Functions and the calls in their source.

A call that ran is known by a code object and an instruction; in the source it is an AST node; a plan names it by
function, callee and ordinal. This module translates between the three.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import itertools
import linecache
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

__all__ = [
    "CallLike",
    "CallNode",
    "FunctionSource",
    "callee_name",
    "calls_below",
    "contains_code",
    "find_method",
    "full_name",
    "innermost",
    "method_running",
    "read_source",
    "resolve",
]

ORIGIN = "__prunegate_origin__"
"""Attribute of a rewritten function: (name of the original, call and ordinal there of each of its calls, in order)."""

MODULE = "_prunegate_module"
"""First parameter of a rewritten free function: a tuple of the module that it was rewritten for."""

ENTERED = "_prunegate_into_"
"""How the names of rewritten free functions begin where they are called."""

CallLike = ast.Call | ast.Subscript | ast.BinOp | ast.AugAssign
"""What counts as a call: operators and subscripts are calls too."""

_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "truediv", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.Pow: "pow", ast.MatMult: "matmul", ast.BitAnd: "and", ast.BitOr: "or", ast.BitXor: "xor",
    ast.LShift: "lshift", ast.RShift: "rshift",
}  # fmt: skip
_MAX_DECORATORS = 6


@dataclass(frozen=True, eq=False)
class CallNode:
    """A call in a function's source.

    Attributes:
        node: The call, subscript or operator.
        call: Name of the callee; in a rewritten function, that of the original's call.
        ordinal: Which of the calls of that name it is, in order of evaluation, in the original; -1 for a call that a
            rewrite added.
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
        text: Its source from the line of its first decorator on, in UTF-8.
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
    _line_starts: tuple[int, ...] = field(repr=False)

    def offset(self, line: int, column: int) -> int:
        """Offset in ``text`` of a position in the file."""
        return self._line_starts[line - self.first_line] + column

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """Where ``node`` begins and ends in ``text``."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that can be given by position; in a rewritten function, those of the original."""
        arguments = self.definition.args
        return [each.arg for each in (*arguments.posonlyargs, *arguments.args) if each.arg != MODULE]

    def find(self, call: str, ordinal: int) -> CallNode | None:
        """The call of this name and ordinal."""
        return next((node for node in self.calls if (node.call, node.ordinal) == (call, ordinal)), None)

    def at(self, code: CodeType, lasti: int, name: str) -> CallNode | None:
        """The call that an instruction makes.

        Args:
            code: The function's code, or that of a comprehension inside it.
            lasti: Index of the instruction in ``code``.
            name: Plain name of the called function, which decides between calls that end at one place.
        """
        position = next(itertools.islice(code.co_positions(), lasti // 2, None), (None,) * 4)
        line, end_line, column, end_column = position
        ending = [n for n in self.calls if (n.node.end_lineno, n.node.end_col_offset) == (end_line, end_column)]
        # The start of an instruction moves to the last line of a chained call, so it decides only where it is found.
        exact = [n for n in ending if (n.node.lineno, n.node.col_offset) == (line, column)]
        named = [n for n in ending if callee_name(n.node).strip("_") == name.strip("_")]
        for choice in (exact, named):
            if len(choice) == 1:
                return choice[0]
        return max(ending, key=lambda n: self.span(n.node)[1] - self.span(n.node)[0], default=None)


def callee_name(node: CallLike) -> str:
    """Name of what is called: the last part of the callee, or the special method of an operator."""
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):
            return node.func.attr
        return node.func.id if isinstance(node.func, ast.Name) else ""
    if isinstance(node, ast.Subscript):
        return "__getitem__" if isinstance(node.ctx, ast.Load) else "__setitem__"
    in_place = "i" if isinstance(node, ast.AugAssign) else ""
    return f"__{in_place}{_OPERATORS[type(node.op)]}__"


def calls_below(node: ast.AST) -> Iterator[CallLike]:
    """The calls in a piece of source, inner ones before those that use them."""
    for child in ast.iter_child_nodes(node):
        yield from calls_below(child)
    if isinstance(node, CallLike):
        yield node


def full_name(function: FunctionType) -> str:
    """``"package.module:Qualified.name"`` of a function; of the original where it is a rewritten one."""
    origin = function.__dict__.get(ORIGIN)
    return origin[0] if origin else f"{function.__module__}:{function.__qualname__}"


def read_source(function: FunctionType) -> FunctionSource | None:
    """The source of a function; ``None`` where it has none that can be rewritten (a lambda, generated code)."""
    return _read(function.__code__, function)


@functools.lru_cache(maxsize=2048)
def _read(code: CodeType, function: FunctionType) -> FunctionSource | None:
    lines = linecache.getlines(code.co_filename, function.__globals__)
    first = code.co_firstlineno
    try:
        block = inspect.getblock(lines[first - 1 :])
        nested = block[0][:1].isspace()
        tree = ast.parse(("if True:\n" if nested else "") + "".join(block))
    except (SyntaxError, IndexError, ValueError):
        return None
    ast.increment_lineno(tree, first - 1 - nested)
    statement: ast.stmt = tree.body[0].body[0] if nested else tree.body[0]  # type: ignore[attr-defined]
    if not isinstance(statement, ast.FunctionDef) or statement.name != code.co_name:
        return None
    encoded = [line.encode() for line in block]
    starts = (0, *itertools.accumulate(len(line) for line in encoded))
    calls = _numbered(statement, function)
    if calls is None:
        return None
    return FunctionSource(function, full_name(function), b"".join(encoded), first, statement, calls, starts)


def _numbered(definition: ast.FunctionDef, function: FunctionType) -> tuple[CallNode, ...] | None:
    nodes = [node for statement in definition.body for node in calls_below(statement)]
    origin = function.__dict__.get(ORIGIN)
    if origin is not None:
        keys = origin[1]
        if len(keys) != len(nodes):
            return None
        return tuple(CallNode(node, *(key or ("", -1))) for node, key in zip(nodes, keys, strict=True))
    counts: dict[str, int] = {}
    calls = []
    for node in nodes:
        name = callee_name(node)
        calls.append(CallNode(node, name, counts.get(name, 0)))
        counts[name] = counts.get(name, 0) + 1
    return tuple(calls)


# ---------------------------------------------------------------------- functions behind decorators


def innermost(value: Any, wanted: Callable[[FunctionType], bool], depth: int = 0) -> FunctionType | None:
    """The innermost function that ``wanted`` accepts in a stack of decorators around a function."""
    while isinstance(value, staticmethod | classmethod | types.MethodType):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.partial):
        value = value.func
    if not isinstance(value, FunctionType) or depth > _MAX_DECORATORS:
        return None
    for inner in wrapped_by(value):
        found = innermost(inner, wanted, depth + 1)
        if found is not None:
            return found
    return value if wanted(value) else None


def wrapped_by(function: FunctionType) -> list[FunctionType]:
    """The functions that a decorator's wrapper may call: those in its closure."""
    inner = []
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if isinstance(content, FunctionType) and content is not function:
            inner.append(content)
    return inner


@functools.lru_cache(maxsize=4096)
def method_running(cls: Any, code: CodeType) -> FunctionType | None:
    """The method of ``cls`` or of one of its bases whose code this is."""
    return _method(cls, lambda function: function.__code__ is code)


@functools.lru_cache(maxsize=4096)
def find_method(cls: Any, name: str) -> FunctionType | None:
    """The method ``"package.module:Qualified.name"`` of ``cls`` or of one of its bases, without decorators."""
    return _method(cls, lambda function: full_name(function) == name)


def _method(cls: type, wanted: Callable[[FunctionType], bool]) -> FunctionType | None:
    for base in cls.__mro__:
        for value in vars(base).values():
            found = innermost(value, wanted)
            if found is not None:
                return found
    return None


def contains_code(outer: CodeType, code: CodeType) -> bool:
    """Whether ``code`` is that of a comprehension, lambda or function written inside ``outer``."""
    return any(
        constant is code or contains_code(constant, code)
        for constant in outer.co_consts
        if isinstance(constant, CodeType)
    )


def resolve(source: FunctionSource, expression: ast.expr) -> Any:
    """What a name, or an attribute of one, outside of the function stands for; ``None`` where it is a local value."""
    if isinstance(expression, ast.Attribute):
        parent = resolve(source, expression.value)
        return None if parent is None else getattr(parent, expression.attr, None)
    if not isinstance(expression, ast.Name):
        return None
    function, name = source.function, expression.id
    code = function.__code__
    if name in code.co_varnames or name in code.co_cellvars:
        return None
    if name in code.co_freevars:
        cell = (function.__closure__ or ())[code.co_freevars.index(name)]
        try:
            return cell.cell_contents
        except ValueError:  # not assigned yet
            return None
    return function.__globals__.get(name, getattr(builtins, name, None))
