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
