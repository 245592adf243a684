"""The samplers in eager code that can be checked by eye: the oracle of every faster path.

:func:`softmax` and :func:`sigmoid` take their noise as an argument, so that a path with noise of its own can be
compared given the same noise; :func:`sample_softmax` and :func:`sample_sigmoid` make it and call them.
:func:`draw_softmax` and :func:`draw_sigmoid` are what any path draws from a counter: one meaning, one place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunegate.gumbel import philox
from prunegate.gumbel.arguments import Options, estimator_tau, refuse_impossible_rows


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """``value`` with the gradient of ``surrogate``; exactly ``value``, because the difference added is exactly 0."""
    return value.detach() + (surrogate - surrogate.detach())


def _moved(position: Tensor, logits: Tensor) -> Tensor:
    """``position`` as a function of the logits that moves as they move; infinite places stay where they are."""
    return torch.where(position.isinf(), position, position - logits).detach() + torch.where(
        position.isinf() | logits.isinf(), 0.0, logits
    )


def softmax(logits: Tensor, noise: Tensor, options: Options, dim: int, conditional: Sequence[Tensor] = ()) -> Tensor:
    """A sample of the Gumbel-softmax distribution, given its noise.

    Args:
        logits: Unnormalised log-probabilities, any shape.
        noise: Standard Gumbel noise, the shape of ``logits``.
        options: How to sample.
        dim: The dimension of the categories.
        conditional: For ``rao_samples``, as many tensors of Gumbel noise more, each the shape of ``logits``.

    Returns:
        The sample, the shape of ``logits``: probabilities, or one 1 along ``dim`` if ``options.hard``.
    """
    scores = logits + noise
    if not options.hard:
        value = torch.softmax(scores / options.tau, dim)
        if options.tau_backward is None:
            return value
        return straight_through(value, torch.softmax(scores / options.tau_backward, dim))
    index = scores.argmax(dim, keepdim=True) if logits.dim() else scores.new_zeros((), dtype=torch.int64)
    value = torch.zeros_like(scores).scatter(dim, index, 1.0)
    if options.estimator == "reinmax":
        return straight_through(value, reinmax_softmax(logits, value, options, dim))
    if options.rao_samples:
        probability = torch.log_softmax(logits, dim).detach()
        draws = [_gumbel_given(value, probability, extra, dim) for extra in conditional]
        tau = options.surrogate_tau
        relaxed = [torch.softmax(_moved(draw, logits) / tau, dim) for draw in draws]
        return straight_through(value, torch.stack(relaxed).mean(0))
    return straight_through(value, torch.softmax(scores / options.surrogate_tau, dim))


def reinmax_softmax(logits: Tensor, value: Tensor, options: Options, dim: int) -> Tensor:
    """What ReinMax differentiates (Liu et al., arXiv 2304.08612): Heun's second-order step instead of Euler's."""
    probability = torch.softmax(logits, dim)
    tempered = torch.softmax(logits / estimator_tau(options), dim)
    middle = ((value + tempered) / 2).detach()
    # A softmax whose value is `middle`, as a function of the logits around the present ones.
    around = torch.softmax(_moved(middle.log(), logits), dim)
    return 2 * around - probability / 2


def _gumbel_given(value: Tensor, log_probability: Tensor, noise: Tensor, dim: int) -> Tensor:
    """Perturbed logits drawn again, given which of them is the largest (Paulus et al., arXiv 2010.04838)."""
    # Exp(-noise) is an exponential arrival time. The winner's is the first arrival of all; the others come after it.
    first = (noise * value).sum(dim, keepdim=True)
    others = -torch.logaddexp(-noise - log_probability, -first)
    return torch.where(value == 1, first, others)


def sigmoid(logits: Tensor, noise: Tensor, options: Options, conditional: Sequence[Tensor] = ()) -> Tensor:
    """A sample of one binary gate a logit, given its noise.

    Args:
        logits: Log-odds of the gates, any shape.
        noise: Standard logistic noise, the shape of ``logits``.
        options: How to sample.
        conditional: For ``rao_samples``, as many tensors of logistic noise more, each the shape of ``logits``.

    Returns:
        The sample, the shape of ``logits``: numbers in (0, 1), or 0 and 1 if ``options.hard``.
    """
    scores = logits + noise
    if not options.hard:
        value = torch.sigmoid(scores / options.tau)
        if options.tau_backward is None:
            return value
        return straight_through(value, torch.sigmoid(scores / options.tau_backward))
    value = (scores > 0).to(scores.dtype)
    if options.estimator == "reinmax":
        return straight_through(value, reinmax_sigmoid(logits, value, options))
    if options.rao_samples:
        tau = options.surrogate_tau
        draws = [_logistic_given(value, logits.detach(), extra) for extra in conditional]
        relaxed = [torch.sigmoid(_moved(draw, logits) / tau) for draw in draws]
        return straight_through(value, torch.stack(relaxed).mean(0))
    return straight_through(value, torch.sigmoid(scores / options.surrogate_tau))


def reinmax_sigmoid(logits: Tensor, value: Tensor, options: Options) -> Tensor:
    """The two-way case of :func:`reinmax_softmax`, on logits (l, 0)."""
    probability = torch.sigmoid(logits)
    tempered = torch.sigmoid(logits / estimator_tau(options))
    middle = ((value + tempered) / 2).detach()
    around = torch.sigmoid(_moved(torch.logit(middle), logits))
    return 2 * around - probability / 2


def _logistic_given(value: Tensor, logits: Tensor, noise: Tensor) -> Tensor:
    """Perturbed log-odds drawn again, given on which side of 0 they are."""
    sign = 2 * value - 1
    uniform = torch.nn.functional.logsigmoid(noise)
    return sign * (torch.nn.functional.softplus(sign * logits + uniform) - (uniform - noise))


def gumbel_noise(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gumbel noise as ``torch.nn.functional.gumbel_softmax`` makes it."""
    return -torch.empty_like(logits).exponential_(generator=generator).log()


def logistic_noise(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Logistic noise, the difference of two Gumbel draws."""
    return gumbel_noise(logits, generator) - gumbel_noise(logits, generator)


def philox_places(logits: Tensor, dim: int, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row and column that each logit's noise is keyed by, int64, the shape of ``logits``."""
    count = torch.arange(logits.numel(), device=logits.device)
    if offsets is not None:
        row = torch.bucketize(count, offsets[1:], right=True)
        return row, count - offsets[row]
    moved = logits.movedim(dim, -1) if logits.dim() else logits
    columns = moved.shape[-1] if logits.dim() else 1
    row = torch.div(count, columns, rounding_mode="floor").reshape(moved.shape)
    column = (count % columns).reshape(moved.shape)
    return (row.movedim(-1, dim), column.movedim(-1, dim)) if logits.dim() else (row, column)


def philox_gumbel(state: Tensor, logits: Tensor, dim: int, offsets: Tensor | None, draw: int = 0) -> Tensor:
    """Gumbel noise of :mod:`prunegate.gumbel.philox` for rows along ``dim``, or for the rows that ``offsets`` mark."""
    row, column = philox_places(logits, dim, offsets)
    return philox.gumbel(philox.words(state, row, column, draw)).to(logits.dtype)


def philox_logistic(state: Tensor, logits: Tensor, draw: int = 0) -> Tensor:
    """Logistic noise of :mod:`prunegate.gumbel.philox`; all logits are one long row, in memory order of the shape."""
    column = torch.arange(logits.numel(), device=logits.device).reshape(logits.shape)
    return philox.logistic(philox.words(state, torch.zeros_like(column), column, draw)).to(logits.dtype)


def draw_softmax(logits: Tensor, options: Options, offsets: Tensor | None, state: Tensor) -> Tensor:
    """Rows along the last dimension, or those that ``offsets`` mark, on the counter's noise."""
    noises = [philox_gumbel(state, logits, -1, offsets, draw) for draw in range(1 + options.rao_samples)]
    return rows_softmax(logits, noises, options, offsets)


def draw_sigmoid(logits: Tensor, options: Options, state: Tensor) -> Tensor:
    """Gates on the counter's noise."""
    noises = [philox_logistic(state, logits, draw) for draw in range(1 + options.rao_samples)]
    return sigmoid(logits, noises[0], options, noises[1:])


def gradient_again(draw: Callable[..., Tensor], logits: Tensor, gradient: Tensor, *how: Any) -> Tensor:
    """The gradient of a draw that a kernel has made, in torch's operations on the same noise.

    For second derivatives and batched gradients, which kernels do not have.

    Args:
        draw: :func:`draw_softmax` or :func:`draw_sigmoid`.
        logits: What was sampled from.
        gradient: Gradient of the sample.
        how: What else ``draw`` takes.

    Returns:
        The gradient of the logits, differentiable where gradients are being recorded.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        source = logits if logits.requires_grad else logits.detach().requires_grad_()
        return torch.autograd.grad(draw(source, *how), source, gradient, create_graph=again)[0]


def sample_softmax(
    rows: Tensor, options: Options, offsets: Tensor | None, generator: torch.Generator | philox.Philox | None
) -> Tensor:
    """Draws noise and samples along the last dimension, or in each of the rows that ``offsets`` mark in flat logits."""
    refuse_impossible_rows(rows, offsets)
    if isinstance(generator, philox.Philox):
        return draw_softmax(rows, options, offsets, generator.take())
    noises = [gumbel_noise(rows, generator) for _ in range(1 + options.rao_samples)]
    return rows_softmax(rows, noises, options, offsets)


def rows_softmax(logits: Tensor, noises: Sequence[Tensor], options: Options, offsets: Tensor | None) -> Tensor:
    """:func:`softmax` along the last dimension, or of each of the rows that ``offsets`` mark in flat logits."""
    if offsets is None:
        return softmax(logits, noises[0], options, -1, noises[1:])
    lengths = offsets.diff().tolist()
    rows = zip(logits.split(lengths), *(noise.split(lengths) for noise in noises), strict=True)
    return torch.cat([softmax(row, noise, options, 0, more) for row, noise, *more in rows if len(row)])


def sample_sigmoid(logits: Tensor, options: Options, generator: torch.Generator | philox.Philox | None) -> Tensor:
    """Draws noise and samples one gate a logit."""
    if isinstance(generator, philox.Philox):
        return draw_sigmoid(logits, options, generator.take())
    noises = [logistic_noise(logits, generator) for _ in range(1 + options.rao_samples)]
    return sigmoid(logits, noises[0], options, noises[1:])
