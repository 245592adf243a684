"""Repair without training: what consumed removed units is fitted again to what the dense model computed.

Every linear map that lost inputs is solved for once, in closed form, in the order of the forward: its inputs are those
of the slim model with all earlier layers repaired, its targets the dense model's outputs (He et al., arXiv 1707.06168,
section 3.1; Luo et al., arXiv 1707.06342). Batch norms that follow get new statistics. No labels are used.

Inputs come in chunks. Where one chunk holds them all, each layer is solved for just before it runs, in a single pass;
otherwise a layer takes a pass of its own, in which its normal equations are summed, chunk by chunk: memory is that of
one chunk, whatever the number of inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from prunegate.batches import Chunks
from prunegate.errors import PruneGateError
from prunegate.labels.trace import call_model, describe_inputs
from prunegate.least_squares import LINEAR, LinearCall, Moments, Normal
from prunegate.slim.apply import plan_of
from prunegate.tensors import named_tensors

__all__ = ["Refitted", "Repair", "refit"]

_RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-5, 1e-9)  # from strong to weak
_LEAST_GAIN = 1e-3  # relative; weights stay as they are where less can be had

Kept = Mapping[str, Mapping[int, tuple[int, ...]]]


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
          at_once: int = 256, seed: int = 0) -> Repair:  # fmt: skip
    """Repairs a cut model in place: fits the consumers of what was removed, and re-estimates batch norms.

    For each layer ``min_W |X W - Y|^2 + ridge * |W - W_0|^2``, where ``X`` are its inputs in the slim model, ``Y`` the
    dense model's outputs (kept channels) and ``W_0`` its weights. The ridge is chosen on half of the inputs, held out,
    and may be infinite: a layer that a fit cannot improve stays as it is. A batch norm's mean moves by the difference
    of the two models' means on the batches, its variance by their ratio: nothing changes where the two agree.

    Args:
        slim: What was cut from ``dense``; changed in place.
        dense: The model before the cut, on the same device.
        batches: Inputs (labels beside them are not looked at), a few hundred images or more: a list, a loader, or
            anything else that can be iterated over again. An iterator is kept as a list.
        norms: Whether batch norms are re-estimated.
        rows: How many rows (positions of images, tokens) a layer is fitted on at most, at random; a layer with many
            inputs takes four for each of them.
        at_once: How many images run together at most (a larger batch is not divided). Up to this many in all, one pass
            over the layers does; with more, memory stays what it is, and each layer and batch norm takes a pass.
        seed: Of the choice of rows.

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
    chunks = Chunks(batches, dense, at_once)
    number = sum(1 for _ in chunks)
    if not number:
        raise PruneGateError("batches= is empty; expected an iterable with at least one batch of inputs")
    repair = Repair()
    rule = _Rule(kept, rows, number, norms, torch.Generator().manual_seed(seed))
    with torch.no_grad(), _evaluated(slim, dense):
        dense_side = _Dense(dense, rule)
        _run(dense, next(iter(chunks)), dense_side)
        jobs = {name: dense_side.job(name) for name in dense_side.found}
        if number == 1:

            def repair_now(name: str, call: Any) -> None:
                jobs[name].add(dense_side.found[name], call)
                jobs[name].settle(repair)

            _run(slim, next(iter(chunks)), _Slim(slim, jobs, repair_now))
        else:
            for name, job in jobs.items():
                for inputs in chunks:
                    _sum_up(job, name, slim, dense, inputs, dense_side)
                job.settle(repair)
    weights = {name for name, tensor, own in named_tensors(slim) if own and tensor.dim() > 1}
    done = {layer.name for layer in repair.layers}
    for name, dims in kept.items():
        if 1 in dims and name in weights and name not in done:
            repair.skipped[name] = dense_side.skipped.get(name, "no linear map or convolution reads it")
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


@contextlib.contextmanager
def _evaluated(*models: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Reached(BaseException):
    """The call that a pass is about has run: what follows it does not matter. No error, so none catches it."""


def _run(model: nn.Module, inputs: Any, mode: TorchFunctionMode) -> None:
    try:
        with mode:
            call_model(model, inputs)
    except _Reached:
        return
    except RuntimeError as error:
        raise PruneGateError(
            f"{type(model).__name__} cannot run on a batch of {describe_inputs(inputs)}: {error}"
        ) from error


def _sum_up(job: _Fit | _Follow, name: str, slim: nn.Module, dense: nn.Module, inputs: Any, side: _Dense) -> None:
    """Adds one chunk to a job: both models run up to its call and no further."""
    side.only = name
    side.found.clear()
    _run(dense, inputs, side)

    def add(_: str, call: Any) -> None:
        job.add(side.found[name], call)
        raise _Reached

    if name in side.found:
        _run(slim, inputs, _Slim(slim, (name,), add))


@dataclass(frozen=True)
class _Rule:
    """What is fitted, and on how much."""

    kept: Kept
    rows: int
    chunks: int
    norms: bool
    generator: torch.Generator


@dataclass
class _Target:
    """What the dense model's layer computed: rows of outputs, at places that the slim model's are taken from too."""

    places: Tensor
    outputs: Tensor


class _Dense(TorchFunctionMode):
    """Takes from the dense model what its layers compute.

    Attributes:
        only: The one name to look for; then the run ends there. ``None`` finds all, in the order of the forward.
        found: Targets of linear maps by the names of their weights, moments of batch norms' inputs by those of their
            running means.
        skipped: Names that cannot be fitted, and why.
    """

    def __init__(self, model: nn.Module, rule: _Rule) -> None:
        super().__init__()
        self.only: str | None = None
        self.found: dict[str, _Target | Moments] = {}
        self.skipped: dict[str, str] = {}
        self._rule = rule
        self._normed: set[str] = set()
        self._names = {id(tensor): name for name, tensor, _ in named_tensors(model)}
        self._last: tuple[str, Tensor] | None = None

    def job(self, name: str) -> _Fit | _Follow:
        """What sums up a name's chunks."""
        if isinstance(self.found.get(name), Moments):
            return _Follow(name)
        return _Fit(name, name in self._normed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        called = getattr(func, "__name__", "")
        if called in LINEAR:
            self._on_linear(LinearCall(called, args, kwargs), out)
        elif called == "batch_norm" and self._rule.norms:
            self._on_norm(*_norm_arguments(func, args, kwargs)[:2])
        return out

    def _wants(self, name: str | None) -> bool:
        if name is None or (self.only is not None and name != self.only):
            return False
        if name in self.found or name in self.skipped:
            self.found.pop(name, None)
            self.skipped[name] = "it is used more than once"
            return False
        return True

    def _keep(self, name: str, what: _Target | Moments) -> None:
        self.found[name] = what
        if self.only is not None:
            raise _Reached

    def _on_linear(self, call: LinearCall, out: Tensor) -> None:
        name = self._names.get(id(call.weight))
        dims = self._rule.kept.get(name or "", {})
        if 1 not in dims or not self._wants(name):
            return
        assert name is not None
        self._last = (name, out)
        values = call.outputs(out)
        wanted = max(self._rule.rows, 4 * call.weight[0].numel())
        share = -(-wanted // self._rule.chunks)
        places = torch.randperm(len(values), generator=self._rule.generator)[:share].sort().values.to(out.device)
        values = values[places]
        self._keep(name, _Target(places, values[:, _index(dims[0], out)] if 0 in dims else values))

    def _on_norm(self, inputs: Tensor, mean_kept: Tensor | None) -> None:
        if self._last is not None and inputs is self._last[1]:
            self._normed.add(self._last[0])
        name = self._names.get(id(mean_kept))
        if self._wants(name):
            assert name is not None
            moments, dims = Moments.of(inputs), self._rule.kept.get(name, {})
            self._keep(name, moments[_index(dims[0], inputs)] if 0 in dims else moments)


def _index(kept: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(kept, device=like.device)


def _norm_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Input, running mean and running variance of a batch norm, by either of torch's two signatures."""
    names = ["input", "running_mean", "running_var"]
    if func is not F.batch_norm:
        names[1:1] = ["weight", "bias"]
    given = dict(zip(names, args, strict=False)) | kwargs
    return given["input"], given.get("running_mean"), given.get("running_var")


class _Slim(TorchFunctionMode):
    """Shows the slim model's calls of some names to a function, just before each runs."""

    def __init__(self, model: nn.Module, names: Iterable[str], show: Callable[[str, Any], None]) -> None:
        super().__init__()
        self._wanted = set(names)
        self._show = show
        self._names = {id(tensor): name for name, tensor, _ in named_tensors(model)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        called = getattr(func, "__name__", "")
        call: Any = None
        if called in LINEAR:
            call = LinearCall(called, args, kwargs)
            name = self._names.get(id(call.weight))
        elif called == "batch_norm":
            call = _norm_arguments(func, args, kwargs)
            name = self._names.get(id(call[1]))
        if call is not None and name in self._wanted:
            with torch._C.DisableTorchFunction():
                self._show(name, call)
        return func(*args, **kwargs)


class _Follow:
    """A batch norm whose statistics move as those of its inputs moved."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._there: Moments | None = None
        self._here: Moments | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None

    def add(self, target: Any, call: tuple[Tensor, Tensor, Tensor]) -> None:
        """Sums up one chunk, given the moments in the dense model."""
        here = Moments.of(call[0])
        self._there = target if self._there is None else self._there + target
        self._here = here if self._here is None else self._here + here
        self._buffers = call[1:]

    def settle(self, repair: Repair) -> None:
        """Moves the statistics."""
        if self._buffers is None or self._there is None or self._here is None:
            return
        mean, variance = self._buffers
        mean.add_((self._here.mean - self._there.mean).to(mean.dtype))
        there, here = self._there.variance, self._here.variance
        variance.mul_(torch.where(there > 0, here / there, torch.ones_like(here)).to(variance.dtype))
        repair.norms.append(self._name.rpartition(".")[0])


class _Fit:
    """The weights of one layer, from normal equations of two halves of the rows."""

    def __init__(self, name: str, normed: bool) -> None:
        self._name = name
        self._normed = normed
        self._parts: list[Normal | None] = [None, None]
        self._call: LinearCall | None = None

    def add(self, target: Any, call: LinearCall) -> None:
        """Sums up one chunk, given what the dense model's layer computed."""
        inputs = call.inputs(target.places).double()
        outputs = target.outputs.double().unflatten(1, (call.groups, -1)).movedim(1, 0)
        shifted = call.bias is not None or self._normed
        # Rows are in the order of the images: the halves share none but the one in the middle.
        middle = len(target.places) // 2
        for side, half in enumerate((slice(0, middle), slice(middle, None))):
            if inputs[:, half].numel():
                part, before = Normal.of(inputs[:, half], outputs[:, half], shifted), self._parts[side]
                self._parts[side] = part if before is None else before + part
        self._call = call

    def settle(self, repair: Repair) -> None:
        """Solves for the weights, and puts them in where they do better on the half that they were not fitted on."""
        parts, call = [part for part in self._parts if part is not None], self._call
        if call is None or len(parts) < 2:
            return
        old, whole = call.flat_weight().double(), parts[0] + parts[1]
        bias = None if call.bias is None else call.bias.detach().double().unflatten(0, (call.groups, -1))
        scale = max(whole.spread, 1e-300)
        before = sum(part.error(old, None if self._normed else bias) for part in parts) / scale
        best, chosen = before * (1 - _LEAST_GAIN), float("inf")
        for ridge in _RIDGES:
            error = sum(b.error(*a.solve(old, ridge)) for a, b in (parts, parts[::-1])) / scale
            if error < best:
                best, chosen = error, ridge
            elif chosen != float("inf"):  # past the best: each further one would cost a factorisation
                break
        if chosen == float("inf"):
            repair.layers.append(Refitted(self._name, before, before, chosen))
            return
        weight, moved = whole.solve(old, chosen)
        call.weight.copy_(weight.transpose(1, 2).flatten(0, 1).view(call.weight.shape))
        if call.bias is not None and moved is not None:
            call.bias.copy_(moved.flatten())
        repair.layers.append(Refitted(self._name, before, best, chosen))
