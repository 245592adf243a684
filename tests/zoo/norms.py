"""Statistics over labelled positions, in every form in which people write them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.base import Tricky, Unit, affine, conv_in, conv_out


class LayerNorm2dByHand(Tricky):
    """Mean and variance over channels, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        mean = x.mean(1, keepdim=True)
        var = x.var(1, keepdim=True, unbiased=False)
        return self.head(self.b((x - mean) / (var + 1e-5).sqrt() * self.scale).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            yield conv_out("a", i) | {("scale", 0): (i,)} | conv_in("b", i)
        for i in range(4):
            yield conv_out("b", i) | conv_in("head", i)


class GroupNorms(Tricky):
    """One group is a statistic over all channels; of several groups whole ones go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.one, self.b = nn.Conv2d(3, 6, 1), nn.GroupNorm(1, 6), nn.Conv2d(6, 8, 1)
        self.two, self.head = nn.GroupNorm(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.b(self.one(self.a(x)).relu())).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            yield conv_out("a", i) | affine("one", i) | conv_in("b", i)
        for g in range(4):
            pair = (2 * g, 2 * g + 1)
            yield conv_out("b", *pair) | affine("two", *pair) | conv_in("head", *pair)


class SoftmaxOverChannels(Tricky):
    """A softmax over a labelled dimension counts kept positions only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).softmax(1).amax((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            yield conv_out("a", i) | conv_in("head", i)


class ResponseNorm(Tricky):
    """Global response normalisation: each channel's norm over positions, against the mean of all channels' norms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 2)
        self.gamma = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.a(x)).permute(0, 2, 3, 1)
        norms = x.norm(p=2, dim=(1, 2), keepdim=True)
        x = x + x * (norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)) * self.gamma
        return self.head(self.b(x.permute(0, 3, 1, 2)).mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            yield conv_out("a", i) | {("gamma", 0): (i,)} | conv_in("b", i)
        for i in range(4):
            yield conv_out("b", i) | conv_in("head", i)
