"""Planes: integer tensors of labels that broadcast to a tensor's shape.

A plane has size 1 along every dimension on which its labels do not vary. An element of the tensor is gone when the
label of any of its planes is gone.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compress", "is_line", "pad_to", "place", "varying"]


def varying(plane: Tensor) -> frozenset[int]:
    """The dimensions along which ``plane`` has more than one position."""
    return frozenset([dim for dim, size in enumerate(plane.shape) if size > 1])


def is_line(plane: Tensor) -> bool:
    """Whether ``plane`` varies along one dimension at most."""
    return max(plane.shape, default=1) == plane.numel()


def compress(plane: Tensor) -> Tensor:
    """Shrinks to size 1 every dimension along which all slices are equal."""
    for dim, size in enumerate(plane.shape):
        if size > 1:
            first = plane.narrow(dim, 0, 1)
            if plane.stride(dim) == 0 or torch.equal(plane, first.expand_as(plane)):
                plane = first
    return plane


def pad_to(plane: Tensor, ndim: int) -> Tensor:
    """Prepends dimensions of size 1 until ``plane`` has ``ndim`` of them, as broadcasting does."""
    return plane.reshape((1,) * (ndim - plane.dim()) + tuple(plane.shape)) if plane.dim() < ndim else plane


def place(labels: Tensor, dim: int, ndim: int) -> Tensor:
    """A plane of ``ndim`` dimensions that carries the one-dimensional ``labels`` along ``dim``."""
    shape = [1] * ndim
    shape[dim] = labels.numel()
    return labels.reshape(shape)
