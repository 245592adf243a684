"""Plans for masks: where a model's own arithmetic cannot follow a cut, what stands in its way is kept."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prunegate.derive import derive
from prunegate.example import describe_example
from prunegate.groups import GateMap, Group
from prunegate.labels.record import nodes_in
from prunegate.labels.trace import Trace
from prunegate.plan import Plan
from prunegate.slim.replay import UnrepairableError
from prunegate.valueless import runs

__all__ = ["Kept", "Planned", "Planner"]


@dataclass(frozen=True, eq=False)
class Kept:
    """Units that a mask closes and that cannot go.

    Attributes:
        gates: Which, bool ``[n_gates]``.
        why: The place in the model's code that cannot follow, and what is wrong there.
    """

    gates: Tensor
    why: str


@dataclass(frozen=True, eq=False)
class Planned:
    """What comes of a mask.

    Attributes:
        plan: The plan.
        mask: The mask that it cuts along, bool ``[n_gates]``.
        kept: What that keeps beyond the mask that was asked for.
    """

    plan: Plan
    mask: Tensor
    kept: tuple[Kept, ...]


class Planner:
    """Plans cuts of one model. The last plan is remembered.

    Args:
        trace: The labelled forward.
        groups: The groups of gates.
        gate_map: From labels to gates.
        example_input: What the model was traced on.
    """

    def __init__(self, trace: Trace, groups: Sequence[Group], gate_map: GateMap, example_input: Any) -> None:
        self._trace, self._groups, self._gate_map, self._example_input = trace, groups, gate_map, example_input
        self._last: tuple[Tensor, Planned] | None = None

    def plan(self, mask: Tensor) -> Planned:
        """The plan for a mask, bool ``[n_gates]``, on the CPU.

        Raises:
            ExportError: Whatever is kept, the cut model does not run.
        """
        if self._last is not None and torch.equal(self._last[0], mask):
            return self._last[1]
        asked, kept = mask.clone(), list[Kept]()
        while True:
            try:
                plan = derive(self._trace, self._gate_map, mask, self._example_input)
                break
            except UnrepairableError as error:
                more = self._kept_for(error, mask)
                kept.append(Kept(more, str(error)))
                mask = mask | more
        planned = Planned(replace(plan, example=self._described), mask, tuple(kept))
        self._last = asked, planned
        return planned

    def whole_under(self, mask: Tensor) -> dict[str, str]:
        """The groups of which a mask closes units that cannot go, by name, each with what cannot follow.

        None while the weights are sharded, as they cannot be cut then.
        """
        if any(hasattr(parameter, "full_tensor") for parameter in self._trace.model.parameters()):
            return {}
        kept = self.plan(mask).kept
        return {
            group.name: each.why
            for each in reversed(kept)
            for group in self._groups
            if bool(each.gates[group.slice].any())
        }

    @functools.cached_property
    def _described(self) -> Any:
        """The example input as data, where the model runs on it for shapes alone."""
        described = describe_example(self._example_input)
        return described if described is not None and runs(self._trace.model, described) else None

    def _kept_for(self, error: UnrepairableError, mask: Tensor) -> Tensor:
        """The closed units that change a size at a call that cannot follow.

        Where none does, the call was given a size of another tensor: then those that change one at the calls before
        it, the nearest first.
        """
        calls = self._trace.calls
        before = calls[: calls.index(error.call)] if error.call in calls else calls
        reaches = [2**power for power in range(len(before).bit_length() + 1)]
        arguments = ([(call.args, call.kwargs, call.out) for call in before[-reach:]] for reach in reaches)
        for nodes in itertools.chain([error.nodes], map(nodes_in, arguments)):
            there = torch.zeros_like(mask)
            for node in nodes:
                for plane in self._trace.algebra.get(node):
                    gates = self._gate_map.of_label[plane].flatten()
                    there[gates[gates >= 0]] = True
            if bool((there & ~mask).any()):
                return there & ~mask
        raise error
