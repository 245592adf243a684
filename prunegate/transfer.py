"""An optimizer's state, carried through a cut."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunegate.errors import PruneGateError
from prunegate.gated import GatedModel
from prunegate.slim.slicing import cut_tensor

__all__ = ["transfer_optimizer"]


def transfer_optimizer(
    optimizer: torch.optim.Optimizer, gated: GatedModel, slim: nn.Module, into: torch.optim.Optimizer | None = None
) -> torch.optim.Optimizer:
    """An optimizer of the slim model that goes on where the search's left off.

    Moments, momentum buffers and whatever else has a parameter's shape are cut as the parameter was; counters are
    copied. The groups keep their options, the logits are left out. A learning-rate scheduler holds the optimizer that
    it was made with: make it again on the new one, with ``last_epoch``.

    Args:
        optimizer: What trained ``gated``'s parameters; it is left as it is.
        gated: The searched model, with the mask that ``slim`` was exported with.
        slim: What ``gated.export()`` returned.
        into: An optimizer of ``slim``'s parameters, and of any others, that takes the state over and keeps its own
            groups and options. Then ``optimizer`` too may train others than ``gated``'s; their state is dropped.

    Returns:
        ``into``, or a new optimizer of the same class.

    Raises:
        PruneGateError: ``slim`` was not cut from ``gated`` by its current mask, or a parameter of the optimizer is not
            one of ``gated``, or ``into`` does not train all of ``slim``'s that ``optimizer`` did of ``gated``.

    Example:
        >>> import torch, prunegate
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> gated = prunegate.attach(net, torch.randn(1, 4))
        >>> optimizer = torch.optim.SGD(gated.parameters(), 0.1, momentum=0.9)
        >>> gated(torch.randn(3, 4)).sum().backward(); optimizer.step()
        >>> gated.mask = [True] * 6 + [False] * 2
        >>> slim = gated.export()
        >>> moved = prunegate.transfer_optimizer(optimizer, gated, slim)
        >>> moved.state[slim[0].weight]["momentum_buffer"].shape
        torch.Size([6, 4])
    """
    plan = gated.plan()
    names = {id(parameter): name for name, parameter in gated.named_parameters()}
    targets = dict(slim.named_parameters())
    groups: list[dict[str, Any]] = []
    states: list[tuple[nn.Parameter, dict[str, Any]]] = []
    for group in optimizer.param_groups:
        moved = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        moved["params"] = []
        for parameter in group["params"]:
            if parameter is gated.logits:
                continue
            name = names.get(id(parameter))
            if (name is not None and plan.removes(name)) or (name is None and into is not None):
                continue
            if name is None or name not in targets:
                raise PruneGateError(
                    f"the optimizer trains a tensor of shape {tuple(parameter.shape)} that is no parameter of the "
                    "gated and the slim model; pass the optimizer that was made from gated.parameters()"
                )
            kept = plan.kept.get(name, {})
            target = targets[name]
            expected = tuple(len(kept[d]) if d in kept else size for d, size in enumerate(parameter.shape))
            if tuple(target.shape) != expected:
                raise PruneGateError(
                    f"{name!r} of the slim model has shape {tuple(target.shape)}; under the gated model's mask it is "
                    f"{expected}. Pass the model that gated.export() gave, before the mask is changed"
                )
            moved["params"].append(target)
            states.append((target, {key: _cut(value, parameter, kept)
                                    for key, value in optimizer.state.get(parameter, {}).items()}))  # fmt: skip
        groups.append(moved)
    if into is not None:
        own = {id(parameter) for group in into.param_groups for parameter in group["params"]}
        moving = {id(target) for target, _ in states}
        missing = [name for name, parameter in targets.items() if id(parameter) in moving - own]
        if missing:
            raise PruneGateError(
                f"into= does not train {missing[0]!r} of the slim model, whose state the optimizer has; make it from "
                "the slim model's parameters"
            )
        into.state.update({target: state for target, state in states if state})
        return into
    # Some optimizers keep settings among their defaults that their constructor does not take; groups have them anyway.
    accepted = inspect.signature(type(optimizer)).parameters
    defaults = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    fresh = type(optimizer)([group for group in groups if group["params"]], **defaults)
    for target, state in states:
        if state:
            fresh.state[target] = state
    return fresh


def _cut(value: Any, parameter: Tensor, kept: Mapping[int, tuple[int, ...]]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape and kept:
        return cut_tensor(value, kept)
    return value.detach().clone()
