"""What several processes of one training agree on: one says it, or all are asked."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor

__all__ = ["averaged", "everywhere", "from_first", "is_first", "several", "text_from_first"]


def several() -> bool:
    """Whether there is more than one process."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1


def is_first() -> bool:
    """Whether this is the first process, or the only one."""
    return not several() or torch.distributed.get_rank() == 0


def averaged(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """The mean over all ranks, float64 on the CPU; ``None`` where there is none or it is not finite."""
    if several():
        # A rank without a gradient takes part, or the others would wait for it.
        gradient = torch.zeros_like(like) if gradient is None else gradient.detach().clone()
        torch.distributed.all_reduce(gradient)
        gradient = gradient / torch.distributed.get_world_size()
    if gradient is None or not bool(gradient.isfinite().all()):
        return None
    return gradient.detach().cpu().double()


def from_first(values: Tensor, device: torch.device) -> Tensor:
    """The first rank's values, on the CPU where there are several ranks; ``device`` is where messages travel."""
    if not several():
        return values
    shared = values.to(device)
    torch.distributed.broadcast(shared, 0)
    return shared.cpu()


def everywhere(fine: bool, device: torch.device) -> bool:
    """Whether all ranks say so; comes back when all of them have."""
    if not several():
        return fine
    votes = torch.tensor([int(fine)], device=device)
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
    return bool(votes.item())


def text_from_first(text: str, device: torch.device) -> str:
    """The first rank's text; what the others give does not matter."""
    if not several():
        return text
    written = text.encode()
    size = int(from_first(torch.tensor([len(written)]), device))
    letters = torch.zeros(size, dtype=torch.uint8)
    if is_first():
        letters = torch.frombuffer(bytearray(written), dtype=torch.uint8) if size else letters
    return bytes(from_first(letters, device).tolist()).decode() if size else ""
