"""LayerNorm and RMSNorm over kept positions: what the norm will compute once the others are cut away.

Statistics are weighted by ``keep``, sum(keep * x) / sum(keep), and are differentiated through it, the count too. One
kernel, in Triton or C, replaces the several passes over memory that torch's operations make; where neither can run,
and where something looks on that must see torch's operations, those are used.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from prunegate.errors import SamplerError
from prunegate.gumbel import cpu, triton
from prunegate.gumbel.arguments import is_plain_eager

# A row is held in the registers of one program.
WIDEST = 16_384
# Programs of the backward kernel, each with a share of the sums over rows: a few for each processor of a large GPU.
SHARES = 512


def masked_layer_norm(
    x: Tensor, keep: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """LayerNorm over the last dimension with statistics of the kept positions only.

    Args:
        x: What is normalised, ``[..., columns]``.
        keep: 1 for the positions that stay and 0 for the others, ``[columns]``; differentiated through.
        weight: Factor of each position, ``[columns]``.
        bias: Offset of each position, ``[columns]``.
        eps: Added to the variance.

    Returns:
        The normalised tensor, with the shape and dtype of ``x``; positions that do not stay hold finite numbers.

    Raises:
        SamplerError: If ``keep`` is not flat or has another length than the last dimension.

    Example:
        >>> x, keep = torch.tensor([[1.0, 3.0, 50.0]]), torch.tensor([1.0, 1.0, 0.0])
        >>> masked_layer_norm(x, keep)[:, :2]
        tensor([[-1.0000,  1.0000]])
    """
    return _norm(x, keep, weight, bias, eps, True)


def masked_rms_norm(x: Tensor, keep: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """RMSNorm over the last dimension with the mean square of the kept positions only.

    Args:
        x: What is normalised, ``[..., columns]``.
        keep: 1 for the positions that stay and 0 for the others, ``[columns]``; differentiated through.
        weight: Factor of each position, ``[columns]``.
        eps: Added to the mean square; ``None`` is the epsilon of the dtype, as in torch.

    Returns:
        The normalised tensor, with the shape and dtype of ``x``.

    Raises:
        SamplerError: If ``keep`` is not flat or has another length than the last dimension.
    """
    return _norm(x, keep, weight, None, torch.finfo(x.dtype).eps if eps is None else eps, False)


def _norm(x: Tensor, keep: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centre: bool) -> Tensor:
    if x.dim() == 0 or keep.dim() != 1 or keep.numel() != x.shape[-1]:
        raise SamplerError(
            f"keep must be flat, with one number for each position of the last dimension of {[*x.shape]}; "
            f"its shape is {[*keep.shape]}."
        )
    tensors = [tensor for tensor in (x, keep, weight, bias) if tensor is not None]
    if x.numel() and all(map(is_plain_eager, tensors)) and (_on_gpu(x) or _in_c(tensors)):
        return _MaskedNorm.apply(x, keep, weight, bias, eps, centre)
    return plain_norm(x, keep, weight, bias, eps, centre)


def _on_gpu(x: Tensor) -> bool:
    here = (x.is_cuda or triton.interpreting()) and triton.availability().startswith("available")
    return here and x.shape[-1] <= WIDEST and x.dtype in triton.DTYPES


def _in_c(tensors: Sequence[Tensor]) -> bool:
    fits = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    return fits and cpu.load()[0] is not None


def plain_norm(x: Tensor, keep: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centre: bool) -> Tensor:
    """The masked norm in torch's operations: the oracle of the kernel, and what runs where there is none.

    Args:
        x: What is normalised, ``[..., columns]``; halves are computed in float32.
        keep: 0 and 1, ``[columns]``.
        weight: Factors ``[columns]`` or ``None``.
        bias: Offsets ``[columns]`` or ``None``.
        eps: Added to the variance or mean square.
        centre: Whether the mean is taken off.

    Returns:
        The normalised tensor, with the shape and dtype of ``x``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    value, kept = x.to(wide), keep.to(wide)
    count = kept.sum()
    if centre:
        value = value - (value * kept).sum(-1, keepdim=True) / count
    result = value * ((value.square() * kept).sum(-1, keepdim=True) / count + eps).rsqrt()
    if weight is not None:
        result = result * weight
    if bias is not None:
        result = result + bias
    return result.to(x.dtype)


class _MaskedNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keep: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centre: bool
    ) -> Tensor:
        x, keep = x.contiguous(), keep.contiguous()
        weight, bias = (None if tensor is None else tensor.contiguous() for tensor in (weight, bias))
        out = torch.empty_like(x)
        scales = torch.empty(x.numel() // x.shape[-1], dtype=torch.float32, device=x.device)
        means = torch.empty_like(scales) if centre else scales
        forward = _triton_forward if _on_gpu(x) else cpu.norm_forward
        forward(x, keep, weight, bias, out, means, scales, eps, centre)
        ctx.save_for_backward(x, keep, weight, bias, means, scales)
        ctx.eps, ctx.centre = eps, centre
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, weight, bias, means, scales = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain_eager(gradient):
            return _differentiable_backward(ctx, gradient, x, keep, weight, bias)
        to_x = torch.empty_like(x)
        backward = _triton_backward if _on_gpu(x) else cpu.norm_backward
        sums = backward(gradient.contiguous(), x, keep, weight, means, scales, to_x, ctx.eps, ctx.centre)
        inputs = (keep, weight, bias)
        return (
            to_x,
            *(None if each is None else total.to(each.dtype) for total, each in zip(sums, inputs, strict=True)),
            None,
            None,
        )


def _triton_forward(
    x: Tensor, keep: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor, means: Tensor, scales: Tensor,
    eps: float, centre: bool,
) -> None:  # fmt: skip
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    # A tensor stands in for each that is absent; the flags keep the kernel from reading it.
    _kernels().norm_forward[(rows,)](
        x, keep, x if weight is None else weight, x if bias is None else bias, out, means, scales, columns, eps,
        CENTRE=centre, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, WIDTH=_width(columns),
        num_warps=launch_warps(columns),
    )  # fmt: skip


def _triton_backward(
    gradient: Tensor, x: Tensor, keep: Tensor, weight: Tensor | None, means: Tensor, scales: Tensor, to_x: Tensor,
    eps: float, centre: bool,
) -> Tensor:  # fmt: skip
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    shares = min(rows, SHARES)
    sums = torch.empty(3, shares, columns, dtype=torch.float32, device=x.device)
    _kernels().norm_backward[(shares,)](
        gradient, x, keep, x if weight is None else weight, means, scales, to_x, sums[0], sums[1], sums[2], rows,
        columns, eps, CENTRE=centre, HAS_WEIGHT=weight is not None, WIDTH=_width(columns),
        num_warps=launch_warps(columns),
    )  # fmt: skip
    return sums.sum(1)


def _differentiable_backward(
    ctx: Any, gradient: Tensor, x: Tensor, keep: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The same gradients as a function that can be differentiated again."""
    with torch.enable_grad():
        out = plain_norm(x, keep, weight, bias, ctx.eps, ctx.centre)
    wanted = [tensor for tensor in (x, keep, weight, bias) if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, gradient, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return (
        *(next(found) if t is not None and t.requires_grad else None for t in (x, keep, weight, bias)),
        None,
        None,
    )


def _kernels() -> Any:
    return importlib.import_module("prunegate.gumbel.norm_kernels")


def _width(columns: int) -> int:
    return 1 << max(columns - 1, 0).bit_length()


def launch_warps(columns: int) -> int:
    """Warps of a program that holds a row of ``columns``."""
    return min(16, max(1, _width(columns) // 512))
