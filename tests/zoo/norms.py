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


class _TwoLayers(Tricky):
    """A linear layer, a norm over its features, another linear layer; ``normalise`` says which norm."""

    input_shape = (2, 5, 4)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.scale, self.shift = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.normalise(self.a(x)) * self.scale + self.shift).relu()).mean(1)

    def normalise(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            yield conv_out("a", i) | {("scale", 0): (i,), ("shift", 0): (i,)} | conv_in("head", i)


class RootMeanSquareByHand(_TwoLayers):
    """The mean of squares, written out."""

    def normalise(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class RootMeanSquare(_TwoLayers):
    """torch's own function."""

    def normalise(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.scale, 1e-6)


class VarianceAndMean(_TwoLayers):
    """Both statistics by one call."""

    def normalise(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
        return (x - mean) * (var + 1e-5).rsqrt()


class MeanOfSquaresMinusSquareOfMean(_TwoLayers):
    """The variance from two means, the numbers of positions being nobody's constants."""

    def normalise(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        return (x - mean) / torch.sqrt((x * x).mean(dim=-1, keepdim=True) - mean**2 + 1e-5)


class StandardDeviation(_TwoLayers):
    """With Bessel's correction, as ``std`` has it unless told otherwise."""

    def normalise(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)


class SumOverCount(_TwoLayers):
    """A divisor that is read from the shape is a constant of the dense model and stays that, in fewer positions."""

    def normalise(self, x: Tensor) -> Tensor:
        return x - x.sum(-1, keepdim=True) / x.shape[-1]


class LengthOne(_TwoLayers):
    """Vectors of length one, by the norm and a floor under it."""

    def normalise(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-8)


class LengthOneBySquares(_TwoLayers):
    """The same by squares and a sum."""

    def normalise(self, x: Tensor) -> Tensor:
        return x / (x.square().sum(-1, keepdim=True) + 1e-8).sqrt()


class LargestAbsolute(_TwoLayers):
    """Scaled by the largest feature."""

    def normalise(self, x: Tensor) -> Tensor:
        return x / (x.abs().amax(-1, keepdim=True) + 1.0)


class GroupsByHand(Tricky):
    """A norm over groups of channels, through a view: whole groups go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        b, c, h, w = x.shape
        groups = x.reshape(b, c // 2, 2 * h * w)
        groups = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, keepdim=True) + 1e-5).sqrt()
        return self.head(self.b(groups.reshape(b, c, h, w) * self.scale).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for g in range(4):
            pair = (2 * g, 2 * g + 1)
            yield conv_out("a", *pair) | {("scale", 1): pair} | conv_in("b", *pair)
        for i in range(4):
            yield conv_out("b", i) | conv_in("head", i)


class InstanceNorm(Tricky):
    """Statistics of each channel by itself, over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6, affine=True)
        self.b, self.head = nn.Conv2d(6, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            yield conv_out("a", i) | affine("norm", i) | conv_in("b", i)
        for i in range(4):
            yield conv_out("b", i) | conv_in("head", i)
