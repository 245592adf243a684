"""Convolutions and what is put around them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.base import Tricky, Unit, conv_in, conv_out, norm


class Depthwise(Tricky):
    """An inverted residual's depthwise convolution passes channels through."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.dw = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn, self.project, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.dw(F.relu6(self.expand(x)))))
        return self.head(self.project(x).mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(8):
            yield conv_out("expand", i) | conv_out("dw", i) | norm("bn", i) | conv_in("project", i)
        for i in range(4):
            yield conv_out("project", i) | conv_in("head", i)


class Transposed(Tricky):
    """A transposed convolution has its input channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b = nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(5, 6, 2, stride=2), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.up(self.a(x).relu()).relu()).mean((2, 3))

    def units(self) -> Iterator[Unit]:
        for i in range(5):
            yield conv_out("a", i) | {("up.weight", 0): (i,)}
        for i in range(6):
            yield {("up.weight", 1): (i,), ("up.bias", 0): (i,)} | conv_in("b", i)


class ChannelShuffle(Tricky):
    """A shuffle between a convolution and its consumer: view, transpose, view over two groups.

    The channel dimension passes through a (2, 3) view, which must stay a box: of its two dimensions the longer stays
    free, so position j of both halves is one unit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.b(x).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for j in range(3):
            yield conv_out("a", j, 3 + j) | conv_in("b", 2 * j, 2 * j + 1)
        for i in range(4):
            yield conv_out("b", i) | conv_in("head", i)


class NativeShuffle(Tricky):
    """The same shuffle as one operation of torch: what each of its groups keeps must be the same there, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.channel_shuffle(self.a(x).relu(), 2)).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for j in range(3):
            yield conv_out("a", j, 3 + j) | conv_in("b", 2 * j, 2 * j + 1)
        for i in range(4):
            yield conv_out("b", i) | conv_in("head", i)


class RolledChannels(Tricky):
    """Channels move along, turn round and are picked again: each consumer has them in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(*sizes, 1) for sizes in ((3, 5), (5, 4), (5, 4), (5, 4)))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        picked = x.index_select(1, torch.tensor([4, 0, 3, 1, 2]))
        x = self.b(torch.roll(x, (1, 2), (1, 3))) + self.c(x.flip(1, 2)) + self.d(picked)
        return self.head(x.relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(5):
            at = [4, 0, 3, 1, 2].index(i)
            yield conv_out("a", i) | conv_in("b", (i + 1) % 5) | conv_in("c", 4 - i) | conv_in("d", at)
        for i in range(4):
            yield conv_out("b", i) | conv_out("c", i) | conv_out("d", i) | conv_in("head", i)


class SqueezeExcite(Tricky):
    """The gate of a squeeze-and-excite branch has the channels that it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.a(x))
        x = x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(x.mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            yield conv_out("a", i) | conv_in("down", i) | conv_out("up", i) | conv_in("head", i)
        for i in range(4):
            yield conv_out("down", i) | conv_in("up", i)


class NormAfterFlatten(Tricky):
    """Flattening 4 channels of 3x3 positions makes 36 features; a channel takes its nine with it."""

    input_shape = (2, 3, 5, 5)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm1d(36), nn.Linear(36, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.a(x).relu().flatten(1)).relu())

    def units(self) -> Iterator[Unit]:
        for i in range(4):
            features = tuple(range(9 * i, 9 * i + 9))
            yield conv_out("a", i) | norm("bn", *features) | conv_in("fc", *features)


class StandardisedWeights(Tricky):
    """Each filter is standardised over its fan-in, so cutting inputs changes what is left of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        w = self.b.weight
        w = F.batch_norm(w.reshape(1, 4, -1), None, None, training=True, eps=1e-5).reshape_as(w)
        return self.head(F.conv2d(x, w, self.b.bias).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            yield conv_out("a", i) | conv_in("b", i)
        for i in range(4):
            yield conv_out("b", i) | conv_in("head", i)


class SplitAttention(Tricky):
    """Two wide groups are weighed against each other by a softmax; the same channel of both groups is one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.fc1, self.fc2, self.head = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 8, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        b, c, h, w = x.shape
        x = x.reshape(b, 2, c // 2, h, w)
        weights = self.fc2(self.fc1(x.sum(1).mean((2, 3), keepdim=True)).relu())
        weights = weights.view(b, 2, c // 2, 1, 1).softmax(1)
        return self.head((x * weights).sum(1).mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(4):
            yield conv_out("conv", i, 4 + i) | conv_in("fc1", i) | conv_out("fc2", i, 4 + i) | conv_in("head", i)
        for i in range(3):
            yield conv_out("fc1", i) | conv_in("fc2", i)


class DynamicWeights(Tricky):
    """The weight is a mixture of experts by the input: derived first, then consumed. An expert is a unit, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.route, self.head = nn.Conv2d(3, 5, 1), nn.Linear(5, 2), nn.Linear(4, 2)
        self.experts = nn.Parameter(torch.randn(2, 4, 5, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        share = self.route(x.mean((2, 3)).mean(0)).sigmoid()
        weight = (share[:, None, None, None, None] * self.experts).sum(0)
        return self.head(F.conv2d(x, weight).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(5):
            yield conv_out("a", i) | conv_in("route", i) | {("experts", 2): (i,)}
        for i in range(4):
            yield {("experts", 1): (i,)} | conv_in("head", i)
        for e in range(2):
            yield conv_out("route", e) | {("experts", 0): (e,)}


class NeighbouringChannels(Tricky):
    """A gate (ECA) made by a convolution along the channels: what stands beside a channel matters, so all of them stay.

    The branch inside has channels of its own, which are free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1)
        self.eca, self.head = nn.Conv1d(1, 1, 3, padding=1, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.b(self.a(x).relu())
        gate = self.eca(y.mean((2, 3)).view(y.shape[0], 1, -1)).sigmoid()
        x = x + 9 * y * gate.view(y.shape[0], -1, 1, 1).expand_as(y)
        return self.head(x.mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(5):
            yield conv_out("a", i) | conv_in("b", i)


class SelectiveKernel(Tricky):
    """Two kernels see the same input; a softmax over the two weighs them, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.small, self.large = nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 3, padding=1)
        self.reduce, self.bn, self.select = nn.Conv2d(5, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 10, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        paths = torch.stack([self.small(x).relu(), self.large(x).relu()], dim=1)
        attention = self.select(self.bn(self.reduce(paths.sum(1).mean((2, 3), keepdim=True))).relu())
        b, c, _, _ = attention.shape
        attention = attention.view(b, 2, c // 2, 1, 1).softmax(dim=1)
        return self.head((paths * attention).sum(dim=1).mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(4):
            yield conv_out("stem", i) | conv_in("small", i) | conv_in("large", i)
        for i in range(5):
            both = conv_out("small", i) | conv_out("large", i) | conv_in("reduce", i)
            yield both | conv_out("select", i, 5 + i) | conv_in("head", i)
        for i in range(3):
            yield conv_out("reduce", i) | norm("bn", i) | conv_in("select", i)


class BlurByTable(Tricky):
    """Anti-aliased pooling: a depthwise filter that is a buffer, one row a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 2)
        taps = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("taps", (taps[:, None] * taps)[None, None].repeat(6, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.a(x).relu(), (1, 1, 1, 1), "reflect")
        x = F.conv2d(x, self.taps, stride=2, groups=self.taps.shape[0])
        return self.head(self.b(x).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            yield conv_out("a", i) | {("taps", 0): (i,)} | conv_in("b", i)
        for i in range(4):
            yield conv_out("b", i) | conv_in("head", i)


class BlurByExpansion(Tricky):
    """The same with one filter that is expanded to the number of channels, which an attribute says."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 6
        self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 2)
        taps = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("taps", (taps[:, None] * taps)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.a(x).relu(), (1, 1, 1, 1), "replicate")
        x = F.conv2d(x, self.taps.expand(self.channels, -1, -1, -1), stride=2, groups=self.channels)
        return self.head(self.b(x).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            yield conv_out("a", i) | conv_in("b", i)
        for i in range(4):
            yield conv_out("b", i) | conv_in("head", i)


class Branches(Tricky):
    """A convolution in its training form: three branches, the third of them a norm alone; :meth:`fuse` makes one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 5, 1), nn.Linear(5, 2)
        self.wide, self.wide_bn = nn.Conv2d(5, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.point, self.point_bn = nn.Conv2d(5, 5, 1, bias=False), nn.BatchNorm2d(5)
        self.skip_bn = nn.BatchNorm2d(5)
        self.fused: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.fused is None:
            x = self.wide_bn(self.wide(x)) + self.point_bn(self.point(x)) + self.skip_bn(x)
        else:
            x = self.fused(x)
        return self.head(x.relu().mean((2, 3)))

    def fuse(self) -> None:
        """Puts one convolution in the place of the three branches."""
        channels, fan_in = self.wide.weight.shape[:2]
        kernel, bias = 0, 0
        identity = torch.eye(channels, dtype=self.wide.weight.dtype)[:, :, None, None]
        pairs = ((self.wide.weight, self.wide_bn), (F.pad(self.point.weight, (1, 1, 1, 1)), self.point_bn),
                 (F.pad(identity, (1, 1, 1, 1)), self.skip_bn))  # fmt: skip
        for weight, bn in pairs:
            scale = bn.weight / (bn.running_var + bn.eps).sqrt()
            kernel, bias = kernel + weight * scale[:, None, None, None], bias + bn.bias - bn.running_mean * scale
        self.fused = nn.Conv2d(fan_in, channels, 3, padding=1, dtype=kernel.dtype)
        self.fused.weight.data, self.fused.bias.data = kernel.detach(), bias.detach()
        del self.wide, self.wide_bn, self.point, self.point_bn, self.skip_bn

    def units(self) -> Iterator[Unit]:
        for i in range(5):
            norms = norm("wide_bn", i) | norm("point_bn", i) | norm("skip_bn", i)
            square = {(f"{name}.weight", dim): (i,) for name in ("wide", "point") for dim in (0, 1)}
            yield conv_out("stem", i) | square | norms | conv_in("head", i)


class BranchesFused(Branches):
    """The same in its inference form: what the branches tied together has come apart."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse()

    def units(self) -> Iterator[Unit]:
        for i in range(5):
            yield conv_out("stem", i) | conv_in("fused", i)
            yield conv_out("fused", i) | conv_in("head", i)


class ConditionalWeights(Tricky):
    """Each sample has a filter of its own, mixed from flat experts; samples become groups of one convolution.

    An output channel is a block of a flat expert. The input channels of a flat filter lie scattered in it: they stay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.route, self.head = nn.Conv2d(3, 5, 1), nn.Linear(5, 3), nn.Linear(4, 2)
        self.experts = nn.Parameter(torch.randn(3, 4 * 5 * 9))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        b, c, h, w = x.shape
        share = self.route(x.mean((2, 3))).sigmoid()
        weight = (share @ self.experts).view(b * 4, 5, 3, 3)
        x = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return self.head(x.view(b, 4, h, w).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(4):
            yield {("experts", 1): tuple(range(45 * i, 45 * i + 45))} | conv_in("head", i)
        for e in range(3):
            yield conv_out("route", e) | {("experts", 0): (e,)}


class FilterAndMatrix(Tricky):
    """One weight filters a map and, flattened, multiplies its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 5, 1), nn.Linear(4, 2)
        self.weight = nn.Parameter(torch.zeros(4, 5, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = F.conv2d(x, self.weight).relu().mean((2, 3))
        return self.head(y + F.linear(x.mean((2, 3)), self.weight.flatten(1)))

    def units(self) -> Iterator[Unit]:
        for i in range(5):
            yield conv_out("stem", i) | {("weight", 1): (i,)}
        for i in range(4):
            yield {("weight", 0): (i,)} | conv_in("head", i)


class ChannelsOfATable(Tricky):
    """Channels that only a buffer makes; the weight that reads them makes them worth a unit."""

    input_shape = (2, 1, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1, 5, 1, 1))
        self.read, self.head = nn.Conv2d(5, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(x * self.table).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(5):
            yield {("table", 1): (i,)} | conv_in("read", i)
        for i in range(4):
            yield conv_out("read", i) | conv_in("head", i)
