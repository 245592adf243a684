"""Modules whose forwards are rewritten in the tests; each form of call once."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Parent(nn.Module):
    """A decorated forward with a docstring, private names and calls over several lines."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)
        self.__factor = 3

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Says what it does."""
        # A comment that stays.
        y = self.linear(x).reshape(
            -1,
            2,
            4,
        )
        z = y.softmax(-1) @ y.transpose(
            1, 2
        )  # fmt: skip
        return F.layer_norm(z, (2,)).mean(dim=1) * self.__factor


class Child(Parent):
    """Reaches its parent's forward through super(), and a free function."""

    def forward(self, x: Tensor) -> Tensor:
        """Adds."""
        return super().forward(x) + centre(x).sum()


def centre(x: Tensor, *, scale: int = 3) -> Tensor:
    """A free function."""
    return x.mean(0) * scale


class Grandchild(Child):
    """Overrides nothing."""


class Everything(nn.Module):
    """Sizes and parts in every form."""

    width = 4

    def forward(self, x: Tensor, keep: tuple[int, ...] = (1, -1)) -> Tensor:
        """Takes [2, 12]."""
        a = x.view(*x.shape[:-1], 3, 4)
        sizes = (2, 3, 4)
        a = a.reshape(sizes)
        b, c, d = x.chunk(3, dim=-1)
        e = x[:, : self.width] + x[..., 2:6]
        n = x.shape[0] * 2
        f = [piece.reshape(n, 2) for piece in (b, c)]
        out = a.sum() + torch.cat([b, c, d]).sum() + e.sum() + sum(f).sum()
        if self.training:
            out = out * 2
        for _ in range(2):
            out = out + x.narrow(1, 0, 4).sum()
        out /= n
        return out + F.scaled_dot_product_attention(a, a, a).sum()


class Rebound(nn.Module):
    """Binds one of two forwards in its constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.forward_b

    def forward_a(self, x: Tensor) -> Tensor:
        """Not used."""
        return x

    def forward_b(self, x: Tensor) -> Tensor:
        """Used."""
        return x.reshape(2, 6)
