"""Rewriting the source of one function: only what an edit names changes, the rest is the author's text.

The new function is compiled, never executed as a script: its code object is taken out of the compiled text and bound to
the globals, defaults and closure of the original.
"""

from __future__ import annotations
import __future__

import ast
import itertools
import linecache
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import torch

from prunegate.errors import PlanError
from prunegate.plan import Argument, Change, PerExecution, Ratio, Value
from prunegate.slim.arguments import (
    SEQUENCE,
    SIZE_KEYWORDS,
    find_argument,
    is_method_call,
    positional,
    size_expressions,
    subscript_items,
)
from prunegate.slim.attention import multi_head_attention_forward
from prunegate.slim.source import ENTERED, MODULE, ORIGIN, CallNode, FunctionSource, calls_below, full_name, read_source

__all__ = ["NEW_INDEX", "SITES", "CallRewrite", "rewrite_function"]

SITES = "_prunegate_sites"
"""Attribute of a module: what its wrapped calls go through, by key."""

NEW_INDEX = "new_tensor"
"""Method that makes an index of its own in the place of one that a call was given."""

_TORCH = "_prunegate_torch"
_ATTENTION = "_prunegate_attention"
_SPLITS = {"chunk": "split", "unsafe_chunk": "split", "tensor_split": "split", "split": "split",
           "split_with_sizes": "split", "unsafe_split": "split"}  # fmt: skip

Key = tuple[str, int] | None
"""Call and ordinal in the original, ``None`` for a call that the rewrite added."""


@dataclass(frozen=True)
class CallRewrite:
    """What happens to one call.

    Attributes:
        changes: New values of arguments.
        wrap: Key in ``self._prunegate_sites`` of what the call goes through: ``f(a, b)`` becomes
            ``self._prunegate_sites[wrap](f, a, b)``.
        into: The rewritten form of the free function that the call enters, which takes a tuple of the module first.
    """

    changes: tuple[Change, ...] = ()
    wrap: str | None = None
    into: Callable[..., Any] | None = None


@dataclass
class _Piece:
    """A piece of new source, and the calls in it in order of evaluation."""

    text: bytes
    keys: list[Key] = field(default_factory=list)
    until: ast.expr | None = None
    """Last of the expressions that the piece takes the place of, where there are several."""


def rewrite_function(original: FunctionType, rewrites: Mapping[tuple[str, int], CallRewrite],
                     takes_module: bool = False) -> FunctionType:  # fmt: skip
    """A copy of a function in which some calls are rewritten.

    Args:
        original: A function without decorators, not a rewritten one.
        rewrites: What happens to each call, by call and ordinal.
        takes_module: Whether it is a free function, which gets a tuple of the module as an additional first argument.

    Returns:
        The new function. Its source is found by ``inspect`` and by debuggers.

    Raises:
        PlanError: The function's source does not have a call or an argument that is to be rewritten.
    """
    source = read_source(original)
    if source is None:
        raise PlanError(f"{full_name(original)} has no source that could be rewritten")
    calls: dict[int, tuple[CallNode, CallRewrite]] = {}
    for (call, ordinal), rewrite in rewrites.items():
        node = source.find(call, ordinal)
        if node is None:
            raise PlanError(f"{full_name(original)} has no call number {ordinal} of {call!r} to change")
        calls[id(node.node)] = node, rewrite
    return _Writer(source, calls, takes_module).function()


class _Writer:
    """Renders one function with its rewrites, and binds the result."""

    def __init__(self, source: FunctionSource, calls: Mapping[int, tuple[CallNode, CallRewrite]],
                 takes_module: bool) -> None:  # fmt: skip
        self.source = source
        self.calls = calls
        self.takes_module = takes_module
        self.own = {id(node.node): (node.call, node.ordinal) for node in source.calls}
        self.iterators: list[tuple[Any, ...]] = []
        self.entered: dict[str, Callable[..., Any]] = {}
        parameters = source.parameters
        # In a tuple, because a function whose first argument is a module is taken for a method of it.
        self.module = f"{MODULE}[0]" if takes_module else (parameters[0] if parameters else "self")
        self.lookup: list[Key] = [None, None] if takes_module else [None]

    # ------------------------------------------------------------------ rendering

    def render(self, node: ast.expr | ast.stmt) -> _Piece:
        """The new text of ``node``."""
        if id(node) not in self.calls:
            return self.splice(node, {})
        call, rewrite = self.calls[id(node)]
        operands = [change for change in rewrite.changes if change.argument.kind == "operand"]
        if operands:
            return self.operand(call, operands[0].argument)
        replaced: dict[int, _Piece] = {}
        added: list[_Piece] = []
        for expression, piece in self.arguments(call, rewrite.changes):
            if isinstance(expression, str):
                added.append(_Piece(expression.encode() + b"=" + piece.text, piece.keys))
            else:
                replaced[id(expression)] = piece
        callee = self.callee(call, rewrite)
        if rewrite.wrap is not None:
            return self.wrapped(call, rewrite, replaced, added, callee)
        edits = [] if callee is None else [callee]
        edits += self.appended(node, added)
        return self.splice(node, replaced, edits, late=[key for piece in added for key in piece.keys])

    def operand(self, call: CallNode, argument: Argument) -> _Piece:
        """One argument in the place of the whole call."""
        given = positional(self.source, call.node)
        if not 0 <= argument.index < len(given) or isinstance(given[argument.index], ast.Starred):
            raise PlanError(f"call {call.call!r} number {call.ordinal} of {self.source.name} has no such operand")
        piece = self.render(given[argument.index])
        text, keys = b"(" + piece.text + b")", list(piece.keys)
        if argument.name == "copy":
            text += b".clone()"
            keys.append(None)
        return _Piece(self.target(call) + text, keys)

    def target(self, call: CallNode) -> bytes:
        """What a statement such as ``x += y`` assigns to, with the sign of an assignment; nothing for an expression."""
        if not isinstance(call.node, ast.AugAssign):
            return b""
        if not isinstance(call.node.target, ast.Name):
            raise PlanError(f"{call.call!r} number {call.ordinal} of {self.source.name} assigns to no plain name")
        return call.node.target.id.encode() + b" = "

    def splice(self, node: ast.expr | ast.stmt, replaced: Mapping[int, _Piece],
               edits: Sequence[tuple[int, int, bytes]] = (), inner: tuple[int, int] | None = None,
               roots: Sequence[ast.AST] | None = None, late: Sequence[Key] = ()) -> _Piece:  # fmt: skip
        """The source of ``node``, or of ``inner`` in it, with pieces put in place of what they replace.

        Args:
            node: An expression or statement.
            replaced: Pieces, by identity of the expression that they replace.
            edits: Further (begin, end, new text) edits, which hold no calls.
            inner: The part of the source to return, all of ``node`` by default.
            roots: The nodes in that part.
            late: Calls in text that was added behind the last child of ``node``.
        """
        start, end = inner or self.source.span(node)
        cuts = list(edits)
        keys: list[Key] = []

        def walk(each: ast.AST, top: bool) -> None:
            piece = replaced.get(id(each))
            if piece is None and not top and id(each) in self.calls:
                piece = self.render(each)  # type: ignore[arg-type]
            if piece is not None:
                begin, stop = self.source.span(each)  # type: ignore[arg-type]
                if piece.until is not None:
                    stop = self.source.span(piece.until)[1]
                cuts.append((begin, stop, piece.text))
                keys.extend(piece.keys)
                return
            last: ast.AST | None = None
            for child in ast.iter_child_nodes(each):
                if last is None:
                    walk(child, False)
                    last = replaced[id(child)].until if id(child) in replaced else None
                if child is last:
                    last = None
            if top:
                keys.extend(late)
            if id(each) in self.own:
                keys.append(self.own[id(each)])

        for root in [node] if roots is None else roots:
            walk(root, root is node)
        text, at = [], start
        for begin, stop, new in sorted(cuts):
            text += [self.source.text[at:begin], new]
            at = stop
        return _Piece(b"".join([*text, self.source.text[at:end]]), keys)

    def appended(self, node: ast.expr | ast.stmt, added: Sequence[_Piece]) -> list[tuple[int, int, bytes]]:
        """The edit that adds keywords behind the last argument, whether or not that has a comma already."""
        if not added:
            return []
        assert isinstance(node, ast.Call)
        end = self.source.span(node)[1] - 1
        text = b", ".join(piece.text for piece in added)
        last = max((self.source.span(each)[1] for each in (*node.args, *(k.value for k in node.keywords))), default=0)
        if last and b"," not in self.source.text[last:end].split(b"#")[0]:
            text = b", " + text
        return [(end, end, text)]

    # ------------------------------------------------------------------ arguments

    def arguments(self, call: CallNode, changes: Sequence[Change]) -> list[tuple[ast.expr | str, _Piece]]:
        """What replaces which expression; a keyword to add is given by its name."""
        found: list[tuple[ast.expr | str, _Piece]] = []
        whole: dict[Argument, Value] = {}
        for change in changes:
            argument = change.argument
            if argument.kind == "widths":
                continue
            expression = find_argument(self.source, call.node, argument)
            if expression is not None:
                found.append((expression, self.value(change.value, expression, argument)))
            elif argument.kind == "argument" and argument.name and isinstance(call.node, ast.Call):
                found.append((argument.name, self.value(change.value, None)))
            elif argument.kind == "size" and isinstance(call.node, ast.Call):
                whole[argument] = change.value
            elif argument.kind in ("start", "stop") and isinstance(call.node, ast.Subscript):
                found.append(self.bound(call.node, argument, changes))
            else:
                raise PlanError(
                    f"call {call.call!r} number {call.ordinal} of {self.source.name} has no argument {argument}"
                )
        if whole:
            found += self.sequence(call, whole)
        return found

    def bound(self, node: ast.Subscript, argument: Argument, changes: Sequence[Change]) -> tuple[ast.expr, _Piece]:
        """A slice of which a bound that was left out is given."""
        items = subscript_items(node)
        item = items[argument.index] if argument.index < len(items) else None
        if not isinstance(item, ast.Slice) or item.step is not None:
            raise PlanError(f"{self.source.name} has no slice {argument.index} in the subscript to change")
        bounds = {"start": item.lower, "stop": item.upper}
        new = {c.argument.kind: c.value for c in changes if c.argument.index == argument.index}
        pieces = {
            kind: self.value(new[kind], old)
            if kind in new
            else (_Piece(b"") if old is None else self.render(old))
            for kind, old in bounds.items()
        }  # fmt: skip
        start, stop = pieces["start"], pieces["stop"]
        return item, _Piece(start.text + b":" + stop.text, start.keys + stop.keys)

    def sequence(self, call: CallNode, values: Mapping[Argument, Value]) -> list[tuple[ast.expr, _Piece]]:
        """Sizes that one expression gives, or that stand behind a starred one, with some entries replaced."""
        assert isinstance(call.node, ast.Call)
        sizes = size_expressions(self.source, call.node)
        if not sizes:
            raise PlanError(f"call {call.call!r} number {call.ordinal} of {self.source.name} takes no sizes")
        given = [self.render(size) for size in sizes]
        is_sequence = any(argument.name == SEQUENCE for argument in values)
        inside = b", ".join(piece.text for piece in given)
        taken = inside if is_sequence else b"(" + inside + (b",)" if len(given) == 1 else b")")
        entries = [(argument.index, self.value(value, None)) for argument, value in values.items()]
        table = b", ".join(str(index).encode() + b": " + piece.text for index, piece in entries)
        text = b"[{" + table + b"}.get(_prunegate_i, _prunegate_n) for _prunegate_i, _prunegate_n in enumerate(" + (
            taken + b")]")  # fmt: skip
        keys: list[Key] = [key for _, piece in entries for key in piece.keys]
        keys += [None, *(key for piece in given for key in piece.keys), None]
        literal = [
            each
            for each in (*call.node.args, *(k.value for k in call.node.keywords if k.arg in SIZE_KEYWORDS))
            if isinstance(each, ast.Tuple | ast.List) and each.elts == sizes
        ]
        if literal:
            return [(literal[0], _Piece(text, keys))]
        # Sizes that are arguments of their own: one list takes the place of them all.
        return [(sizes[0], _Piece(text, keys, until=sizes[-1]))]

    def value(self, value: Value, old: ast.expr | None, argument: Argument | None = None) -> _Piece:
        """The text of a value, in the place of ``old`` where the source has one."""
        if isinstance(value, Ratio):
            return self.scaled(value, old)
        if isinstance(value, PerExecution):
            self.iterators.append(value.values)
            piece = _Piece(f"next(_prunegate_values_{len(self.iterators) - 1})".encode(), [None])
            several = isinstance(value.values[0], tuple)
        else:
            piece, several = _Piece(repr(value).encode()), isinstance(value, tuple)
        if argument is None or not several:
            return piece
        if argument.kind == "index":  # a tuple could be taken for several items
            return _Piece(b"[*" + piece.text + b"]", piece.keys)
        if argument.name == "index":  # as a tensor on the device of the one that is replaced
            if old is None:
                raise PlanError(f"{self.source.name} has no index to replace")
            before = self.render(old)
            text = b"(" + before.text + f").{NEW_INDEX}(".encode() + piece.text + b")"
            return _Piece(text, [*before.keys, *piece.keys, None])
        return piece

    def scaled(self, ratio: Ratio, old: ast.expr | None) -> _Piece:
        """What the source computes, times a ratio."""
        if old is None:
            raise PlanError(f"{self.source.name} has no expression to scale")
        piece = self.render(old)
        scaled = b"((" + piece.text + f") * {ratio.numerator} // {ratio.denominator})".encode()
        return _Piece(scaled, [*piece.keys, None, None])

    # ------------------------------------------------------------------ callees

    def callee(self, call: CallNode, rewrite: CallRewrite) -> tuple[int, int, bytes] | None:
        """What replaces the callee's name, if anything does."""
        node = call.node
        if rewrite.into is not None:
            assert isinstance(node, ast.Call)
            name = f"{ENTERED}{len(self.entered)}"
            self.entered[name] = rewrite.into
            start, opening = self.source.span(node.func)[0], self.opening(node) + 1
            comma = ", " if node.args or node.keywords else ""
            module = MODULE if self.takes_module else f"({self.module},)"
            return start, opening, f"{name}({module}{comma}".encode()
        widths = [change.value for change in rewrite.changes if change.argument.kind == "widths"]
        if widths:
            if not isinstance(node, ast.Call) or call.call != multi_head_attention_forward.__name__:
                raise PlanError(f"call {call.call!r} of {self.source.name} is no multi-head attention")
            self.entered[_ATTENTION] = multi_head_attention_forward
            start, opening = self.source.span(node.func)[0], self.opening(node) + 1
            return start, opening, f"{_ATTENTION}({widths[0]!r}, ".encode()
        if any(change.argument.kind == "split" for change in rewrite.changes):
            if not isinstance(node, ast.Call) or call.call not in _SPLITS:
                raise PlanError(f"call {call.call!r} of {self.source.name} cannot become a split")
            start, end = self.source.span(node.func)
            if isinstance(node.func, ast.Attribute):
                return end - len(node.func.attr.encode()), end, _SPLITS[call.call].encode()
            return start, end, f"{_TORCH}.{_SPLITS[call.call]}".encode()
        return None

    def opening(self, node: ast.Call) -> int:
        """Offset of the parenthesis that opens the arguments."""
        return self.source.text.index(b"(", self.source.span(node.func)[1])

    def wrapped(self, call: CallNode, rewrite: CallRewrite, replaced: Mapping[int, _Piece], added: Sequence[_Piece],
                callee: tuple[int, int, bytes] | None) -> _Piece:  # fmt: skip
        """The call, made through ``self._prunegate_sites``."""
        through = f"{self.module}.{SITES}[{rewrite.wrap!r}](".encode()
        node = call.node
        own = (call.call, call.ordinal)
        if isinstance(node, ast.AugAssign):
            target = self.target(call)
            value = replaced.get(id(node.value)) or self.render(node.value)
            method = f"{_TORCH}.Tensor.{call.call}, ".encode() + target.removesuffix(b" = ") + b", "
            return _Piece(target + through + method + value.text + b")", [*self.lookup, *value.keys, own])
        if isinstance(node, ast.BinOp):
            left, right = (replaced.get(id(each)) or self.render(each) for each in (node.left, node.right))
            method = f"{_TORCH}.Tensor.{call.call}, ".encode()
            text = through + method + left.text + b", " + right.text + b")"
            return _Piece(text, [*self.lookup, *left.keys, *right.keys, own])
        if not isinstance(node, ast.Call) or rewrite.into is not None:
            raise PlanError(f"{call.call!r} number {call.ordinal} of {self.source.name} cannot be wrapped")
        begin, end = self.opening(node) + 1, self.source.span(node)[1] - 1
        inside = self.splice(node, replaced, self.appended(node, added), (begin, end), [*node.args, *node.keywords])
        inside.keys += [key for piece in added for key in piece.keys]
        if isinstance(node.func, ast.Attribute) and is_method_call(self.source, node):
            value = self.render(node.func.value)
            name = callee[2] if callee is not None else node.func.attr.encode()
            head = _Piece(f"{_TORCH}.Tensor.".encode() + name + b", " + value.text, value.keys)
        else:
            head = self.splice(node.func, {}, [callee] if callee is not None else [])
        comma = b", " if inside.text.strip() else b""
        return _Piece(through + head.text + comma + inside.text + b")", [*self.lookup, *head.keys, *inside.keys, own])

    # ------------------------------------------------------------------ the function

    def function(self) -> FunctionType:
        """The rewritten function."""
        definition, original = self.source.definition, self.source.function
        start = self.source.offset(definition.lineno, 0)
        end = self.source.span(definition)[1]
        bodies = [self.render(statement) for statement in definition.body]
        edits = [
            (*self.source.span(statement), piece.text) for statement, piece in zip(definition.body, bodies, strict=True)
        ]
        keys: list[Key] = [key for piece in bodies for key in piece.keys]
        keys = self.with_iterators(edits, keys, [len(piece.keys) for piece in bodies])
        if self.takes_module:
            at = self.source.text.index(b"(", start) + 1
            arguments = definition.args
            more = self.source.parameters or arguments.vararg or arguments.kwonlyargs or arguments.kwarg
            edits.append((at, at, (MODULE + (", " if more else "")).encode()))
        text, at = [], start
        for begin, stop, new in sorted(edits, key=lambda edit: edit[:2]):
            text += [self.source.text[at:begin], new]
            at = stop
        body = b"".join([*text, self.source.text[at:end]]).decode()
        return self.bind(original, body, keys)

    def with_iterators(self, edits: list[tuple[int, int, bytes]], keys: list[Key], counts: list[int]) -> list[Key]:
        """Puts the iterators of per-execution values in front of the first statement behind the docstring."""
        if not self.iterators:
            return keys
        body = self.source.definition.body
        has_docstring = len(body) > 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        first = int(has_docstring)
        begin = self.source.span(body[first])[0]
        indent = self.source.text[self.source.offset(body[first].lineno, 0) : begin]
        lines = [f"_prunegate_values_{n} = iter({values!r})".encode() for n, values in enumerate(self.iterators)]
        separator = b"; " if indent.strip() else b"\n" + indent
        edits.append((begin, begin, b"".join(line + separator for line in lines)))
        before = sum(counts[:first])
        return [*keys[:before], *(None for _ in lines), *keys[before:]]

    def bind(self, original: FunctionType, body: str, keys: list[Key]) -> FunctionType:
        """Compiles ``body`` and binds it as the original was bound."""
        code = original.__code__
        if not body[:1].isspace():
            body = textwrap.indent(body, "    ")
        added = {_TORCH: torch, **self.entered}
        cells = dict(zip(code.co_freevars, original.__closure__ or (), strict=True))
        cells |= {name: types.CellType(value) for name, value in added.items()}
        # A class around the function, because private names are mangled by it.
        owner = original.__qualname__.split(".")[-2] if "." in original.__qualname__ else "_"
        owner = owner if owner.isidentifier() else "_"
        text = f"def _prunegate_factory({', '.join(cells)}):\n class {owner}:\n{body}\n"
        filename = _register(original, text)
        try:
            module = compile(text, filename, "exec", flags=code.co_flags & _FUTURES, dont_inherit=True)
        except SyntaxError as error:
            raise PlanError(f"the rewritten {self.source.name} is not valid: {error}") from error
        new_code = _nested(module, code.co_name).replace(co_qualname=code.co_qualname)
        function: Any = FunctionType(
            new_code, original.__globals__, original.__name__, original.__defaults__,
            tuple(cells[name] for name in new_code.co_freevars),
        )  # fmt: skip
        function.__kwdefaults__ = original.__kwdefaults__
        function.__annotations__ = dict(original.__annotations__)
        function.__qualname__, function.__module__ = original.__qualname__, original.__module__
        function.__dict__.update(original.__dict__)
        function.__dict__.pop("__wrapped__", None)
        function.__dict__[ORIGIN] = (self.source.name, tuple(keys))
        self.check(text, len(keys))
        return function

    def check(self, text: str, count: int) -> None:
        """Sees that the calls of the new text are those that were counted; places in it are told by their order."""
        factory = ast.parse(text).body[0]
        assert isinstance(factory, ast.FunctionDef)
        owner = factory.body[0]
        assert isinstance(owner, ast.ClassDef)
        function = owner.body[0]
        assert isinstance(function, ast.FunctionDef)
        found = sum(1 for statement in function.body for _ in calls_below(statement))
        if found != count:
            raise PlanError(f"{self.source.name} cannot be rewritten: {count} calls expected, {found} found")


_FUTURES = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
_numbers = itertools.count()


def _nested(code: CodeType, name: str) -> CodeType:
    """The function ``name`` in the class in the factory that ``code`` defines."""
    for _ in range(2):
        code = next(constant for constant in code.co_consts if isinstance(constant, CodeType))
    return next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)


def _register(original: FunctionType, text: str) -> str:
    """Makes the text of a rewritten function known to ``inspect`` and to debuggers, and returns its file name."""
    filename = f"<prunegate {next(_numbers)}: {original.__module__}.{original.__qualname__}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    return filename
