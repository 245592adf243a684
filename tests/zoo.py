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


class TalkingHeads(Tricky):
    """Heads are mixed before and after the softmax: scores and weights have heads of their own.

    Queries, keys and values come from one fused layer whose rows are viewed as [3][head][d]; that view must stay a
    box, so a head of the scores takes the same head of the values with it, and only the heads between the two
    mixings are free.
    """

    input_shape = (2, 5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.before, self.after = nn.Linear(6, 36), nn.Linear(3, 3), nn.Linear(3, 3)
        self.proj = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, 12)).mean(1)

    def units(self) -> Iterator[Unit]:
        for h in range(3):
            rows = tuple(12 * part + 4 * h + j for part in range(3) for j in range(4))
            columns = conv_in("proj", *range(4 * h, 4 * h + 4))
            yield conv_out("qkv", *rows) | conv_in("before", h) | conv_out("after", h) | columns
            yield conv_out("before", h) | conv_in("after", h)


class CrossCovariance(Tricky):
    """Attention between the channels of a head, with a temperature for each head."""

    input_shape = (2, 5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 24), nn.Linear(8, 2)
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).reshape(b, n, 8)).mean(1)

    def units(self) -> Iterator[Unit]:
        for h in range(2):
            rows = tuple(8 * part + 4 * h + j for part in range(3) for j in range(4))
            yield (
                conv_out("qkv", *rows) | {("temperature", 0): (h,)} | conv_in("proj", *range(4 * h, 4 * h + 4))
            )


class BiasTable(Tricky):
    """A relative position bias: columns of a table go with heads, its rows are looked up by constant indices."""

    input_shape = (2, 4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 2)
        self.table = nn.Parameter(torch.zeros(7, 3))
        self.register_buffer("index", torch.arange(4)[:, None] - torch.arange(4)[None] + 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 3, c // 3).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).unsqueeze(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(y.transpose(1, 2).reshape(b, n, c)).mean(1)

    def units(self) -> Iterator[Unit]:
        for h in range(3):
            rows = tuple(6 * part + 2 * h + j for part in range(3) for j in range(2))
            yield conv_out("qkv", *rows) | {("table", 1): (h,)} | conv_in("proj", 2 * h, 2 * h + 1)


class Rotary(Tricky):
    """A rotation of pairs of channels by a table (a buffer) must not tie heads away."""

    input_shape = (2, 4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 24), nn.Linear(8, 2)
        angles = torch.arange(4)[:, None] * torch.tensor([1.0, 0.1])
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())

    def rotate(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * self.cos + torch.cat([-right, left], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)
        return self.proj(y.transpose(1, 2).flatten(2)).mean(1)

    def units(self) -> Iterator[Unit]:
        for h in range(2):
            rows = tuple(8 * part + 4 * h + j for part in range(3) for j in range(4))
            yield conv_out("qkv", *rows) | conv_in("proj", *range(4 * h, 4 * h + 4))


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


class Recurrent(Tricky):
    """A recurrent layer: four gates of one hidden unit go together, in both of its matrices."""

    input_shape = (2, 4, 3)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(3, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0]).mean(1)

    def units(self) -> Iterator[Unit]:
        for i in range(4):
            yield conv_out("embed", i) | {("rnn.weight_ih_l0", 1): (i,)}
        for i in range(5):
            gates = tuple(5 * gate + i for gate in range(4))
            rows = {(f"rnn.{name}", 0): gates for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")}
            yield rows | {("rnn.weight_hh_l0", 1): (i,)} | conv_in("head", i)


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


class WindowShift(Tricky):
    """Windows are cut out, shifted and put back; channels pass through as they are."""

    input_shape = (2, 3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 6, 1), nn.LayerNorm(6)
        self.fc1, self.fc2, self.merge, self.head = nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(24, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        y = torch.roll(self.norm(x), (-2, -2), (1, 2))
        b, h, w, c = y.shape
        y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        y = self.fc2(F.gelu(self.fc1(y)))
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + torch.roll(y, (2, 2), (1, 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.merge(x).mean((1, 2)))

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            corners = conv_in("merge", *(6 * corner + i for corner in range(4)))
            yield conv_out("embed", i) | affine("norm", i) | conv_in("fc1", i) | conv_out("fc2", i) | corners
        for i in range(5):
            yield conv_out("fc1", i) | conv_in("fc2", i)
        for i in range(4):
            yield conv_out("merge", i) | conv_in("head", i)


class ClassToken(Tricky):
    """A class token and position embeddings belong to the stream; positions themselves stay."""

    input_shape = (2, 3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Conv2d(3, 6, 4, stride=4), nn.LayerNorm(6), nn.Linear(6, 2)
        self.token, self.pos = nn.Parameter(torch.zeros(1, 1, 6)), nn.Parameter(torch.zeros(1, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.pos
        return self.head(self.norm(x)[:, 0])

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            yield conv_out("embed", i) | {("token", 2): (i,), ("pos", 2): (i,)} | affine("norm", i) | conv_in("head", i)


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
