"""Triton kernels of the masked norms: one visit to memory forward, one backward."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_forward(
    x,
    keep,
    weight,
    bias,
    out,
    means,
    scales,
    columns,
    eps,
    CENTRE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Normalises one row a program by the statistics of its kept positions, and keeps the two statistics."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < columns
    value = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    kept = tl.load(keep + column, mask=inside, other=0.0).to(tl.float32)
    count = tl.sum(kept, 0)
    if CENTRE:
        mean = tl.sum(value * kept, 0) / count
        value -= mean
        tl.store(means + row, mean)
    scale = 1.0 / tl.sqrt(tl.sum(value * value * kept, 0) / count + eps)
    tl.store(scales + row, scale)
    result = value * scale
    if HAS_WEIGHT:
        result *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, result, mask=inside)


@triton.jit
def norm_backward(
    gradient,
    x,
    keep,
    weight,
    means,
    scales,
    to_x,
    to_keep,
    to_weight,
    to_bias,
    rows,
    columns,
    eps,
    CENTRE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gradient of the rows, and each program's share of the gradients that are sums over rows.

    A program takes every ``num_programs``-th row, so that shares are few.
    """
    column = tl.arange(0, WIDTH)
    inside = column < columns
    kept = tl.load(keep + column, mask=inside, other=0.0).to(tl.float32)
    count = tl.sum(kept, 0)
    sum_keep = tl.zeros((WIDTH,), tl.float32)
    sum_weight = tl.zeros((WIDTH,), tl.float32)
    sum_bias = tl.zeros((WIDTH,), tl.float32)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(index, tl.int64) * columns
        incoming = tl.load(gradient + start + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + index)
        if CENTRE:
            value -= tl.load(means + index)
        normal = tl.where(inside, value * scale, 0.0)
        sum_weight += incoming * normal
        sum_bias += incoming
        if HAS_WEIGHT:
            incoming *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        along = tl.sum(incoming * normal, 0) / count
        inner = incoming - kept * normal * along
        # The kept positions' power over itself plus epsilon: what the mean square of `normal` over them is.
        power = 1.0 - eps * scale * scale
        sum_keep -= 0.5 * along * (normal * normal - power)
        if CENTRE:
            level = tl.sum(incoming, 0) / count
            inner -= kept * level
            sum_keep -= level * normal
        tl.store(to_x + start + column, inner * scale, mask=inside)
    share = tl.program_id(0).to(tl.int64) * columns + column
    tl.store(to_keep + share, sum_keep, mask=inside)
    tl.store(to_weight + share, sum_weight, mask=inside)
    tl.store(to_bias + share, sum_bias, mask=inside)
