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

import datetime
import functools
import hashlib
import itertools
import json
import math
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunegate.blocks import factors_of
from prunegate.budget.limits import PICOSECONDS
from prunegate.budget.stopwatch import Pool, Timer, time_call, time_in_turn
from prunegate.budget.timed import Operator, find_operators
from prunegate.errors import BudgetError, ExportError
from prunegate.gated import GatedModel
from prunegate.labels.trace import call_model
from prunegate.operators import ONE_OF
from prunegate.polynomial import Polynomial, PolynomialBuilder

__all__ = ["LatencyTable"]

_FORMAT = 2
_SHARES = {1: (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0), 2: (0.125, 0.375, 0.625, 0.8125, 1.0)}
_SHARES_OF_MANY = (0.25, 0.625, 1.0)
_MOST_VARIABLES = 3
_BLOCK = 16  # elements that a kernel's innermost loop takes at once, at most
_CUTS = (0.75, 0.5, 0.3)  # mean shares kept in the cuts that predictions are calibrated on
_SPREAD = 0.2  # how far a group's share is from the mean at most
_DENSE_COUNTS = 3.0  # shares are shares of the dense model's time

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
            progress: Called with the number of operators done and to do.

        Raises:
            BudgetError: ``known`` is from another device.
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
        with torch.no_grad():
            for done, (key, operator) in enumerate(distinct.items()):
                if key not in table.operators:
                    table.operators[key] = _measure(operator, device, pool, timer)
                if progress is not None:
                    progress(done + 1, len(distinct))
            if timer is None:
                table._calibrate(gated, operators)
        return table

    def _calibrate(self, gated: GatedModel, operators: Sequence[Operator]) -> None:
        """Sets off whole forwards of the model, dense and cut, against the sums of their operators."""
        sums, wholes, weights = [], [], []
        masks = [(gated.gate_map.start(), _DENSE_COUNTS), *((mask, 1.0) for mask in _cuts_like_a_searchs(gated))]
        for mask, weight in masks:
            try:
                cut = _cut(gated, mask)
            except ExportError:
                continue
            wholes.append(time_call(call_model, (cut, gated.example_input), {}, 1.0, 10))
            sums.append(self._sum(gated, operators, mask))
            weights.append(weight)
        if not wholes:
            return
        # Two unknowns need two forwards; with one there is only the factor.
        columns = np.stack([np.ones(len(sums)), np.array(sums)], axis=1)[:, -min(2, len(sums)) :]
        relative = np.array(weights) / np.array(wholes)
        found = _non_negative_least_squares(columns * relative[:, None], np.array(weights))
        self.overhead[_model_key(operators)] = (float(found[:-1].sum()), float(found[-1]))

    def _sum(self, gated: GatedModel, operators: Sequence[Operator], mask: Tensor) -> float:
        """Milliseconds of all operators that run under a mask."""
        blocks = factors_of(gated.gate_map.blocks)[0]
        return sum(
            self._interpolate(operator, operator.live(mask))
            for operator in operators
            if operator.runs(mask) and all(bool(mask[gate]) for gate in blocks.get(id(operator.op), ()))
        )

    def predict(self, gated: GatedModel, mask: Tensor | None = None) -> float:
        """Milliseconds of a forward of the model cut by ``mask`` (``None``: dense), at the example input's batch.

        Raises:
            BudgetError: The table is of another device, or lacks an operator.
        """
        return self.predictor(gated)(gated.gate_map.start() if mask is None else mask.cpu())

    def predictor(self, gated: GatedModel) -> Callable[[Tensor], float]:
        """Gives milliseconds of a forward for one mask (bool ``[n_gates]``, on the CPU) after another.

        Raises:
            BudgetError: The table is of another device, or lacks an operator.
        """
        self.check(gated.logits.device)
        operators = self._known(gated)
        added, scale = self.overhead.get(_model_key(operators), (0.0, 1.0))
        return lambda mask: added + scale * self._sum(gated, operators, mask)

    def polynomial(self, gated: GatedModel) -> Polynomial:
        """The latency as a cost of the mask, in picoseconds: the non-negative fit of each operator's times.

        Measured times rise in steps and widths that fill a kernel's blocks are faster than those beside them, so it is
        scaled to agree with :meth:`predict` at the widths of a search, not at the dense model's.

        Raises:
            BudgetError: The table is of another device, or lacks an operator.
        """
        predict = self.predictor(gated)
        operators = self._known(gated)
        added, scale = self.overhead.get(_model_key(operators), (0.0, 1.0))
        blocks = factors_of(gated.gate_map.blocks)[0]
        fits = {operator.key: _fit(self.operators[operator.key]) for operator in operators}

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

    def _interpolate(self, operator: Operator, sizes: Sequence[int]) -> float:
        entry = self.operators[operator.key]
        values = np.array(entry["ms"]).reshape([len(axis) for axis in entry["sizes"]])
        for axis, size in zip(entry["sizes"], sizes, strict=True):
            # The first axis is resolved each time. Below the smallest size the line goes on, but not below 0, and a
            # line that rises towards nothing is noise.
            i = min(max(int(np.searchsorted(axis, size)) - 1, 0), len(axis) - 2) if len(axis) > 1 else 0
            if len(axis) == 1:
                values = values[0]
            else:
                at = (size - axis[i]) / (axis[i + 1] - axis[i])
                line = np.maximum(values[i] * (1 - at) + values[i + 1] * at, 0)
                values = np.minimum(line, values[0]) if at < 0 else line
        return float(values)

    def check(self, device: torch.device) -> None:
        """Raises ``BudgetError`` if the table was measured on another device."""
        name = device_name(device)
        if self.device != name:
            raise BudgetError(
                f"the latency table was measured on {self.device!r}, the model is on {name!r}; measure it there: "
                "python tools/latency.py MODEL"
            )

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON."""
        content = {"format": _FORMAT, **vars(self)}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Reads a table that :meth:`save` wrote.

        Raises:
            BudgetError: The file is not one.
        """
        try:
            content = json.loads(Path(path).read_text())
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
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BudgetError(f"{path} is not a latency table ({error}); make one with tools/latency.py") from error
        return table


def device_name(device: torch.device) -> str:
    """The device's own name; a CPU's with its number of threads, on which times depend."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        return f"{model or platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return str(device)


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


def _cut(gated: GatedModel, mask: Tensor) -> nn.Module:
    """The exported model under a mask; the gated model's own mask and phase stay."""
    gates = gated.prunegate
    phase, fixed = gates.phase, gates.fixed_mask.clone()
    try:
        gated.mask = mask
        return gated.export().eval()
    finally:
        gates.fixed_mask.copy_(fixed)
        gates.phase = phase


def _model_key(operators: Sequence[Operator]) -> str:
    return hashlib.sha256("\n".join(operator.key for operator in operators).encode()).hexdigest()[:16]


def _grid(size: int, shares: Sequence[float]) -> list[int]:
    """Sizes to measure at, the dense one among them.

    Kernels work on blocks, so times rise in steps. Points in the middle of a block, and in no multiple of 8, make the
    line between them an average of the steps; points at their edges would make it a lower bound.
    """
    sizes = [max(1, round(size * share)) for share in shares]
    if size >= 4 * _BLOCK:
        sizes = [at if at == size else min(at // _BLOCK * _BLOCK + _BLOCK // 2 + 1, size) for at in sizes]
    return sorted(set(sizes))


def _measure(operator: Operator, device: torch.device, pool: Pool, timer: Timer | None) -> dict[str, list[Any]]:
    dense = operator.dense()
    shares = _SHARES.get(len(dense), _SHARES_OF_MANY)
    axes = [_grid(size, shares) if i < _MOST_VARIABLES else [size] for i, size in enumerate(dense)]
    times = []
    for sizes in itertools.product(*axes):
        try:
            if timer is None:
                make = functools.partial(operator.arguments, sizes, pool, device)
                times.append(time_in_turn(operator.op.func, make))
            else:
                times.append(timer(operator.op.func, *operator.arguments(sizes, pool, device)))
        except (RuntimeError, IndexError, ValueError):
            # Some operations cannot run at sizes of our choosing; they are taken to be proportional to their size.
            times.append(math.nan)
    if operator.writes():
        pool.refresh()
    filled = np.array(times)
    if np.isnan(filled).any():
        if np.isnan(filled[-1]):
            return {"sizes": [[size] for size in dense], "ms": [0.0]}
        relative = np.array([math.prod(sizes) for sizes in itertools.product(*axes)]) / max(1, math.prod(dense))
        filled = np.where(np.isnan(filled), filled[-1] * relative, filled)
    return {"sizes": axes, "ms": [float(f"{ms:.4g}") for ms in filled]}


def _fit(entry: dict[str, list[Any]]) -> list[tuple[tuple[int, ...], float]]:
    """Milliseconds as a sum of products of shares of the dense sizes, with coefficients of at least 0.

    Returns:
        (numbers of the changing dimensions, coefficient) for every product.
    """
    axes = [np.array(axis, dtype=np.float64) / axis[-1] for axis in entry["sizes"]]
    moving = [i for i, axis in enumerate(axes) if len(axis) > 1]
    points = np.array(list(itertools.product(*axes)), dtype=np.float64).reshape(len(entry["ms"]), len(axes))
    times = np.array(entry["ms"], dtype=np.float64)
    products = [c for n in range(len(moving) + 1) for c in itertools.combinations(moving, n)]
    columns = np.stack([points[:, list(c)].prod(axis=1) for c in products], axis=1)
    # Errors count relative to the time, but no time is trusted to less than a hundredth of the longest.
    weight = 1 / np.maximum(times, 0.01 * max(times.max(), 1e-9))
    coefficients = _non_negative_least_squares(columns * weight[:, None], times * weight)
    return [(c, float(value)) for c, value in zip(products, coefficients, strict=True) if value > 0]


def _non_negative_least_squares(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The best of all subsets of columns whose unconstrained solution is not negative (eight columns at most)."""
    best, solution = math.inf, np.zeros(a.shape[1])
    for n in range(1, a.shape[1] + 1):
        for chosen in itertools.combinations(range(a.shape[1]), n):
            found = np.linalg.lstsq(a[:, chosen], b, rcond=None)[0]
            error = float(np.square(a[:, chosen] @ found - b).sum())
            if (found >= 0).all() and error < best * (1 - 1e-9):
                best, solution = error, np.zeros(a.shape[1])
                solution[list(chosen)] = found
    return solution
