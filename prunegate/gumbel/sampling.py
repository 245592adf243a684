"""The front door: two functions, one meaning on every backend."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from prunegate.gumbel import triton
from prunegate.gumbel.arguments import check_logits, make_offsets, make_options
from prunegate.gumbel.backends import choose
from prunegate.gumbel.philox import Philox

# Widened to float32 and narrowed again; the Triton kernels do so in registers.
_HALVES = (torch.float16, torch.bfloat16)


def gumbel_softmax(
    logits: Tensor,
    tau: float | Tensor = 1,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    *,
    tau_backward: float | Tensor | None = None,
    generator: torch.Generator | Philox | None = None,
    estimator: str = "st",
    rao_samples: int = 0,
    segments: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Samples from the Gumbel-softmax distribution; takes the place of ``torch.nn.functional.gumbel_softmax``.

    A hard sample is exactly one-hot, ties included, and its gradient is that of the relaxed sample. Half-precision
    logits are sampled in float32. A NaN logit makes its row NaN.

    Args:
        logits: Unnormalised log-probabilities, any shape and strides; -inf masks a category out.
        tau: Temperature, above 0; a number or a 0-dim tensor.
        hard: Whether to return one-hot rows instead of probabilities.
        eps: No effect, as in torch; another value than the default warns.
        dim: The dimension of the categories.
        tau_backward: Temperature of the relaxed sample that is differentiated; ``None`` means ``tau``. A low one
            costs gradient noise, a high one bias.
        generator: A ``torch.Generator`` of the logits' device, or a :class:`Philox`, whose (seed, step) give the
            same draw on every device and rank. ``None`` is torch's own default generator.
        estimator: ``"st"``, straight-through, or ``"reinmax"`` (arXiv 2304.08612; of second order, and blind to
            ``tau``; its own temperature is ``tau_backward``, 1 by default).
        rao_samples: Conditional draws to average the straight-through gradient over (arXiv 2010.04838); 0 uses
            the draw itself.
        segments: Offsets ``[rows + 1]`` that cut flat logits into rows of different lengths, each sampled by itself.
        backend: ``"auto"``, or a name that :func:`backends` lists. Kernels give way to torch's own operations, also
            where named, when a compiler or transform looks on, in float64, and for estimators that they do not have.

    Returns:
        The sample, with the shape and dtype of ``logits``.

    Raises:
        SamplerError: If an argument is out of range or does not go with the others, or (in eager code on the CPU)
            a row has no possible category.

    Example:
        >>> sample = gumbel_softmax(torch.zeros(3, 5), hard=True)
        >>> sample.sum(-1)
        tensor([1., 1., 1.])
    """
    if eps != 1e-10:
        warnings.warn("`eps` has no effect; it is there for the sake of torch's signature.", stacklevel=2)
    check_logits(logits, dim)
    options = make_options(tau, tau_backward, hard, estimator, rao_samples)
    offsets = None if segments is None else make_offsets(segments, logits)
    module = choose(backend, logits, options, False)
    if logits.numel() == 0:
        return logits.clone()
    last = dim in (-1, logits.dim() - 1)
    rows = logits.reshape(1) if logits.dim() == 0 else logits if last else logits.movedim(dim, -1)
    if logits.dtype in _HALVES and module is not triton:
        sample = module.sample_softmax(rows.float(), options, offsets, generator).to(logits.dtype)
    else:
        sample = module.sample_softmax(rows, options, offsets, generator)
    if logits.dim() == 0:
        return sample.reshape(())
    return sample if last else sample.movedim(-1, dim).contiguous()


def gumbel_sigmoid(
    logits: Tensor,
    tau: float | Tensor = 1,
    hard: bool = False,
    *,
    tau_backward: float | Tensor | None = None,
    generator: torch.Generator | Philox | None = None,
    estimator: str = "st",
    rao_samples: int = 0,
    segments: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Samples one binary gate a logit: the two-way case of :func:`gumbel_softmax` on logits (l, 0).

    A hard gate is 1 where l + logistic noise > 0, which has probability sigmoid(l); its gradient is that of
    sigmoid((l + noise) / tau). A NaN logit gives a NaN gate.

    Args:
        logits: Log-odds of the gates, any shape and strides.
        tau: Temperature, above 0; a number or a 0-dim tensor.
        hard: Whether to return zeros and ones instead of numbers between.
        tau_backward: Temperature of the relaxed sample that is differentiated; ``None`` means ``tau``.
        generator: As in :func:`gumbel_softmax`.
        estimator: ``"st"`` or ``"reinmax"``, which here closes to g * (z ? (1 - p) / 2 : p / 2).
        rao_samples: Conditional draws to average the straight-through gradient over; 0 uses the draw itself.
        segments: Accepted and checked, so that both functions take the same rows; gates are independent, and the
            draw is the same with it and without.
        backend: ``"auto"``, or a name that :func:`backends` lists.

    Returns:
        The gates, with the shape and dtype of ``logits``.

    Raises:
        SamplerError: If an argument is out of range or does not go with the others.

    Example:
        >>> gumbel_sigmoid(torch.tensor([-1e4, 1e4]), hard=True)
        tensor([0., 1.])
    """
    check_logits(logits, 0)
    options = make_options(tau, tau_backward, hard, estimator, rao_samples)
    if segments is not None:
        make_offsets(segments, logits)
    module = choose(backend, logits, options, True)
    if logits.numel() == 0:
        return logits.clone()
    if logits.dtype in _HALVES and module is not triton:
        return module.sample_sigmoid(logits.float(), options, generator).to(logits.dtype)
    return module.sample_sigmoid(logits, options, generator)
