"""Deriving a plan's edits again, for a version of a library whose source is not the one that the plan was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunegate.errors import PlanError, PruneGateError
from prunegate.labels.record import Node
from prunegate.labels.trace import call_model, trace
from prunegate.plan import Plan
from prunegate.slim.derive import derive_plan
from prunegate.slim.slicing import check_tensors

__all__ = ["rederive"]


def rederive(dense: nn.Module, plan: Plan, config: Mapping[str, Any] | None) -> Plan:
    """A plan that keeps what ``plan`` keeps, with attributes and calls found in the source as it is here.

    Args:
        dense: The dense model, with any values in its tensors.
        plan: A plan that keeps the right positions and names places that are not there.
        config: The model's pretrained configuration; its ``input_size`` says on what to run the model.

    Raises:
        PlanError: The positions do not go together in the model as it is here, or the size of its input is not known.
    """
    size = (config or {}).get("input_size")
    if not isinstance(size, list | tuple) or not all(isinstance(each, int) and 0 < each <= 2**10 for each in size):
        raise PlanError(
            "the places that the plan edits are not in the source here, and no input size tells them anew"
        )
    check_tensors(dense, plan)
    inputs = torch.zeros(1, *size)
    try:
        traced = trace(dense, inputs)
        stays = torch.ones(len(traced.labels), dtype=torch.bool)
        tensors: dict[tuple[str, int], Tensor] = {}
        for name, dims in plan.kept.items():
            for dim, positions in dims.items():
                kept = torch.zeros(plan.dense[name][dim], dtype=torch.bool)
                kept[list(positions)] = True
                tensors[name, dim] = kept
                labels = traced.along(traced.tensors[traced.aliases.get(name, name)], dim)
                if labels is None or bool((labels[~kept] == 0).any()):
                    raise PlanError(f"the plan removes positions of {name!r} that cannot be removed here")
                stays[labels[~kept]] = False

        def kept_of(node: Node, dim: int) -> Tensor | None:
            labels = traced.along(node, dim)
            return None if labels is None else stays[labels]

        again = derive_plan(dense, traced.calls, kept_of, tensors, lambda slim: call_model(slim, inputs), inputs)
    except PlanError:
        raise
    except PruneGateError as error:
        raise PlanError(f"the plan's edits could not be derived again: {error}") from error
    return again
