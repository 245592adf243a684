"""Which implementations there are, what each can take, and which one is used when the caller leaves it open."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from prunegate.errors import SamplerError
from prunegate.gumbel import aten, reference
from prunegate.gumbel.arguments import Options
from prunegate.gumbel.philox import Philox

NAMES = ("reference", "aten")


def backends() -> dict[str, str]:
    """What can sample on this machine.

    Returns:
        For each backend, ``"available"`` or the reason why it is not.

    Example:
        >>> backends()["reference"]
        'available'
    """
    return dict.fromkeys(NAMES, "available")


def choose(
    backend: str, logits: Tensor, options: Options, generator: torch.Generator | Philox | None, ragged: bool
) -> ModuleType:
    """The module that samples: the one asked for, or the fastest that can.

    Raises:
        SamplerError: If there is no such backend, or the one asked for cannot take these arguments here.
    """
    if backend == "reference":
        return reference
    if backend in ("aten", "auto"):
        return aten
    raise SamplerError(f"backend must be 'auto' or one of {', '.join(NAMES)}, not {backend!r}.")
