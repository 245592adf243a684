"""Methods of single module instances, rewritten from edits given as data.

An edited module gets a subclass of its class, with the same name, in which some methods are rewritten. Equal edits of
equal classes share one subclass; an instance of it is copied and pickled as its class and its edits.
"""

from __future__ import annotations

import copyreg
import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

from torch import nn

from prunegate.errors import PlanError
from prunegate.plan import CallEdit, CallSite, Change, Step, merge_calls
from prunegate.slim.rewrite import SITES, CallRewrite, rewrite_function
from prunegate.slim.source import find_method, full_name, innermost, read_source, resolve

__all__ = ["Edit", "apply_edits", "edit_module", "edits_of", "original_class", "wrap_calls"]

_EDITS = "__prunegate_edits__"
_BASE = "__prunegate_base__"


@dataclass(frozen=True)
class Edit:
    """What changes at one call of a module's methods.

    Attributes:
        site: The call; its ``module`` is ``""``, so that equal modules have equal edits.
        changes: New values of arguments.
        wrap: Key, in the module's table of sites, of what the call goes through.
    """

    site: CallSite
    changes: tuple[Change, ...] = ()
    wrap: str | None = None


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was edited."""
    return type(module).__dict__.get(_BASE, type(module))


def edits_of(module: nn.Module) -> tuple[Edit, ...]:
    """The edits of a module, empty where it has none."""
    return type(module).__dict__.get(_EDITS, ())


def edit_module(module: nn.Module, edits: Iterable[Edit]) -> None:
    """Rewrites methods of one module, in addition to what has been rewritten before.

    Raises:
        PlanError: The module's source does not have what is to be changed. The module is then as it was.
    """
    merged = _merge((*edits_of(module), *edits))
    base: Any = original_class(module)
    before, after = type(module), _edited_class(base, merged)
    if after is before:
        return
    module.__class__ = after
    # Bound methods that a constructor stored (self.forward = self.forward_x) must be those of the new class.
    for name, value in module.__dict__.items():
        if isinstance(value, types.MethodType) and value.__self__ is module:
            current = getattr(after, value.__func__.__name__, None)
            if getattr(before, value.__func__.__name__, None) is value.__func__ and current is not value.__func__:
                module.__dict__[name] = types.MethodType(current, module)  # type: ignore[arg-type]


def apply_edits(model: nn.Module, calls: Iterable[CallEdit]) -> None:
    """Rewrites the methods of a model's modules.

    Raises:
        PlanError: The model has no such module, or its source no such call.
    """
    by_module: dict[str, list[Edit]] = {}
    for call in calls:
        edit = Edit(replace(call.site, module=""), call.changes)
        by_module.setdefault(call.site.module, []).append(edit)
    for name, edits in by_module.items():
        edit_module(_submodule(model, name), edits)


def wrap_calls(model: nn.Module, wraps: Mapping[CallSite, Callable[..., Any]]) -> None:
    """Makes calls go through callables: ``f(a, b)`` becomes ``wrap(f, a, b)``; for a method ``f`` is torch.Tensor's.

    Raises:
        PlanError: The model has no such module, or its source no such call.
    """
    by_module: dict[str, dict[str, tuple[CallSite, Callable[..., Any]]]] = {}
    for site, wrap in wraps.items():
        local = replace(site, module="")
        by_module.setdefault(site.module, {})[_key(local)] = local, wrap
    for name, entries in by_module.items():
        module = _submodule(model, name)
        edit_module(module, [Edit(site, wrap=key) for key, (site, _) in entries.items()])
        table = dict(module.__dict__.get(SITES, {}))
        module.__dict__[SITES] = table | {key: wrap for key, (_, wrap) in entries.items()}


def _key(site: CallSite) -> str:
    steps = [*site.via, Step(site.function, site.call, site.ordinal)]
    return "/".join(f"{step.function}.{step.call}.{step.ordinal}" for step in steps)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise PlanError(f"{type(model).__name__} has no module {name!r}, whose calls are to be changed") from None


def _merge(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """One edit for each site, in an order that does not depend on how the edits came."""
    edits = list(edits)
    wraps = {edit.site: edit.wrap for edit in edits if edit.wrap is not None}
    merged = merge_calls(CallEdit(edit.site, edit.changes) for edit in edits)
    ordered = sorted(merged, key=lambda call: repr(call.site))
    return tuple(
        Edit(call.site, tuple(sorted(call.changes, key=lambda change: repr(change.argument))), wraps.get(call.site))
        for call in ordered
    )


# ---------------------------------------------------------------------- classes


@functools.cache
def _edited_class(base: Any, edits: tuple[Edit, ...]) -> type[nn.Module]:
    """The subclass of ``base``, a class, with these edits."""
    if not edits:
        return base
    own: dict[str, Any] = {}
    between: dict[type, dict[str, Any]] = {}
    for name, function in _rewritten(base, edits).items():
        original = find_method(base, name)
        assert original is not None
        owner, attribute, value = _definition(base, original)
        new = _redecorated(value, original, function)
        if _lookup(base, attribute)[0] is owner:
            own[attribute] = new
        else:
            # Reached through super(): the rewritten method must stand right in front of the original's class in the
            # order of resolution, and nowhere before.
            between.setdefault(owner, {})[attribute] = new
    mixins = tuple(_subclass(owner, (owner,), methods) for owner, methods in between.items())
    own |= {_EDITS: edits, _BASE: base, "__reduce_ex__": _reduce}
    return _subclass(base, (base, *mixins), own)


def _subclass(of: type, bases: tuple[type, ...], namespace: Mapping[str, Any]) -> type:
    named = {"__module__": of.__module__, "__qualname__": of.__qualname__, "__doc__": of.__doc__}
    if "__firstlineno__" in of.__dict__:
        named["__firstlineno__"] = of.__dict__["__firstlineno__"]
    try:
        return type(of)(of.__name__, bases, {**named, **namespace})
    except TypeError as error:
        raise PlanError(f"{of.__qualname__} cannot be given rewritten methods: {error}") from error


def _rewritten(base: type, edits: Sequence[Edit]) -> dict[str, FunctionType]:
    """The rewritten methods, by the full name of the original."""
    trees: dict[str, dict[tuple[str, int], _Tree]] = {}
    for edit in edits:
        steps = [*edit.site.via, Step(edit.site.function, edit.site.call, edit.site.ordinal)]
        level = trees.setdefault(steps[0].function, {})
        for step, inner in zip(steps, [*steps[1:], None], strict=True):
            tree = level.setdefault((step.call, step.ordinal), _Tree())
            if inner is None:
                tree.changes, tree.wrap = edit.changes, edit.wrap
            else:
                tree.function = inner.function
                level = tree.inside
    rewritten = {}
    for name, level in trees.items():
        original = find_method(base, name)
        if original is None:
            raise PlanError(f"{base.__qualname__} has no method {name!r}; its calls are to be changed")
        rewritten[name] = _rewrite(original, level, False)
    return rewritten


class _Tree:
    """What happens to a call, and to the calls in the free function that it enters."""

    def __init__(self) -> None:
        self.changes: tuple[Change, ...] = ()
        self.wrap: str | None = None
        self.function: str | None = None
        self.inside: dict[tuple[str, int], _Tree] = {}


def _rewrite(original: FunctionType, level: Mapping[tuple[str, int], _Tree], takes_module: bool) -> FunctionType:
    rewrites = {}
    for (call, ordinal), tree in level.items():
        into = None
        if tree.function is not None:
            into = _rewrite(_entered(original, call, ordinal, tree.function, tree.inside), tree.inside, True)
        rewrites[call, ordinal] = CallRewrite(tree.changes, tree.wrap, into)
    return rewrite_function(original, rewrites, takes_module)


def _entered(function: FunctionType, call: str, ordinal: int, name: str,
             inside: Iterable[tuple[str, int]]) -> FunctionType:  # fmt: skip
    """The free function that a call names. It is looked up where the source does, never imported by its name.

    A decorator's wrapper can have the name of what it wraps; the calls ``inside`` tell them apart.
    """

    def is_meant(each: FunctionType) -> bool:
        entered = read_source(each) if full_name(each) == name else None
        return entered is not None and all(entered.find(*key) is not None for key in inside)

    source = read_source(function)
    node = None if source is None else source.find(call, ordinal)
    callee = getattr(node.node, "func", None) if node is not None else None
    if source is not None and callee is not None:
        found = innermost(resolve(source, callee), is_meant)
        if found is not None:
            return found
    raise PlanError(f"call {call!r} number {ordinal} of {full_name(function)} does not enter {name!r}")


def _definition(base: type, original: FunctionType) -> tuple[type, str, Any]:
    """The class that defines a method, the attribute it is stored under, and what is stored."""
    for owner in base.__mro__:
        for attribute, value in vars(owner).items():
            if innermost(value, lambda each: each is original) is not None:
                return owner, attribute, value
    raise PlanError(f"{base.__qualname__} has no method {full_name(original)!r}")


def _lookup(base: type, attribute: str) -> tuple[type, Any]:
    return next((owner, vars(owner)[attribute]) for owner in base.__mro__ if attribute in vars(owner))


def _redecorated(value: Any, old: FunctionType, new: FunctionType) -> Any:
    """``value`` with ``new`` in place of ``old`` under its decorators."""
    if value is old:
        return new
    if isinstance(value, property):
        return property(_redecorated(value.fget, old, new), value.fset, value.fdel, value.__doc__)
    if isinstance(value, staticmethod | classmethod):
        return type(value)(_redecorated(value.__func__, old, new))
    if isinstance(value, functools.partial):
        return functools.partial(_redecorated(value.func, old, new), *value.args, **value.keywords)
    if not isinstance(value, FunctionType) or innermost(value, lambda each: each is old) is None:
        return value
    cells = []
    for cell in value.__closure__ or ():
        content = cell.cell_contents
        inner = _redecorated(content, old, new) if isinstance(content, FunctionType) else content
        cells.append(cell if inner is content else types.CellType(inner))
    copy = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells))
    copy.__kwdefaults__ = value.__kwdefaults__
    functools.update_wrapper(copy, value)
    copy.__dict__.pop("__wrapped__", None)
    if "__wrapped__" in value.__dict__:
        copy.__dict__["__wrapped__"] = _redecorated(value.__dict__["__wrapped__"], old, new)
    return copy


# ---------------------------------------------------------------------- copying and pickling


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """Names the original class and the edits, so that the subclass is made again where the copy is made."""
    cls: Any = next(each for each in type(module).__mro__ if _EDITS in each.__dict__)
    made_by, arguments, *rest = super(cls, module).__reduce_ex__(protocol)
    if cls is not type(module):  # a subclass that someone made of the rewritten class
        return made_by, arguments, *rest
    if made_by is not copyreg.__newobj__ or arguments[0] is not cls:  # type: ignore[attr-defined]
        raise PlanError(f"{cls.__qualname__} pickles in a way of its own, which a rewritten class cannot follow")
    return _remake, (cls.__dict__[_BASE], cls.__dict__[_EDITS], *arguments[1:]), *rest


def _remake(base: Any, edits: tuple[Edit, ...], *arguments: Any) -> nn.Module:
    cls = _edited_class(base, edits)
    return cls.__new__(cls, *arguments)
