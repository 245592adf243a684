"""Triton kernels: logits are read once, noise is made in registers, and made again in backward instead of saved.

Every kernel takes ``state``, the seed and step of the draw, by address, so that a CUDA graph draws anew on replay.
The counter of a number is its (column // 4, row, step), never its place in a block: block sizes are free.

``FAST`` uses the hardware's base-2 logarithm (48 instructions a gate fewer than the library's); the interpreter has
no such instruction, and uses its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prunegate.gumbel import philox

_ROUNDS = tl.constexpr(philox.ROUNDS)


@triton.jit
def _log(x, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Natural logarithm of positive normal numbers: absolute error 1e-7 near 1, two ulp elsewhere."""
    if FAST:
        binary = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        binary = tl.log2(x)
    return binary * 0.6931471805599453


@triton.jit
def _exp(x):  # type: ignore[no-untyped-def]
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _near(word):  # type: ignore[no-untyped-def]
    """The low 31 bits of random words as numbers in (0, 0.5]."""
    return ((word & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _minus_gumbel(word, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Minus the Gumbel noise of random words."""
    near = _near(word)
    upper = (word >> 31) != 0
    exponential = -_log(tl.where(upper, 1.0 - near, near), FAST)
    # The upper tail is what decides among many categories; there a logarithm near 1 has no digits left.
    series = near * (1.0 + near * (0.5 + near * (0.3333333333 + near * 0.25)))
    return _log(tl.where(upper & (near < 0.03125), series, exponential), FAST)


@triton.jit
def _logistic(word, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logistic noise of random words; the top bit is its sign."""
    near = _near(word)
    size = _log((1.0 - near) / near, FAST)
    return tl.where((word >> 31) != 0, size, -size)


@triton.jit
def _words(state, counter, row, draw):  # type: ignore[no-untyped-def]
    """Four random words of each counter, in two dimensions more, two wide each."""
    zero = tl.zeros_like(counter)
    step = zero + tl.load(state + 1).to(tl.int32)
    a, b, c, d = tl.philox(tl.load(state), counter, zero + row, step, zero + draw, _ROUNDS)
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _line_of_words(state, row, first, draw, QUARTER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Random words of 4 * QUARTER columns of one row; ``first`` counts the columns before them by fours."""
    return tl.reshape(_words(state, first + tl.arange(0, QUARTER), row, draw), (4 * QUARTER,))


@triton.jit
def _tile_of_words(state, row, draw, QUARTER: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Random words of the first 4 * QUARTER columns of ROWS rows."""
    counter = tl.zeros((ROWS, QUARTER), tl.int32) + tl.arange(0, QUARTER)[None, :]
    rows = (row + tl.arange(0, ROWS))[:, None]
    return tl.reshape(_words(state, counter, rows, draw), (ROWS, 4 * QUARTER))


@triton.jit
def _tile(rows, columns, QUARTER: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's first row; the columns; which places are inside the matrix; and where they are in memory."""
    row = tl.program_id(0) * ROWS
    column = tl.arange(0, 4 * QUARTER)[None, :]
    line = (row + tl.arange(0, ROWS))[:, None]
    return row, column, (line < rows) & (column < columns), line.to(tl.int64) * columns + column


@triton.jit
def _temperature(tau, POINTER: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(tau).to(tl.float32) if POINTER else tau


@triton.jit
def gates_forward(  # type: ignore[no-untyped-def]
    logits,
    out,
    state,
    tau,
    count,
    HARD: tl.constexpr,
    POINTER: tl.constexpr,
    QUARTER: tl.constexpr,
    FAST: tl.constexpr,
):
    """Samples binary gates, 4 * QUARTER to a program."""
    first = tl.program_id(0) * QUARTER
    at = tl.program_id(0).to(tl.int64) * (4 * QUARTER) + tl.arange(0, 4 * QUARTER)
    score = tl.load(logits + at, mask=at < count, other=0.0).to(tl.float32)
    score += _logistic(_line_of_words(state, 0, first, 0, QUARTER), FAST)
    if HARD:
        sample = tl.where(score > 0, 1.0, tl.where(score != score, score, 0.0))
    else:
        sample = tl.sigmoid(score / _temperature(tau, POINTER))
    tl.store(out + at, sample, mask=at < count)


@triton.jit
def _conditional_gate(logit, is_open, word, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """How far from 0 a gate's score is, drawn again given its side of 0."""
    near = _near(word)
    upper = (word >> 31) != 0
    log_near, log_far = _log(near, FAST), _log(1.0 - near, FAST)
    # Logarithms of the uniform number behind the noise, and of 1 less it.
    log_of, log_rest = tl.where(upper, log_far, log_near), tl.where(upper, log_near, log_far)
    towards = tl.where(is_open, logit, -logit) + log_of
    return tl.maximum(towards, 0.0) + _log(1.0 + _exp(-tl.abs(towards)), FAST) - log_rest


@triton.jit
def gates_backward(  # type: ignore[no-untyped-def]
    gradient,
    logits,
    out,
    state,
    tau,
    count,
    DRAWS: tl.constexpr,
    REINMAX: tl.constexpr,
    POINTER: tl.constexpr,
    QUARTER: tl.constexpr,
    FAST: tl.constexpr,
):
    """Gradient of the logits of binary gates, whose noise is made again.

    That of the relaxed gates; or its mean over DRAWS conditional draws; or ReinMax's,
    2 a (1 - a) - p (1 - p) / 2 with a halfway from the gate to sigmoid(l / tau).
    """
    first = tl.program_id(0) * QUARTER
    at = tl.program_id(0).to(tl.int64) * (4 * QUARTER) + tl.arange(0, 4 * QUARTER)
    logit = tl.load(logits + at, mask=at < count, other=0.0).to(tl.float32)
    score = logit + _logistic(_line_of_words(state, 0, first, 0, QUARTER), FAST)
    temperature = _temperature(tau, POINTER)
    if REINMAX:
        probability, tempered = tl.sigmoid(logit), tl.sigmoid(logit / temperature)
        other = 0.5 * tl.where(score > 0, 1.0 - tempered, tempered)
        slope = 2.0 * other * (1.0 - other) - 0.5 * probability * (1.0 - probability)
    elif DRAWS > 0:
        slope = tl.zeros_like(score)
        for draw in range(1, DRAWS + 1):
            word = _line_of_words(state, 0, first, draw, QUARTER)
            soft = tl.sigmoid(_conditional_gate(logit, score > 0, word, FAST) / temperature)
            slope += soft * (1.0 - soft)
        slope = slope / (DRAWS * temperature)
    else:
        soft = tl.sigmoid(score / temperature)
        slope = soft * (1.0 - soft) / temperature
    tl.store(out + at, tl.load(gradient + at, mask=at < count, other=0.0).to(tl.float32) * slope, mask=at < count)


@triton.jit
def tile_forward(  # type: ignore[no-untyped-def]
    logits,
    out,
    state,
    tau,
    rows,
    columns,
    HARD: tl.constexpr,
    POINTER: tl.constexpr,
    QUARTER: tl.constexpr,
    ROWS: tl.constexpr,
    FAST: tl.constexpr,
):
    """Samples rows that fit in a program, ROWS of them at once."""
    row, column, inside, at = _tile(rows, columns, QUARTER, ROWS)
    score = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    score -= _minus_gumbel(_tile_of_words(state, row, 0, QUARTER, ROWS), FAST)
    score = tl.where(column < columns, score, float("-inf"))
    best = tl.max(score, 1)[:, None]
    wrong = tl.max((score != score).to(tl.int32), 1)[:, None] > 0
    # A best score that is infinite means a row without categories, or one that torch makes NaN too.
    wrong = wrong | (best == float("inf")) | (best == float("-inf"))
    if HARD:
        first = tl.min(tl.where(score == best, column, 4 * QUARTER), 1)[:, None]
        sample = tl.where(column == first, 1.0, 0.0)
    else:
        relaxed = _exp((score - best) / _temperature(tau, POINTER))
        sample = relaxed / tl.sum(relaxed, 1)[:, None]
    tl.store(out + at, tl.where(wrong, float("nan"), sample), mask=inside)


@triton.jit
def _softmax(score):  # type: ignore[no-untyped-def]
    relaxed = _exp(score - tl.max(score, 1)[:, None])
    return relaxed / tl.sum(relaxed, 1)[:, None]


@triton.jit
def _through(soft, incoming):  # type: ignore[no-untyped-def]
    """A gradient through a softmax whose value is ``soft``."""
    return soft * (incoming - tl.sum(soft * incoming, 1)[:, None])


@triton.jit
def tile_backward(  # type: ignore[no-untyped-def]
    gradient,
    logits,
    out,
    state,
    tau,
    rows,
    columns,
    DRAWS: tl.constexpr,
    REINMAX: tl.constexpr,
    POINTER: tl.constexpr,
    QUARTER: tl.constexpr,
    ROWS: tl.constexpr,
    FAST: tl.constexpr,
):
    """Gradient of the logits of rows that fit in a program.

    That of the relaxed rows; or its mean over DRAWS conditional draws; or ReinMax's, twice the gradient halfway from
    the sample to softmax(l / tau), less half of that at softmax(l).
    """
    row, column, inside, at = _tile(rows, columns, QUARTER, ROWS)
    logit = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    logit = tl.where(column < columns, logit, float("-inf"))
    score = logit - _minus_gumbel(_tile_of_words(state, row, 0, QUARTER, ROWS), FAST)
    incoming = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    temperature = _temperature(tau, POINTER)
    if REINMAX or DRAWS > 0:
        best = tl.max(score, 1)[:, None]
        first = tl.min(tl.where(score == best, column, 4 * QUARTER), 1)[:, None]
        is_first = column == first
    if REINMAX:
        middle = 0.5 * (tl.where(is_first, 1.0, 0.0) + _softmax(logit / temperature))
        result = 2.0 * _through(middle, incoming) - 0.5 * _through(_softmax(logit), incoming)
    elif DRAWS > 0:
        top = tl.max(logit, 1)[:, None]
        log_probability = logit - top - _log(tl.sum(_exp(logit - top), 1)[:, None], FAST)
        result = tl.zeros_like(score)
        for draw in range(1, DRAWS + 1):
            # Logarithms of exponential arrival times. The winner's is the first of all; the others come after it.
            arrival = _minus_gumbel(_tile_of_words(state, row, draw, QUARTER, ROWS), FAST)
            earliest = tl.sum(tl.where(is_first, arrival, 0.0), 1)[:, None]
            wait = arrival - log_probability
            later = tl.maximum(wait, earliest) + _log(1.0 + _exp(-tl.abs(wait - earliest)), FAST)
            again = -tl.where(is_first, earliest, later)
            result += _through(_softmax(again / temperature), incoming)
        result = result / (DRAWS * temperature)
    else:
        result = _through(_softmax(score / temperature), incoming) / temperature
    tl.store(out + at, result, mask=inside)


@triton.jit
def _row_span(offsets, columns, RAGGED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where this program's row begins, and how long it is."""
    row = tl.program_id(0)
    if RAGGED:
        start = tl.load(offsets + row)
        length = (tl.load(offsets + row + 1) - start).to(tl.int32)
    else:
        start = row.to(tl.int64) * columns
        length = columns
    return start, length


@triton.jit
def _scores(logits, state, start, length, at, QUARTER: tl.constexpr, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Perturbed logits of a row's columns from ``at`` on; -inf beyond its end."""
    column = at + tl.arange(0, 4 * QUARTER)
    inside = column < length
    score = tl.load(logits + start + column, mask=inside, other=0.0).to(tl.float32)
    score -= _minus_gumbel(_line_of_words(state, tl.program_id(0), at // 4, 0, QUARTER), FAST)
    return column, inside, tl.where(inside, score, float("-inf"))


@triton.jit
def row_forward(  # type: ignore[no-untyped-def]
    logits,
    out,
    offsets,
    state,
    tau,
    columns,
    HARD: tl.constexpr,
    POINTER: tl.constexpr,
    RAGGED: tl.constexpr,
    QUARTER: tl.constexpr,
    FAST: tl.constexpr,
):
    """Samples one row a program, in a loop over its columns: a long row, or one of several lengths."""
    start, length = _row_span(offsets, columns, RAGGED)
    best = tl.full((4 * QUARTER,), float("-inf"), tl.float32)
    winner = tl.full((4 * QUARTER,), 2147483647, tl.int32)
    total = tl.zeros((4 * QUARTER,), tl.float32)
    wrong = tl.zeros((4 * QUARTER,), tl.int32)
    temperature = _temperature(tau, POINTER)
    for at in range(0, length, 4 * QUARTER):
        column, inside, score = _scores(logits, state, start, length, at, QUARTER, FAST)
        wrong = wrong | (score != score).to(tl.int32)
        if HARD:
            winner = tl.where(score > best, column, winner)
            tl.store(out + start + column, tl.zeros_like(score), mask=inside)
        else:
            # Each lane keeps a running maximum of its own; they meet after the loop.
            higher = tl.maximum(best, score)
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * _exp((best - anchor) / temperature) + _exp((score - anchor) / temperature)
        best = tl.where(score > best, score, best)
    top = tl.max(best, 0)
    bad = (tl.max(wrong, 0) > 0) | (top == float("inf")) | (top == float("-inf"))
    if HARD:
        first = tl.min(tl.where(best == top, winner, 2147483647), 0)
        # Zeros that other threads wrote must land before the 1.
        tl.debug_barrier()
        tl.store(out + start + first, 1.0, mask=(first < length) & (bad == 0))
        if bad:
            for at in range(0, length, 4 * QUARTER):
                column = at + tl.arange(0, 4 * QUARTER)
                nothing = tl.full((4 * QUARTER,), float("nan"), tl.float32)
                tl.store(out + start + column, nothing, mask=column < length)
    else:
        top = tl.where(bad, 0.0, top)
        sum_ = tl.sum(tl.where(best == float("-inf"), 0.0, total * _exp((best - top) / temperature)), 0)
        sum_ = tl.where(bad, 1.0, sum_)
        for at in range(0, length, 4 * QUARTER):
            column, inside, score = _scores(logits, state, start, length, at, QUARTER, FAST)
            soft = _exp((score - top) / temperature) / sum_
            tl.store(out + start + column, tl.where(bad, float("nan"), soft), mask=inside)


@triton.jit
def row_winners(  # type: ignore[no-untyped-def]
    logits,
    out,
    parts,
    winners,
    state,
    columns,
    span,
    QUARTER: tl.constexpr,
    FAST: tl.constexpr,
):
    """The best score and its column of one part of a long row, NaN if a score is; the part is filled with zeros."""
    start = tl.program_id(0).to(tl.int64) * columns
    first = tl.program_id(1) * span
    best = tl.full((4 * QUARTER,), float("-inf"), tl.float32)
    winner = tl.full((4 * QUARTER,), 2147483647, tl.int32)
    wrong = tl.zeros((4 * QUARTER,), tl.int32)
    for at in range(first, tl.minimum(first + span, columns), 4 * QUARTER):
        column, inside, score = _scores(logits, state, start, columns, at, QUARTER, FAST)
        wrong = wrong | (score != score).to(tl.int32)
        winner = tl.where(score > best, column, winner)
        best = tl.where(score > best, score, best)
        tl.store(out + start + column, tl.zeros_like(score), mask=inside)
    top = tl.max(best, 0)
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(winners + at, tl.min(tl.where(best == top, winner, 2147483647), 0))
    tl.store(parts + at, tl.where(tl.max(wrong, 0) > 0, float("nan"), top))


@triton.jit
def row_choice(  # type: ignore[no-untyped-def]
    out,
    parts,
    winners,
    columns,
    count,
    PARTS: tl.constexpr,
    QUARTER: tl.constexpr,
):
    """Writes the 1 of a row whose parts have been through :func:`row_winners`; or NaN, if it has no winner."""
    start = tl.program_id(0).to(tl.int64) * columns
    part = tl.arange(0, PARTS)
    here = part < count
    best = tl.load(parts + tl.program_id(0) * count + part, mask=here, other=float("-inf"))
    winner = tl.load(winners + tl.program_id(0) * count + part, mask=here, other=2147483647)
    wrong = tl.max((best != best).to(tl.int32), 0) > 0
    top = tl.max(tl.where(best != best, float("-inf"), best), 0)
    if wrong | (top == float("inf")) | (top == float("-inf")):
        for at in range(0, columns, 4 * QUARTER):
            column = at + tl.arange(0, 4 * QUARTER)
            nothing = tl.full((4 * QUARTER,), float("nan"), tl.float32)
            tl.store(out + start + column, nothing, mask=column < columns)
    else:
        tl.store(out + start + tl.min(tl.where(best == top, winner, 2147483647), 0), 1.0)


@triton.jit
def _row_sums(  # type: ignore[no-untyped-def]
    gradient, logits, state, start, length, first, last, temperature, QUARTER: tl.constexpr, FAST: tl.constexpr
):
    """Of a row's columns from ``first`` to ``last``: the best score, and sums of exp and of exp times the gradient.

    The exponentials are of the scores' distances to the best.
    """
    best = tl.full((4 * QUARTER,), float("-inf"), tl.float32)
    total = tl.zeros((4 * QUARTER,), tl.float32)
    dots = tl.zeros((4 * QUARTER,), tl.float32)
    for at in range(first, last, 4 * QUARTER):
        column, inside, score = _scores(logits, state, start, length, at, QUARTER, FAST)
        incoming = tl.load(gradient + start + column, mask=inside, other=0.0).to(tl.float32)
        higher = tl.maximum(best, score)
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = _exp((best - anchor) / temperature)
        relaxed = _exp((score - anchor) / temperature)
        total = total * shrink + relaxed
        dots = dots * shrink + relaxed * incoming
        best = higher
    return _merged(best, total, dots, temperature)


@triton.jit
def _merged(best, total, dots, temperature):  # type: ignore[no-untyped-def]
    """Sums that are relative to several best scores, relative to the best of them; that is 0 where there is none."""
    top = tl.max(best, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.where(best == float("-inf"), 0.0, _exp((best - top) / temperature))
    return top, tl.sum(total * weight, 0), tl.sum(dots * weight, 0)


@triton.jit
def row_sums(  # type: ignore[no-untyped-def]
    gradient,
    logits,
    parts,
    state,
    tau,
    columns,
    span,
    POINTER: tl.constexpr,
    QUARTER: tl.constexpr,
    FAST: tl.constexpr,
):
    """What backward must know of a row, from the part of it that this program has: three numbers of each part."""
    start = tl.program_id(0).to(tl.int64) * columns
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, columns)
    top, total, dot = _row_sums(
        gradient, logits, state, start, columns, first, last, _temperature(tau, POINTER), QUARTER, FAST
    )
    at = parts + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 3
    tl.store(at, top)
    tl.store(at + 1, total)
    tl.store(at + 2, dot)


@triton.jit
def row_backward(  # type: ignore[no-untyped-def]
    gradient,
    logits,
    out,
    offsets,
    parts,
    state,
    tau,
    columns,
    span,
    POINTER: tl.constexpr,
    RAGGED: tl.constexpr,
    PARTS: tl.constexpr,
    QUARTER: tl.constexpr,
    FAST: tl.constexpr,
):
    """Gradient of the logits of one row, or of one part of a long row whose sums :func:`row_sums` has left.

    With PARTS 0 a program has a whole row, and takes its sums in a loop of its own; else PARTS is a power of two that
    the parts of a row fit in.
    """
    start, length = _row_span(offsets, columns, RAGGED)
    temperature = _temperature(tau, POINTER)
    first, last = 0, length
    if PARTS > 0:
        first = tl.program_id(1) * span
        last = tl.minimum(first + span, length)
        part = tl.arange(0, PARTS)
        here = part < tl.num_programs(1)
        at = parts + (tl.program_id(0) * tl.num_programs(1) + part) * 3
        best = tl.load(at, mask=here, other=float("-inf"))
        total = tl.load(at + 1, mask=here, other=0.0)
        dots = tl.load(at + 2, mask=here, other=0.0)
        top, sum_, dot = _merged(best, total, dots, temperature)
    else:
        top, sum_, dot = _row_sums(gradient, logits, state, start, length, first, last, temperature, QUARTER, FAST)
    sum_ = tl.where(sum_ == 0.0, 1.0, sum_)
    dot = dot / sum_
    scale = 1.0 / (sum_ * temperature)
    for at in range(first, last, 4 * QUARTER):
        column, inside, score = _scores(logits, state, start, length, at, QUARTER, FAST)
        incoming = tl.load(gradient + start + column, mask=inside, other=0.0).to(tl.float32)
        soft = _exp((score - top) / temperature) * scale
        tl.store(out + start + column, soft * (incoming - dot), mask=inside)
