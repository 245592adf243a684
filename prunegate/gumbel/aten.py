"""The samplers in torch's own operations: no compiler needed, and everything that torch can do works on them.

Two forms. Where a compiler or a transform looks on, and for the estimators that need it, the oracle's own formulas
on cheaper noise: a compiler fuses them. In plain eager code, a function that makes few passes over memory, works in
place, and keeps one tensor for backward. Costs named below are for one core with AVX-512.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from prunegate.gumbel import reference
from prunegate.gumbel.arguments import Options, impossible_rows, is_plain_eager, refuse_impossible_rows
from prunegate.gumbel.philox import Philox

# Rows of up to this many categories are sampled transposed: reductions along a short last dimension are slow.
SHORT_ROW = 16


def _uniform(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    # torch.rand can give 0, never 1. An eighth of an epsilon lifts 0 off the floor and is rounded away near 1.
    uniform = torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)
    return uniform + torch.finfo(like.dtype).eps / 8


def gumbel_noise(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise of the shape of ``logits``; ``exponential_`` would cost seven times ``rand``."""
    return -torch.log(-torch.log(_uniform(logits.shape, logits, generator)))


def logistic_noise(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard logistic noise of the shape of ``logits``."""
    uniform = _uniform(logits.shape, logits, generator)
    return torch.log(uniform / (1 - uniform))


def sample_softmax(
    logits: Tensor,
    options: Options,
    dim: int,
    offsets: Tensor | None,
    generator: torch.Generator | Philox | None,
) -> Tensor:
    """Draws noise and samples along ``dim``, or in each of the rows that ``offsets`` mark in flat logits."""
    own_noise = not isinstance(generator, Philox)
    if own_noise and offsets is None and logits.dim() and logits.numel() and _is_fast(logits, options):
        return _HardSoftmax.apply(logits, options.surrogate_tau, dim, generator)[0]
    refuse_impossible_rows(logits, dim, offsets)
    if isinstance(generator, Philox):
        state = generator.take()
        noises = [reference.philox_gumbel(state, logits, dim, offsets, k) for k in range(1 + options.rao_samples)]
    else:
        noises = [gumbel_noise(logits, generator) for _ in range(1 + options.rao_samples)]
    if offsets is None:
        return reference.softmax(logits, noises[0], options, dim, noises[1:])
    return _ragged_softmax(logits, noises, options, offsets)


def sample_sigmoid(logits: Tensor, options: Options, generator: torch.Generator | Philox | None) -> Tensor:
    """Draws noise and samples one gate a logit."""
    if not isinstance(generator, Philox):
        if _is_fast(logits, options):
            return _HardSigmoid.apply(logits, options.surrogate_tau, generator)[0]
        noises = [logistic_noise(logits, generator) for _ in range(1 + options.rao_samples)]
    else:
        state = generator.take()
        noises = [reference.philox_logistic(state, logits, k) for k in range(1 + options.rao_samples)]
    return reference.sigmoid(logits, noises[0], options, noises[1:])


def _is_fast(logits: Tensor, options: Options) -> bool:
    tau = options.surrogate_tau
    return (
        options.hard
        and options.plain
        and not (isinstance(tau, Tensor) and tau.requires_grad)
        and is_plain_eager(logits)
        and not logits.is_meta
    )


class _HardSigmoid(Function):
    """Hard gates, and the relaxed ones as a second output: saved as an output, they carry second derivatives."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tau: float | Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        scores = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device, generator=generator)
        scores.add_(torch.finfo(logits.dtype).eps / 8)
        scores.div_(1 - scores).log_().add_(logits)
        hard = torch.gt(scores, 0, out=torch.empty_like(scores))
        # A NaN is not greater than 0, but it must not pass for a closed gate.
        if scores.device.type != "cpu":
            hard = torch.where(scores.isnan(), scores, hard)
        elif not math.isfinite(float(scores.sum())):
            hard[scores.isnan()] = math.nan
        soft = (scores if _is_one(tau) else scores.div_(tau)).sigmoid_()
        ctx.save_for_backward(soft)
        ctx.tau = tau
        ctx.set_materialize_grads(False)
        return hard, soft

    @staticmethod
    def backward(ctx: Any, to_hard: Tensor | None, to_soft: Tensor | None) -> tuple[Tensor | None, None, None]:
        gradient = _total(to_hard, to_soft)
        if gradient is None:
            return None, None, None
        (soft,) = ctx.saved_tensors
        inner = torch.ops.aten.sigmoid_backward(gradient, soft)
        return inner if _is_one(ctx.tau) else inner / ctx.tau, None, None


class _HardSoftmax(Function):
    """One-hot rows, and the relaxed ones as a second output: saved as an output, they carry second derivatives."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tau: float | Tensor, dim: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        short = logits.shape[dim] <= SHORT_ROW
        rows, along = (logits.movedim(dim, 0), 0) if short else (logits, dim)
        scores = torch.rand(rows.shape, dtype=logits.dtype, device=logits.device, generator=generator)
        scores.add_(torch.finfo(logits.dtype).eps / 8).log_().neg_().log_()
        torch.sub(rows, scores, out=scores)
        best = scores.amax(along, keepdim=True)
        if scores.device.type == "cpu":
            hard = torch.ge(scores, best, out=torch.empty_like(scores))
            # Comparing is ten times faster than argmax, and wrong only where the best is shared or not finite.
            if float(hard.sum()) != best.numel() or not math.isfinite(float(best.sum())):
                hard = _exactly_one(scores, best, along)
        else:
            hard = torch.zeros_like(scores).scatter_(along, scores.argmax(along, keepdim=True), 1.0)
            hard = torch.where(best.isfinite(), hard, math.nan)
        if not _is_one(tau):
            scores.div_(tau)
        soft = torch.softmax(scores, along)
        if short:
            hard, soft = hard.movedim(0, dim).contiguous(), soft.movedim(0, dim)
        ctx.save_for_backward(soft)
        ctx.tau, ctx.dim = tau, dim
        ctx.set_materialize_grads(False)
        return hard, soft

    @staticmethod
    def backward(ctx: Any, to_hard: Tensor | None, to_soft: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        gradient = _total(to_hard, to_soft)
        if gradient is None:
            return None, None, None, None
        (soft,) = ctx.saved_tensors
        if soft.shape[ctx.dim] <= SHORT_ROW:
            moved = soft.movedim(ctx.dim, 0)
            inner = _softmax_backward(gradient.movedim(ctx.dim, 0).contiguous(), moved, 0).movedim(0, ctx.dim)
        else:
            inner = _softmax_backward(gradient, soft, ctx.dim)
        return inner if _is_one(ctx.tau) else inner / ctx.tau, None, None, None


def _softmax_backward(gradient: Tensor, soft: Tensor, dim: int) -> Tensor:
    return torch.ops.aten._softmax_backward_data(gradient, soft, dim, soft.dtype)


def _is_one(tau: float | Tensor) -> bool:
    return not isinstance(tau, Tensor) and tau == 1


def _total(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _exactly_one(scores: Tensor, best: Tensor, dim: int) -> Tensor:
    """One-hot rows where the best score is shared (the first has it), infinite or NaN (the row is NaN, as in torch)."""
    impossible = int(best.isneginf().sum())
    if impossible:
        raise impossible_rows(impossible, best.numel())
    hard = torch.zeros_like(scores).scatter_(dim, scores.argmax(dim, keepdim=True), 1.0)
    return torch.where(best.isfinite(), hard, math.nan)


def _ragged_softmax(logits: Tensor, noises: list[Tensor], options: Options, offsets: Tensor) -> Tensor:
    """Rows of different lengths in one flat tensor, all at once: padded with -inf to one rectangle and back."""
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    if logits.numel() == 0 or longest == 0:
        return logits + 0
    place = torch.arange(longest, device=logits.device)
    inside = place < lengths.unsqueeze(1)
    source = (offsets[:-1].unsqueeze(1) + place).clamp_(max=logits.numel() - 1)
    # Empty rows are left with one possible category, which nothing reads, so that no NaN comes of them.
    outside = torch.where(inside | ((lengths == 0).unsqueeze(1) & (place == 0)), 0.0, -math.inf).to(logits.dtype)
    padded = torch.where(inside, logits[source], outside)
    extra = [torch.where(inside, noise[source], 0.0) for noise in noises]
    return reference.softmax(padded, extra[0], options, 1, extra[1:])[inside]
