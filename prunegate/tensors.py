"""What a module keeps tensors in: parameters, buffers, plain attributes and caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "ABSENT",
    "attributes_kept",
    "call_model",
    "computed_tensors",
    "fit_inputs",
    "is_channels_last",
    "modules_of",
    "named_tensors",
    "set_attributes_back",
    "tensor_caches",
    "tensor_stores",
]


def is_channels_last(tensor: Tensor) -> bool:
    """Whether an image tensor, or a convolution's weight, is laid out with its channels last."""
    if tensor.dim() != 4 or not tensor.is_contiguous(memory_format=torch.channels_last):
        return False
    # Where sizes are 1 both layouts hold the same memory, but kernels look at the strides.
    return tensor.stride() != torch.empty(tensor.shape, device="meta").stride()


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` yields; its generators of generators take many times as long on deep models."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((name, module))
        lead = f"{name}." if name else ""
        waiting += [(lead + key, child) for key, child in reversed(module._modules.items()) if child is not None]
    return found


def tensor_stores(model: nn.Module) -> Iterator[tuple[str, MutableMapping[str, Any], bool]]:
    """Yields (module name, mapping that holds tensors, whether they are parameters) for every module, in order."""
    for prefix, module in modules_of(model):
        yield prefix, module._parameters, True
        yield prefix, module._buffers, False
        yield prefix, module.__dict__, False


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yields (qualified name, tensor, is a parameter) of all parameters, buffers and plain tensor attributes.

    A tensor that has several names (tied weights) comes once for each of them.
    """
    for prefix, store, is_parameter in tensor_stores(model):
        for name, tensor in store.items():
            if isinstance(tensor, Tensor):
                yield (f"{prefix}.{name}" if prefix else name), tensor, is_parameter


def tensor_caches(model: nn.Module) -> Iterator[dict[Any, Tensor]]:
    """Yields the plain dictionaries in which modules keep tensors that they computed earlier."""
    for module in model.modules():
        for name, value in module.__dict__.items():
            if type(value) is dict and not name.startswith("_") and value:
                if all(isinstance(item, Tensor) for item in value.values()):
                    yield value


def computed_tensors(model: nn.Module) -> dict[int, Tensor]:
    """A memo for ``copy.deepcopy``: what a forward with gradients left in a model's attributes, without its history.

    Torch copies leaves only.
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        for name, value in module.__dict__.items():
            if type(value) in _HOLD_TENSORS and name not in _STORES:
                leaves = (each for each in tree_leaves(value) if isinstance(each, Tensor))
                found |= {id(each): each.detach() for each in leaves if each.grad_fn is not None}
    return found


_HOLD_TENSORS = frozenset([Tensor, dict, list, tuple])
_STORES = frozenset(["_parameters", "_buffers", "_modules"])  # what torch keeps there are leaves


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Runs ``model`` on an example input: a tensor, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def fit_inputs(inputs: Any, model: nn.Module) -> Any:
    """An example input on the device, and in the floating-point type, that ``model`` is in now."""
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    if first is None:
        return inputs

    def fit(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(first.device, first.dtype if leaf.is_floating_point() else leaf.dtype)

    return tree_map(fit, inputs)


ABSENT: Any = object()
"""Stands for an attribute that a module does not have."""

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def set_attributes_back(model: nn.Module, values: Mapping[tuple[str, str], Any]) -> None:
    """Gives attributes the values that :func:`attributes_kept` found them with."""
    for (path, name), value in values.items():
        module = model.get_submodule(path)
        store = module._buffers if name in module._buffers else module.__dict__
        if value is ABSENT:
            store.pop(name, None)
        else:
            store[name] = value.copy() if type(value) in (dict, list) else value


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[dict[tuple[str, str], Any]]:
    """Undoes what a forward leaves in attributes, buffers, lists and dictionaries: anchors, index tables and the like.

    Inside, dictionaries of cached tensors are empty, so that a forward computes all that it needs.

    Yields:
        A dictionary that, afterwards, holds what was undone: the values before of attributes that got another
        (``ABSENT`` where there was none), by names of module and attribute.
    """
    before, contents = [], []
    changed: dict[tuple[str, str], Any] = {}
    for prefix, module in modules_of(model):
        before.append((prefix, module.__dict__, dict(module.__dict__)))
        before.append((prefix, module._buffers, dict(module._buffers)))
        for name, value in module.__dict__.items():
            if type(value) in (dict, list) and name not in _OF_EVERY_MODULE:
                contents.append((prefix, name, value, value.copy()))
                if type(value) is dict and all(isinstance(item, Tensor) for item in value.values()):
                    value.clear()
    try:
        yield changed
    finally:
        for prefix, store, entries in before:
            for name, value in store.items():
                if name != "training" and entries.get(name, ABSENT) is not value:
                    changed[prefix, name] = entries.get(name, ABSENT)
            store.clear()
            store.update(entries)
        for prefix, name, container, content in contents:
            if len(container) != len(content) and container:
                changed[prefix, name] = content
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
