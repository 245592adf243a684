"""Widths that a model tells others: what its features and its classifier's input have after a cut.

No call of the forward takes these numbers; programs around the model do (a new classifier, a detector on top). They are
found by looking at the tensors that they describe, in a run of the cut model beside the record of the dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunegate.labels.record import Node
from prunegate.labels.shapes import ShapesOnly
from prunegate.plan import AttributeEdit
from prunegate.slim.attributes import module_pairs
from prunegate.slim.live import Live

__all__ = ["NODE", "FeatureWatch"]

NODE = "_prunegate_seen"
"""Attribute of a tensor in a run of the cut model: the node that it stands for."""

_FEATURES = "forward_features"
_INTERMEDIATES = "forward_intermediates"
_INPUT_WIDTHS = ("in_features", "in_channels", "embedding_dim")
_OUTPUT_WIDTHS = ("out_features", "out_channels", "num_features")
_FUSING = ("reparameterize", "fuse")
"""Methods that put one layer in the place of several branches (timm calls them so)."""
_FUSED_BY: dict[str, tuple[Sequence[str], int]] = {
    **dict.fromkeys(("in_chs", "in_channels", "dim"), ((*_INPUT_WIDTHS, "num_features", "groups"), 0)),
    **dict.fromkeys(("out_chs", "out_channels", "embed_dim"), (_OUTPUT_WIDTHS, -1)),
    "groups": (("groups", "num_features"), 0),  # as many groups as a norm has channels: one each
}
"""Attributes from which such a method makes its layer: the children's attributes that they equal, first or last."""


class FeatureWatch:
    """Sees which traced tensors a model's features are.

    Args:
        dense: The dense model.
        inputs: What a run is given.
    """

    def __init__(self, dense: nn.Module, inputs: Any) -> None:
        self.dense = dense
        self.inputs = inputs
        self.modules = dict(dense.named_modules())
        self.nodes: dict[str, list[Node]] = {}

    @contextmanager
    def on(self, slim: nn.Module) -> Iterator[None]:
        """Watches a run of the cut model."""
        handles = []
        for entry in self._feature_info():
            name = entry["module"]
            module = slim.get_submodule(name)
            if entry.get("hook_type") == "forward_pre":
                handles.append(module.register_forward_pre_hook(self._keep_input(name)))
            else:
                handles.append(module.register_forward_hook(self._keep_output(name)))
        method = getattr(slim, _FEATURES, None)
        if callable(method) and _FEATURES not in slim.__dict__:
            slim.__dict__[_FEATURES] = self._keeping(method)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            slim.__dict__.pop(_FEATURES, None) if callable(method) else None

    def edits(self, slim: nn.Module, live: Live) -> list[AttributeEdit]:
        """The attributes that must follow.

        Args:
            slim: The cut model.
            live: What stays.
        """
        edits = list(self._of_feature_info(slim, live))
        names = {id(module): name for name, module in self.modules.items()}
        for before, after in module_pairs(self.dense, slim):
            name = names[id(before)]
            for attribute, rule in (("in_features", _first), ("num_features", _last)):
                value = _kept_number(before, attribute) if name and any(True for _ in before.children()) else None
                new = None if value is None else rule(before, after, value)
                if value is not None and new is not None and new != value:
                    edits.append(AttributeEdit(name, attribute, value, new))
            edits += _of_fusing(name, before, after)
        edits += self._of_stages(edits)
        return [*edits, *self._of_model(slim, live, {(edit.module, edit.name) for edit in edits})]

    def _of_stages(self, edits: Sequence[AttributeEdit]) -> Iterator[AttributeEdit]:
        """Widths of several stages or branches in one sequence, and their sum."""
        widths = self.dense.__dict__.get("embed_dim")
        new_of = {edit.old: edit.new for edit in edits if edit.name.startswith("feature_info.")}
        if not isinstance(widths, list | tuple) or not new_of or len(new_of) != len(set(widths) & set(new_of)):
            return
        new = [new_of.get(width, width) for width in widths]
        yield AttributeEdit("", "embed_dim", tuple(widths), tuple(new))  # type: ignore[arg-type]
        for name in ("num_features", "head_hidden_size"):
            if _kept_number(self.dense, name) == sum(widths):
                yield AttributeEdit("", name, sum(widths), sum(new))  # type: ignore[arg-type]

    def _of_model(self, slim: nn.Module, live: Live, done: set[tuple[str, str]]) -> Iterator[AttributeEdit]:
        """Widths that the model as a whole has: of its features, of its classifier's input, of its first layer."""
        features = self.nodes.get(_FEATURES, [])
        new_of: dict[int, int] = {}
        for attribute in ("num_features", "head_hidden_size", "embed_dim"):
            value = _kept_number(self.dense, attribute)
            if value is None:
                continue
            if attribute == "num_features":
                new = _width(features, value, live)
                if new is not None:
                    new_of[value] = new
            elif attribute == "head_hidden_size":
                new = _classifier_width(self.dense, slim, value) or new_of.get(value)
            else:
                new = new_of.get(value) or _first_tensor(self.dense, slim, value)
            if new is not None and new != value and ("", attribute) not in done:
                yield AttributeEdit("", attribute, value, new)

    def _of_feature_info(self, slim: nn.Module, live: Live) -> Iterator[AttributeEdit]:
        """Widths of the intermediate features."""
        entries = getattr(self.dense, "feature_info", None)
        entries = [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
        names = [str(entry.get("module")) for entry in entries]
        new = [
            _width(self.nodes.get(name, []), entry.get("num_chs", -1), live)
            for name, entry in zip(names, entries, strict=True)
        ]
        if None in new or len(set(names)) < len(names):
            new = _from_intermediates(self.dense, slim, self.inputs, entries) or new
        for index, (entry, width) in enumerate(zip(entries, new, strict=True)):
            if width is not None and width != entry["num_chs"]:
                yield AttributeEdit("", f"feature_info.{index}.num_chs", entry["num_chs"], width)

    def _feature_info(self) -> Iterator[Mapping[str, Any]]:
        for entry in getattr(self.dense, "feature_info", None) or ():
            if isinstance(entry, dict) and entry.get("module") in self.modules:
                yield entry

    def _keep(self, name: str, value: Any) -> None:
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        self.nodes[name] = [node for leaf in leaves if (node := getattr(leaf, NODE, None)) is not None]

    def _keep_output(self, name: str) -> Callable[..., None]:
        return lambda module, args, output: self._keep(name, output)

    def _keep_input(self, name: str) -> Callable[..., None]:
        return lambda module, args: self._keep(name, args)

    def _keeping(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def forward_features(*args: Any, **kwargs: Any) -> Any:
            output = method(*args, **kwargs)
            self._keep(_FEATURES, output)
            return output

        return forward_features


def _width(nodes: Iterable[Node], value: int, live: Live) -> int | None:
    """What is left of the dimension of this size in the first tensor that has lost some of it; ``None`` if none has."""
    for node in nodes:
        new = _lost(node.shape, live.shape(node), value)
        if new is not None:
            return new
    return None


def _lost(before: Sequence[int], after: Sequence[int], value: int) -> int | None:
    new = {now for then, now in zip(before, after, strict=True) if then == value and now != then}
    return new.pop() if len(new) == 1 else None


def _from_intermediates(dense: nn.Module, slim: nn.Module, inputs: Any,
                        entries: Sequence[Mapping[str, Any]]) -> list[int | None] | None:  # fmt: skip
    """Widths of the intermediate features that both models return, where the names of modules do not tell."""
    method = getattr(dense, _INTERMEDIATES, None)
    if not callable(method) or not isinstance(inputs, Tensor):
        return None
    modes = [(module, module.training) for module in dense.modules()]
    try:
        dense.eval()
        with torch.no_grad(), ShapesOnly():
            before = method(inputs, intermediates_only=True)
            after = getattr(slim, _INTERMEDIATES)(inputs, intermediates_only=True)
    except (TypeError, AttributeError, RuntimeError, AssertionError):  # not written for these arguments, or this input
        return None
    finally:
        for module, training in modes:
            module.training = training
    shapes = [(tuple(a.shape), tuple(b.shape)) for a, b in zip(before, after, strict=True) if isinstance(a, Tensor)]
    if len(shapes) != len(entries):
        return None
    return [_lost(a, b, entry.get("num_chs", -1)) for (a, b), entry in zip(shapes, entries, strict=True)]


def _kept_number(module: nn.Module, attribute: str) -> int | None:
    """An integer that the module keeps under a name."""
    value = module.__dict__.get(attribute)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _of_fusing(name: str, before: nn.Module, after: nn.Module) -> Iterator[AttributeEdit]:
    """Sizes of the layer into which a module can fuse its branches; its forward reads none of them."""
    if not any(callable(getattr(before, method, None)) for method in _FUSING):
        return
    read = getattr(type(before).forward, "__code__", None)
    for attribute, (widths, which) in _FUSED_BY.items():
        value = _kept_number(before, attribute)
        if value is None or read is None or attribute in read.co_names:
            continue
        found = [new for old, new in _numbers(before, after, widths) if old == value != new]
        if found:
            yield AttributeEdit(name, attribute, value, found[which])


def _numbers(before: nn.Module, after: nn.Module, attributes: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Numbers of the layers in a module, before and after, in order."""
    for dense, slim in zip(before.modules(), after.modules(), strict=True):
        for attribute in attributes:
            if attribute in dense.__dict__ and isinstance(getattr(dense, "weight", None), Tensor):
                yield getattr(dense, attribute), getattr(slim, attribute)


def _inputs(before: nn.Module, after: nn.Module) -> list[tuple[int, int]]:
    """Widths that the layers in a module take, before and after, in order."""
    widths = []
    for dense, slim in module_pairs(before, after):
        for attribute in _INPUT_WIDTHS:
            if attribute in dense.__dict__ and isinstance(getattr(dense, "weight", None), Tensor):
                widths.append((getattr(dense, attribute), getattr(slim, attribute)))
    return widths


def _first(before: nn.Module, after: nn.Module, value: int) -> int | None:
    return next((new for old, new in _inputs(before, after) if old == value), None)


def _last(before: nn.Module, after: nn.Module, value: int) -> int | None:
    return next((new for old, new in reversed(_inputs(before, after)) if old == value), None)


def _classifier_width(dense: nn.Module, slim: nn.Module, value: int) -> int | None:
    get = getattr(dense, "get_classifier", None)
    if not callable(get):
        return None
    for before, after in zip(tree_leaves(get()), tree_leaves(slim.get_classifier()), strict=False):  # type: ignore[operator]
        if isinstance(before, nn.Module):
            return _first(before, after, value)
    return None


def _first_tensor(dense: nn.Module, slim: nn.Module, value: int) -> int | None:
    """What is left of the first dimension of that size, in the order in which the model has its parameters."""
    cut = dict(slim.named_parameters())
    for name, before in dense.named_parameters():
        after = cut.get(name, before)
        for old, new in zip(before.shape, after.shape, strict=True):
            if old == value:
                return new
    return None
