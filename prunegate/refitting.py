"""Repair without training: what consumed removed units is fitted again to what the dense model computed.

Every linear map that lost inputs is solved for once, in closed form, in the order of the forward: its inputs are those
of the slim model with all earlier layers repaired, its targets the dense model's outputs (He et al., arXiv 1707.06168,
section 3.1; Luo et al., arXiv 1707.06342). Batch norms that follow get new statistics. No labels are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from prunegate.batches import joined_inputs
from prunegate.errors import PruneGateError
from prunegate.labels.trace import call_model
from prunegate.slim.apply import plan_of
from prunegate.tensors import named_tensors

__all__ = ["Refitted", "Repair", "refit"]

_RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-5, 1e-9)  # from strong to weak
_LEAST_GAIN = 1e-3  # relative; weights stay as they are where less can be had
_PATCHES = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


@dataclass(frozen=True)
class Refitted:
    """What came of one layer.

    Attributes:
        name: Qualified name of its weight.
        before: Squared error of its outputs, as a share of the dense outputs' variance, on inputs held out.
        after: The same with the chosen ridge.
        ridge: Strength of the pull to the weights as they were, as a share of the mean square of the inputs; infinite
            where the weights were left alone because no fit did better on inputs held out.
    """

    name: str
    before: float
    after: float
    ridge: float


@dataclass
class Repair:
    """What a repair did.

    Attributes:
        layers: The linear maps that lost inputs, in the order of the forward.
        norms: Names of the batch norms with new statistics.
        skipped: Weights that lost inputs but were not fitted, and why.
    """

    layers: list[Refitted] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def refit(slim: nn.Module, dense: nn.Module, batches: Iterable[Any], *, norms: bool = True, rows: int = 16_384,
          seed: int = 0) -> Repair:  # fmt: skip
    """Repairs a cut model in place: fits the consumers of what was removed, and re-estimates batch norms.

    For each layer ``min_W |X W - Y|^2 + ridge * |W - W_0|^2``, where ``X`` are its inputs in the slim model, ``Y`` the
    dense model's outputs (kept channels) and ``W_0`` its weights. The ridge is chosen on half of the inputs, held out,
    and may be infinite: a layer that a fit cannot improve stays as it is. A batch norm's mean moves by the difference
    of the two models' means on the batches, its variance by their ratio: nothing changes where the two agree.

    Args:
        slim: What was cut from ``dense``; changed in place.
        dense: The model before the cut, on the same device.
        batches: Inputs (labels beside them are not looked at), a few hundred images or more. They run as one batch.
        norms: Whether batch norms are re-estimated.
        rows: How many rows (positions of images, tokens) a layer is fitted on at most, at random; a layer with many
            inputs takes four for each of them.
        seed: Of that choice.

    Returns:
        What was done, layer by layer.

    Raises:
        PruneGateError: The slim model was not cut, or not from this dense model, or no layer could be fitted.

    Example:
        >>> import torch, prunegate
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
        >>> slim = prunegate.one_shot(net, torch.randn(1, 16), flops=0.5)
        >>> layer = prunegate.refit(slim, net, [torch.randn(500, 16)]).layers[0]
        >>> layer.name, layer.after < 0.7 * layer.before
        ('2.weight', True)
    """
    kept = _matching(slim, dense)
    inputs = joined_inputs(batches, dense)
    modes = [(module, module.training) for model in (slim, dense) for module in model.modules()]
    try:
        slim.eval()
        dense.eval()
        with torch.no_grad():
            watch = _Watch(dense, kept, rows, seed)
            with watch:
                call_model(dense, inputs)
            fitter = _Fitter(slim, watch, norms)
            with fitter:
                call_model(slim, inputs)
    finally:
        for module, training in modes:
            module.training = training
    repair = fitter.repair
    wanted = [name for name, dims in kept.items() if 1 in dims and fitter.is_weight(name)]
    done = {layer.name for layer in repair.layers}
    for name in wanted:
        if name not in done:
            repair.skipped.setdefault(name, watch.skipped.get(name, "no linear map or convolution reads it"))
    if not repair.layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(repair.skipped.items())[:3])
        raise PruneGateError(f"no layer of {type(slim).__name__} could be fitted ({why or 'none lost inputs'})")
    return repair


def _matching(slim: nn.Module, dense: nn.Module) -> dict[str, Mapping[int, tuple[int, ...]]]:
    """What the slim model kept of each of the dense model's tensors."""
    plan, own = plan_of(slim), plan_of(dense)
    if not plan.kept:
        raise PruneGateError(f"{type(slim).__name__} was not cut: pass what export() returned")
    if own.kept:
        raise PruneGateError("the dense model was cut itself; pass the model before the first cut")
    shapes = {name: tuple(tensor.shape) for name, tensor, _ in named_tensors(dense)}
    for name, shape in plan.dense.items():
        if shapes.get(name) != tuple(shape):
            raise PruneGateError(
                f"the slim model was cut from one with {name!r} of shape {tuple(shape)}; the dense model given has it "
                f"in {shapes.get(name)}: pass the model that was cut"
            )
    return {name: dims for name, dims in plan.kept.items()}


@dataclass
class _Target:
    """What the dense model's layer computed: rows of outputs, at places that the slim model's are taken from too."""

    places: Tensor
    outputs: Tensor
    normed: bool = False


@dataclass
class _Statistics:
    """Mean and variance of a batch norm's inputs in the dense model."""

    mean: Tensor
    variance: Tensor


class _Linear:
    """A call of a linear map or a convolution, its inputs as rows of a matrix.

    Inputs are seen as the function sees them, so padding that a module does by itself is in them.
    """

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, args, strict=False)) | kwargs
        self.input: Tensor = given["input"]
        self.weight: Tensor = given["weight"]
        self.bias: Tensor | None = given.get("bias")
        self.spatial = _PATCHES.get(name, 0)
        self.groups: int = given.get("groups", 1) if self.spatial else 1
        if self.spatial:
            self.stride, self.dilation = self._each(given.get("stride", 1)), self._each(given.get("dilation", 1))
            padding = given.get("padding", 0)
            if padding == "same":
                total = [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
                self.padding = [(t // 2, t - t // 2) for t in total]
            else:
                self.padding = [(p, p) for p in self._each(0 if padding == "valid" else padding)]

    def _each(self, value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * self.spatial if len(values) == 1 else values

    def outputs(self, out: Tensor) -> Tensor:
        """The outputs as rows ``[rows, channels]``, image by image."""
        return out.movedim(1, -1).flatten(0, -2) if self.spatial else out.flatten(0, -2)

    def inputs(self, places: Tensor) -> Tensor:
        """The inputs of the given rows, ``[groups, rows, inputs of one output]``."""
        if not self.spatial:
            return self.input.flatten(0, -2)[places][None]
        padded = F.pad(self.input, [side for pair in reversed(self.padding) for side in pair])
        kernel = self.weight.shape[2:]
        patches = padded
        for dim, (size, step, dilation) in enumerate(zip(kernel, self.stride, self.dilation, strict=True), start=2):
            patches = patches.unfold(dim, dilation * (size - 1) + 1, step)[..., ::dilation]
        # A view of all patches, [batch, channels, *places, *kernel], of which only the wanted ones are read.
        sites = patches.shape[2 : 2 + self.spatial]
        index, rest = [], places
        for size in reversed(sites):
            index.append(rest % size)
            rest = rest // size
        taken = patches.movedim(1, self.spatial + 1)[(rest, *reversed(index))]  # [rows, channels, *kernel]
        return taken.unflatten(1, (self.groups, -1)).flatten(2).movedim(1, 0)

    def flat_weight(self) -> Tensor:
        """The weight as ``[groups, inputs, outputs]``."""
        return self.weight.detach().flatten(1).unflatten(0, (self.groups, -1)).transpose(1, 2)


_LINEAR = frozenset({"linear", *_PATCHES})


class _Watch(TorchFunctionMode):
    """Records what the dense model's layers compute."""

    def __init__(self, model: nn.Module, kept: Mapping[str, Mapping[int, tuple[int, ...]]], rows: int,
                 seed: int) -> None:  # fmt: skip
        super().__init__()
        self.kept = kept
        self.rows = rows
        self.generator = torch.Generator().manual_seed(seed)
        self.targets: dict[str, _Target] = {}
        self.statistics: dict[str, _Statistics] = {}
        self.skipped: dict[str, str] = {}
        self._names = {id(tensor): name for name, tensor, _ in named_tensors(model)}
        self._last: tuple[str, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        called = getattr(func, "__name__", "")
        if called in _LINEAR:
            self._on_linear(_Linear(called, args, kwargs), out)
        elif called == "batch_norm":
            self._on_norm(*_norm_arguments(func, args, kwargs))
        return out

    def _on_linear(self, call: _Linear, out: Tensor) -> None:
        name = self._names.get(id(call.weight))
        if name is None or 1 not in self.kept.get(name, {}):
            return
        if name in self.targets or name in self.skipped:
            self.targets.pop(name, None)
            self.skipped[name] = "it is used more than once"
            return
        values = call.outputs(out)
        wanted = max(self.rows, 4 * call.weight[0].numel())
        places = torch.randperm(len(values), generator=self.generator)[:wanted].sort().values.to(out.device)
        values = values[places]
        if 0 in self.kept[name]:
            values = values[:, torch.tensor(self.kept[name][0], device=out.device)]
        self.targets[name] = _Target(places, values)
        self._last = (name, out)

    def _on_norm(self, inputs: Tensor, mean_kept: Tensor | None, variance_kept: Tensor | None) -> None:
        if self._last is not None and inputs is self._last[1]:
            self.targets[self._last[0]].normed = True
        name = self._names.get(id(mean_kept))
        if name is None:
            return
        if name in self.statistics or name in self.skipped:
            self.statistics.pop(name, None)
            self.skipped[name] = "it is used more than once"
            return
        mean, variance = _moments(inputs)
        if 0 in self.kept.get(name, {}):
            index = torch.tensor(self.kept[name][0], device=mean.device)
            mean, variance = mean[index], variance[index]
        self.statistics[name] = _Statistics(mean, variance)


def _norm_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Input, running mean and running variance of a batch norm, by either of torch's two signatures."""
    names = ["input", "running_mean", "running_var"]
    if func is not F.batch_norm:
        names[1:1] = ["weight", "bias"]
    given = dict(zip(names, args, strict=False)) | kwargs
    return given["input"], given.get("running_mean"), given.get("running_var")


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel (dimension 1), float64."""
    dims = [dim for dim in range(x.dim()) if dim != 1]
    variance, mean = torch.var_mean(x.double(), dims, correction=0)
    return mean, variance


class _Fitter(TorchFunctionMode):
    """Fits each layer just before it runs, so that later ones see what the repaired one computes."""

    def __init__(self, model: nn.Module, watch: _Watch, norms: bool) -> None:
        super().__init__()
        self.repair = Repair()
        self._watch = watch
        self._norms = norms
        self._names = {id(tensor): name for name, tensor, _ in named_tensors(model)}
        self._weights = {name for name, tensor, own in named_tensors(model) if own and tensor.dim() > 1}

    def is_weight(self, name: str) -> bool:
        """Whether a name is that of a parameter with inputs."""
        return name in self._weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        called = getattr(func, "__name__", "")
        if called in _LINEAR:
            call = _Linear(called, args, kwargs)
            name = self._names.get(id(call.weight), "")
            if name in self._watch.targets:
                with torch._C.DisableTorchFunction():
                    self.repair.layers.append(_solve(name, call, self._watch.targets[name]))
        elif called == "batch_norm" and self._norms:
            inputs, mean, variance = _norm_arguments(func, args, kwargs)
            name = self._names.get(id(mean), "")
            if name in self._watch.statistics:
                with torch._C.DisableTorchFunction():
                    self._follow(name, inputs, mean, variance)
        return func(*args, **kwargs)

    def _follow(self, name: str, inputs: Tensor, mean: Tensor, variance: Tensor) -> None:
        there = self._watch.statistics[name]
        mean_here, variance_here = _moments(inputs)
        mean.add_((mean_here - there.mean).to(mean.dtype))
        ratio = torch.where(there.variance > 0, variance_here / there.variance, torch.ones_like(variance_here))
        variance.mul_(ratio.to(variance.dtype))
        self.repair.norms.append(name.rpartition(".")[0])


def _solve(name: str, call: _Linear, target: _Target) -> Refitted:
    """Solves for one layer's weights, and puts them in."""
    inputs = call.inputs(target.places).double()
    outputs = target.outputs.double().unflatten(1, (call.groups, -1)).movedim(1, 0)
    old = call.flat_weight().double()
    shifted = call.bias is not None or target.normed
    # Rows are in the order of the images: the halves share none but the one in the middle.
    halves = [slice(0, len(target.places) // 2), slice(len(target.places) // 2, None)]
    bias = None if call.bias is None else call.bias.detach().double().unflatten(0, (call.groups, -1))
    parts = [_Normal.of(inputs[:, half], outputs[:, half], shifted) for half in halves]
    whole = _Normal.of(inputs, outputs, shifted)
    scale = max(whole.spread, 1e-300)
    before = sum(part.error(old, None if target.normed else bias) for part in parts) / scale
    best, chosen = before * (1 - _LEAST_GAIN), float("inf")
    for ridge in _RIDGES:
        error = sum(b.error(*a.solve(old, ridge)) for a, b in (parts, parts[::-1])) / scale
        if error < best:
            best, chosen = error, ridge
        elif chosen != float("inf"):  # past the best: each further one would cost a factorisation
            break
    if chosen == float("inf"):
        return Refitted(name, before, before, chosen)
    weight, moved = whole.solve(old, chosen)
    call.weight.copy_(weight.transpose(1, 2).flatten(0, 1).view(call.weight.shape))
    if call.bias is not None and moved is not None:
        call.bias.copy_(moved.flatten())
    return Refitted(name, before, best, chosen)


@dataclass
class _Normal:
    """The normal equations of one part of the rows, for each group.

    Attributes:
        gram: ``[groups, inputs, inputs]``, of inputs less their mean where there is a shift.
        cross: ``[groups, inputs, outputs]``, likewise.
        spread: Sum of the outputs' squares about their mean.
        square: Sum of the squares of ``outputs`` (less their mean where there is a shift).
        mean_in: ``[groups, 1, inputs]``; 0 where there is no shift.
        mean_out: ``[groups, 1, outputs]``, likewise.
        rows: Number of rows.
        shifted: Whether a bias, or a batch norm's mean, takes any shift.
    """

    gram: Tensor
    cross: Tensor
    spread: float
    square: float
    mean_in: Tensor
    mean_out: Tensor
    rows: int
    shifted: bool

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor, shifted: bool) -> _Normal:
        """From rows ``[groups, rows, inputs]`` and ``[groups, rows, outputs]``."""
        spread = float((outputs - outputs.mean(1, keepdim=True)).square().sum())
        mean_in, mean_out = inputs.mean(1, keepdim=True), outputs.mean(1, keepdim=True)
        if not shifted:
            mean_in, mean_out = torch.zeros_like(mean_in), torch.zeros_like(mean_out)
        x, y = inputs - mean_in, outputs - mean_out
        gram, cross = x.transpose(1, 2) @ x, x.transpose(1, 2) @ y
        return cls(gram, cross, spread, float(y.square().sum()), mean_in, mean_out, inputs.shape[1], shifted)

    def solve(self, old: Tensor, ridge: float) -> tuple[Tensor, Tensor | None]:
        """Weights ``[groups, inputs, outputs]`` and the shift ``[groups, outputs]`` that goes with them."""
        size = self.gram.shape[-1]
        pull = ridge * self.gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
        eye = torch.eye(size, dtype=self.gram.dtype, device=self.gram.device)
        system = self.gram + pull[:, None, None] * eye
        factor = torch.linalg.cholesky_ex(system)[0]
        weight = old + torch.cholesky_solve(self.cross - self.gram @ old, factor)
        shift = (self.mean_out - self.mean_in @ weight).squeeze(1) if self.shifted else None
        return weight, shift

    def error(self, weight: Tensor, shift: Tensor | None) -> float:
        """Sum of squared errors of the rows; the best shift is taken where there is one but none is given."""
        fit = (weight * (self.gram @ weight - 2 * self.cross)).sum()
        value = self.square + float(fit)
        if self.shifted and shift is not None:
            value += self.rows * float((self.mean_out - self.mean_in @ weight - shift[:, None]).square().sum())
        return max(value, 0.0)
