"""What every module of the zoo is made of: an input, and units written down as sets of positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

Unit = dict[tuple[str, int], tuple[int, ...]]

ZOO: dict[str, type[Tricky]] = {}


class Tricky(nn.Module):
    """Base: an input shape and the declared units."""

    input_shape: tuple[int, ...] = (2, 3, 8, 8)

    def __init_subclass__(cls) -> None:
        if not cls.__name__.startswith("_"):  # a base of several
            ZOO.setdefault(cls.__name__, cls)  # an edited module gets a subclass of the same name

    def example(self) -> Any:
        return torch.randn(self.input_shape, dtype=torch.float64)

    def units(self) -> Iterator[Unit]:
        raise NotImplementedError


def conv_out(name: str, *at: int, bias: bool = True) -> Unit:
    """A convolution or linear layer's output channels."""
    return {(f"{name}.weight", 0): at} | ({(f"{name}.bias", 0): at} if bias else {})


def conv_in(name: str, *at: int) -> Unit:
    return {(f"{name}.weight", 1): at}


def norm(name: str, *at: int) -> Unit:
    """Batch normalisation's vectors."""
    return {(f"{name}.{part}", 0): at for part in ("weight", "bias", "running_mean", "running_var")}


def affine(name: str, *at: int) -> Unit:
    return {(f"{name}.weight", 0): at, (f"{name}.bias", 0): at}
