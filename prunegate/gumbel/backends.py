"""Which implementations there are, what each can take, and which one is used when the caller leaves it open."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from prunegate.errors import SamplerError
from prunegate.gumbel import aten, cpu, reference, triton
from prunegate.gumbel.arguments import Options

NAMES = ("reference", "aten", "cpu", "triton")


def backends() -> dict[str, str]:
    """What can sample on this machine.

    Returns:
        For each backend, a text that begins with ``"available"``, or the reason why it is not.

    Example:
        >>> backends()["reference"]
        'available'
    """
    return {"reference": "available", "aten": "available", "cpu": cpu.availability(), "triton": triton.availability()}


def choose(backend: str, logits: Tensor, options: Options, binary: bool) -> ModuleType:
    """The module that samples: the one asked for, or the fastest that can.

    Kernels give way to torch's own operations, also where they were asked for by name, when a compiler or a
    transform looks on, in float64, and for the estimators that they do not have.

    Raises:
        SamplerError: If there is no such backend, or the one asked for cannot take these arguments here.
    """
    if backend == "auto":
        if logits.is_cuda:
            return triton if triton.takes(logits, options, binary) else aten
        return cpu if cpu.takes(logits, options, binary) else aten
    if backend == "reference":
        return reference
    if backend == "aten":
        return aten
    if backend == "cpu":
        if logits.device.type != "cpu":
            raise SamplerError(f"backend='cpu' samples tensors on the CPU, not on {logits.device}; leave it to 'auto'.")
        if not torch.compiler.is_compiling() and cpu.load()[0] is None:
            raise SamplerError(f"backend='cpu' is not available here: {cpu.availability()}.")
        return cpu if cpu.takes(logits, options, binary) else aten
    if backend == "triton":
        if not torch.compiler.is_compiling() and not triton.availability().startswith("available"):
            raise SamplerError(f"backend='triton' is not available here: {triton.availability()}.")
        if not (logits.is_cuda or triton.interpreting()):
            raise SamplerError(f"backend='triton' samples tensors on a GPU, not on {logits.device}.")
        return triton if triton.takes(logits, options, binary) else aten
    raise SamplerError(f"backend must be 'auto' or one of {', '.join(NAMES)}, not {backend!r}.")
