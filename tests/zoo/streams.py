"""Streams that meet, part and come back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.base import Tricky, Unit, conv_in, conv_out, norm


class Residual(Tricky):
    """A sum ties the stem to the branch's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.a, self.b, self.head = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = x + self.b(self.a(x).relu())
        return self.head(x.mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            yield conv_out("stem", i) | norm("bn", i) | conv_in("a", i) | conv_out("b", i) | conv_in("head", i)
        for i in range(5):
            yield conv_out("a", i) | conv_in("b", i)


class ConcatOfResiduals(Tricky):
    """Two residual streams side by side feed one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1)
        self.pp, self.qq = nn.Conv2d(4, 4, 1), nn.Conv2d(5, 5, 1)
        self.out, self.head = nn.Conv2d(9, 6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.p(x), self.q(x)
        p, q = p + self.pp(p).relu(), q + self.qq(q).relu()
        return self.head(self.out(torch.cat([p, q], 1)).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(4):
            square = {("pp.weight", 0): (i,), ("pp.weight", 1): (i,), ("pp.bias", 0): (i,)}
            yield conv_out("p", i) | square | conv_in("out", i)
        for i in range(5):
            square = {("qq.weight", 0): (i,), ("qq.weight", 1): (i,), ("qq.bias", 0): (i,)}
            yield conv_out("q", i) | square | conv_in("out", 4 + i)
        for i in range(6):
            yield conv_out("out", i) | conv_in("head", i)


class GroupedAfterSplit(Tricky):
    """Half of the channels go through a grouped convolution (four groups of two), half pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g = nn.Conv2d(3, 12, 1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.b, self.head = nn.Conv2d(12, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).relu().split([8, 4], 1)
        return self.head(self.b(torch.cat([self.g(left), right], 1)).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for g in range(4):
            pair = (2 * g, 2 * g + 1)
            yield conv_out("a", *pair) | conv_out("g", *pair) | conv_in("b", *pair)
        for i in range(8, 12):
            yield conv_out("a", i) | conv_in("b", i)
        for i in range(4):
            yield conv_out("b", i) | conv_in("head", i)


class NeverMeets(Tricky):
    """Two branches that only meet in the outputs share no unit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.fa, self.fb = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": self.fa(self.a(x).relu().mean((2, 3))), "b": self.fb(self.b(x).relu().amax((2, 3)))}

    def units(self) -> Iterator[Unit]:
        for name in "ab":
            for i in range(4):
                yield conv_out(name, i) | conv_in(f"f{name}", i)


class SharedWeight(Tricky):
    """Two branches read one weight: its input positions tie the branches together, its rows stay (outputs)."""

    input_shape = (2, 5)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(5, 6)
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(self.a(x).relu()), self.right(self.b(x).relu())

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            yield conv_out("a", i) | conv_out("b", i) | conv_in("left", i)


class UsedTwice(Tricky):
    """One module runs twice in a pass, so what it reads the first time and the second are one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 3, padding=1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.twice(self.twice(x).relu()).relu()
        return self.head(x.mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(5):
            square = {("twice.weight", 0): (i,), ("twice.weight", 1): (i,), ("twice.bias", 0): (i,)}
            yield conv_out("stem", i) | square | conv_in("head", i)


class TiedWeights(Tricky):
    """One table embeds tokens and, transposed, classifies them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.out = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.out.weight = self.table.weight

    def example(self) -> Tensor:
        return torch.randint(0, 7, (2, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        return self.out(x + self.mix(x).relu())

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            square = {("mix.weight", 0): (i,), ("mix.weight", 1): (i,), ("mix.bias", 0): (i,)}
            yield {("table.weight", 1): (i,)} | square


class Cascade(Tricky):
    """A cascade over chunks: each chunk is added to what the chunk before it became."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out, self.head = nn.Conv2d(3, 9, 1), nn.Conv2d(9, 4, 1), nn.Linear(4, 2)
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chunks = self.a(x).split(3, 1)
        done = [self.convs[0](chunks[0])]
        done.append(self.convs[1](done[0] + chunks[1]))
        return self.head(self.out(torch.cat([*done, chunks[2]], 1)).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(3):
            yield conv_out("a", i) | conv_in("convs.0", i)
            yield conv_out("a", 3 + i) | conv_out("convs.0", i) | conv_in("convs.1", i) | conv_in("out", i)
            yield conv_out("convs.1", i) | conv_in("out", 3 + i)
            yield conv_out("a", 6 + i) | conv_in("out", 6 + i)
        for i in range(4):
            yield conv_out("out", i) | conv_in("head", i)


class GhostConcat(Tricky):
    """Half of the channels are made from the other half by a cheap depthwise convolution, and put beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.cheap = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.b, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.head(self.b(torch.cat([x, self.cheap(x).relu()], 1)).mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(4):
            yield conv_out("a", i) | conv_out("cheap", i) | conv_in("b", i, 4 + i)
            yield conv_out("b", i) | conv_in("head", i)


class Resolutions(Tricky):
    """Two streams of different widths and resolutions exchange what they know (HRNet's fusion)."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up, self.up_bn = nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.down, self.down_bn = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        high, low = self.high(x).relu(), self.low(x).relu()
        up = F.interpolate(self.up_bn(self.up(low)), scale_factor=2, mode="nearest")
        high, low = (high + up).relu(), (low + self.down_bn(self.down(high))).relu()
        return self.head(torch.cat([high.mean((2, 3)), low.mean((2, 3))], 1))

    def units(self) -> Iterator[Unit]:
        for i in range(4):
            made = conv_out("high", i) | conv_out("up", i, bias=False) | norm("up_bn", i)
            yield made | conv_in("down", i) | conv_in("head", i)
        for i in range(6):
            made = conv_out("low", i) | conv_out("down", i, bias=False) | norm("down_bn", i)
            yield made | conv_in("up", i) | conv_in("head", 4 + i)


class DualPath(Tricky):
    """A block's output is split: one part is added to a stream, the other is put beside what has grown so far."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 7, 1), nn.BatchNorm2d(7)
        self.first, self.second = nn.Conv2d(7, 6, 1), nn.Conv2d(9, 6, 3, padding=1)
        self.head = nn.Linear(11, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x))
        stream, grown = x[:, :4], x[:, 4:]
        for block in (self.first, self.second):
            y = block(torch.cat([stream, grown], 1).relu())
            stream, grown = stream + y[:, :4], torch.cat([grown, y[:, 4:]], 1)
        return self.head(torch.cat([stream, grown], 1).mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(4):
            made = conv_out("stem", i) | norm("bn", i) | conv_out("first", i) | conv_out("second", i)
            yield made | conv_in("first", i) | conv_in("second", i) | conv_in("head", i)
        for i in range(4, 7):
            made = conv_out("stem", i) | norm("bn", i)
            yield made | conv_in("first", i) | conv_in("second", i) | conv_in("head", i)
        for i in range(2):
            yield conv_out("first", 4 + i) | conv_in("second", 7 + i) | conv_in("head", 7 + i)
            yield conv_out("second", 4 + i) | conv_in("head", 9 + i)


class Reversible(Tricky):
    """Two halves of a stream, each the other's function: both halves of the stem, tied only by their own sums."""

    input_shape = (2, 5)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.f, self.g, self.head = nn.Linear(5, 8), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=-1)
        left = left + self.f(right.relu())
        right = right + self.g(left.relu())
        return self.head(torch.cat([left, right], -1))

    def units(self) -> Iterator[Unit]:
        for i in range(4):
            yield conv_out("stem", i) | conv_out("f", i) | conv_in("g", i) | conv_in("head", i)
            yield conv_out("stem", 4 + i) | conv_out("g", i) | conv_in("f", i) | conv_in("head", 4 + i)


class Dense(Tricky):
    """A dense block: every layer reads all that came before it, each through a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 3 * i, 3, 3, padding=1) for i in range(2))
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for bn, conv in zip(self.norms, self.convs, strict=False):
            features.append(conv(bn(torch.cat(features, 1)).relu()))
        return self.head(self.norms[-1](torch.cat(features, 1)).relu().mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        def read(position: int, since: int) -> Unit:
            norms = {key: at for i in range(since, 3) for key, at in norm(f"norms.{i}", position).items()}
            convs = {key: at for i in range(since, 2) for key, at in conv_in(f"convs.{i}", position).items()}
            return norms | convs | conv_in("head", position)

        for i in range(4):
            yield conv_out("stem", i) | read(i, 0)
        for i in range(3):
            yield conv_out("convs.0", i) | read(4 + i, 1)
            yield conv_out("convs.1", i) | read(7 + i, 2)


class ThereAndBack(Tricky):
    """One parameter is used twice, the second time transposed: hidden units are its rows, in both uses."""

    input_shape = (2, 5)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 6), nn.Linear(6, 2)
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        hidden = F.linear(x, self.weight, self.bias).tanh()
        return self.head((x + hidden @ self.weight).relu())

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            yield conv_out("embed", i) | {("weight", 1): (i,)} | conv_in("head", i)
        for i in range(4):
            yield {("weight", 0): (i,), ("bias", 0): (i,)}
