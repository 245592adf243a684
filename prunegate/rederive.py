"""Deriving a plan's edits again, for a version of a library whose source is not the one that the plan was made for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunegate.blocks import find_blocks, removal_of
from prunegate.errors import PlanError, PruneGateError
from prunegate.example import example_from
from prunegate.labels.heads import positions_in_heads
from prunegate.labels.record import Node
from prunegate.labels.trace import call_model, trace
from prunegate.labels.unionfind import FROZEN
from prunegate.plan import Plan
from prunegate.slim.choices import settle_choices, with_choices
from prunegate.slim.derive import derive_plan
from prunegate.slim.slicing import check_tensors

__all__ = ["rederive"]

_MAX_ELEMENTS = 2**27  # of one input, as it is a file that says so


def rederive(dense: nn.Module, plan: Plan, config: Mapping[str, Any] | None) -> Plan:
    """A plan that keeps what ``plan`` keeps, with attributes and calls found in the source as it is here.

    Args:
        dense: The dense model, with any values in its tensors.
        plan: A plan that keeps the right positions and names places that are not there.
        config: The model's pretrained configuration; its ``input_size`` says on what to run the model where the plan
            has no example.

    Raises:
        PlanError: The positions do not go together in the model as it is here, or the size of its input is not known.
    """
    inputs = _inputs_for(plan, config)
    check_tensors(dense, plan)
    settle_choices(dense, plan)  # only what was chosen runs, and leaves calls
    cropped = set(with_choices(dense, Plan(choices=plan.choices)).kept)
    try:
        traced = trace(dense, inputs)
        inside = positions_in_heads(traced.algebra, traced.tensors)
        if inside:
            traced = trace(dense, inputs, inside=inside)
        # A block that is removed removes its modules, so the modules tell the blocks.
        gone = tuple(f"{name}." for name in plan.removed)
        blocks = find_blocks(traced) if gone else []
        blocks = [block for block in blocks if all(f"{name}.".startswith(gone) for name in block.replaced)]
        removal = removal_of(blocks, traced.calls)
        if set(removal.replaced) != set(plan.removed):
            raise PlanError(f"the plan removes {sorted(plan.removed)[:3]}, which cannot be removed here")
        stays = torch.ones(len(traced.labels), dtype=torch.bool)

        def kept_of(node: Node, dim: int) -> Tensor | None:
            planes = [stays[plane.flatten()] for plane in traced.planes_along(node, dim)]
            return functools.reduce(torch.logical_and, planes) if planes else None

        tensors: dict[tuple[str, int], Tensor] = {}
        for name, dims in plan.kept.items():
            for dim, positions in dims.items():
                if dim > 1 and name in cropped:
                    continue  # the kernel's size, which is the choice's to say
                kept = torch.zeros(plan.dense[name][dim], dtype=torch.bool)
                kept[list(positions)] = True
                tensors[name, dim] = kept
                planes = traced.planes_along(traced.tensors[traced.aliases.get(name, name)], dim)
                for labels in (plane.flatten() for plane in planes):
                    # A unit is gone when all its positions are; what is left over must be inside a head that is.
                    partly = torch.zeros(len(traced.labels), dtype=torch.bool)
                    partly[labels[kept]] = True
                    stays[labels[~partly[labels]]] = False
                where = kept_of(traced.tensors[traced.aliases.get(name, name)], dim)
                if where is None or not bool(stays[FROZEN]) or bool((where & ~kept).any()):
                    raise PlanError(f"the plan removes positions of {name!r} that cannot be removed here")

        again = derive_plan(
            dense, removal.calls, kept_of, tensors, lambda slim: call_model(slim, inputs), inputs,
            plan.choices,
            removed=removal.replaced, edits=removal.edits,
        )  # fmt: skip
    except PlanError:
        raise
    except PruneGateError as error:
        raise PlanError(f"the plan's edits could not be derived again: {error}") from error
    return replace(with_choices(dense, again), example=plan.example)


def _inputs_for(plan: Plan, config: Mapping[str, Any] | None) -> Any:
    """What to run the model on."""
    if plan.example is not None:
        return example_from(plan.example, "cpu", _MAX_ELEMENTS)
    size = (config or {}).get("input_size")
    if not isinstance(size, list | tuple) or not all(isinstance(each, int) and 0 < each <= 2**10 for each in size):
        raise PlanError(
            "the places that the plan edits are not in the source here, and no input size tells them anew"
        )
    return torch.zeros(1, *size)
