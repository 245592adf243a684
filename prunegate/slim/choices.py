"""Putting the chosen operators in the place of their choices, and what else a choice changes in a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from prunegate.choice import Choice
from prunegate.errors import PlanError
from prunegate.plan import AttributeEdit, Plan
from prunegate.slim.attributes import plain

__all__ = ["chosen_of", "put_operators", "settle_choices", "with_choices"]


def chosen_of(model: nn.Module, plan: Plan) -> dict[str, int]:
    """Number of the operator that a plan leaves of each choice, by the choice's qualified name.

    Raises:
        PlanError: There is no such choice, or it has no such operator.
    """
    found = {}
    for site, chosen in plan.choices.items():
        try:
            module: Any = model.get_submodule(site)
        except AttributeError:
            module = None
        if not isinstance(module, Choice):
            raise PlanError(
                f"the plan chooses an operator at {site!r}, where this {type(model).__name__} has no Choice; build the "
                "model that the plan was made for"
            )
        if chosen.name not in module.names:
            raise PlanError(
                f"the plan chooses {chosen.name!r} at {site!r}; the Choice there has the operators "
                f"{list(module.names)}"
            )
        index = module.names.index(chosen.name)
        if chosen.path != module.path_of(index):
            raise PlanError(
                f"the plan takes {chosen.path!r} for the operator {chosen.name!r} at {site!r}; it is "
                f"{module.path_of(index)!r}"
            )
        found[site] = index
    return found


def settle_choices(model: nn.Module, plan: Plan) -> None:
    """Makes the choices of a model run what a plan chooses; the model keeps its modules."""
    for site, index in chosen_of(model, plan).items():
        module: Any = model.get_submodule(site)
        module.chosen = index


def put_operators(model: nn.Module, plan: Plan) -> nn.Module:
    """The model with the chosen operators in the place of their choices, innermost first."""
    for site, index in sorted(chosen_of(model, plan).items(), key=lambda item: -item[0].count(".")):
        choice: Any = model.get_submodule(site)
        operator = choice.get_submodule(choice.path_of(index))
        if choice is model:
            model = operator
        for module in list(model.modules()):
            for name, child in module._modules.items():
                if child is choice:
                    module._modules[name] = operator
    return model


def with_choices(model: nn.Module, plan: Plan) -> Plan:
    """A plan with what its choices change in tensors and attributes that operators share."""
    dense, kept = dict(plan.dense), {name: dict(dims) for name, dims in plan.kept.items()}
    attributes = list(plan.attributes)
    for site, index in chosen_of(model, plan).items():
        choice: Any = model.get_submodule(site)
        for (name, dim), positions in choice.kept(index).items():
            full = f"{site}.{name}" if site else name
            shape = tuple(choice.get_parameter(name).shape)
            if len(positions) < shape[dim]:
                dense.setdefault(full, shape)
                kept.setdefault(full, {})[dim] = positions
        for (name, attribute), value in choice.attributes(index).items():
            old = plain(getattr(choice.get_submodule(name), attribute))
            if old != value:
                attributes.append(AttributeEdit(f"{site}.{name}" if site else name, attribute, old, value))
    return replace(plan, dense=dense, kept=kept, attributes=tuple(attributes))
