"""Attention in its many layouts, and the tables that come with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.base import Tricky, Unit, affine, conv_in, conv_out


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


class _Heads(Tricky):
    """Attention with a fused layer laid out [3][head][d] under an embedding that stays; ``attend`` is what differs."""

    input_shape = (2, 4, 6)
    heads, width = 3, 2

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 3 * self.heads * self.width), nn.Linear(self.heads * self.width, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(b, n, -1)).mean(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def units(self) -> Iterator[Unit]:
        each, total = self.width, self.heads * self.width
        for h in range(self.heads):
            rows = tuple(total * part + each * h + j for part in range(3) for j in range(each))
            yield conv_out("qkv", *rows) | conv_in("proj", *range(each * h, each * h + each)) | self.tables(h)

    def tables(self, h: int) -> Unit:
        """What else head ``h`` has."""
        return {}


class LogitScale(_Heads):
    """Cosine attention, each head at a learnt scale with a ceiling."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(self.heads, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (scores * self.logit_scale.clamp(max=4.6).exp()).softmax(-1) @ v

    def tables(self, h: int) -> Unit:
        return {("logit_scale", 0): (h,)}


class BiasBuffer(_Heads):
    """A bias that nobody learns: a buffer, by head and distance."""

    def __init__(self) -> None:
        super().__init__()
        distance = (torch.arange(4)[:, None] - torch.arange(4)).abs()
        self.register_buffer("bias", -distance * torch.tensor([0.5, 0.25, 0.125])[:, None, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * self.width**-0.5 + self.bias).softmax(-1) @ v

    def tables(self, h: int) -> Unit:
        return {("bias", 0): (h,)}


class BiasCache(_Heads):
    """A table is gathered once and kept by device; what is kept must be dropped when heads go."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(self.heads, 7))
        self.register_buffer("index", torch.arange(4)[:, None] - torch.arange(4) + 3, persistent=False)
        self.kept: dict[str, Tensor] = {}

    def biases(self, device: torch.device) -> Tensor:
        if self.training:
            return self.table[:, self.index]
        if str(device) not in self.kept:
            self.kept[str(device)] = self.table[:, self.index]
        return self.kept[str(device)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * self.width**-0.5) @ k.transpose(-2, -1) + self.biases(q.device)).softmax(-1) @ v

    def tables(self, h: int) -> Unit:
        return {("table", 0): (h,)}


class ScaleFromWidth(_Heads):
    """The score scale is made from a shape at run time; heads may go, the width of a head does not."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5, -1) @ v


class RotaryBeforeHeads(Tricky):
    """Pairs of neighbouring channels rotate while heads and channels of a head still share one dimension."""

    input_shape = (2, 4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 12)
        self.proj = nn.Linear(12, 2)
        angles = torch.arange(4)[:, None] * torch.tensor([1.0, 0.1])
        self.register_buffer("cos", angles.cos().repeat_interleave(2, -1).repeat(1, 3))
        self.register_buffer("sin", angles.sin().repeat_interleave(2, -1).repeat(1, 3))

    def rotate(self, x: Tensor) -> Tensor:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        return x * self.cos + turned * self.sin

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            t.view(b, n, 3, 4).transpose(1, 2) for t in (self.rotate(self.q(x)), self.rotate(self.k(x)), self.v(x))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)).mean(1)

    def units(self) -> Iterator[Unit]:
        for h in range(3):
            at = range(4 * h, 4 * h + 4)
            tables = {("cos", 1): tuple(at), ("sin", 1): tuple(at)}
            yield conv_out("q", *at) | conv_out("k", *at) | conv_out("v", *at) | tables | conv_in("proj", *at)


class MultiQuery(Tricky):
    """One head of keys and values serves all heads of queries.

    Scores are products against keys that have no heads, so the queries' heads and the width inside them stay; the
    width of values is the same in all heads, and goes in all of them.
    """

    input_shape = (2, 5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = nn.Linear(6, 12), nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 3).transpose(1, 2)
        k, v = self.k(x).unsqueeze(1), self.v(x).unsqueeze(1)
        y = (q @ k.transpose(-2, -1) * 3**-0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, -1)).mean(1)

    def units(self) -> Iterator[Unit]:
        for j in range(3):
            yield conv_out("v", j) | conv_in("proj", *range(j, 12, 3))


class _Windows(Tricky):
    """Queries from windows of a map, keys and values from larger windows that overlap; ``larger`` cuts them out."""

    input_shape = (2, 3, 8, 8)
    heads, width = 2, 3

    def __init__(self) -> None:
        super().__init__()
        total = self.heads * self.width
        self.stem = nn.Conv2d(3, 5, 1)
        self.q, self.kv = nn.Conv2d(5, total, 1, bias=False), nn.Conv2d(5, 2 * total, 1, bias=False)
        self.head = nn.Linear(total, 2)

    def larger(self, x: Tensor) -> Tensor:
        """Of ``[B, C, 8, 8]`` windows of 6 by 6 around each of the four windows of 4 by 4: ``[B, C, 4, 36]``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, _, h, w = x.shape
        q = self.q(x).reshape(-1, self.width, 2, h // 2, 2, w // 2).permute(0, 1, 2, 4, 3, 5)
        q = q.reshape(b * self.heads, self.width, 4, -1).permute(0, 2, 3, 1)
        kv = self.larger(self.kv(x))
        kv = kv.reshape(b * self.heads, 2 * self.width, 4, -1).permute(0, 2, 3, 1)
        k, v = kv.split([self.width, self.width], dim=-1)
        y = (q @ k.transpose(-1, -2) * self.width**-0.5).softmax(-1) @ v
        return self.head(y.permute(0, 3, 1, 2).reshape(b, -1, 4, y.shape[2]).mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(5):
            yield conv_out("stem", i) | conv_in("q", i) | conv_in("kv", i)
        for h in range(2):
            mine = tuple(range(3 * h, 3 * h + 3))
            pairs = tuple(range(6 * h, 6 * h + 6))  # [head][key, value][width]
            yield conv_out("q", *mine, bias=False) | conv_out("kv", *pairs, bias=False) | conv_in("head", *mine)


class Halo(_Windows):
    """Larger windows by two strided views."""

    def larger(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1)).unfold(2, 6, 4).unfold(3, 6, 4)
        return x.reshape(x.shape[0], x.shape[1], 4, 36)


class OverlappingBlocks(_Windows):
    """Larger windows by an operation that unfolds."""

    def larger(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.shape
        return F.unfold(x, 6, padding=1, stride=4).reshape(b, c, 36, -1).transpose(2, 3)


class Lambda(Tricky):
    """A lambda layer: keys, summed over positions, make a linear map of the context that is applied to queries.

    A convolution over positions gives a map for each place. In the result heads and the width of values share one
    dimension; the width has more units. The width of keys is made by the convolution, too, where it is an output that
    is not labelled alike: it stays.
    """

    input_shape = (2, 3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2 * 3 + 3 + 5, 1, bias=False)
        self.place = nn.Conv3d(1, 3, (3, 3, 1), padding=(1, 1, 0))
        self.head = nn.Linear(2 * 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, _, h, w = x.shape
        q, k, v = torch.split(self.qkv(x), [6, 3, 5], dim=1)
        q = q.reshape(b, 2, 3, h * w).transpose(-1, -2)
        v = v.reshape(b, 5, h * w).transpose(-1, -2)
        k = k.reshape(b, 3, h * w).softmax(-1)
        content = q @ (k @ v).unsqueeze(1)
        places = self.place(v.reshape(b, 1, h, w, 5)).reshape(b, 1, 3, h * w, 5).transpose(2, 3)
        y = content + (q.unsqueeze(-2) @ places).squeeze(-2)
        return self.head(y.transpose(-1, -2).reshape(b, 10, h, w).mean((2, 3)))

    def units(self) -> Iterator[Unit]:
        for i in range(4):
            yield conv_out("stem", i) | conv_in("qkv", i)
        for j in range(5):
            yield conv_out("qkv", 9 + j, bias=False) | conv_in("head", j, 5 + j)
