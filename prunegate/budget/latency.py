"""Latency measured per operator over a grid of widths, and modelled as a cost of the mask.

Every operation of the traced forward that computes something is timed on its own, at several sizes of its prunable
dimensions, on memory that is laid out as in the model and as far away from the processor. A table holds these times: it
knows the device, and it serves every mask of every model that is made of the same operators. Times between the grid's
points are interpolated; for a search they become a polynomial like FLOPs.

What is between operators (Python code, memory that is taken and given back) no operator's time shows. So the model
itself is timed as well, whole, dense and at a few widths, and its sum of operators is set off against that: a constant
and a factor, of the least relative errors, that belong to the model and are in the table.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunegate.blocks import factors_of
from prunegate.budget.grids import fit, interpolate, measure_operator, non_negative_least_squares
from prunegate.budget.limits import PICOSECONDS
from prunegate.budget.stopwatch import Pool, Timer, device_name
from prunegate.budget.timed import Operator, find_operators
from prunegate.budget.whole import cut, measure
from prunegate.errors import BudgetError, ExportError
from prunegate.gated import GatedModel
from prunegate.operators import ONE_OF
from prunegate.polynomial import Polynomial, PolynomialBuilder

__all__ = ["LatencyTable"]

_FORMAT = 2
_CUTS = (0.75, 0.5, 0.3)  # mean shares kept in the cuts that predictions are calibrated on
_SPREAD = 0.2  # how far a group's share is from the mean at most
_DENSE_COUNTS = 3.0  # shares are shares of the dense model's time
_MOST_PASSES = 8
_LEAST_SECONDS = 10.0
_STEADY = 0.98  # of the sum of all times before: a pass that does not lower it further is the last
_FAR = 1.5  # a factor between operators and whole models that is no longer explained by caches


@dataclass
class LatencyTable:
    """Times of operators on one device.

    Attributes:
        device: The device's own name, and the number of threads on a CPU.
        versions: Of torch and of Python.
        date: When it was measured.
        operators: For each operator's key, the sizes along each changing dimension, and milliseconds at each point of
            that grid in row-major order.
        overhead: For each model's key, what a whole forward takes beyond its operators (milliseconds), and the factor
            by which they take longer in the model than alone.
    """

    device: str
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    operators: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    overhead: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def measure(cls, gated: GatedModel, timer: Timer | None = None, known: LatencyTable | None = None,
                progress: Callable[[int, int], None] | None = None) -> LatencyTable:  # fmt: skip
        """Times every operator of a model that is not in ``known`` yet, on the model's device.

        Args:
            gated: The gated model.
            timer: Another engine's timer of one call (``timer(function, args, kwargs)`` gives milliseconds) makes a
                table for that engine. The model itself is not run by it, so nothing is set off against whole forwards.
            known: A table of the same device to extend.
            progress: Called with the number of operators done and to do, in each of several passes over them.

        Raises:
            BudgetError: ``known`` is from another device, or ``timer`` gave something else than a number of at least 0.
        """
        device = gated.logits.device
        table = cls(device_name(device))
        if known is not None:
            known.check(device)
            table.operators.update(known.operators)
            table.overhead.update(known.overhead)
        table.versions = {"torch": torch.__version__, "python": platform.python_version()}
        table.date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        operators = find_operators(gated)
        distinct = {operator.key: operator for operator in operators}
        pool = Pool(sum(t.numel() * t.element_size() for t in (*gated.parameters(), *gated.buffers())), device)
        new = {key: operator for key, operator in distinct.items() if key not in table.operators}
        with torch.no_grad():
            for lowered in table._passes(new, pool, timer, progress):
                if timer is not None or not lowered:
                    break
            if timer is None:
                table._calibrate(gated, operators)
        return table

    def _passes(self, new: Mapping[str, Operator], pool: Pool, timer: Timer | None,
                progress: Callable[[int, int], None] | None) -> Iterator[bool]:  # fmt: skip
        """Measures operators again and again, the least times stay; says after each pass whether another is needed.

        What disturbs a machine does so for seconds: it passes over one operator in all its sizes, and over a small
        model's operators one after the other. So at least two passes are made, and more until they bring nothing.
        """
        started, before = time.perf_counter(), math.inf
        for number in range(_MOST_PASSES):
            for done, (key, operator) in enumerate(new.items()):
                measured = measure_operator(operator, pool, timer)
                if number and measured["sizes"] == self.operators[key]["sizes"]:
                    pairs = zip(measured["ms"], self.operators[key]["ms"], strict=True)
                    measured["ms"] = [min(pair) for pair in pairs]
                self.operators[key] = measured
                if progress is not None:
                    progress(done + 1, len(new))
            total = sum(math.fsum(self.operators[key]["ms"]) for key in new)
            steady = number > 0 and total > _STEADY * before
            yield not steady or time.perf_counter() - started < _LEAST_SECONDS
            before = total

    def _calibrate(self, gated: GatedModel, operators: Sequence[Operator]) -> None:
        """Sets off whole forwards of the model, dense and cut, against the sums of their operators."""
        start = gated.gate_map.start()
        try:
            dense = cut(gated, start)
        except ExportError:
            return
        sums, shares, times = [self._sum(gated, operators, start)], [1.0], []
        for mask in _cuts_like_a_searchs(gated):
            with contextlib.suppress(ExportError):
                found = measure(gated, dense, cut(gated, mask), seconds=2.0)
                sums.append(self._sum(gated, operators, mask))
                shares.append(found.share)
                times.append(found.dense_ms)
        if not times:
            return
        # Each cut ran in turn with the dense model, so its share of that is surer than its time.
        wholes = float(np.median(times)) * np.array(shares)
        weights = np.array([_DENSE_COUNTS, *[1.0] * (len(sums) - 1)])
        columns = np.stack([np.ones(len(sums)), np.array(sums)], axis=1)
        added, factor = non_negative_least_squares(columns * (weights / wholes)[:, None], weights)
        self.overhead[_model_key(operators)] = (float(added), float(factor))

    @property
    def of_this_engine(self) -> bool:
        """Whether torch's own operators were timed, not another engine's: only they are set off against a model."""
        return bool(self.overhead)

    def overhead_of(self, gated: GatedModel) -> tuple[float, float]:
        """Milliseconds of a model's forward beyond its operators, and the factor by which these take longer in it."""
        return self.overhead.get(_model_key(find_operators(gated)), (0.0, 1.0))

    def doubt(self, gated: GatedModel) -> str | None:
        """What speaks against the table's times of a model, and what to do about it; ``None`` where nothing does.

        In the model operators take about as long as alone. Where they do not, the machine did something else while the
        table was measured, or its clock changed.
        """
        factor = self.overhead_of(gated)[1]
        if 1 / _FAR <= factor <= _FAR:
            return None
        return (
            f"the latency table of {self.date or 'no date'} is doubtful: operators take {factor:.2f} times as long in "
            f"the whole model as alone (expected: {1 / _FAR:.2f} to {_FAR:.2f}), so something else ran while it was "
            "measured, or the model is so small that calls are all there is to it; measure again while the machine is "
            "quiet: python tools/latency.py MODEL"
        )

    def part(self, gated: GatedModel) -> LatencyTable:
        """The entries that one model needs.

        Raises:
            BudgetError: The table lacks an operator.
        """
        operators = self._known(gated)
        key = _model_key(operators)
        return replace(
            self,
            operators={operator.key: self.operators[operator.key] for operator in operators},
            overhead={key: self.overhead[key]} if key in self.overhead else {},
        )

    def _sum(self, gated: GatedModel, operators: Sequence[Operator], mask: Tensor) -> float:
        """Milliseconds of all operators that run under a mask."""
        blocks = factors_of(gated.gate_map.blocks)[0]
        return sum(
            interpolate(self.operators[operator.key], operator.live(mask))
            for operator in operators
            if operator.runs(mask) and all(bool(mask[gate]) for gate in blocks.get(id(operator.op), ()))
        )

    def predict(self, gated: GatedModel, mask: Tensor | None = None) -> float:
        """Milliseconds of a forward of the model cut by ``mask`` (``None``: dense), at the example input's batch.

        Raises:
            BudgetError: The table is of another device, or lacks an operator.
        """
        return self.predictor(gated)(gated.gate_map.start() if mask is None else mask.cpu())

    def predictor(self, gated: GatedModel, check: bool = True) -> Callable[[Tensor], float]:
        """Gives milliseconds of a forward for one mask (bool ``[n_gates]``, on the CPU) after another.

        Args:
            gated: The gated model.
            check: Whether the model must be on the device that the table was measured on.

        Raises:
            BudgetError: The table is of another device, or lacks an operator.
        """
        if check:
            self.check(gated.logits.device)
        operators = self._known(gated)
        added, scale = self.overhead.get(_model_key(operators), (0.0, 1.0))
        return lambda mask: added + scale * self._sum(gated, operators, mask)

    def polynomial(self, gated: GatedModel, check: bool = True) -> Polynomial:
        """The latency as a cost of the mask, in picoseconds: the non-negative fit of each operator's times.

        Measured times rise in steps and widths that fill a kernel's blocks are faster than those beside them, so it is
        scaled to agree with :meth:`predict` at the widths of a search, not at the dense model's.

        Args:
            gated: The gated model.
            check: Whether the model must be on the device that the table was measured on.

        Raises:
            BudgetError: The table is of another device, or lacks an operator.
        """
        predict = self.predictor(gated, check)
        operators = self._known(gated)
        added, scale = self.overhead.get(_model_key(operators), (0.0, 1.0))
        blocks = factors_of(gated.gate_map.blocks)[0]
        fits = {operator.key: fit(self.operators[operator.key]) for operator in operators}

        def build(scale: float) -> Polynomial:
            builder = PolynomialBuilder(gated.logits.numel(), gated.gate_map.start())
            builder.add(round(added * PICOSECONDS), [])
            for operator in operators:
                there = operator.there + blocks.get(id(operator.op), [])
                for variables, milliseconds in fits[operator.key]:
                    whole = math.prod(operator.gates[v].numel() for v in variables)
                    coefficient = round(scale * milliseconds * PICOSECONDS / whole)
                    builder.add(coefficient, [operator.gates[v] for v in variables] + there)
            return builder.build()

        fitted = build(scale)
        masks = _cuts_like_a_searchs(gated)
        predicted = sum(predict(mask) - added for mask in masks)
        modelled = sum(fitted.exact(mask) / PICOSECONDS - added for mask in masks)
        return build(scale * predicted / modelled) if modelled > 0 else fitted

    def _known(self, gated: GatedModel) -> list[Operator]:
        operators = find_operators(gated)
        missing = sorted({operator.key for operator in operators} - set(self.operators))
        if missing:
            known = _dtypes(self.operators)
            foreign = sorted(_dtypes(missing) - known)
            if foreign:
                why = f"was measured in {', '.join(sorted(known)) or 'no type'}, the model computes in {foreign[0]}"
            else:
                why = f"does not know {len(missing)} of the model's operators, the first is {missing[0]}"
            raise BudgetError(
                f"the latency table {why}; measure them on this device: python tools/latency.py MODEL --extend TABLE"
            )
        return operators

    def check(self, device: torch.device) -> None:
        """Raises ``BudgetError`` if the table was measured on another device."""
        name = device_name(device)
        if self.device != name:
            raise BudgetError(
                f"the latency table was measured on {self.device!r}, the model is on {name!r}; measure it there: "
                "python tools/latency.py MODEL"
            )

    def to_json(self) -> str:
        """The table as JSON."""
        return json.dumps({"format": _FORMAT, **vars(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str, source: str) -> LatencyTable:
        """The table that :meth:`to_json` wrote.

        Args:
            text: What it wrote.
            source: Where the text comes from, for messages.

        Raises:
            BudgetError: The text is not one.
        """
        try:
            content = json.loads(text)
            if content.pop("format") != _FORMAT:
                raise ValueError("its format is another")
            if set(content) != {"device", "versions", "date", "operators", "overhead"}:
                raise ValueError("its entries are others")
            content["overhead"] = {key: (float(a), float(b)) for key, (a, b) in content["overhead"].items()}
            table = cls(**content)
            for key, entry in table.operators.items():
                if len(entry["ms"]) != math.prod(len(axis) for axis in entry["sizes"]):
                    raise ValueError(f"the times of {key} do not fill their grid")
                if not all(isinstance(ms, (int, float)) and ms >= 0 and math.isfinite(ms) for ms in entry["ms"]):
                    raise ValueError(f"the times of {key} are not all numbers of at least 0")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BudgetError(f"{source} is not a latency table ({error}); make one with tools/latency.py") from error
        return table

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Reads a table that :meth:`save` wrote.

        Raises:
            BudgetError: The file is not one.
        """
        try:
            text = Path(path).read_text()
        except (OSError, ValueError) as error:
            raise BudgetError(f"{path} is not a latency table ({error}); make one with tools/latency.py") from error
        return cls.from_json(text, str(path))


def _dtypes(keys: Iterable[str]) -> set[str]:
    """The floating-point types of operands in operators' keys."""
    return {found for key in keys for found in re.findall(r"\b(b?float\d+|complex\d+)\[", key)}


def _cuts_like_a_searchs(gated: GatedModel) -> list[Tensor]:
    """Masks with widths as after a search: odd, and from layer to layer others."""
    generator = torch.Generator().manual_seed(0)
    masks = []
    for mean in _CUTS:
        mask = torch.zeros(gated.logits.numel(), dtype=torch.bool)
        for group in gated.groups:
            share = mean + _SPREAD * (2 * float(torch.rand((), generator=generator)) - 1)
            kept = 1 if group.kind == ONE_OF else max(1, round(share * group.size))
            mask[group.slice.start : group.slice.start + kept] = True
        masks.append(mask)
    return masks


def _model_key(operators: Sequence[Operator]) -> str:
    return hashlib.sha256("\n".join(operator.key for operator in operators).encode()).hexdigest()[:16]
