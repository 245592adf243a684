"""What a caller asked of a sampler, checked once and handed to every backend in the same form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from prunegate.errors import SamplerError

ESTIMATORS = ("st", "reinmax")


class Options(NamedTuple):
    """How to sample: temperatures, hardness and the gradient's estimator.

    Attributes:
        tau: Temperature of the sample, a number above 0 or a 0-dim tensor.
        tau_backward: Temperature of the sample whose gradient is used; ``None`` means ``tau``.
        hard: Whether values are exact zeros and ones.
        estimator: ``"st"`` or ``"reinmax"``.
        rao_samples: Conditional draws that the gradient averages over; 0 uses the draw itself.
    """

    tau: float | Tensor
    tau_backward: float | Tensor | None
    hard: bool
    estimator: str
    rao_samples: int

    @property
    def surrogate_tau(self) -> float | Tensor:
        """Temperature of the relaxed sample that is differentiated."""
        return self.tau if self.tau_backward is None else self.tau_backward

    @property
    def plain(self) -> bool:
        """Whether the gradient is that of one relaxed sample with the draw's own noise."""
        return self.estimator == "st" and self.rao_samples == 0


def estimator_tau(options: Options) -> float | Tensor:
    """Temperature that the gradient's estimator works at.

    For ReinMax the draw's own temperature means nothing to hard values; the paper's is 1 unless asked for.
    """
    if options.estimator == "reinmax":
        return 1.0 if options.tau_backward is None else options.tau_backward
    return options.surrogate_tau


def is_plain_eager(logits: Tensor) -> bool:
    """Whether ``logits`` is an ordinary tensor in ordinary eager code.

    Compilers, function transforms, tracers and tensor subclasses must see plain torch operations, which they can
    differentiate, batch and fuse; only what is left may read data, branch on it or call foreign kernels.
    """
    return not (
        torch.compiler.is_compiling()
        or type(logits) not in (Tensor, torch.nn.Parameter)
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def check_logits(logits: Tensor, dim: int) -> None:
    """Refuses logits that no sampler can take.

    Raises:
        SamplerError: If ``logits`` is not floating point, or has no dimension ``dim``.
    """
    if not isinstance(logits, Tensor):
        raise SamplerError(f"logits must be a tensor of floating-point numbers, but a {type(logits).__name__} came.")
    if not logits.is_floating_point():
        raise SamplerError(f"logits must be floating point, but their dtype is {logits.dtype}; call .float() on them.")
    dims = max(logits.dim(), 1)
    if not -dims <= dim < dims:
        raise SamplerError(f"dim must be from {-dims} to {dims - 1} for logits of shape {[*logits.shape]}, not {dim}.")


def make_options(
    tau: float | Tensor, tau_backward: float | Tensor | None, hard: bool, estimator: str, rao_samples: int
) -> Options:
    """Checks the arguments that say how to sample.

    Raises:
        SamplerError: If one of them is out of range, or they do not go together.
    """
    if isinstance(tau, Tensor):
        tau = _temperature("tau", tau)
    if isinstance(tau_backward, Tensor):
        tau_backward = _temperature("tau_backward", tau_backward)
    if isinstance(tau, Tensor) or isinstance(tau_backward, Tensor) or torch.compiler.is_compiling():
        return _checked(tau, tau_backward, hard, estimator, rao_samples)
    return _remembered(tau, tau_backward, hard, estimator, rao_samples)


def _checked(
    tau: float | Tensor, tau_backward: float | Tensor | None, hard: bool, estimator: str, rao_samples: int
) -> Options:
    if estimator not in ESTIMATORS:
        raise SamplerError(f"estimator must be one of {', '.join(ESTIMATORS)}, not {estimator!r}.")
    if rao_samples < 0:
        raise SamplerError(f"rao_samples must be 0 or more, not {rao_samples}.")
    if not hard and (rao_samples or estimator != "st"):
        raise SamplerError("rao_samples and reinmax estimate the gradient of hard samples: pass hard=True.")
    if rao_samples and estimator != "st":
        raise SamplerError("rao_samples goes with estimator='st' only; reinmax draws nothing more.")
    return Options(
        _temperature("tau", tau),
        None if tau_backward is None else _temperature("tau_backward", tau_backward),
        hard,
        estimator,
        rao_samples,
    )


def _temperature(name: str, tau: float | Tensor) -> float | Tensor:
    if isinstance(tau, Tensor):
        if tau.numel() != 1:
            raise SamplerError(f"{name} must be one number, but a tensor of shape {list(tau.shape)} came.")
        tau = tau.reshape(())
        # Reading a value is free on the CPU only, and never while compiling or where tau is learned.
        if tau.device.type != "cpu" or tau.requires_grad or not is_plain_eager(tau):
            return tau
        tau = float(tau)
    if not 0 < tau < math.inf:
        raise SamplerError(f"{name} must be a finite number above 0, not {tau}.")
    return tau


# For plain numbers; looking the answer up costs a fifth of checking again at every step.
_remembered = lru_cache(maxsize=256)(_checked)


def make_offsets(segments: Tensor | Sequence[int], logits: Tensor) -> Tensor:
    """Brings ``segments`` into the form that backends take: int64 offsets on the device of ``logits``.

    Args:
        segments: Offsets ``[rows + 1]``, rising from 0 to the length of ``logits``; row ``r`` is
            ``logits[segments[r]:segments[r + 1]]``.
        logits: The flat vector of all rows.

    Returns:
        Offsets, int64 ``[rows + 1]``.

    Raises:
        SamplerError: If ``logits`` is not flat or the offsets do not cover it. Offsets that live on an accelerator
            are trusted, because looking at them would make the host wait.
    """
    if logits.dim() != 1:
        raise SamplerError(f"segments= goes with flat logits, but their shape is {list(logits.shape)}.")
    offsets = torch.as_tensor(segments)
    if offsets.dim() != 1 or offsets.numel() == 0 or offsets.is_floating_point() or offsets.is_complex():
        raise SamplerError(
            f"segments must be a flat sequence of integer offsets, one more than there are rows; "
            f"{offsets.dtype} of shape {list(offsets.shape)} came."
        )
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        first, last, steps = int(offsets[0]), int(offsets[-1]), offsets.diff()
        if first != 0 or last != logits.numel() or bool((steps < 0).any()):
            raise SamplerError(
                f"segments must rise from 0 to the {logits.numel()} logits, but go from {first} to {last}"
                f"{' and fall on the way' if bool((steps < 0).any()) else ''}."
            )
    return offsets.to(device=logits.device, dtype=torch.int64)


def refuse_impossible_rows(rows: Tensor, offsets: Tensor | None) -> None:
    """Refuses rows in which every category is masked out by minus infinity.

    Only eager code on the CPU is checked: elsewhere a look at the values would make the host wait or break a graph,
    and such a row comes out as NaN, as it does from ``torch.softmax``.

    Raises:
        SamplerError: If a row has categories, and all of their logits are minus infinity.
    """
    if rows.numel() == 0 or rows.device.type != "cpu" or not is_plain_eager(rows):
        return
    with torch.no_grad():
        if offsets is None:
            best = rows.amax(-1)
        else:
            lengths = offsets.diff()
            best = torch.segment_reduce(rows.detach().contiguous(), "max", lengths=lengths[lengths > 0])
        bad = int(best.isneginf().sum())
    if bad:
        raise impossible_rows(bad, best.numel())


def impossible_rows(bad: int, rows: int) -> SamplerError:
    """The error that says how many of the rows have no category to choose."""
    return SamplerError(
        f"{bad} of {rows} rows have no possible category: all their logits are -inf. "
        "Leave at least one category of each row finite."
    )
