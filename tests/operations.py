"""Operations of all kinds on a tensor of channels, and a network of any sequence of them between two convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, SIZE = 8, 8


class Sequential(nn.Module):
    """Convolution, operations, convolution, pooling, linear layer; parameters for the operations to use."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.stem, self.mix = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.head = nn.Linear(WIDTH, 2)
        self.w, self.w2 = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))
        self.vector = nn.Parameter(torch.randn(WIDTH))
        self.kernel = nn.Parameter(torch.randn(1, 1, 3))
        self.cube = nn.Parameter(torch.randn(1, 1, 3, 3, 3))
        self.triple = nn.Parameter(torch.randn(WIDTH, WIDTH, WIDTH))
        self.register_buffer("constant", torch.randn(WIDTH))
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.grouped = nn.Conv2d(WIDTH, WIDTH, 1, groups=2)
        self.transposed = nn.ConvTranspose2d(WIDTH, WIDTH, 1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.gru, self.lstm = (layer(WIDTH, WIDTH, batch_first=True) for layer in (nn.GRU, nn.LSTM))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, SIZE, SIZE] to [N, 2]."""
        x = self.stem(x).relu()
        for name in self.names:
            x = OPERATIONS[name](self, x)
        return self.head(self.mix(x).relu().mean((2, 3)))


def rows(x: Tensor) -> Tensor:
    """[N, C, H, W] to [N, H * W, C]."""
    return x.flatten(2).transpose(1, 2)


def picture(x: Tensor) -> Tensor:
    """[N, H * W, C] to [N, C, H, W]."""
    return x.transpose(1, 2).reshape(x.shape[0], -1, SIZE, SIZE)


def filters(w: Tensor) -> Tensor:
    """[out, in] to [out, in, 1, 1]."""
    return w[:, :, None, None]


def along(v: Tensor) -> Tensor:
    """[C] to [C, 1, 1]."""
    return v[:, None, None]


def pooled(x: Tensor) -> Tensor:
    """[N, C, H, W] to [N, C]."""
    return x.mean((2, 3))


def heads(x: Tensor, n: int) -> Tensor:
    """[N, L, C] to [N, n, L, C / n]."""
    return x.unflatten(2, (n, -1)).transpose(1, 2)


def attend(m: Sequential, x: Tensor, n: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (heads(F.linear(rows(x), w), n) for w in (m.w, m.w2, m.w.t()))
    return picture(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def attend_in_one_group(m: Sequential, x: Tensor) -> Tensor:
    q, k, v = heads(F.linear(rows(x), m.w), 2), F.linear(rows(x), m.w2[:4])[:, None], F.linear(rows(x), m.w2[4:])
    return picture(((q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v[:, None]).transpose(1, 2).flatten(2))


def attend_by_hand(m: Sequential, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    q, k, v = F.conv2d(x, filters(torch.cat([m.w, m.w2, m.w]))).reshape(n, 3, 2, c // 2, h * w).unbind(1)
    return (v @ (q.transpose(-2, -1) @ k * (c // 2) ** -0.5).softmax(-1).transpose(-2, -1)).reshape(n, -1, h, w)


def attend_linearly(m: Sequential, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    q, k, v = F.conv2d(x, filters(torch.cat([m.w, m.w2, m.w]))).view(n, 3 * c, -1).chunk(3, 1)
    q, k, v = (part.view(n, 2, c // 2, -1) for part in (q.softmax(1), k.softmax(-1), v))
    context = torch.einsum("nhdp,nhep->nhde", k, v)
    return torch.einsum("nhde,nhdp->nhep", context, q).reshape(n, -1, h, w)


def windows(x: Tensor) -> Tensor:
    x = x.view(x.shape[0], x.shape[1], 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 4, x.shape[1])
    return x.view(-1, 2, 2, 4, 4, x.shape[3]).permute(0, 5, 1, 3, 2, 4).reshape(-1, x.shape[3], SIZE, SIZE)


def written_in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x += 1
    x[:, 2:5] = 0.5 * x[:, 1:4]
    x[:, 1:3].fill_(0.5)
    return x


def written_into_zeros(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape)
    y[:, :4], y[:, 4:] = x[:, :4], x[:, 4:]
    return y


def turned_in_place(x: Tensor) -> Tensor:
    return x.clone().transpose_(1, 2).unsqueeze_(0).squeeze_(0).transpose_(1, 2)


def one_filter_for_each_sample(m: Sequential, x: Tensor) -> Tensor:
    weight = (pooled(x)[:, :1, None] * m.w).reshape(-1, WIDTH, 1, 1)
    return F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight, groups=x.shape[0]).view(x.shape)


Operation = Callable[[Sequential, Tensor], Tensor]

OPERATIONS: dict[str, Operation] = {
    # parts of tensors and their order
    "narrow": lambda m, x: torch.cat([x.narrow(1, 2, 6), x.narrow(1, 0, 2)], 1),
    "chunk": lambda m, x: torch.cat(x.chunk(3, 1)[::-1], 1),
    "split": lambda m, x: torch.cat(x.split([3, 5], 1)[::-1], 1),
    "split to ones": lambda m, x: torch.cat(x.split(1, 1), 1),
    "tensor_split": lambda m, x: torch.cat(torch.tensor_split(x, 3, 1)[::-1], 1),
    "hsplit": lambda m, x: torch.cat(torch.hsplit(x, 2)[::-1], 1),
    "slices": lambda m, x: torch.cat([x[:, -3:], x[..., :-3, :, :]], 1),
    "half": lambda m, x: torch.cat([x[:, : x.shape[1] // 2], m.depthwise(x)[:, x.shape[1] // 2 :]], 1),
    "fixed half": lambda m, x: torch.cat([x[:, :4], m.depthwise(x)[:, 4:]], 1),
    "every second": lambda m, x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "select": lambda m, x: x.select(1, 2)[:, None] * x + x[:, -1:],
    "list": lambda m, x: x[:, [4, 0, 3, 1, 2, 7, 6, 5]],
    "one of a list": lambda m, x: x[:, [2]] * x,
    "index_select": lambda m, x: x.index_select(1, torch.tensor([4, 0, 3, 1, 2, 7, 6, 5])),
    "index_add": lambda m, x: x.index_add(1, torch.tensor([0, 3]), x[:, :2]),
    "scatter": lambda m, x: torch.zeros_like(x).scatter_add(
        1, torch.tensor([1, 2, 0, 3, 5, 4, 7, 6]).view(1, WIDTH, 1, 1).expand_as(x), x
    ),
    "masked_select": lambda m, x: x + x.masked_select(x > 0).mean(),
    "roll": lambda m, x: torch.roll(x, 1, 1),
    "flip": lambda m, x: x.flip(1),
    "rot90": lambda m, x: x.rot90(2, (1, 2)),
    "pad": lambda m, x: F.pad(x, (0, 0, 0, 0, 2, 0))[:, 2:],
    "pad and cut": lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 2))[:, :WIDTH],
    "diff": lambda m, x: F.pad(x.diff(dim=1), (0, 0, 0, 0, 0, 1)),
    "stack": lambda m, x: torch.stack([x, x.flip(1)], 1).sum(1),
    "interleave": lambda m, x: torch.stack([x, 2 * x], 2).flatten(1, 2)[:, :WIDTH],
    "unbind": lambda m, x: torch.stack(x.unbind(1)[:4] + x.unbind(1)[4:], 1),
    "loop": lambda m, x: torch.stack([x[:, i] for i in range(x.shape[1])], 1),
    "cat": lambda m, x: torch.cat([x, m.transposed(x)], 1)[:, 4:12],
    "cat and add": lambda m, x: sum(torch.cat([x, x], 1).chunk(2, 1)),
    "repeat": lambda m, x: x.repeat_interleave(2, 1).unflatten(1, (WIDTH, 2)).sum(2),
    "tile": lambda m, x: x.tile(1, 2, 1, 1)[:, ::2],
    "expand": lambda m, x: x.mean(1, keepdim=True).expand_as(x) * x,
    "class token": lambda m, x: picture(
        torch.cat([m.vector.view(1, 1, -1).expand(x.shape[0], -1, -1), rows(x)], 1)[:, 1:]
    ),
    # shapes
    "shuffle": lambda m, x: x.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "channel_shuffle": lambda m, x: torch.channel_shuffle(x, 2),
    "in place": lambda m, x: turned_in_place(x),
    "movedim": lambda m, x: torch.movedim(x, 1, 3).movedim(3, 1),
    "windows": lambda m, x: windows(x),
    "into the batch": lambda m, x: F.avg_pool2d(x.reshape(-1, 1, *x.shape[2:]), 3, 1, 1).view(x.shape),
    "size of itself": lambda m, x: x.reshape(x.shape[0], x.shape[1], -1).mean(-1)[:, :, None, None] + x,
    "size in arithmetic": lambda m, x: x / x.shape[1] ** 0.5,
    "size in a condition": lambda m, x: x * 2 if x.shape[1] == WIDTH else x * 3,
    "unfold": lambda m, x: F.unfold(x, 3, padding=1).view(x.shape[0], WIDTH, 9, *x.shape[2:]).mean(2),
    "fold": lambda m, x: F.fold(F.unfold(x, 2, stride=2), x.shape[-2:], 2, stride=2),
    "unfold of rows": lambda m, x: x.unfold(2, 2, 2).mean(-1).repeat_interleave(2, 2),
    "pixel_shuffle": lambda m, x: torch.pixel_shuffle(torch.pixel_unshuffle(x, 2), 2),
    "space to depth": lambda m, x: F.conv2d(
        x.view(x.shape[0], WIDTH, 4, 2, 4, 2).permute(0, 3, 5, 1, 2, 4).reshape(x.shape[0], 4 * WIDTH, 4, 4),
        filters(m.w.repeat(1, 4)),
    ).repeat(1, 1, 2, 2),
    "complex": lambda m, x: torch.view_as_real(
        torch.view_as_complex(x.unflatten(1, (-1, 2)).movedim(2, -1).contiguous()) * torch.tensor(0.6 + 0.8j)
    ).movedim(-1, 2).flatten(1, 2),
    # memory
    "written": lambda m, x: written_in_place(x),
    "written into zeros": lambda m, x: written_into_zeros(x),
    "changed": lambda m, x: x.clone().mul_(2).add_(along(m.vector)).sub_(along(m.constant)),
    "copy": lambda m, x: torch.empty_like(x).copy_(x),
    # element by element
    "where": lambda m, x: torch.where(x > 0.1, x, 0.2 * x),
    "masked_fill": lambda m, x: x.masked_fill(x < 0.05, 0.3),
    "maximum": lambda m, x: torch.maximum(x, -x.flip(1)),
    "lerp": lambda m, x: torch.lerp(x, x.flip(1), 0.3),
    "addcmul": lambda m, x: torch.addcmul(x, x, m.vector.view(-1, 1, 1)),
    "prelu": lambda m, x: F.prelu(x, m.vector),
    "power": lambda m, x: x.abs() ** 0.5 + 2**x,
    "round": lambda m, x: x.mul(10).round() / 10 + torch.floor_divide(x, 0.1) + x.sign(),
    "activations": lambda m, x: F.hardswish(F.softplus(x)) + F.celu(x) + F.softshrink(x) + F.logsigmoid(x) + F.gelu(x),
    "truth": lambda m, x: ((x > 0) & (x < 0.3)).double() + x,
    "table": lambda m, x: x * along(m.constant) + torch.zeros(x.shape[1]).to(x).view(1, -1, 1, 1),
    "arange": lambda m, x: x * torch.arange(x.shape[1]).to(x).view(1, -1, 1, 1),
    "linspace": lambda m, x: x * torch.linspace(0.5, 1, x.size(1)).to(x).view(1, -1, 1, 1),
    "spatial parameter": lambda m, x: x + m.w,
    "glu": lambda m, x: torch.cat([F.glu(x, 1)] * 2, 1),
    "maxout": lambda m, x: x.unflatten(1, (4, 2)).amax(2).repeat(1, 2, 1, 1),
    # statistics over channels
    "sum": lambda m, x: x + x.sum(1, keepdim=True),
    "mean": lambda m, x: x * x.mean((1, 2, 3), keepdim=True) + x.mean(1, keepdim=True),
    "std": lambda m, x: x / (x.std(1, keepdim=True) + x.var(1, unbiased=False, keepdim=True) + 1),
    "var_mean": lambda m, x: x - torch.var_mean(x, 1, keepdim=True)[1],
    "norm": lambda m, x: F.normalize(x, dim=1) + x / (x.norm(1, 1, keepdim=True) + 1),
    "cosine": lambda m, x: F.cosine_similarity(x, x.flip(1), dim=1)[:, None] * x,
    "largest": lambda m, x: x - x.amax(1, keepdim=True) + x.min(1, keepdim=True).values,
    "median": lambda m, x: x - x.median(1, keepdim=True).values,
    "product": lambda m, x: x + x.prod(1, keepdim=True),
    "logsumexp": lambda m, x: x - torch.logsumexp(x, 1, keepdim=True),
    "softmax": lambda m, x: x.softmax(1) * x + x.log_softmax(1) + F.softmin(x, 1),
    "cumsum": lambda m, x: x.cumsum(1),
    "topk": lambda m, x: x * along_batch(pooled(x) >= pooled(x).topk(3, 1).values[:, -1:]),
    "argmax": lambda m, x: x * along_batch(F.one_hot(pooled(x).argmax(1), WIDTH)),
    "group_norm": lambda m, x: F.group_norm(x, 2, m.vector, m.vector) + F.group_norm(x, 1),
    "layer_norm": lambda m, x: F.layer_norm(x.movedim(1, -1), (WIDTH,), m.vector).movedim(-1, 1),
    "rms_norm": lambda m, x: F.rms_norm(x.movedim(1, -1), (WIDTH,), m.vector).movedim(-1, 1),
    "rms by hand": lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * along(m.vector),
    "instance_norm": lambda m, x: F.instance_norm(x),
    "batch_norm": lambda m, x: m.norm(x),
    "batch norm by hand": lambda m, x: (x - along(m.norm.running_mean)) * along(m.norm.running_var + 1e-5).rsqrt(),
    "local_response_norm": lambda m, x: F.local_response_norm(x, 3),
    "fft": lambda m, x: torch.fft.rfft2(x).abs().mean((2, 3))[:, :, None, None] * x,
    "fft of channels": lambda m, x: torch.fft.rfft(x, dim=1).abs().mean(1, keepdim=True) * x,
    # products
    "linear": lambda m, x: F.linear(x.movedim(1, -1), m.w, m.vector).movedim(-1, 1),
    "matmul": lambda m, x: (x.permute(0, 2, 3, 1) @ m.w).permute(0, 3, 1, 2),
    "matmul from the left": lambda m, x: (m.w @ x.flatten(2)).view(x.shape),
    "spatial matmul": lambda m, x: x @ m.w,
    "einsum": lambda m, x: torch.einsum("nchw,dc->ndhw", x, m.w),
    "einsum with itself": lambda m, x: torch.einsum("nchw,nchv->nwv", x, x)[:, None] + x,
    "tensordot": lambda m, x: torch.tensordot(x, m.w, dims=([1], [0])).movedim(-1, 1),
    "chain": lambda m, x: (torch.linalg.multi_dot([m.w, m.w2, m.w]) @ x.flatten(2)).view(x.shape),
    "bmm": lambda m, x: torch.bmm(rows(x), x.flatten(2)).softmax(-1).mean(1).view(x.shape[0], 1, SIZE, SIZE) * x,
    "baddbmm": lambda m, x: torch.baddbmm(x.flatten(2), m.w.expand(x.shape[0], -1, -1), x.flatten(2)).view(x.shape),
    "addmm": lambda m, x: torch.addmm(m.vector, pooled(x), m.w)[:, :, None, None] * x,
    "vectors": lambda m, x: (x.movedim(1, -1) @ m.vector)[:, None] * x + torch.dot(m.vector, m.constant),
    "outer": lambda m, x: x * (pooled(x)[:, :, None] * pooled(x)[:, None, :]).sum(2)[:, :, None, None],
    "bilinear": lambda m, x: F.bilinear(pooled(x), pooled(x), m.triple)[:, :, None, None] + x,
    "cdist": lambda m, x: torch.cdist(rows(x), rows(x)).mean(1).view(x.shape[0], 1, SIZE, SIZE) + x,
    "diag_embed": lambda m, x: (torch.diag_embed(pooled(x)) @ x.flatten(2)).view_as(x),
    "trace": lambda m, x: x * torch.einsum("ncc->n", torch.bmm(x.flatten(2), rows(x)))[:, None, None, None],
    "triangle": lambda m, x: x @ torch.tril(x.transpose(2, 3)),
    "depthwise": lambda m, x: m.depthwise(x),
    "grouped": lambda m, x: m.grouped(x),
    "transposed": lambda m, x: m.transposed(x),
    "over channels": lambda m, x: F.conv3d(x[:, None], m.cube, padding=1)[:, 0],
    "channel attention": lambda m, x: x * F.conv1d(pooled(x)[:, None], m.kernel, padding=1)[:, 0, :, None, None],
    "excite": lambda m, x: x * F.conv2d(x.mean((2, 3), keepdim=True), filters(m.w)).sigmoid(),
    "filters of samples": one_filter_for_each_sample,
    "repeated filters": lambda m, x: F.conv2d(
        x.reshape(1, -1, *x.shape[2:]), m.depthwise.weight.repeat(x.shape[0], 1, 1, 1), padding=1,
        groups=x.shape[0] * x.shape[1],
    ).view(x.shape),
    "mixer": lambda m, x: F.linear(F.linear(x.flatten(2), m.w.repeat(1, 8)).relu(), m.w.repeat(8, 1)).view(x.shape),
    # attention and recurrence
    "attention": lambda m, x: picture(m.attention(rows(x), rows(x), rows(x))[0]),
    "two heads": lambda m, x: attend(m, x, 2, torch.ones(SIZE**2, SIZE**2, dtype=torch.bool).tril()),
    "one head": lambda m, x: attend(m, x, 1),
    "shared keys": attend_in_one_group,
    "by hand": attend_by_hand,
    "linear attention": attend_linearly,
    "over channels, too": lambda m, x: (torch.bmm(x.flatten(2), rows(x)).softmax(-1) @ x.flatten(2)).view(x.shape),
    "gru": lambda m, x: picture(m.gru(rows(x))[0]),
    "lstm": lambda m, x: picture(m.lstm(rows(x))[0]),
    # resolution
    "pooling": lambda m, x: F.interpolate(F.avg_pool2d(x, 2) + F.max_pool2d(x, 2), scale_factor=2.0, mode="bilinear"),
    "adaptive": lambda m, x: F.adaptive_avg_pool2d(x, 4).repeat(1, 1, 2, 2),
    "pooled channels": lambda m, x: picture(F.avg_pool1d(rows(x), 3, 1, 1)),
    "grid_sample": lambda m, x: F.grid_sample(
        x, torch.full((x.shape[0], SIZE, SIZE, 2), 0.1).to(x), align_corners=False
    ),
    # arithmetic on weights
    "standardised": lambda m, x: F.conv2d(x, filters((m.w - m.w.mean(1, keepdim=True)) / m.w.std(1, keepdim=True))),
    "weight softmax": lambda m, x: F.conv2d(x, filters(m.w.softmax(1))) + F.conv2d(x, filters(m.w2.softmax(0))),
    "weight norm": lambda m, x: F.conv2d(x, filters(F.normalize(m.w, dim=1))),
    "symmetric": lambda m, x: F.conv2d(x, filters(m.w + m.w.t())),
    "triangular": lambda m, x: F.conv2d(x, filters(m.w.tril())),
    "inverse": lambda m, x: F.conv2d(x, filters(torch.linalg.inv(m.w + 9 * torch.eye(WIDTH).to(x)))),
    "product of weights": lambda m, x: F.conv2d(x, filters(m.w[:, :3] @ m.w2[:3])),
    "concatenated weights": lambda m, x: F.conv2d(torch.cat([x, x], 1), filters(torch.cat([m.w, m.w2], 1))),
    "kron": lambda m, x: F.conv2d(x, filters(torch.kron(m.w[:4, :4], m.w2[:2, :2]))),
    "outer of weights": lambda m, x: F.conv2d(x, filters(torch.outer(m.vector, m.constant))),
    "repeated weights": lambda m, x: F.conv2d(x, filters(m.w[:2].repeat(4, 1) + m.w[:1].expand(WIDTH, WIDTH))),
    "tied": lambda m, x: F.conv2d(F.conv2d(x, filters(m.w)).relu(), filters(m.w.t())),
    "mixture": lambda m, x: F.conv2d(x, filters(torch.einsum("k,koi->oi", m.vector[:2], torch.stack([m.w, m.w2])))),
    "diagonal": lambda m, x: x * along(m.w.diagonal()),
    "row and column": lambda m, x: x * along(m.w[3]) + along(m.w2[:, 2]) * math.pi,
    "largest weights": lambda m, x: x * along(m.w.max(1)[0]) + along(m.w2.sum(0)),
}  # fmt: skip


def along_batch(v: Tensor) -> Tensor:
    """[N, C] to [N, C, 1, 1]."""
    return v[:, :, None, None]
