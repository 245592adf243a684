"""Least squares for one layer: its inputs as rows of a matrix, and the normal equations of those rows, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LINEAR", "LinearCall", "Moments", "Normal"]

_PATCHES = {"conv1d": 1, "conv2d": 2, "conv3d": 3}

LINEAR = frozenset({"linear", *_PATCHES})
"""Names of the functions that a :class:`LinearCall` understands."""


class LinearCall:
    """A call of a linear map or a convolution, its inputs as rows of a matrix.

    Inputs are seen as the function sees them, so padding that a module does by itself is in them.
    """

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, args, strict=False)) | kwargs
        self.input: Tensor = given["input"]
        self.weight: Tensor = given["weight"]
        self.bias: Tensor | None = given.get("bias")
        self.spatial = _PATCHES.get(name, 0)
        self.groups: int = given.get("groups", 1) if self.spatial else 1
        if self.spatial:
            self.stride, self.dilation = self._each(given.get("stride", 1)), self._each(given.get("dilation", 1))
            padding = given.get("padding", 0)
            if padding == "same":
                total = [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
                self.padding = [(t // 2, t - t // 2) for t in total]
            else:
                self.padding = [(p, p) for p in self._each(0 if padding == "valid" else padding)]

    def _each(self, value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * self.spatial if len(values) == 1 else values

    def outputs(self, out: Tensor) -> Tensor:
        """The outputs as rows ``[rows, channels]``, image by image."""
        return out.movedim(1, -1).flatten(0, -2) if self.spatial else out.flatten(0, -2)

    def inputs(self, places: Tensor) -> Tensor:
        """The inputs of the given rows, ``[groups, rows, inputs of one output]``."""
        if not self.spatial:
            return self.input.flatten(0, -2)[places][None]
        padded = F.pad(self.input, [side for pair in reversed(self.padding) for side in pair])
        kernel = self.weight.shape[2:]
        patches = padded
        for dim, (size, step, dilation) in enumerate(zip(kernel, self.stride, self.dilation, strict=True), start=2):
            patches = patches.unfold(dim, dilation * (size - 1) + 1, step)[..., ::dilation]
        # A view of all patches, [batch, channels, *places, *kernel], of which only the wanted ones are read.
        sites = patches.shape[2 : 2 + self.spatial]
        index, rest = [], places
        for size in reversed(sites):
            index.append(rest % size)
            rest = rest // size
        taken = patches.movedim(1, self.spatial + 1)[(rest, *reversed(index))]  # [rows, channels, *kernel]
        return taken.unflatten(1, (self.groups, -1)).flatten(2).movedim(1, 0)

    def flat_weight(self) -> Tensor:
        """The weight as ``[groups, inputs, outputs]``."""
        return self.weight.detach().flatten(1).unflatten(0, (self.groups, -1)).transpose(1, 2)


@dataclass
class Moments:
    """Mean and squares about it, of rows that come in parts (Chan, Golub and LeVeque, 1979, equation 2.1).

    Attributes:
        count: Number of values of each channel.
        mean: float64 ``[channels]``.
        squares: Sum of squares about the mean, float64 ``[channels]``.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Of each channel (dimension 1) of a tensor, a few images at a time: the whole in float64 is twice as large."""
        dims = [dim for dim in range(x.dim()) if dim != 1]
        found: Moments | None = None
        for part in x.split(16):
            variance, mean = torch.var_mean(part.double(), dims, correction=0)
            count = part.numel() // max(1, part.shape[1])
            own = cls(count, mean, variance * count)
            found = own if found is None else found + own
        assert found is not None
        return found

    @property
    def variance(self) -> Tensor:
        """Without Bessel's correction, ``[channels]``."""
        return self.squares / self.count

    def __getitem__(self, index: Tensor) -> Moments:
        return Moments(self.count, self.mean[index], self.squares[index])

    def __add__(self, other: Moments) -> Moments:
        count, apart = self.count + other.count, other.mean - self.mean
        squares = self.squares + other.squares + apart.square() * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), squares)


@dataclass
class Normal:
    """The normal equations of some rows, for each group; two of them add up to those of all the rows.

    Attributes:
        gram: ``[groups, inputs, inputs]``, of inputs less their mean where there is a shift.
        cross: ``[groups, inputs, outputs]``, likewise.
        square: Sum of the squares of the outputs, likewise.
        spread: Sum of the squares of the outputs about their mean.
        mean_in: ``[groups, 1, inputs]``.
        mean_out: ``[groups, 1, outputs]``.
        rows: Number of rows.
        shifted: Whether a bias, or a batch norm's mean, takes any shift.
    """

    gram: Tensor
    cross: Tensor
    square: float
    spread: float
    mean_in: Tensor
    mean_out: Tensor
    rows: int
    shifted: bool

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor, shifted: bool) -> Normal:
        """From rows ``[groups, rows, inputs]`` and ``[groups, rows, outputs]``, at least one."""
        mean_in, mean_out = inputs.mean(1, keepdim=True), outputs.mean(1, keepdim=True)
        centred = outputs - mean_out
        x, y = (inputs - mean_in, centred) if shifted else (inputs, outputs)
        gram, cross = x.transpose(1, 2) @ x, x.transpose(1, 2) @ y
        square, spread = float(y.square().sum()), float(centred.square().sum())
        return cls(gram, cross, square, spread, mean_in, mean_out, inputs.shape[1], shifted)

    def __add__(self, other: Normal) -> Normal:
        rows = self.rows + other.rows
        share = self.rows * other.rows / rows
        apart_in, apart_out = other.mean_in - self.mean_in, other.mean_out - self.mean_out
        gram, cross, square = self.gram + other.gram, self.cross + other.cross, self.square + other.square
        between = share * float(apart_out.square().sum())
        if self.shifted:
            gram = gram + share * apart_in.transpose(1, 2) @ apart_in
            cross = cross + share * apart_in.transpose(1, 2) @ apart_out
            square += between
        weight = other.rows / rows
        return Normal(gram, cross, square, self.spread + other.spread + between, self.mean_in + weight * apart_in,
                      self.mean_out + weight * apart_out, rows, self.shifted)  # fmt: skip

    def solve(self, old: Tensor, ridge: float) -> tuple[Tensor, Tensor | None]:
        """Weights ``[groups, inputs, outputs]`` and the shift ``[groups, outputs]`` that goes with them.

        Args:
            old: The weights that the ridge pulls to.
            ridge: Its strength, as a share of the mean square of the inputs.
        """
        size = self.gram.shape[-1]
        pull = ridge * self.gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
        eye = torch.eye(size, dtype=self.gram.dtype, device=self.gram.device)
        system = self.gram + pull[:, None, None] * eye
        factor = torch.linalg.cholesky_ex(system)[0]
        weight = old + torch.cholesky_solve(self.cross - self.gram @ old, factor)
        shift = (self.mean_out - self.mean_in @ weight).squeeze(1) if self.shifted else None
        return weight, shift

    def error(self, weight: Tensor, shift: Tensor | None) -> float:
        """Sum of squared errors of the rows; the best shift is taken where there is one but none is given."""
        fit = (weight * (self.gram @ weight - 2 * self.cross)).sum()
        value = self.square + float(fit)
        if self.shifted and shift is not None:
            value += self.rows * float((self.mean_out - self.mean_in @ weight - shift[:, None]).square().sum())
        return max(value, 0.0)
