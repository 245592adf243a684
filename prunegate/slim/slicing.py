"""The tensors of a cut model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunegate.errors import PlanError
from prunegate.plan import Plan
from prunegate.tensors import is_channels_last, named_tensors

__all__ = ["check_tensors", "cut_tensor", "cut_tensors"]


def check_tensors(model: nn.Module, plan: Plan) -> None:
    """Sees that the tensors that a plan cuts are there, in the shapes that it was made for.

    Raises:
        PlanError: They are not.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor, _ in named_tensors(model)}
    for name, dense in plan.dense.items():
        if name not in shapes:
            raise PlanError(
                f"the plan cuts {name!r}, which this {type(model).__name__} does not have; build the model that the "
                "plan was made for, with the same arguments"
            )
        if shapes[name] != dense:
            raise PlanError(
                f"the plan was made for {name!r} of shape {dense}; this {type(model).__name__} has it in shape "
                f"{shapes[name]}. Build the model with the same arguments; apply a plan only once"
            )


def cut_tensors(model: nn.Module, plan: Plan) -> dict[int, Tensor]:
    """The cut tensors, each by the identity of the dense one, so that tensors with several names stay one."""
    cut: dict[int, Tensor] = {}
    for name, tensor, _ in named_tensors(model):
        if name in plan.kept:
            cut[id(tensor)] = cut_tensor(tensor, plan.kept[name])
    return cut


def cut_tensor(tensor: Tensor, kept: Mapping[int, tuple[int, ...]]) -> Tensor:
    """A copy with only the kept positions of each dimension; a parameter stays one."""
    with torch.no_grad():
        value = tensor.detach()
        for dim, positions in kept.items():
            value = value.index_select(dim, torch.tensor(positions, device=tensor.device))
        if is_channels_last(tensor):
            value = value.clone(memory_format=torch.channels_last)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value
