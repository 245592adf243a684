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

# Elements that one thread works on at a time, small enough that a pass finds what the last one left in the cache.
SLAB = 1 << 17


def _uniform(shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers strictly between 0 and 1."""
    kind = like.dtype
    if kind == torch.float32 and like.device.type == "cpu" and is_plain_eager(like):
        # Two numbers to each 64-bit integer: 1.9 ns a number with its conversion, where torch.rand takes 2.8.
        count = math.prod(shape)
        bits = torch.empty((count + 1) // 2, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        uniform = torch.empty(shape).copy_(bits.view(torch.int32)[:count].view(shape))
        # The factor is short of 2**-32 by what keeps the ends, 2**-24 and 1 - 2**-24, inside.
        return torch.add(0.5, uniform, alpha=2.0**-32 * (1 - 2.0**-23), out=uniform)
    # torch.rand can give 0, never 1. An eighth of an epsilon lifts 0 off the floor and is rounded away near 1.
    return torch.rand(shape, dtype=kind, device=like.device, generator=generator) + torch.finfo(kind).eps / 8


def gumbel_noise(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise of the shape of ``logits``; ``exponential_`` would cost seven times the uniform numbers."""
    return -torch.log(-torch.log(_uniform(logits.shape, logits, generator)))


def logistic_noise(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard logistic noise of the shape of ``logits``."""
    return torch.logit(_uniform(logits.shape, logits, generator))


def sample_softmax(
    rows: Tensor, options: Options, offsets: Tensor | None, generator: torch.Generator | Philox | None
) -> Tensor:
    """Draws noise and samples along the last dimension, or in each of the rows that ``offsets`` mark in flat logits."""
    own_noise = not isinstance(generator, Philox)
    if own_noise and offsets is None and rows.numel() and _is_fast(rows, options):
        hard = _HardSoftmax.apply(rows.reshape(-1, rows.shape[-1]), options.surrogate_tau, generator)[0]
        return hard.reshape(rows.shape)
    refuse_impossible_rows(rows, offsets)
    if isinstance(generator, Philox):
        state = generator.take()
        noises = [reference.philox_gumbel(state, rows, -1, offsets, k) for k in range(1 + options.rao_samples)]
    else:
        noises = [gumbel_noise(rows, generator) for _ in range(1 + options.rao_samples)]
    if offsets is None:
        return reference.softmax(rows, noises[0], options, -1, noises[1:])
    return _ragged_softmax(rows, noises, options, offsets)


def sample_sigmoid(logits: Tensor, options: Options, generator: torch.Generator | Philox | None) -> Tensor:
    """Draws noise and samples one gate a logit."""
    if isinstance(generator, Philox):
        return reference.sample_sigmoid(logits, options, generator)
    if _is_fast(logits, options):
        return _HardSigmoid.apply(logits, options.surrogate_tau, generator)[0]
    noises = [logistic_noise(logits, generator) for _ in range(1 + options.rao_samples)]
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
        scores = _uniform(logits.shape, logits, generator).logit_().add_(logits)
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
    """One-hot rows of a matrix, and the relaxed ones as a second output: saved so, they carry second derivatives."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tau: float | Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        rows, columns = logits.shape
        hard = logits.new_empty(rows, columns)
        # Where each row is short, its numbers lie a stride apart here, so that reductions run along the rows' length.
        short = columns <= SHORT_ROW
        soft = logits.new_empty(columns, rows).T if short else torch.empty_like(hard)
        step = rows
        if logits.device.type == "cpu":
            step = max(1, SLAB * torch.get_num_threads() // columns)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            if short:
                _sample_slab(logits[part].T, 0, tau, generator, hard[part].T, soft[part].T)
            else:
                _sample_slab(logits[part], 1, tau, generator, hard[part], soft[part])
        ctx.save_for_backward(soft)
        ctx.tau, ctx.short = tau, short
        ctx.set_materialize_grads(False)
        return hard, soft

    @staticmethod
    def backward(ctx: Any, to_hard: Tensor | None, to_soft: Tensor | None) -> tuple[Tensor | None, None, None]:
        gradient = _total(to_hard, to_soft)
        if gradient is None:
            return None, None, None
        (soft,) = ctx.saved_tensors
        if ctx.short:
            inner = _softmax_backward(gradient.T.contiguous(), soft.T, 0).T
        else:
            inner = _softmax_backward(gradient, soft, 1)
        return inner if _is_one(ctx.tau) else inner / ctx.tau, None, None


def _sample_slab(
    logits: Tensor, dim: int, tau: float | Tensor, generator: torch.Generator | None, hard: Tensor, soft: Tensor
) -> None:
    """Samples rows along ``dim`` into ``hard`` and ``soft``, in passes that stay in the cache."""
    scores = _uniform(tuple(logits.shape), logits, generator).log_().neg_().log_()
    torch.sub(logits, scores, out=scores)
    best = scores.amax(dim, keepdim=True)
    if scores.device.type == "cpu":
        found = hard if hard.is_contiguous() else torch.empty_like(scores)
        torch.ge(scores, best, out=found)
        # Comparing is ten times faster than argmax, and wrong only where the best is shared or not finite.
        if float(found.sum()) != best.numel() or not math.isfinite(float(best.sum())):
            found = _exactly_one(scores, best, dim)
    else:
        found = torch.zeros_like(scores).scatter_(dim, scores.argmax(dim, keepdim=True), 1.0)
        found = torch.where(best.isfinite(), found, math.nan)
    if found is not hard:
        hard.copy_(found)
    if not _is_one(tau):
        scores.div_(tau)
    if soft.is_contiguous():
        torch.softmax(scores, dim, out=soft)
    else:
        soft.copy_(torch.softmax(scores, dim))


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
