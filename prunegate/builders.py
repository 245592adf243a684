"""Naming the constructor of a model as data, and calling it again, but nothing else.

A file must not be able to run code. What it may name is a model that ``timm`` or ``torchvision`` registers, a model
class of ``transformers``, or something in a module that the caller allows. Its arguments are plain values.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn

from prunegate.errors import CheckpointError

__all__ = ["Limits", "build", "describe", "names_in"]

MAX_INTEGER = 2**20
"""Largest integer among the arguments of a constructor, whatever the tensors: no model has such a size."""

_MAX_ITEMS = 10_000
_PER_CHOICE = 500  # parameters, or modules, of the operators of one choice
_TIMM = "timm:create_model"
_NOT_PASSED = frozenset({
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights",
    "weights_backbone", "device", "dtype",
})  # fmt: skip
"""Arguments that only say where weights come from or go."""


class Limits:
    """How much a constructor may make before it is stopped, and how large its integers may be.

    Args:
        shapes: Shapes of the tensors that the model is known to have, once for each name.
        choices: Number of choices that operators were put in the place of; the others' tensors are made, too.
    """

    def __init__(self, shapes: Collection[Sequence[int]], choices: int = 0) -> None:
        self.parameters = 4 * len(shapes) + 100 + _PER_CHOICE * choices
        self.modules = 100 * len(shapes) + 10_000 + _PER_CHOICE * choices
        self.elements = max(10_000_000, 256 * sum(math.prod(shape) for shape in shapes))
        largest = max((size for shape in shapes for size in shape), default=0)
        self.integer = min(MAX_INTEGER, max(2**14, 64 * largest))

    def check(self, value: int) -> None:
        """Refuses an integer that would make a constructor loop for ages."""
        if abs(value) > self.integer:
            raise CheckpointError(
                f"the file's constructor is given {value}, far more than any size of the file's tensors allows "
                f"({self.integer})"
            )

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Counts what modules register inside, and raises CheckpointError at the limit."""
        left = {"parameters": self.parameters, "modules": self.modules, "elements": self.elements}

        def take(what: str, count: int) -> None:
            left[what] -= count
            if left[what] < 0:
                raise CheckpointError(f"the file's constructor makes far more {what} than the file's tensors allow")

        def on_parameter(module: nn.Module, name: str, parameter: Any) -> None:
            take("parameters", 1)
            take("elements", 0 if parameter is None else parameter.numel())

        def on_module(module: nn.Module, name: str, child: Any) -> None:
            take("modules", 1)

        handles = [
            nn.modules.module.register_module_parameter_registration_hook(on_parameter),
            nn.modules.module.register_module_module_registration_hook(on_module),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


# ---------------------------------------------------------------------- naming


def describe(model: nn.Module, builder: Callable[..., nn.Module] | None) -> dict[str, Any]:
    """Names what builds a dense model like ``model``, as JSON data.

    Args:
        model: The model.
        builder: A function, a class or a ``functools.partial`` of one, which lives in an importable module; ``None``
            for a model that knows its constructor.

    Raises:
        CheckpointError: There is no name for it, or an argument is no plain value.
    """
    if builder is not None:
        given: Any = builder
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        while isinstance(given, functools.partial):
            args, kwargs, given = (*given.args, *args), {**given.keywords, **kwargs}, given.func
        return _entry(_name_of(given), args, {k: v for k, v in kwargs.items() if k not in _NOT_PASSED})
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, Mapping) and config.get("architecture") and type(model).__module__.startswith("timm."):
        kwargs = {k: v for k, v in getattr(model, "_model_args", {}).items() if k not in _NOT_PASSED}
        classes = getattr(model, "num_classes", None)
        if isinstance(classes, int) and classes != kwargs.get("num_classes", config.get("num_classes")):
            kwargs["num_classes"] = classes
        return _entry(_TIMM, (config["architecture"],), kwargs)
    own = getattr(model, "config", None)
    if own is not None and hasattr(own, "to_dict") and type(own).__module__.startswith("transformers."):
        # An edited model is of a subclass of the same name, which is not the one that the module holds.
        return _entry(f"{type(model).__module__}:{type(model).__qualname__}", (own,), {})
    raise CheckpointError(
        f"{type(model).__name__} does not say how it is built; pass builder=, a function or class that builds the "
        "dense model, or a functools.partial of one with its arguments"
    )


def _name_of(builder: Any) -> str:
    module, name = getattr(builder, "__module__", None), getattr(builder, "__qualname__", None)
    if isinstance(builder, FunctionType | type) and module and name and "<" not in name and module != "__main__":
        return f"{module}:{name}"
    raise CheckpointError(
        f"builder={builder!r} was given; expected a function or class that another process can import by its module "
        "and name (no lambda, no local function, nothing of __main__), or a functools.partial of one"
    )


def _entry(target: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "target": target,
        "args": [_encode(value, target) for value in args],
        "kwargs": {name: _encode(value, target) for name, value in kwargs.items()},
    }


def _encode(value: Any, target: str) -> Any:
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        if abs(value) <= MAX_INTEGER:
            return value
        raise CheckpointError(f"the argument {value} of {target} is larger than a file may hold ({MAX_INTEGER})")
    if isinstance(value, list):
        return [_encode(item, target) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, target) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(item, target) for key, item in value.items()}}
    if isinstance(value, functools.partial):
        return {"partial": _entry(_name_of(value.func), value.args, value.keywords)}
    if isinstance(value, type) and issubclass(value, nn.Module):
        return {"layer": _name_of(value)}
    if hasattr(value, "to_dict") and type(value).__module__.startswith("transformers."):
        return {
            "config": f"{type(value).__module__}:{type(value).__qualname__}",
            "values": value.to_json_string(False),
            "attention": getattr(value, "_attn_implementation", None),  # which its own JSON leaves out
        }
    raise CheckpointError(
        f"the argument {value!r} of {target} cannot be written to a file; expected numbers, strings, sequences, "
        "dictionaries, layer classes or partials of them"
    )


def names_in(entry: Any) -> set[str]:
    """Everything that a description names, ``"module:name"``."""
    if isinstance(entry, list):
        return {name for item in entry for name in names_in(item)}
    if not isinstance(entry, dict):
        return set()
    own = {entry[key] for key in ("target", "layer", "config") if isinstance(entry.get(key), str)}
    return own | {name for item in entry.values() for name in names_in(item)}


# ---------------------------------------------------------------------- building


def build(entry: Any, allow: Collection[str], limits: Limits) -> nn.Module:
    """Calls a constructor that ``describe`` named, with no weights.

    Args:
        entry: What ``describe`` returned, from a file that is not trusted.
        allow: Modules, or ``"module:name"`` of single constructors, that may be imported besides those that are known.
        limits: How much it may make.

    Raises:
        CheckpointError: It names something that may not be called, or the call fails.
    """
    target, args, kwargs = _parts(entry)
    constructor, fixed = _constructor(target, args, kwargs, allow)
    decoder = _Decoder(allow, limits)
    given = [decoder.value(value) for value in args]
    named = {name: decoder.value(value) for name, value in kwargs.items()}
    try:
        with limits.enforced(), torch.random.fork_rng(devices=[]):
            model = constructor(*given, **named, **fixed)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{target} does not build the model of this file: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"{target} builds a {type(model).__name__}; expected a torch.nn.Module")
    return model


def _parts(entry: Any) -> tuple[str, list[Any], dict[str, Any]]:
    if not isinstance(entry, dict) or set(entry) != {"target", "args", "kwargs"}:
        raise CheckpointError("the file does not name a constructor in the form that save() writes")
    target, args, kwargs = entry["target"], entry["args"], entry["kwargs"]
    if not isinstance(target, str) or not isinstance(args, list) or not isinstance(kwargs, dict):
        raise CheckpointError("the file does not name a constructor in the form that save() writes")
    forbidden = sorted(_NOT_PASSED & {name for name, value in kwargs.items() if value is not None})
    if forbidden:
        raise CheckpointError(f"the file's constructor is given {forbidden}; a file of ours never does that")
    return target, args, kwargs


def _constructor(target: str, args: list[Any], kwargs: Mapping[str, Any],
                 allow: Collection[str]) -> tuple[Callable[..., Any], dict[str, Any]]:  # fmt: skip
    """What a target stands for if it may be called, and arguments that keep it from looking for weights."""
    module, _, name = target.partition(":")
    if target == _TIMM:
        timm = importlib.import_module("timm")
        if len(args) != 1 or not isinstance(args[0], str) or not timm.is_model(args[0]):
            raise CheckpointError(
                f"the file's model {str(args)[:80]} is not one that timm {timm.__version__} registers"
            )
        return timm.create_model, {"pretrained": False}
    if module.startswith("torchvision.models."):
        models = importlib.import_module("torchvision.models")
        if name in models.list_models() and models.get_model_builder(name).__module__ == module:
            builder = models.get_model_builder(name)
            accepted = inspect.signature(builder).parameters
            return builder, {key: None for key in ("weights", "weights_backbone") if key in accepted}
    if module.startswith("transformers.models."):
        value = _resolve(module, name)
        base = importlib.import_module("transformers").PreTrainedModel
        if isinstance(value, type) and issubclass(value, base):
            return value, {}
    if _is_allowed(target, allow):
        value = _resolve(module, name)
        # A module's namespace holds what it imports, too; that is not what the caller allowed.
        if (getattr(value, "__module__", None), getattr(value, "__qualname__", None)) != (module, name):
            raise CheckpointError(f"{target[:120]!r} is not defined in {module[:120]!r}, which is what was allowed")
        return value, {}
    raise CheckpointError(
        f"the file wants to call {target[:120]!r}, which is not a model of timm, torchvision or transformers; if you "
        f"trust it, pass allow=({module[:120]!r},) to load()"
    )


def _is_allowed(target: str, allow: Collection[str]) -> bool:
    entries = (allow,) if isinstance(allow, str) else tuple(allow)
    module = target.partition(":")[0]
    return any(target == entry or module == entry or module.startswith(entry + ".") for entry in entries if entry)


def _resolve(module: str, name: str) -> Any:
    try:
        value: Any = importlib.import_module(module)
        for step in name.split("."):
            value = getattr(value, step)
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{module}:{name} cannot be imported here: {error}") from None
    if not callable(value):
        raise CheckpointError(f"{module}:{name} is a {type(value).__name__}; expected a function or class")
    return value


class _Decoder:
    """Turns encoded arguments back into values."""

    def __init__(self, allow: Collection[str], limits: Limits) -> None:
        self.allow = allow
        self.limits = limits
        self.items = 0

    def value(self, value: Any) -> Any:
        self.items += 1
        if self.items > _MAX_ITEMS:
            raise CheckpointError("the file's constructor is given too many arguments")
        if isinstance(value, bool) or value is None or isinstance(value, float | str):
            return value
        if isinstance(value, int):
            self.limits.check(value)
            return value
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if isinstance(value, dict):
            return self.tagged(value)
        raise CheckpointError(f"the file's constructor is given a {type(value).__name__}")

    def tagged(self, value: dict[str, Any]) -> Any:
        match value:
            case {"tuple": list(items), **rest} if not rest:
                return tuple(self.value(item) for item in items)
            case {"dict": dict(items), **rest} if not rest:
                return {str(key): self.value(item) for key, item in items.items()}
            case {"layer": str(name), **rest} if not rest:
                return self.layer(name)
            case {"partial": entry, **rest} if not rest:
                target, args, kwargs = _parts(entry)
                given = [self.value(item) for item in args]
                return functools.partial(self.layer(target), *given, **{k: self.value(v) for k, v in kwargs.items()})
            case {"config": str(name), "values": str(text), "attention": attention, **rest} if not rest:
                # A name with a slash would be fetched from a hub.
                if attention is not None and not (isinstance(attention, str) and attention.isidentifier()):
                    raise CheckpointError(f"the file names {str(attention)[:80]!r} as an implementation of attention")
                return self.config(name, text, attention)
        raise CheckpointError(f"the file's constructor is given an unknown kind of value: {sorted(value)[:4]}")

    def layer(self, name: str) -> Any:
        """A layer class: of torch.nn, or of a package that is allowed."""
        module, _, qualified = name.partition(":")
        known = module.split(".")[:2] == ["torch", "nn"] or module.split(".")[0] in ("timm", "torchvision")
        if known or _is_allowed(name, self.allow):
            value = _resolve(module, qualified)
            if isinstance(value, type) and issubclass(value, nn.Module):
                return value
        raise CheckpointError(f"the file names {name[:120]!r} as a layer, which is not one of torch.nn or timm")

    def config(self, name: str, text: str, attention: str | None) -> Any:
        """A configuration object of transformers."""
        module, _, qualified = name.partition(":")
        base = importlib.import_module("transformers").PretrainedConfig if module.startswith("transformers.") else None
        kind: Any = _resolve(module, qualified) if base is not None else None
        if base is None or not isinstance(kind, type) or not issubclass(kind, base):
            raise CheckpointError(f"the file names {name[:120]!r} as a configuration, which it is not")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"the file's configuration is not JSON: {error}") from None
        self.bounded(values)
        build_config: Any = kind
        return build_config.from_dict(values, attn_implementation=attention)

    def bounded(self, values: Any) -> None:
        """Sees that no integer in nested values is absurd."""
        stack = [values]
        while stack:
            item = stack.pop()
            if isinstance(item, dict):
                stack.extend(item.values())
            elif isinstance(item, list):
                stack.extend(item)
            elif isinstance(item, int):
                self.limits.check(item)
