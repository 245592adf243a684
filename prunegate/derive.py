"""From a mask to a plan: which positions of every traced tensor stay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunegate.blocks import Block, removal_of
from prunegate.errors import ExportError, PlanError
from prunegate.groups import GateMap, Group, add_blocks
from prunegate.labels.paths import is_active, paths_of_modules
from prunegate.labels.record import Node
from prunegate.labels.shapes import ShapesOnly
from prunegate.labels.trace import Trace, call_model
from prunegate.operators import add_choices, chosen_by
from prunegate.plan import Chosen, Plan
from prunegate.slim.choices import with_choices
from prunegate.slim.derive import derive_plan
from prunegate.tensors import attributes_kept, fit_inputs, set_attributes_back

__all__ = ["derive", "removable_blocks"]


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
    removal = removal_of(gate_map.removed(mask), calls)
    gone = tuple(f"{name}." for name in removal.replaced)
    tensors = {key: positions for key, positions in tensors.items() if not key[0].startswith(gone)}
    inputs = fit_inputs(example_input, trace.model)

    def run(slim: nn.Module) -> None:
        with ShapesOnly(), attributes_kept(slim):  # a plan depends on sizes alone
            set_attributes_back(slim, trace.changed)  # the model may have run since it was traced
            call_model(slim, inputs)

    written = frozenset(node.base.uid for op in trace.ops for node in op.written if node.base is not None)
    plan = derive_plan(
        trace.model, removal.calls, kept, tensors, run, inputs, choices, removal.replaced, removal.edits, written
    )
    return with_choices(trace.model, plan)


def removable_blocks(blocks: Sequence[Block], trace: Trace, groups: Sequence[Group], gate_map: GateMap,
                     example_input: Any) -> list[Block]:  # fmt: skip
    """Those of some blocks without which the model runs: each is removed once.

    Args:
        blocks: Candidates.
        trace: A labelling.
        groups: The groups of its units.
        gate_map: From labels to gates, without blocks.
        example_input: What the model was traced on.
    """
    levels: dict[int, list[Block]] = {}
    for block in blocks:
        levels.setdefault(sum(id(block.call) in other.calls for other in blocks), []).append(block)

    def runs(some: Sequence[Block]) -> bool:
        _, with_gates = add_choices(trace, *add_blocks(groups, gate_map, some))
        mask = with_gates.start()
        mask[list(with_gates.blocks)] = False
        try:
            derive(trace, with_gates, mask, example_input)
        except (ExportError, PlanError):
            return False
        return True

    good = [block for level in levels.values() for block in _those(level, runs)]
    return [block for block in blocks if block in good]


def _those(blocks: Sequence[Block], runs: Callable[[Sequence[Block]], bool]) -> list[Block]:
    """The blocks without which the model runs, each by itself; all are tried at once, then halves."""
    if not blocks or runs(blocks):
        return list(blocks)
    if len(blocks) == 1:
        return []
    middle = len(blocks) // 2
    return [*_those(blocks[:middle], runs), *_those(blocks[middle:], runs)]
