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
def _log(x, FAST: tl.constexpr):
    """Natural logarithm of positive normal numbers: absolute error 1e-7 near 1, two ulp elsewhere."""
    if FAST:
        binary = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        binary = tl.log2(x)
    return binary * 0.6931471805599453


@triton.jit
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _near(word):
    """The low 31 bits of random words as numbers in (0, 0.5]."""
    return ((word & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _minus_gumbel(word, FAST: tl.constexpr):
    """Minus the Gumbel noise of random words."""
    near = _near(word)
    upper = (word >> 31) != 0
    exponential = -_log(tl.where(upper, 1.0 - near, near), FAST)
    # The upper tail is what decides among many categories; there a logarithm near 1 has no digits left.
    series = near * (1.0 + near * (0.5 + near * (0.3333333333 + near * 0.25)))
    return _log(tl.where(upper & (near < 0.03125), series, exponential), FAST)


@triton.jit
def _logistic(word, FAST: tl.constexpr):
    """Logistic noise of random words; the top bit is its sign."""
    near = _near(word)
    size = _log((1.0 - near) / near, FAST)
    return tl.where((word >> 31) != 0, size, -size)


@triton.jit
def _words(state, counter, row, draw):
    """Four random words of each counter, in two dimensions more, two wide each."""
    zero = tl.zeros_like(counter)
    step = zero + tl.load(state + 1).to(tl.int32)
    a, b, c, d = tl.philox(tl.load(state), counter, zero + row, step, zero + draw, _ROUNDS)
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _line_of_words(state, row, first, draw, QUARTER: tl.constexpr):
    """Random words of 4 * QUARTER columns of one row; ``first`` counts the columns before them by fours."""
    return tl.reshape(_words(state, first + tl.arange(0, QUARTER), row, draw), (4 * QUARTER,))


@triton.jit
def _tile_of_words(state, row, first, draw, QUARTER: tl.constexpr, ROWS: tl.constexpr):
    """Random words of 4 * QUARTER columns of ROWS rows; ``first`` counts the columns before them by fours."""
    counter = tl.zeros((ROWS, QUARTER), tl.int32) + (first + tl.arange(0, QUARTER))[None, :]
    rows = (row + tl.arange(0, ROWS))[:, None]
    return tl.reshape(_words(state, counter, rows, draw), (ROWS, 4 * QUARTER))


@triton.jit
def _tile(rows, columns, QUARTER: tl.constexpr, ROWS: tl.constexpr):
    """This program's first row; the columns; which places are inside the matrix; and where they are in memory."""
    row = tl.program_id(0) * ROWS
    column = tl.arange(0, 4 * QUARTER)[None, :]
    line = (row + tl.arange(0, ROWS))[:, None]
    return row, column, (line < rows) & (column < columns), line.to(tl.int64) * columns + column


@triton.jit
def _temperature(tau, POINTER: tl.constexpr):
    return tl.load(tau).to(tl.float32) if POINTER else tau


@triton.jit
def gates_forward(
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
def _conditional_gate(logit, is_open, word, FAST: tl.constexpr):
    """How far from 0 a gate's score is, drawn again given its side of 0."""
    near = _near(word)
    upper = (word >> 31) != 0
    log_near, log_far = _log(near, FAST), _log(1.0 - near, FAST)
    # Logarithms of the uniform number behind the noise, and of 1 less it.
    log_of, log_rest = tl.where(upper, log_far, log_near), tl.where(upper, log_near, log_far)
    towards = tl.where(is_open, logit, -logit) + log_of
    return tl.maximum(towards, 0.0) + _log(1.0 + _exp(-tl.abs(towards)), FAST) - log_rest


@triton.jit
def gates_backward(
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
def tile_forward(
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
    score -= _minus_gumbel(_tile_of_words(state, row, 0, 0, QUARTER, ROWS), FAST)
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
def _softmax(score):
    relaxed = _exp(score - tl.max(score, 1)[:, None])
    return relaxed / tl.sum(relaxed, 1)[:, None]


@triton.jit
def _through(soft, incoming):
    """A gradient through a softmax whose value is ``soft``."""
    return soft * (incoming - tl.sum(soft * incoming, 1)[:, None])


@triton.jit
def tile_backward(
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
    score = logit - _minus_gumbel(_tile_of_words(state, row, 0, 0, QUARTER, ROWS), FAST)
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
            arrival = _minus_gumbel(_tile_of_words(state, row, 0, draw, QUARTER, ROWS), FAST)
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
def _part(logits, state, columns, QUARTER: tl.constexpr, FAST: tl.constexpr):
    """One part of a long row: its columns, which of them there are, where they lie, and their perturbed logits."""
    column = tl.program_id(1) * (4 * QUARTER) + tl.arange(0, 4 * QUARTER)
    inside = column < columns
    at = tl.program_id(0).to(tl.int64) * columns + column
    score = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    score -= _minus_gumbel(_line_of_words(state, tl.program_id(0), tl.program_id(1) * QUARTER, 0, QUARTER), FAST)
    return column, inside, at, tl.where(inside, score, float("-inf"))


@triton.jit
def _index_of_part(part):
    return tl.program_id(0) * tl.num_programs(1) + part


@triton.jit
def part_winners(
    logits,
    out,
    parts,
    winners,
    state,
    columns,
    QUARTER: tl.constexpr,
    FAST: tl.constexpr,
):
    """The best score and its column of one part of a long row, NaN if a score is; the part is filled with zeros."""
    column, inside, at, score = _part(logits, state, columns, QUARTER, FAST)
    tl.store(out + at, tl.zeros_like(score), mask=inside)
    wrong = tl.max((score != score).to(tl.int32), 0) > 0
    top = tl.max(score, 0)
    here = _index_of_part(tl.program_id(1))
    tl.store(winners + here, tl.min(tl.where(score == top, column, 2147483647), 0))
    tl.store(parts + here, tl.where(wrong, float("nan"), top))


@triton.jit
def row_choice(
    out,
    parts,
    winners,
    columns,
    count,
    PARTS: tl.constexpr,
    QUARTER: tl.constexpr,
):
    """Writes the 1 of a row whose parts have been through :func:`part_winners`; or NaN, if it has no winner."""
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
def part_sums(
    gradient,
    logits,
    work,
    parts,
    state,
    tau,
    columns,
    GRADIENT: tl.constexpr,
    POINTER: tl.constexpr,
    QUARTER: tl.constexpr,
    FAST: tl.constexpr,
):
    """Exponentials of one part of a long row, into ``work``; and its three numbers.

    These are its best score, and the sums of the exponentials and of their products with the gradient (or NaN for all
    of them, where a score is). The exponentials are of the scores' distances to the part's best.
    """
    _column, inside, at, score = _part(logits, state, columns, QUARTER, FAST)
    top = tl.max(score, 0)
    # In a part where all is masked out, or one score is infinite, the exponentials must not be of NaN.
    anchor = tl.where(top == float("-inf"), 0.0, top)
    relaxed = _exp((score - anchor) * (1.0 / _temperature(tau, POINTER)))
    tl.store(work + at, relaxed, mask=inside)
    here = parts + _index_of_part(tl.program_id(1)) * 3
    wrong = tl.max((score != score).to(tl.int32), 0) > 0
    tl.store(here, tl.where(wrong, float("nan"), top))
    tl.store(here + 1, tl.sum(relaxed, 0))
    if GRADIENT:
        incoming = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(here + 2, tl.sum(relaxed * incoming, 0))


@triton.jit
def part_finish(
    gradient,
    work,
    out,
    parts,
    tau,
    columns,
    GRADIENT: tl.constexpr,
    POINTER: tl.constexpr,
    PARTS: tl.constexpr,
    QUARTER: tl.constexpr,
):
    """The relaxed row, or the gradient of its logits, from what :func:`part_sums` has left of all its parts."""
    scale = 1.0 / _temperature(tau, POINTER)
    part = tl.arange(0, PARTS)
    here = parts + _index_of_part(part) * 3
    present = part < tl.num_programs(1)
    best = tl.load(here, mask=present, other=float("-inf"))
    wrong = (tl.max((best != best).to(tl.int32), 0) > 0) | (tl.max(best, 0) == float("inf"))
    top = tl.max(best, 0)
    wrong = wrong | (top == float("-inf"))
    weight = tl.where(best == float("-inf"), 0.0, _exp((best - top) * scale))
    total = tl.sum(weight * tl.load(here + 1, mask=present, other=0.0), 0)
    own = tl.load(parts + _index_of_part(tl.program_id(1)) * 3)
    factor = tl.where(own == float("-inf"), 0.0, _exp((own - top) * scale)) / total
    column = tl.program_id(1) * (4 * QUARTER) + tl.arange(0, 4 * QUARTER)
    at = tl.program_id(0).to(tl.int64) * columns + column
    sample = tl.load(work + at, mask=column < columns, other=0.0) * tl.where(wrong, float("nan"), factor)
    if GRADIENT:
        dot = tl.sum(weight * tl.load(here + 2, mask=present, other=0.0), 0) / total
        incoming = tl.load(gradient + at, mask=column < columns, other=0.0).to(tl.float32)
        sample = sample * scale * (incoming - dot)
    tl.store(out + at, sample, mask=column < columns)


@triton.jit
def _ragged(offsets, rows, ROWS: tl.constexpr):
    """This program's rows: the first one's number, where each begins, how long each is, and the longest of them."""
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    start = tl.load(offsets + row, mask=row < rows, other=0)
    end = tl.load(offsets + row + 1, mask=row < rows, other=0)
    length = (end - start).to(tl.int32)
    return first, start[:, None], length[:, None], tl.max(length, 0)


@triton.jit
def _ragged_scores(
    logits, state, first, start, length, at, QUARTER: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr
):
    """Perturbed logits of the rows' columns from ``at`` on, and where they lie; -inf beyond a row's end."""
    column = at + tl.arange(0, 4 * QUARTER)[None, :]
    inside = column < length
    place = start + column
    score = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
    score -= _minus_gumbel(_tile_of_words(state, first, at // 4, 0, QUARTER, ROWS), FAST)
    return column, inside, place, tl.where(inside, score, float("-inf"))


@triton.jit
def ragged_winners(
    logits,
    out,
    offsets,
    state,
    rows,
    QUARTER: tl.constexpr,
    ROWS: tl.constexpr,
    FAST: tl.constexpr,
):
    """Samples hard rows of different lengths, ROWS of them at once, in a loop over the columns of the longest."""
    first, start, length, longest = _ragged(offsets, rows, ROWS)
    best = tl.full((ROWS, 1), float("-inf"), tl.float32)
    chosen = tl.full((ROWS, 1), 2147483647, tl.int32)
    wrong = tl.zeros((ROWS, 1), tl.int32)
    for at in range(0, longest, 4 * QUARTER):
        column, _inside, _place, score = _ragged_scores(logits, state, first, start, length, at, QUARTER, ROWS, FAST)
        wrong = wrong | tl.max((score != score).to(tl.int32), 1)[:, None]
        top = tl.max(score, 1)[:, None]
        winner = tl.min(tl.where(score == top, column, 2147483647), 1)[:, None]
        chosen = tl.where(top > best, winner, chosen)
        best = tl.where(top > best, top, best)
    bad = (wrong > 0) | (best == float("inf")) | (best == float("-inf"))
    for at in range(0, longest, 4 * QUARTER):
        column = at + tl.arange(0, 4 * QUARTER)[None, :]
        sample = tl.where(bad, float("nan"), tl.where(column == chosen, 1.0, 0.0))
        tl.store(out + start + column, sample, mask=column < length)


@triton.jit
def ragged_sums(
    gradient,
    logits,
    work,
    out,
    offsets,
    state,
    tau,
    rows,
    GRADIENT: tl.constexpr,
    POINTER: tl.constexpr,
    QUARTER: tl.constexpr,
    ROWS: tl.constexpr,
    FAST: tl.constexpr,
):
    """Relaxed rows of different lengths, or the gradient of their logits; ``work`` holds the scores meanwhile."""
    first, start, length, longest = _ragged(offsets, rows, ROWS)
    scale = 1.0 / _temperature(tau, POINTER)
    best = tl.full((ROWS, 1), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, 1), tl.float32)
    dot = tl.zeros((ROWS, 1), tl.float32)
    for at in range(0, longest, 4 * QUARTER):
        _column, inside, place, score = _ragged_scores(logits, state, first, start, length, at, QUARTER, ROWS, FAST)
        tl.store(work + place, score, mask=inside)
        # Sums are of exponentials of the distance to the best so far.
        higher = tl.maximum(best, tl.max(score, 1)[:, None])
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = _exp((best - anchor) * scale)
        relaxed = _exp((score - anchor) * scale)
        total = total * shrink + tl.sum(relaxed, 1)[:, None]
        if GRADIENT:
            incoming = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
            dot = dot * shrink + tl.sum(relaxed * incoming, 1)[:, None]
        best = higher
    dot = dot / total
    share = 1.0 / total
    # Another thread may read what this one wrote.
    tl.debug_barrier()
    for at in range(0, longest, 4 * QUARTER):
        column = at + tl.arange(0, 4 * QUARTER)[None, :]
        inside = column < length
        score = tl.load(work + start + column, mask=inside, other=0.0)
        sample = _exp((score - best) * scale) * share
        if GRADIENT:
            incoming = tl.load(gradient + start + column, mask=inside, other=0.0).to(tl.float32)
            sample = sample * scale * (incoming - dot)
        tl.store(out + start + column, sample, mask=inside)
