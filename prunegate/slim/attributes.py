"""Numbers that modules keep: the one table of those that follow from weights, and the edits that a plan asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from prunegate.errors import PlanError
from prunegate.plan import AttributeEdit
from prunegate.slim.edits import original_class

__all__ = ["check_attributes", "follow_weights", "get_path", "module_pairs", "plain", "set_attributes"]


def _channels(module: Any) -> int | None:
    holder = module.running_mean if module.running_mean is not None else module.weight
    return None if holder is None else holder.numel()


def _shape(module: Any) -> tuple[int, ...] | None:
    return None if module.weight is None else tuple(module.weight.shape)


def _is_packed(module: Any) -> bool:
    width = module.embed_dim
    return module.in_proj_weight is not None and tuple(module.in_proj_weight.shape) == (3 * width, width)


_GATES = {"LSTM": 4, "GRU": 3}  # how many gates a recurrent layer stacks in one weight

TABLE: dict[type[nn.Module], dict[str, Callable[[Any], Any]]] = {
    nn.Linear: {"out_features": lambda m: m.weight.shape[0], "in_features": lambda m: m.weight.shape[1]},
    nn.Bilinear: {
        "out_features": lambda m: m.weight.shape[0],
        "in1_features": lambda m: m.weight.shape[1],
        "in2_features": lambda m: m.weight.shape[2],
    },
    _ConvNd: {
        "out_channels": lambda m: m.weight.shape[0],
        "in_channels": lambda m: m.weight.shape[1] * m.groups,
    },
    _ConvTransposeNd: {
        "out_channels": lambda m: m.weight.shape[1] * m.groups,
        "in_channels": lambda m: m.weight.shape[0],
    },
    _NormBase: {"num_features": _channels},
    nn.GroupNorm: {"num_channels": lambda m: None if m.weight is None else m.weight.shape[0]},
    nn.LayerNorm: {"normalized_shape": _shape},
    nn.RMSNorm: {"normalized_shape": _shape},
    nn.Embedding: {"num_embeddings": lambda m: m.weight.shape[0], "embedding_dim": lambda m: m.weight.shape[1]},
    # torch's own fused kernels, and its checks, are for projections that are as wide as the input.
    nn.MultiheadAttention: {"_qkv_same_embed_dim": _is_packed},
    nn.PReLU: {"num_parameters": lambda m: m.weight.shape[0]},
    nn.RNNCellBase: {
        "input_size": lambda m: m.weight_ih.shape[1],
        "hidden_size": lambda m: m.weight_hh.shape[1],
    },
    nn.RNNBase: {
        "input_size": lambda m: m.weight_ih_l0.shape[1],
        "hidden_size": lambda m: m.weight_hh_l0.shape[0] // _GATES.get(m.mode, 1),
        "proj_size": lambda m: m.weight_hr_l0.shape[0] if m.proj_size else 0,
    },
}
"""For each class of torch: its attributes that follow from its tensors; ``None`` where they say nothing."""


def module_pairs(dense: nn.Module, slim: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The modules of a model with those of its cut copy; modules without a counterpart are left out."""
    found = dict(slim.named_modules())
    for name, module in dense.named_modules():
        if name in found and isinstance(found[name], original_class(module)):
            yield module, found[name]


def follow_weights(dense: nn.Module, slim: nn.Module) -> None:
    """Sets the attributes of the table on every module of ``slim`` that was cut.

    An attribute that does not follow from the weights in ``dense`` (a subclass that means something else by it) is left
    alone.
    """
    for before, after in module_pairs(dense, slim):
        entries = next((TABLE[base] for base in type(before).__mro__ if base in TABLE), {})
        for name, value in entries.items():
            try:
                follows = value(before) == getattr(before, name)
                new = value(after)
            except (AttributeError, IndexError):
                continue
            if follows and new is not None and new != getattr(after, name):
                setattr(after, name, new)


def plain(value: Any) -> Any:
    """A list or torch.Size as a tuple; anything else as it is."""
    return tuple(value) if isinstance(value, list | tuple) else value


def get_path(module: nn.Module, name: str) -> Any:
    """The value of an attribute; steps after dots lead into lists, dictionaries and attributes of the value.

    Raises:
        PlanError: There is no such attribute.
    """
    value: Any = module
    for step in name.split("."):
        try:
            value = _step(value, step)
        except (AttributeError, KeyError, IndexError, TypeError):
            raise PlanError(f"{type(module).__name__} has no attribute {name!r}, which the plan changes") from None
    return value


def _step(value: Any, step: str) -> Any:
    if isinstance(value, nn.Module):
        return value.__dict__[step]
    if isinstance(value, dict):
        return value[step]
    if isinstance(value, list | tuple):
        return value[int(step)]
    return getattr(value, step)


def check_attributes(model: nn.Module, edits: Iterable[AttributeEdit]) -> None:
    """Sees that attributes have the values that a plan was made for.

    Raises:
        PlanError: They have not.
    """
    for edit in edits:
        current = plain(get_path(_module(model, edit.module), edit.name))
        if current != edit.old or isinstance(current, bool):
            raise PlanError(
                f"the plan was made for {edit.module or type(model).__name__}.{edit.name} = {edit.old!r}; here it is "
                f"{current!r}. Build the model with the same arguments; apply a plan only once"
            )


def set_attributes(model: nn.Module, edits: Iterable[AttributeEdit]) -> None:
    """Gives attributes their new values; a list stays a list."""
    for edit in edits:
        *path, last = edit.name.split(".")
        holder: Any = _module(model, edit.module)
        for step in path:
            holder = _step(holder, step)
        old = _step(holder, last)
        value: Any = edit.new
        new = type(old)(value) if isinstance(old, list | tuple) else value
        if isinstance(holder, nn.Module):
            setattr(holder, last, new)
        elif isinstance(holder, dict):
            holder[last] = new
        elif isinstance(holder, list):
            holder[int(last)] = new
        else:
            raise PlanError(f"the plan changes {edit.name!r}, which is part of a {type(holder).__name__}")


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise PlanError(f"the plan changes module {name!r}, which this {type(model).__name__} does not have") from None
