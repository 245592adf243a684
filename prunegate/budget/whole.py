"""Whole models, timed as they will run: the cut beside the dense one, in turn, on the device that counts."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunegate.budget import ranks
from prunegate.budget.limits import PICOSECONDS
from prunegate.budget.stopwatch import Timer, device_name, time_in_turn
from prunegate.errors import BudgetError, ExportError
from prunegate.gated import GatedModel
from prunegate.labels.trace import call_model
from prunegate.tensors import fit_inputs

__all__ = ["Measured", "Trial", "cut", "measure"]


@dataclass(frozen=True)
class Measured:
    """What a cut was measured to take, beside the dense model.

    Attributes:
        dense_ms: Milliseconds of a forward of the dense model at the example input.
        slim_ms: Milliseconds of the cut one.
        share: What the cut one takes of the dense one: the median over turns, so that it does not depend on whether the
            machine became slower meanwhile.
    """

    dense_ms: float
    slim_ms: float
    share: float


def cut(gated: GatedModel, mask: Tensor) -> nn.Module:
    """The exported model under a mask, in eval mode; the gated model's own mask and phase stay."""
    gates = gated.prunegate
    phase, fixed = gates.phase, gates.fixed_mask.clone()
    try:
        gated.mask = mask
        return gated.export().eval()
    finally:
        gates.fixed_mask.copy_(fixed)
        gates.phase = phase


def measure(gated: GatedModel, dense: nn.Module, slim: nn.Module, timer: Timer | None = None,
            seconds: float = 4.0) -> Measured:  # fmt: skip
    """Times two models of one origin on the example input.

    Args:
        gated: Where they come from.
        dense: The model as it was.
        slim: The cut one.
        timer: Another engine's timer, called once for each; this device's clock if ``None``.
        seconds: How long to go on by this device's clock, at least.

    Raises:
        BudgetError: The timer gave something else than a number above 0.
    """
    inputs = fit_inputs(gated.example_input, gated)
    if timer is not None:
        before, after = _asked(timer, dense, inputs), _asked(timer, slim, inputs)
        return Measured(before, after, after / before)
    with torch.inference_mode():
        calls = [functools.partial(call_model, model, inputs) for model in (dense, slim)]
        turns = time_in_turn(calls, gated.logits.is_cuda, seconds)
    before, after = (float(each) for each in np.median(turns, axis=0))
    return Measured(before, after, float(np.median(turns[:, 1] / turns[:, 0])))


def _asked(timer: Timer, model: nn.Module, inputs: Any) -> float:
    named = isinstance(inputs, Mapping)
    args = () if named else inputs if isinstance(inputs, tuple) else (inputs,)
    taken = timer(model, args, dict(inputs) if named else {})
    if isinstance(taken, bool) or not isinstance(taken, (int, float)) or not math.isfinite(taken) or taken <= 0:
        raise BudgetError(
            f"the timer passed as latency_check= gave {taken!r} for a {type(model).__name__}; expected milliseconds of "
            "one call, a number above 0"
        )
    return float(taken)


class Trial:
    """Finds out what cuts of a model really take, where that can be done.

    The first process measures, and all get its numbers: they must choose the same mask. All of them cut, because the
    weights may lie on all of them.

    Args:
        gated: The gated model.
        device: The name of the table's device.
        timer: Times whole models in another engine; ``None`` for this device's clock.
        whole: What the dense model takes, in picoseconds, of which a share is asked for; ``None`` where milliseconds
            are asked for.

    Attributes:
        obstacle: Why the last cut could not be measured.

    Raises:
        BudgetError: ``timer`` does not give a number above 0 for the dense model.
    """

    def __init__(self, gated: GatedModel, device: str, timer: Timer | None, whole: int | None) -> None:
        self._gated, self._device, self._timer, self._whole = gated, device, timer, whole
        self._dense: nn.Module | None = None
        self.obstacle = ""
        if timer is not None and ranks.is_first():
            # A timer that does not work must not come to light when the search is nearly over.
            _asked(timer, cut(gated, gated.gate_map.start()), fit_inputs(gated.example_input, gated))

    def run(self, mask: Tensor) -> tuple[int, Measured] | None:
        """What the model under a mask takes: picoseconds as a budget counts them, and what was measured.

        ``None`` where it cannot be measured; ``obstacle`` then says why.
        """
        where = self._gated.logits.device
        slim, problem = None, ""
        here = device_name(where)
        if self._timer is None and here != self._device:
            problem = f"the table was measured on {self._device!r}, the model is on {here!r} now"
        else:
            try:
                self._dense = self._dense or cut(self._gated, self._gated.gate_map.start())
                slim = cut(self._gated, mask)
            except (ExportError, RuntimeError) as error:
                problem = f"the cut model could not be made: {error}"
        if not ranks.everywhere(slim is not None, where):
            self.obstacle = problem or "another process could not make the cut model"
            return None
        found = [math.nan] * 3
        if ranks.is_first():
            assert self._dense is not None
            assert slim is not None
            try:
                measured = measure(self._gated, self._dense, slim, self._timer)
                found = [measured.dense_ms, measured.slim_ms, measured.share]
            except Exception as error:  # whatever it is: a training that is nearly done must not end by it
                problem = f"timing failed: {type(error).__name__}: {error}"
        shared = ranks.from_first(torch.tensor(found, dtype=torch.float64), where).tolist()
        if any(math.isnan(value) for value in shared):
            self.obstacle = problem or "the first process could not time the cut model"
            return None
        result = Measured(*shared)
        return round(result.slim_ms * PICOSECONDS if self._whole is None else result.share * self._whole), result

    def end(self) -> None:
        """Lets go of the dense model."""
        self._dense = None
