"""Small modules with couplings that are hard to find; each declares the units that must be found, no more, no less.

A unit is a mapping from (tensor, dimension) to the positions that go together. ``units()`` is written by hand from the
module's definition and shares nothing with the library.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Unit = dict[tuple[str, int], tuple[int, ...]]

ZOO: dict[str, type[Tricky]] = {}


class Tricky(nn.Module):
    """Base: an input shape and the declared units."""

    input_shape: tuple[int, ...] = (2, 3, 8, 8)

    def __init_subclass__(cls) -> None:
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


class GluByChunk(Tricky):
    """Row i and row i + 5 of one layer become value and gate of one unit."""

    input_shape = (2, 4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 10), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.norm(F.silu(gate) * value)).mean(1)

    def units(self) -> Iterator[Unit]:
        for i in range(5):
            yield conv_out("fc1", i, 5 + i) | affine("norm", i) | conv_in("fc2", i)


class FusedQkv(Tricky):
    """Multi-head attention, rows laid out [3][head][d]; a residual stream under layer norms."""

    input_shape = (2, 5, 4)

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.d = 3, 4
        self.embed, self.norm = nn.Linear(4, 12), nn.LayerNorm(12)
        self.qkv, self.proj, self.head = nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, self.d).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * self.d**-0.5).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, self.heads * self.d))
        return self.head(x.mean(1))

    def units(self) -> Iterator[Unit]:
        for i in range(12):
            yield (
                conv_out("embed", i) | affine("norm", i) | conv_in("qkv", i) | conv_out("proj", i) | conv_in("head", i)
            )
        for h in range(3):
            rows = tuple(12 * part + 4 * h + j for part in range(3) for j in range(4))
            yield conv_out("qkv", *rows) | conv_in("proj", *range(4 * h, 4 * h + 4))


class FusedQkvHeadFirst(FusedQkv):
    """The same with rows laid out [head][q, k, v]."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, self.heads, -1).split([self.d] * 3, dim=3)
        q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, self.heads * self.d))
        return self.head(x.mean(1))

    def units(self) -> Iterator[Unit]:
        yield from list(super().units())[:12]
        for h in range(3):
            yield conv_out("qkv", *range(12 * h, 12 * h + 12)) | conv_in("proj", *range(4 * h, 4 * h + 4))


class GroupedQueries(Tricky):
    """Four query heads share two key and value heads: a unit is a key head with its two query heads."""

    input_shape = (2, 5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 2, 2, 3).permute(0, 2, 3, 1, 4)
        k, v = self.kv(x).view(b, n, 2, 2, 3).permute(2, 0, 3, 1, 4).unsqueeze(3).unbind(0)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.permute(0, 3, 1, 2, 4).flatten(2)).mean(1)

    def units(self) -> Iterator[Unit]:
        for h in range(2):
            queries = range(6 * h, 6 * h + 6)
            keys = (*range(3 * h, 3 * h + 3), *range(6 + 3 * h, 9 + 3 * h))
            yield conv_out("q", *queries) | conv_out("kv", *keys) | conv_in("proj", *queries)


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


class Embedding(Tricky):
    """Columns of a table are units, its rows are chosen by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(10, 6), nn.Linear(6, 3)

    def example(self) -> Tensor:
        return torch.randint(0, 10, (2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.table(x).tanh()).mean(1)

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            yield {("table.weight", 1): (i,)} | conv_in("fc", i)


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


class TokenMixing(Tricky):
    """A mixer's token MLP has units of its own; tokens themselves are positions of the input and stay."""

    input_shape = (2, 6, 4)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2, self.head = nn.Linear(4, 5), nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.fc2(self.fc1(x.transpose(1, 2)).relu()).transpose(1, 2)
        return self.head(x.mean(1))

    def units(self) -> Iterator[Unit]:
        for i in range(5):
            yield conv_out("embed", i) | conv_in("head", i)
        for i in range(7):
            yield conv_out("fc1", i) | conv_in("fc2", i)


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


class CosineAttentionOverChannels(Tricky):
    """Queries and keys whose width is a unit: nothing but their product consumes it."""

    input_shape = (2, 5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = F.normalize(self.q(x), dim=-1), self.k(x)
        return self.head((q @ k.transpose(-2, -1)).softmax(-1) @ self.v(x)).mean(1)

    def units(self) -> Iterator[Unit]:
        for i in range(4):
            yield conv_out("q", i) | conv_out("k", i)
        for i in range(5):
            yield conv_out("v", i) | conv_in("head", i)


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
