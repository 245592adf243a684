"""The samplers as Triton kernels, for tensors on a GPU (or on the CPU, in Triton's interpreter).

Nothing is saved for backward but the logits and the two numbers that the noise is made of.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from prunegate.gumbel import aten, reference
from prunegate.gumbel.arguments import Options, estimator_tau, is_plain_eager, refuse_impossible_rows
from prunegate.gumbel.philox import Philox, take_state

# Rows of up to this many columns are held whole in the registers of a program; longer ones are looped over.
WHOLE_ROW = 4096
# Elements of a program: many short rows, or one step of the loop over a long one.
ELEMENTS = 2048
# Programs that are enough to keep a large GPU busy; where long rows are fewer, several share one.
PROGRAMS = 1024

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Plan(NamedTuple):
    """How a kernel is launched.

    Attributes:
        whole: Whether a program holds whole rows; otherwise it loops over the columns of one.
        quarter: A quarter of the columns in a block.
        rows: Rows in a block.
        warps: Warps of a program.
        parts: Programs that share a row.
    """

    whole: bool
    quarter: int
    rows: int
    warps: int
    parts: int = 1

    @property
    def span(self) -> int:
        """Columns of one step of a program's loop."""
        return 4 * self.quarter


def plan_rows(columns: int, ragged: bool, rows: int = PROGRAMS) -> Plan:
    """The block that suits ``rows`` rows of ``columns`` categories, on average where they are ragged."""
    quarter = 1
    while 4 * quarter < columns:
        quarter *= 2
    if ragged:
        # Most rows take one step of the loop, and few lanes of it are idle.
        quarter = min(max(quarter, 32), ELEMENTS // 4)
        return Plan(False, quarter, 1, max(1, 4 * quarter // 512))
    if columns > WHOLE_ROW:
        steps = -(-columns // (2 * ELEMENTS))
        return Plan(False, ELEMENTS // 2, 1, 8, min(steps, max(1, PROGRAMS // max(rows, 1))))
    return Plan(True, quarter, max(1, ELEMENTS // (4 * quarter)), 8 if columns > 2048 else 4)


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def availability() -> str:
    """``"available"`` and where, or why there is nothing to run kernels on."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreting():
        return "available, in the interpreter"
    if not torch.cuda.is_available():
        return "there is no GPU; TRITON_INTERPRET=1 runs the kernels in Python"
    return f"available, {torch.cuda.get_device_name()}"


def takes(logits: Tensor, options: Options, binary: bool) -> bool:
    """Whether these kernels can sample this; what they cannot, torch's own operations do."""
    tau = estimator_tau(options)
    return (
        (logits.is_cuda or interpreting())
        and logits.dtype in DTYPES
        and (options.plain or options.hard)
        and (options.hard or options.tau_backward is None)
        and not (isinstance(tau, Tensor) and tau.requires_grad)
        and is_plain_eager(logits)
        and availability().startswith("available")
    )


def sample_softmax(
    logits: Tensor,
    options: Options,
    dim: int,
    offsets: Tensor | None,
    generator: torch.Generator | Philox | None,
) -> Tensor:
    """Draws noise and samples along ``dim``, or in each of the rows that ``offsets`` mark in flat logits."""
    columns = logits.shape[dim] if logits.dim() else 1
    if not (options.plain or plan_rows(columns, offsets is not None).whole):
        # In a loop over columns, other estimators would need as many passes more; torch's operations serve as well.
        return aten.sample_softmax(logits.float(), options, dim, offsets, generator).to(logits.dtype)
    refuse_impossible_rows(logits, dim, offsets)
    state = take_state(generator, logits.device)
    if offsets is not None:
        return _Softmax.apply(logits.contiguous(), options, offsets, state)
    moved = logits.reshape(1) if logits.dim() == 0 else logits.movedim(dim, -1)
    sample = _Softmax.apply(moved.reshape(-1, moved.shape[-1]).contiguous(), options, None, state).reshape(moved.shape)
    return sample.reshape(()) if logits.dim() == 0 else sample.movedim(-1, dim).contiguous()


def sample_sigmoid(logits: Tensor, options: Options, generator: torch.Generator | Philox | None) -> Tensor:
    """Draws noise and samples one gate a logit."""
    return _Sigmoid.apply(logits.contiguous(), options, take_state(generator, logits.device))


def _kernels() -> ModuleType:
    # Imported on first use: Triton decides at import whether it interprets, and not every machine has it.
    return importlib.import_module("prunegate.gumbel.kernels")


def _tau(options: Options) -> tuple[float | Tensor, bool]:
    # A temperature on the device is read there; looking at it here would make the host wait.
    tau = estimator_tau(options)
    if isinstance(tau, Tensor) and tau.device.type == "cpu" and not interpreting():
        return float(tau), False
    return (tau, True) if isinstance(tau, Tensor) else (float(tau), False)


class _Sigmoid(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, options: Options, state: Tensor) -> Tensor:
        ctx.save_for_backward(logits, state)
        ctx.options = options
        out = torch.empty_like(logits)
        tau, pointer = _tau(options)
        grid = (-(-logits.numel() // ELEMENTS),)
        flags = {"HARD": options.hard, "POINTER": pointer, "QUARTER": ELEMENTS // 4, "FAST": not interpreting()}
        _kernels().gates_forward[grid](logits, out, state, tau, logits.numel(), **flags)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, state = ctx.saved_tensors
        tau, pointer = _tau(ctx.options)
        if torch.is_grad_enabled() or not is_plain_eager(gradient):
            noises = [reference.philox_logistic(state, logits, draw) for draw in range(1 + ctx.options.rao_samples)]
            return _oracle_gradient(
                lambda x: reference.sigmoid(x, noises[0], ctx.options, noises[1:]), logits, gradient
            )
        gradient = gradient.contiguous()
        out = torch.empty_like(logits)
        grid = (-(-logits.numel() // ELEMENTS),)
        flags = {"POINTER": pointer, "QUARTER": ELEMENTS // 4, "FAST": not interpreting(), **_estimator(ctx.options)}
        _kernels().gates_backward[grid](gradient, logits, out, state, tau, logits.numel(), **flags)
        return out, None, None


class _Softmax(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, options: Options, offsets: Tensor | None, state: Tensor) -> Tensor:
        ctx.save_for_backward(logits, state)
        ctx.options, ctx.offsets = options, offsets
        out = torch.empty_like(logits)
        _launch("forward", [logits, out], options, offsets, state, HARD=options.hard)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, state = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain_eager(gradient):
            count, offsets = 1 + ctx.options.rao_samples, ctx.offsets
            noises = [reference.philox_gumbel(state, logits, -1, offsets, draw) for draw in range(count)]
            return (*_oracle_gradient(
                lambda x: reference.rows_softmax(x, noises, ctx.options, -1, offsets), logits, gradient
            ), None)  # fmt: skip
        out = torch.empty_like(logits)
        _launch("backward", [gradient.contiguous(), logits, out], ctx.options, ctx.offsets, state)
        return out, None, None, None


def _launch(
    direction: str, tensors: list[Tensor], options: Options, offsets: Tensor | None, state: Tensor, **flags: int | bool
) -> None:
    logits = tensors[-2]
    ragged = offsets is not None
    rows, columns = logits.shape if offsets is None else (len(offsets) - 1, logits.numel() // max(1, len(offsets) - 1))
    plan = plan_rows(columns, ragged, rows)
    tau, flags["POINTER"] = _tau(options)
    flags["FAST"] = not interpreting()
    kernels = _kernels()
    if plan.whole:
        if direction == "backward":
            flags |= _estimator(options)
        kernel = kernels.tile_forward if direction == "forward" else kernels.tile_backward
        kernel[(-(-rows // plan.rows),)](
            *tensors, state, tau, rows, columns, QUARTER=plan.quarter, ROWS=plan.rows, num_warps=plan.warps, **flags
        )
        return
    block = {"QUARTER": plan.quarter, "num_warps": plan.warps}
    # A tensor stands in for what is absent; the flags keep the kernels from reading it.
    places = state if offsets is None else offsets
    # Each of a row's programs takes as many whole steps.
    span = -(-columns // (plan.parts * plan.span)) * plan.span
    count = -(-columns // span)
    if direction == "forward" and count > 1 and options.hard and not ragged:
        parts, winners = (state.new_empty(rows, count, dtype=kind) for kind in (torch.float32, torch.int32))
        kernels.row_winners[(rows, count)](*tensors, parts, winners, state, columns, span, FAST=flags["FAST"], **block)
        kernels.row_choice[(rows,)](tensors[-1], parts, winners, columns, count, PARTS=_power(count), **block)
    elif direction == "forward":
        kernels.row_forward[(rows,)](*tensors, places, state, tau, columns, RAGGED=ragged, **block, **flags)
    else:
        parts, shared = state, count > 1 and not ragged
        if shared:
            parts = state.new_empty(rows, count, 3, dtype=torch.float32)
            kernels.row_sums[(rows, count)](*tensors[:2], parts, state, tau, columns, span, **block, **flags)
        kernels.row_backward[(rows, count if shared else 1)](
            *tensors, places, parts, state, tau, columns, span, RAGGED=ragged, PARTS=_power(count) if shared else 0,
            **block, **flags,
        )  # fmt: skip


def _power(count: int) -> int:
    """The least power of two that is not below ``count``."""
    return 1 << (count - 1).bit_length()


def _estimator(options: Options) -> dict[str, int | bool]:
    return {"DRAWS": options.rao_samples, "REINMAX": options.estimator == "reinmax"}


def _oracle_gradient(sample: Callable[[Tensor], Tensor], logits: Tensor, gradient: Tensor) -> tuple[Tensor, None, None]:
    """The gradient in torch's operations on the same noise, for second derivatives and batched gradients."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        source = logits if logits.requires_grad else logits.detach().requires_grad_()
        found = torch.autograd.grad(sample(source), source, gradient, create_graph=again)[0]
    return found, None, None
