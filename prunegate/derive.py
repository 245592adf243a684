"""From a mask to a plan: which positions of every traced tensor stay."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from prunegate.groups import GateMap
from prunegate.labels.paths import is_active, paths_of_modules
from prunegate.labels.record import Node
from prunegate.labels.shapes import ShapesOnly
from prunegate.labels.trace import Trace, call_model
from prunegate.operators import chosen_by
from prunegate.plan import Chosen, Plan
from prunegate.slim.choices import with_choices
from prunegate.slim.derive import derive_plan
from prunegate.tensors import attributes_kept, fit_inputs, set_attributes_back

__all__ = ["derive"]


def derive(trace: Trace, gate_map: GateMap, mask: Tensor, example_input: Any) -> Plan:
    """The plan that cuts the traced model, and any copy of it, down to ``mask``.

    Args:
        trace: A labelling.
        gate_map: From labels to gates.
        mask: bool ``[n_gates]``, on the CPU.
        example_input: What the model was traced on.

    Raises:
        ExportError: A call's sizes cannot be made to follow the cut.
    """
    stays = torch.cat([mask, torch.ones(1, dtype=torch.bool)])  # gate -1: always there
    keep = stays[gate_map.of_label]

    def kept(node: Node, dim: int) -> Tensor | None:
        planes = [keep[plane.flatten()] for plane in trace.planes_along(node, dim)]
        return functools.reduce(torch.logical_and, planes) if planes else None

    chosen = chosen_by(gate_map, mask)
    there = paths_of_modules(trace.model, trace.choices) if chosen else {}
    tensors = {
        (name, dim): positions
        for (name, dim), positions in gate_map.kept(mask).items()
        if is_active(there.get(name.rpartition(".")[0], ()), chosen)
    }
    choices = {
        site: Chosen(record.options[chosen[group]], module.path_of(chosen[group]))
        for group, record in trace.choices.items()
        for site, module in record.sites.items()
        if is_active(there[site], chosen)
    }
    calls = [call for call in trace.calls if is_active(call.path, chosen)]
    inputs = fit_inputs(example_input, trace.model)

    def run(slim: nn.Module) -> None:
        with ShapesOnly(), attributes_kept(slim):  # a plan depends on sizes alone
            set_attributes_back(slim, trace.changed)  # the model may have run since it was traced
            call_model(slim, inputs)

    plan = derive_plan(trace.model, calls, kept, tensors, run, inputs, choices)
    return with_choices(trace.model, plan)
