"""The samplers in C for tensors on the CPU: one visit to memory forward, one backward.

The extension is optional. It is built where a C compiler is found, tried against the oracle before its first use,
and stays out of the way, with a line in the debug log, where it is missing or wrong.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from prunegate.gumbel import reference
from prunegate.gumbel.arguments import Options, estimator_tau, impossible_rows, is_plain_eager, make_options
from prunegate.gumbel.philox import Philox, take_state

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEVELS = ("baseline", "AVX2 and FMA", "AVX-512")


class Extension(NamedTuple):
    """The compiled module and the instruction set that it is used with."""

    module: ModuleType
    level: int


@cache
def load() -> tuple[Extension | None, str]:
    """The extension, if it is there and right; and what to say about it.

    Returns:
        The extension with the best instruction set that passes the self-test, or ``None``; and the reason why.
    """
    try:
        module = importlib.import_module("prunegate.gumbel._cpu")
    except ImportError as error:
        reason = f"the C extension is not built ({error}); install from source with a C compiler to have it"
        logging.getLogger(__name__).debug("The CPU sampler steps aside: %s.", reason)
        return None, reason
    for level in range(module.level(), -1, -1):
        extension = Extension(module, level)
        try:
            right = _is_right(extension)
        except (AttributeError, TypeError) as error:
            # Built from another version of the source: its functions are others, or take other arguments.
            logging.getLogger(__name__).debug("The CPU sampler is of another version: %s.", error)
            right = False
        if right:
            return extension, f"available, {_LEVELS[level]}"
        logging.getLogger(__name__).debug("The CPU sampler for %s fails its self-test.", _LEVELS[level])
    return None, "the C extension fails its self-test on this machine"


def _is_right(extension: Extension) -> bool:
    """Whether the extension samples as the oracle does, on a few rows of every kind."""
    state = torch.tensor([0x0123456789ABCDEF, 5])
    options = make_options(0.7, None, True, "st", 0)
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 3), (7, 4), (3, 32), (3, 150)):
        logits, gradient = (torch.randn(shape, generator=generator) for _ in "ab")
        noise = reference.philox_gumbel(state, logits, -1, None)
        hard, soft = (torch.empty_like(logits) for _ in "ab")
        _softmax_forward(extension, logits, hard, soft, None, state, 0.7)
        expected = reference.softmax(logits, noise, options, -1)
        relaxed = torch.softmax((logits + noise) / 0.7, -1)
        inner = relaxed * (gradient - (relaxed * gradient).sum(-1, keepdim=True)) / 0.7
        # In place, as backward does.
        found = _softmax_backward(extension, gradient, place := soft.clone(), place, None, 0.7)
        right = hard.equal(expected) and _near(soft, relaxed) and _near(found, inner)
        if not (right and _norms(extension, logits) and _products(extension, logits)):
            return False
    logits = torch.randn(150, generator=generator)
    noise = reference.philox_logistic(state, logits)
    hard, slope = (torch.empty_like(logits) for _ in "ab")
    _sigmoid_forward(extension, logits, hard, slope, state, 0.7)
    relaxed = torch.sigmoid((logits + noise) / 0.7)
    if not (hard.equal(reference.sigmoid(logits, noise, options)) and _near(slope, relaxed * (1 - relaxed) / 0.7)):
        return False
    _sigmoid_forward(extension, logits, None, slope, state, 0.7)
    return _near(slope, relaxed)


def _norms(extension: Extension, x: Tensor) -> bool:
    """Whether a norm of which nothing is masked is torch's own, forward and backward."""
    columns = x.shape[1]
    keep, weight, bias = torch.ones(columns), torch.linspace(0.5, 2.0, columns), torch.linspace(-1.0, 1.0, columns)
    out, to_x, (means, scales) = torch.empty_like(x), torch.empty_like(x), x.new_empty(2, len(x))
    _norm_forward(extension, x, keep, weight, bias, out, means, scales, 1e-3, True)
    _, to_weight, to_bias = _norm_backward(extension, x, x, keep, weight, means, scales, to_x, 1e-3, True)
    expected = torch.ops.aten.native_layer_norm(x, [columns], weight, bias, 1e-3)
    flags = [True, True, True]
    inner = torch.ops.aten.native_layer_norm_backward(x, x, [columns], *expected[1:], weight, bias, flags)
    return all(map(_near, (out, to_x, to_weight, to_bias), (expected[0], *inner)))


def _products(extension: Extension, x: Tensor) -> bool:
    """Whether products with gates for columns, and for rows, are torch's own, forward and backward."""
    for gate, view in ((x[0].clone(), (*x.shape, 1)), (x[:, 0].clone(), (1, *x.shape))):
        out, to_x, other = torch.empty_like(x), torch.empty_like(x), x.flip(0, 1)
        shape = (1, -1) if view[2] == 1 else (-1, 1)
        _product_forward(extension, x, gate, view, out)
        to_gate = _product_backward(extension, other, x, gate, view, to_x)
        sums = (other * x).sum(0 if view[2] == 1 else 1)
        if not all(map(_near, (out, to_x, to_gate), (x * gate.view(shape), other * gate.view(shape), sums))):
            return False
    return True


def _near(found: Tensor, expected: Tensor) -> bool:
    return bool(torch.allclose(found, expected, rtol=1e-4, atol=1e-5))


def availability() -> str:
    """``"available"`` and the instruction set, or why the extension is not used."""
    return load()[1]


def takes(logits: Tensor, options: Options, binary: bool) -> bool:
    """Whether these kernels can sample this; what they cannot, torch's own operations do.

    Gates have every estimator here, rows the straight-through one.
    """
    return (
        logits.dtype in _DTYPES
        and logits.device.type == "cpu"
        and (options.plain or (binary and options.hard))
        and (options.hard or options.tau_backward is None)
        and not isinstance(estimator_tau(options), Tensor)
        and is_plain_eager(logits)
        and load()[0] is not None
    )


def sample_softmax(
    rows: Tensor, options: Options, offsets: Tensor | None, generator: torch.Generator | Philox | None
) -> Tensor:
    """Draws noise and samples along the last dimension, or in each of the rows that ``offsets`` mark in flat logits."""
    return _Softmax.apply(rows, options, offsets, take_state(generator, rows.device))


def sample_sigmoid(logits: Tensor, options: Options, generator: torch.Generator | Philox | None) -> Tensor:
    """Draws noise and samples one gate a logit."""
    return _Sigmoid.apply(logits, options, take_state(generator, logits.device))


class _Sigmoid(Function):
    """Gates. What hard ones pass on is known when they are drawn: their slopes are kept, and backward multiplies."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, options: Options, state: Tensor) -> Tensor:
        sample, ctx.kept = _sample_sigmoid(logits, options, state)
        ctx.options, ctx.state = options, state
        ctx.save_for_backward(logits, *(() if options.hard else (sample,)))
        return sample

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, *sample = ctx.saved_tensors
        options, state = ctx.options, ctx.state
        if torch.is_grad_enabled() or not is_plain_eager(gradient):
            return reference.gradient_again(reference.draw_sigmoid, logits, gradient, options, state), None, None
        if sample:
            return torch.ops.aten.sigmoid_backward(gradient, sample[0]) / float(options.tau), None, None
        # The gradient takes the place of the slopes. Where a graph is walked twice, they are made again.
        slopes, ctx.kept = ctx.kept, None
        if slopes is None:
            slopes = _sample_sigmoid(logits, options, state)[1]
        return slopes.mul_(gradient), None, None


class _Softmax(Function):
    """Rows; beside hard ones, the relaxed rows are kept for backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, options: Options, offsets: Tensor | None, state: Tensor) -> Tensor:
        sample, ctx.kept = _sample_softmax(logits, options, offsets, state)
        ctx.options, ctx.offsets, ctx.state = options, offsets, state
        ctx.save_for_backward(logits, *(() if options.hard else (sample,)))
        return sample

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, *sample = ctx.saved_tensors
        options, offsets, state = ctx.options, ctx.offsets, ctx.state
        if torch.is_grad_enabled() or not is_plain_eager(gradient):
            found = reference.gradient_again(reference.draw_softmax, logits, gradient, options, offsets, state)
            return found, None, None, None
        tau = float(options.surrogate_tau)
        if sample:
            out = torch.empty_like(sample[0])
            return _softmax_backward(_extension(), gradient, sample[0], out, offsets, tau), None, None, None
        # The gradient takes the place of the relaxed rows. Where a graph is walked twice, they are made again.
        relaxed, ctx.kept = ctx.kept, None
        if relaxed is None:
            relaxed = _sample_softmax(logits, options, offsets, state)[1]
        return _softmax_backward(_extension(), gradient, relaxed, relaxed, offsets, tau), None, None, None


def _sample_sigmoid(logits: Tensor, options: Options, state: Tensor) -> tuple[Tensor, Tensor | None]:
    """Hard gates and the slopes of their gradient, or relaxed gates."""
    source = logits.contiguous()
    beside = torch.empty_like(source)
    hard = torch.empty_like(source) if options.hard else None
    draws = -1 if options.estimator == "reinmax" else options.rao_samples
    _sigmoid_forward(_extension(), source, hard, beside, state, float(estimator_tau(options)), draws)
    return (beside, None) if hard is None else (hard, beside)


def _sample_softmax(
    logits: Tensor, options: Options, offsets: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Hard rows and the relaxed ones beside them, or relaxed rows."""
    source = logits.contiguous()
    relaxed = torch.empty_like(source)
    hard = torch.empty_like(source) if options.hard else None
    _softmax_forward(_extension(), source, hard, relaxed, offsets, state, float(options.surrogate_tau))
    return (relaxed, None) if hard is None else (hard, relaxed)


def _extension() -> Extension:
    extension = load()[0]
    assert extension is not None  # takes() has seen it
    return extension


def _sigmoid_forward(
    extension: Extension, logits: Tensor, hard: Tensor | None, soft: Tensor, state: Tensor, tau: float, draws: int = 0
) -> None:
    seed, step = state.tolist()
    module, level = extension
    out = 0 if hard is None else hard.data_ptr()
    threads = torch.get_num_threads()
    module.sigmoid_forward(
        level, logits.data_ptr(), out, soft.data_ptr(), logits.numel(), seed, step, 1 / tau, draws, threads
    )


def _rows(like: Tensor, offsets: Tensor | None) -> tuple[int, int, int]:
    # Number of rows, columns of each, address of the offsets; one of the last two says nothing.
    return (*_matrix(like), 0) if offsets is None else (len(offsets) - 1, 0, offsets.data_ptr())


def _softmax_forward(
    extension: Extension,
    logits: Tensor,
    hard: Tensor | None,
    soft: Tensor,
    offsets: Tensor | None,
    state: Tensor,
    tau: float,
) -> None:
    seed, step = state.tolist()
    module, level = extension
    out = 0 if hard is None else hard.data_ptr()
    rows = _rows(logits, offsets)
    threads = torch.get_num_threads()
    bad = module.softmax_forward(level, logits.data_ptr(), out, soft.data_ptr(), *rows, seed, step, 1 / tau, threads)
    if bad:
        raise impossible_rows(bad, rows[0])


def _softmax_backward(
    extension: Extension, gradient: Tensor, soft: Tensor, out: Tensor, offsets: Tensor | None, tau: float
) -> Tensor:
    gradient = gradient.contiguous()
    module, level = extension
    rows = _rows(soft, offsets)
    threads = torch.get_num_threads()
    module.softmax_backward(level, gradient.data_ptr(), soft.data_ptr(), out.data_ptr(), *rows, 1 / tau, threads)
    return out


def norm_forward(
    x: Tensor, keep: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor, means: Tensor, scales: Tensor,
    eps: float, centre: bool,
) -> None:  # fmt: skip
    """Normalises rows by the statistics of their kept positions; all tensors contiguous float32.

    Args:
        x: Rows, ``[..., columns]``.
        keep: 0 and 1, ``[columns]``.
        weight: Factors ``[columns]`` or ``None``.
        bias: Offsets ``[columns]`` or ``None``.
        out: Where the normalised rows go.
        means: Where the rows' means go, ``[rows]``, if ``centre``.
        scales: Where the rows' factors go, ``[rows]``.
        eps: Added to the variance or mean square.
        centre: Whether the mean is taken off.
    """
    _norm_forward(_extension(), x, keep, weight, bias, out, means, scales, eps, centre)


def norm_backward(
    gradient: Tensor, x: Tensor, keep: Tensor, weight: Tensor | None, means: Tensor, scales: Tensor, to_x: Tensor,
    eps: float, centre: bool,
) -> Tensor:  # fmt: skip
    """The gradient of :func:`norm_forward`: that of the rows is written to ``to_x``.

    Returns:
        The gradients of mask, weight and bias, ``[3, columns]``.
    """
    return _norm_backward(_extension(), gradient, x, keep, weight, means, scales, to_x, eps, centre)


def product_forward(x: Tensor, gate: Tensor, view: tuple[int, int, int], out: Tensor) -> None:
    """Multiplies runs of elements by the gate of their channel; all tensors float32.

    Args:
        x: Rows of channels of runs of elements, dense in memory in this order.
        gate: One number for each channel, contiguous.
        view: Number of rows, of channels, and of elements in a run.
        out: Where the product goes, laid out as ``x``.
    """
    _product_forward(_extension(), x, gate, view, out)


def product_backward(gradient: Tensor, x: Tensor, gate: Tensor, view: tuple[int, int, int],
                     out: Tensor | None) -> Tensor:  # fmt: skip
    """The gradient of :func:`product_forward`: that of ``x`` is written to ``out``, if there is one.

    Returns:
        The gradient of the gate, in its shape.
    """
    return _product_backward(_extension(), gradient, x, gate, view, out)


def _product_forward(extension: Extension, x: Tensor, gate: Tensor, view: tuple[int, int, int], out: Tensor) -> None:
    module, level = extension
    module.product_forward(level, x.data_ptr(), gate.data_ptr(), out.data_ptr(), *view, torch.get_num_threads())


def _product_backward(extension: Extension, gradient: Tensor, x: Tensor, gate: Tensor, view: tuple[int, int, int],
                      out: Tensor | None) -> Tensor:  # fmt: skip
    module, level = extension
    to_gate = torch.empty_like(gate)
    module.product_backward(
        level, gradient.data_ptr(), x.data_ptr(), gate.data_ptr(), 0 if out is None else out.data_ptr(),
        to_gate.data_ptr(), *view, torch.get_num_threads(),
    )  # fmt: skip
    return to_gate


def _matrix(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _norm_forward(
    extension: Extension, x: Tensor, keep: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor,
    means: Tensor, scales: Tensor, eps: float, centre: bool,
) -> None:  # fmt: skip
    module, level = extension
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (x, keep, weight, bias, out, means, scales)]
    module.norm_forward(level, *addresses, *_matrix(x), eps, centre, torch.get_num_threads())


def _norm_backward(
    extension: Extension, gradient: Tensor, x: Tensor, keep: Tensor, weight: Tensor | None, means: Tensor,
    scales: Tensor, to_x: Tensor, eps: float, centre: bool,
) -> Tensor:  # fmt: skip
    module, level = extension
    threads = torch.get_num_threads()
    sums = x.new_empty(threads, 3, x.shape[-1])
    tensors = (gradient, x, keep, weight, means, scales, to_x, sums)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    shares = module.norm_backward(level, *addresses, *_matrix(x), eps, centre, threads)
    return sums[0] if shares == 1 else sums[:shares].sum(0)
