"""The samplers as Triton kernels, for tensors on a GPU (or on the CPU, in Triton's interpreter).

Nothing is saved for backward but the logits and the two numbers that the noise is made of.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from prunegate.gumbel import aten, reference
from prunegate.gumbel.arguments import Options, estimator_tau, is_plain_eager, refuse_impossible_rows
from prunegate.gumbel.philox import Philox, take_state

# Rows of up to this many columns are held whole in the registers of a program; longer ones are shared by several.
WHOLE_ROW = 4096
# Elements of a program: many short rows at once.
ELEMENTS = 2048

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Plan(NamedTuple):
    """How a kernel is launched.

    Attributes:
        quarter: A quarter of the columns in a block.
        rows: Rows in a block.
        warps: Warps of a program.
        parts: Programs that share a row.
    """

    quarter: int
    rows: int
    warps: int
    parts: int = 1


def plan_rows(columns: int) -> Plan:
    """The block that suits rows of ``columns`` categories, on average where they are ragged."""
    quarter = _power(-(-min(columns, WHOLE_ROW) // 4))
    warps = 8 if columns > 2048 else 4
    return Plan(quarter, max(1, ELEMENTS // (4 * quarter)), warps, -(-columns // (4 * quarter)))


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
    rows: Tensor, options: Options, offsets: Tensor | None, generator: torch.Generator | Philox | None
) -> Tensor:
    """Draws noise and samples along the last dimension, or in each of the rows that ``offsets`` mark in flat logits."""
    if not options.plain and (offsets is not None or plan_rows(rows.shape[-1]).parts > 1):
        # Over several programs or steps, other estimators would need more passes; torch's operations serve as well.
        return aten.sample_softmax(rows.float(), options, offsets, generator).to(rows.dtype)
    refuse_impossible_rows(rows, offsets)
    return _Softmax.apply(rows.contiguous(), options, offsets, take_state(generator, rows.device))


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
            return reference.gradient_again(reference.draw_sigmoid, logits, gradient, ctx.options, state), None, None
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
        _launch(None, logits, out, options, offsets, state)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, state = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain_eager(gradient):
            found = reference.gradient_again(reference.draw_softmax, logits, gradient, ctx.options, ctx.offsets, state)
            return found, None, None, None
        out = torch.empty_like(logits)
        _launch(gradient.contiguous(), logits, out, ctx.options, ctx.offsets, state)
        return out, None, None, None


def _launch(
    gradient: Tensor | None, logits: Tensor, out: Tensor, options: Options, offsets: Tensor | None, state: Tensor
) -> None:
    """Samples into ``out``; or writes the gradient of the logits there, where there is one of the sample."""
    rows = logits.numel() // logits.shape[-1] if offsets is None else len(offsets) - 1
    columns = logits.numel() // max(1, rows)
    plan = plan_rows(columns)
    tau, pointer = _tau(options)
    kernels, fast = _kernels(), not interpreting()
    backward = gradient is not None
    block = {"QUARTER": plan.quarter, "num_warps": plan.warps}
    shared: dict[str, Any] = {**block, "POINTER": pointer}
    grid = (-(-rows // plan.rows),)
    winners = options.hard and not backward
    if offsets is None and plan.parts == 1:
        shared |= {"ROWS": plan.rows, "FAST": fast}
        if backward:
            shared |= _estimator(options)
            kernels.tile_backward[grid](gradient, logits, out, state, tau, rows, columns, **shared)
        else:
            kernels.tile_forward[grid](logits, out, state, tau, rows, columns, HARD=options.hard, **shared)
        return
    # A tensor stands in for the gradient where there is none; a flag keeps the kernels from reading it.
    incoming = logits if gradient is None else gradient
    # What a kernel leaves for the next must not be rounded to half precision.
    work = out if winners or out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    if offsets is not None and winners:
        kernels.ragged_winners[grid](logits, out, offsets, state, rows, ROWS=plan.rows, FAST=fast, **block)
    elif offsets is not None:
        shared |= {"ROWS": plan.rows, "FAST": fast, "GRADIENT": backward}
        kernels.ragged_sums[grid](incoming, logits, work, out, offsets, state, tau, rows, **shared)
    elif winners:
        parts, columns_won = (state.new_empty(rows, plan.parts, dtype=kind) for kind in (torch.float32, torch.int32))
        kernels.part_winners[(rows, plan.parts)](logits, out, parts, columns_won, state, columns, FAST=fast, **block)
        kernels.row_choice[(rows,)](out, parts, columns_won, columns, plan.parts, PARTS=_power(plan.parts), **block)
    else:
        both = (rows, plan.parts)
        parts = state.new_empty(rows, plan.parts, 3, dtype=torch.float32)
        kernels.part_sums[both](
            incoming, logits, work, parts, state, tau, columns, GRADIENT=backward, FAST=fast, **shared
        )
        kernels.part_finish[both](
            incoming, work, out, parts, tau, columns, GRADIENT=backward, PARTS=_power(plan.parts), **shared
        )


def _power(count: int) -> int:
    """The least power of two that is not below ``count``."""
    return 1 << (count - 1).bit_length()


def _estimator(options: Options) -> dict[str, int | bool]:
    return {"DRAWS": options.rao_samples, "REINMAX": options.estimator == "reinmax"}
