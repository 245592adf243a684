"""Latency measured per operator over a grid of widths, and modelled as a cost of the mask.

Every operation of the traced forward that computes something is timed on its own, at several sizes of its prunable
dimensions. A table holds these times: it knows the device, and it serves every mask of every model that is made of the
same operators. Times between the grid's points are interpolated; for a search they become a polynomial like FLOPs.
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunegate.blocks import factors_of
from prunegate.budget.limits import PICOSECONDS
from prunegate.errors import BudgetError, ExportError
from prunegate.gated import GatedModel
from prunegate.groups import ALWAYS
from prunegate.labels.paths import ALL
from prunegate.labels.record import Node, Op, nodes_in
from prunegate.labels.trace import call_model
from prunegate.operators import ONE_OF, PathLengths
from prunegate.polynomial import Polynomial, PolynomialBuilder

__all__ = ["LatencyTable", "Operator", "find_operators", "time_call"]

_FORMAT = 1
_SHARES = {1: (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0), 2: (0.125, 0.375, 0.625, 0.8125, 1.0)}
_SHARES_OF_MANY = (0.25, 0.625, 1.0)
_MOST_VARIABLES = 3
_BLOCK = 16  # elements that a kernel's innermost loop takes at once, at most
_FREE = frozenset("unsafe_view alias detach lift_fresh empty zeros ones arange full scalar_tensor".split())
_CUTS = (0.7, 0.45)  # shares kept in the cuts that predictions are calibrated on

Timer = Callable[[Callable[..., Any], Sequence[Any], dict[str, Any]], float]
"""Milliseconds of one call, given the function, its positional and its keyword arguments."""


@dataclass(eq=False)
class Operator:
    """One operation of the forward, with the dimensions that pruning changes.

    Attributes:
        key: Describes it completely at dense size: operations of equal keys take equal times.
        op: The recorded operation.
        gates: For each changing dimension that differs from the others, the gate of each position.
        places: (tensor number, dimension) to the number of the changing dimension.
        there: Of an operation inside operators of choices, their gates: it runs where all are open.
    """

    key: str
    op: Op
    gates: list[Tensor] = field(default_factory=list)
    places: dict[tuple[int, int], int] = field(default_factory=dict)
    there: list[Tensor] = field(default_factory=list)

    def runs(self, mask: Tensor) -> bool:
        """Whether it runs under a mask."""
        return all(bool(mask[gate].all()) for gate in self.there)

    def dense(self) -> list[int]:
        """Dense sizes of the changing dimensions."""
        return [gates.numel() for gates in self.gates]

    def live(self, mask: Tensor) -> list[int]:
        """Their sizes under a mask."""
        open_to = torch.cat([mask.cpu(), torch.ones(1, dtype=torch.bool)])  # the last serves positions without a gate
        return [int(open_to[gates].sum()) for gates in self.gates]

    def arguments(self, sizes: Sequence[int], device: torch.device) -> tuple[list[Any], dict[str, Any]]:
        """Arguments for a call at other sizes of the changing dimensions."""
        numbers = itertools.count()

        def shape_of(node: Node, number: int) -> list[int]:
            return [
                sizes[self.places[number, dim]] if (number, dim) in self.places else size
                for dim, size in enumerate(node.shape)
            ]

        shapes: list[list[int]] = []

        def make(leaf: Any) -> Any:
            if not isinstance(leaf, Node):
                return leaf
            shape = shape_of(leaf, next(numbers))
            shapes.append(shape)
            if leaf.dtype.is_floating_point or leaf.dtype.is_complex:
                return torch.rand(shape, device=device, dtype=leaf.dtype)
            if leaf.value is not None and list(leaf.value.shape) == shape:
                return leaf.value.to(device)
            return torch.zeros(shape, device=device, dtype=leaf.dtype)

        args, kwargs = tree_map(make, (list(self.op.args), dict(self.op.kwargs)))
        return _follow(self.op, args, shapes), kwargs


def _follow(op: Op, args: list[Any], shapes: list[list[int]]) -> list[Any]:
    """Arguments that are sizes follow the tensors."""
    nodes = list(nodes_in((op.args, op.kwargs)))
    if op.name == "convolution" and args[8] > 1 and shapes[1][1] == nodes[1].shape[1]:
        args[8] = args[8] * shapes[0][1] // nodes[0].shape[1]
    elif op.name == "native_layer_norm":
        args[1] = shapes[0][-len(args[1]) :]
    elif op.name == "native_group_norm":
        args[4] = shapes[0][1]
        args[6] = args[6] if shapes[0][1] % args[6] == 0 else 1
    return args


def find_operators(gated: GatedModel) -> list[Operator]:
    """The operations of the traced forward that take time, in order."""
    found = []
    paths = PathLengths(gated.trace, gated.gate_map)
    for op in gated.trace.ops:
        if any(index == ALL for _, index in op.path):
            continue  # adds up what operators give; only the trace runs several
        nodes = list(nodes_in((op.args, op.kwargs)))
        if not nodes or op.func.is_view or op.name in _FREE:  # type: ignore[attr-defined]
            continue
        operator = _operator(gated, op, nodes)
        operator.there = paths.of(op.path)
        found.append(operator)
    return found


def _operator(gated: GatedModel, op: Op, nodes: list[Node]) -> Operator:
    operator = Operator("", op)
    known: dict[bytes, int] = {}
    tags = []
    for number, node in enumerate(nodes):
        dims = []
        for dim, size in enumerate(node.shape):
            labels = gated.trace.along(node, dim)
            gates = None if labels is None else gated.gate_map.of_label[labels]
            if gates is None or not bool((gates != ALWAYS).any()):
                dims.append(str(size))
                continue
            name = gates.numpy().tobytes()
            if name not in known:
                known[name] = len(known)
                operator.gates.append(gates)
            operator.places[number, dim] = known[name]
            dims.append(f"{'abcdefghijklmnop'[known[name] % 16]}:{size}")
        tags.append(f"{str(node.dtype).removeprefix('torch.')}[{','.join(dims)}]")
    names = iter(tags)
    described = tree_map(lambda leaf: next(names) if isinstance(leaf, Node) else leaf, (op.args, op.kwargs))
    operator.key = f"{op.name}{described[0]}{described[1] or ''}".replace("'", "")
    return operator


def time_call(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], least_seconds: float = 0.004,
              least_calls: int = 5) -> float:  # fmt: skip
    """Median milliseconds of one call.

    With one CPU thread it is the thread's own time, so that other programs on the machine do not count.
    """
    cuda = any(leaf.is_cuda for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    clock = time.thread_time if not cuda and torch.get_num_threads() == 1 else time.perf_counter
    taken: list[float] = []
    function(*args, **kwargs)
    until = time.perf_counter() + least_seconds
    while len(taken) < least_calls or time.perf_counter() < until:
        if cuda:
            torch.cuda.synchronize()
        start = clock()
        function(*args, **kwargs)
        if cuda:
            torch.cuda.synchronize()
        taken.append(clock() - start)
    return 1000 * float(np.median(taken))


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
    def measure(cls, gated: GatedModel, timer: Timer = time_call, known: LatencyTable | None = None,
                progress: Callable[[int, int], None] | None = None) -> LatencyTable:  # fmt: skip
        """Times every operator of a model that is not in ``known`` yet, on the model's device.

        Args:
            gated: The gated model.
            timer: Times one call; another engine's timer makes a table for that engine. With another timer no whole
                forward is measured.
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
        with torch.no_grad():
            for done, (key, operator) in enumerate(distinct.items()):
                if key not in table.operators:
                    table.operators[key] = _measure(operator, device, timer)
                if progress is not None:
                    progress(done + 1, len(distinct))
            if timer is time_call:
                table._calibrate(gated, operators)
        return table

    def _calibrate(self, gated: GatedModel, operators: Sequence[Operator]) -> None:
        """Sets off whole forwards of the model, and of two cuts of it, against the sums of their operators.

        Alone, an operator finds its data in the cache and follows no Python code, so a model takes longer.
        """
        model = copy.deepcopy(gated.model).eval()
        measured: list[tuple[Tensor | None, float]] = [
            (None, time_call(call_model, (model, gated.example_input), {}, 1.0, 10))
        ]
        for share in _CUTS:
            mask = _share_of_every_group(gated, share)
            try:
                cut = _cut(gated, mask)
            except ExportError:
                break
            measured.append((mask, time_call(call_model, (cut, gated.example_input), {}, 1.0, 10)))
        wholes = np.array([whole for _, whole in measured])
        start = gated.gate_map.start()
        masks = [start if mask is None else mask.cpu() for mask, _ in measured]
        sums = np.array([sum(self._interpolate(o, o.live(mask)) for o in operators if o.runs(mask)) for mask in masks])
        columns = np.stack([np.ones_like(sums), sums], axis=1)
        added, scale = _non_negative_least_squares(columns / wholes[:, None], np.ones_like(wholes))
        if len(measured) == 1:
            added, scale = 0.0, wholes[0] / sums[0]
        self.overhead[_model_key(operators)] = (float(added), float(scale))

    def predict(self, gated: GatedModel, mask: Tensor | None = None) -> float:
        """Milliseconds of a forward of the model cut by ``mask`` (``None``: dense), at the example input's batch.

        Raises:
            BudgetError: The table is of another device, or lacks an operator.
        """
        self.check(gated.logits.device)
        operators = self._known(gated)
        added, scale = self.overhead.get(_model_key(operators), (0.0, 1.0))
        live = [operator.dense() if mask is None else operator.live(mask) for operator in operators]
        blocks = {} if mask is None else factors_of(gated.gate_map.blocks)[0]
        there = gated.gate_map.start() if mask is None else mask.cpu()
        runs = [
            each.runs(there) and all(bool(there[gate]) for gate in blocks.get(id(each.op), ())) for each in operators
        ]
        known = zip(operators, live, runs, strict=True)
        return added + scale * sum(self._interpolate(operator, sizes) for operator, sizes, there in known if there)

    def polynomial(self, gated: GatedModel) -> Polynomial:
        """The latency as a cost of the mask, in picoseconds: the non-negative fit of each operator's times.

        Raises:
            BudgetError: The table is of another device, or lacks an operator.
        """
        self.check(gated.logits.device)
        operators = self._known(gated)
        added, scale = self.overhead.get(_model_key(operators), (0.0, 1.0))
        builder = PolynomialBuilder(gated.logits.numel(), gated.gate_map.start())
        builder.add(round(added * PICOSECONDS), [])
        blocks = factors_of(gated.gate_map.blocks)[0]
        fits: dict[str, list[tuple[tuple[int, ...], float]]] = {}
        for operator in operators:
            if operator.key not in fits:
                fits[operator.key] = _fit(self.operators[operator.key])
            for variables, milliseconds in fits[operator.key]:
                whole = math.prod(operator.gates[v].numel() for v in variables)
                coefficient = round(scale * milliseconds * PICOSECONDS / whole)
                there = operator.there + blocks.get(id(operator.op), [])
                builder.add(coefficient, [operator.gates[v] for v in variables] + there)
        return builder.build()

    def _known(self, gated: GatedModel) -> list[Operator]:
        operators = find_operators(gated)
        missing = sorted({operator.key for operator in operators} - set(self.operators))
        if missing:
            raise BudgetError(
                f"the latency table does not know {len(missing)} of the model's operators, the first is {missing[0]}; "
                "measure them on this device: python tools/latency.py MODEL --extend TABLE"
            )
        return operators

    def _interpolate(self, operator: Operator, sizes: Sequence[int]) -> float:
        entry = self.operators[operator.key]
        values = np.array(entry["ms"]).reshape([len(axis) for axis in entry["sizes"]])
        for axis, size in zip(entry["sizes"], sizes, strict=True):
            # The first axis is resolved each time; below the smallest size the line goes on, but not below 0.
            i = min(max(int(np.searchsorted(axis, size)) - 1, 0), len(axis) - 2) if len(axis) > 1 else 0
            if len(axis) == 1:
                values = values[0]
            else:
                at = (size - axis[i]) / (axis[i + 1] - axis[i])
                values = np.maximum(values[i] * (1 - at) + values[i + 1] * at, 0)
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


def _share_of_every_group(gated: GatedModel, share: float) -> Tensor:
    """A mask that keeps the same share of every group, at odd widths as a search would."""
    mask = torch.zeros(gated.logits.numel(), dtype=torch.bool)
    for group in gated.groups:
        kept = max(1, round(share * group.size) - (group.size >= 4 * _BLOCK)) if group.kind != ONE_OF else 1
        mask[group.slice.start : group.slice.start + kept] = True
    return mask


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


def _measure(operator: Operator, device: torch.device, timer: Timer) -> dict[str, list[Any]]:
    dense = operator.dense()
    shares = _SHARES.get(len(dense), _SHARES_OF_MANY)
    axes = [_grid(size, shares) if i < _MOST_VARIABLES else [size] for i, size in enumerate(dense)]
    times = []
    for sizes in itertools.product(*axes):
        try:
            args, kwargs = operator.arguments(sizes, device)
            times.append(timer(operator.op.func, args, kwargs))
        except (RuntimeError, IndexError, ValueError):
            # Some operations cannot run at sizes of our choosing; they are taken to be proportional to their size.
            times.append(math.nan)
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
