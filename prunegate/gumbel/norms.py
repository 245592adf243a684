"""LayerNorm and RMSNorm over kept positions: what the norm will compute once the others are cut away.

Statistics are weighted by ``keep``, sum(keep * x) / sum(keep), and are differentiated through it, the count too. On a
GPU one kernel replaces the several passes over memory that torch's operations make; elsewhere those are used.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from prunegate.errors import SamplerError
from prunegate.gumbel import triton
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
    fits = x.numel() > 0 and x.shape[-1] <= WIDEST and x.dtype in triton.DTYPES
    on_device = (x.is_cuda or triton.interpreting()) and triton.availability().startswith("available")
    if fits and on_device and is_plain_eager(x) and is_plain_eager(keep):
        rows = _MaskedNorm.apply(x.reshape(-1, x.shape[-1]), keep, weight, bias, eps, centre)
        return rows.reshape(x.shape)
    return plain_norm(x, keep, weight, bias, eps, centre)


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
        rows, columns = x.shape
        out = torch.empty_like(x)
        scales = torch.empty(rows, dtype=torch.float32, device=x.device)
        means = torch.empty_like(scales) if centre else scales
        flags = {"CENTRE": centre, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
        # A tensor stands in for each that is absent; the flags keep the kernel from reading it.
        _kernels().norm_forward[(rows,)](
            x, keep, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(), out,
            means, scales, columns, eps, WIDTH=_width(columns), num_warps=launch_warps(columns), **flags,
        )  # fmt: skip
        ctx.save_for_backward(x, keep, weight, bias, means, scales)
        ctx.eps, ctx.centre = eps, centre
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, weight, bias, means, scales = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain_eager(gradient):
            return _differentiable_backward(ctx, gradient, x, keep, weight, bias)
        rows, columns = x.shape
        shares = min(rows, SHARES)
        to_x = torch.empty_like(x)
        sums = torch.empty(3, shares, columns, dtype=torch.float32, device=x.device)
        _kernels().norm_backward[(shares,)](
            gradient.contiguous(), x, keep, x if weight is None else weight.contiguous(), means, scales, to_x, sums[0],
            sums[1], sums[2], rows, columns, ctx.eps, CENTRE=ctx.centre, HAS_WEIGHT=weight is not None,
            WIDTH=_width(columns), num_warps=launch_warps(columns),
        )  # fmt: skip
        to_keep, to_weight, to_bias = sums.sum(1)
        return (
            to_x,
            to_keep.to(keep.dtype),
            None if weight is None else to_weight.to(weight.dtype),
            None if bias is None else to_bias.to(bias.dtype),
            None,
            None,
        )


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
