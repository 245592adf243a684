"""From a mask to a plan: which positions of every traced tensor stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunegate.groups import GateMap
from prunegate.labels.planes import varying
from prunegate.labels.record import Node
from prunegate.labels.trace import Trace, call_model
from prunegate.plan import Plan
from prunegate.slim.replay import derive_plan

__all__ = ["derive"]


def derive(model: nn.Module, trace: Trace, gate_map: GateMap, mask: Tensor, example_input: Any) -> Plan:
    """The plan that cuts ``model`` down to ``mask``.

    Args:
        model: The dense model that was traced, or a copy of it.
        trace: Its labelling.
        gate_map: From labels to gates.
        mask: bool ``[n_gates]``, on the CPU.
        example_input: What the model was traced on.

    Raises:
        ExportError: A call's sizes cannot be made to follow the cut.
    """
    stays = torch.cat([mask, torch.ones(1, dtype=torch.bool)])  # gate -1: always there
    keep = stays[gate_map.of_label]

    def kept(node: Node, dim: int) -> Tensor:
        alive = torch.ones(node.shape[dim], dtype=torch.bool)
        for plane in trace.algebra.get(node):
            if varying(plane) == {dim}:
                alive &= keep[plane.flatten()]
        return alive

    tensors = {key: stays[gates] for key, gates in gate_map.dims.items()}
    return derive_plan(model, trace, kept, tensors, lambda slim: call_model(slim, example_input))
