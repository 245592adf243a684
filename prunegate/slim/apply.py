"""From a model and a plan to the slim model."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from prunegate.errors import PlanError
from prunegate.plan import Plan
from prunegate.slim.attributes import check_attributes, follow_weights, set_attributes
from prunegate.slim.choices import chosen_of, put_operators, settle_choices
from prunegate.slim.edits import apply_edits
from prunegate.slim.slicing import check_tensors, cut_tensors
from prunegate.tensors import computed_tensors, tensor_caches
from prunegate.valueless import check_runs

__all__ = ["apply_plan", "cut_along", "cut_model", "plan_of"]

_PLAN = "_prunegate_plan"


def plan_of(model: nn.Module) -> Plan:
    """The plan by which a model was cut, from the first dense model on; an empty one for a model that was not."""
    plan: Plan = model.__dict__.get(_PLAN, Plan())
    return plan


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Cuts a model along a plan.

    Args:
        model: The model that the plan was made for, on any device, also ``"meta"``. It is left as it is.
        plan: What stays.

    Returns:
        The slim model: of the same class, with the kept positions of every tensor. Where a call's arguments had to
        change, its module is of a subclass of the same name.

    Raises:
        PlanError: The plan was made for another model, or leaves one that does not run; nothing has changed then.

    Where the plan chooses operators, they stand in the place of their choices.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> kept = {"0.weight": {0: (0, 2)}, "0.bias": {0: (0, 2)}, "2.weight": {1: (0, 2)}}
        >>> dense = {"0.weight": (3, 4), "0.bias": (3,), "2.weight": (2, 3)}
        >>> apply_plan(net, Plan(dense, kept))[0]
        Linear(in_features=4, out_features=2, bias=True)
    """
    slim = cut_along(model, plan)
    if plan.example is not None:
        check_runs(slim, plan.example)
    return slim


def cut_along(model: nn.Module, plan: Plan) -> nn.Module:
    """As :func:`apply_plan`, for a plan that was just made: what it leaves is not run.

    Raises:
        PlanError: The plan was made for another model.
    """
    slim = put_operators(cut_model(model, plan), plan)
    slim.__dict__[_PLAN] = plan_of(model).compose(plan)
    return slim


def _identities(model: nn.Module, plan: Plan) -> dict[int, nn.Module]:
    """What stands in for the modules that a plan removes, by their identity."""
    found: dict[int, nn.Module] = {}
    for name in plan.removed:
        try:
            module = model.get_submodule(name) if name else None
        except AttributeError:
            module = None
        if module is None:
            raise PlanError(f"the plan removes the module {name!r}, which this {type(model).__name__} does not have")
        found[id(module)] = nn.Identity().train(module.training)
    return found


def cut_model(model: nn.Module, plan: Plan) -> nn.Module:
    """As :func:`apply_plan`, but choices stay where they are and run what the plan chooses.

    Raises:
        PlanError: The plan was made for another model.
    """
    chosen_of(model, plan)
    check_tensors(model, plan)
    check_attributes(model, plan.attributes)
    # Copying with the cut tensors already in the memo never holds a second dense model, and keeps tied ones tied.
    memo: dict[int, Any] = computed_tensors(model) | cut_tensors(model, plan)
    memo |= _identities(model, plan)
    slim = copy.deepcopy(model, memo)
    set_attributes(slim, plan.attributes)
    follow_weights(model, slim)
    set_attributes(slim, plan.attributes)
    for cache in tensor_caches(slim):
        cache.clear()
    apply_edits(slim, plan.calls)
    settle_choices(slim, plan)
    return slim
