"""Models that another process can build by name."""

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Every kind of tensor that a file must hold."""

    listed: list[Tensor]

    def __init__(self, width: int = 8, act: type[nn.Module] = nn.ReLU, out: tuple[int, ...] = (3,)) -> None:
        super().__init__()
        self.table = nn.Embedding(5, width)
        self.act = act()
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.table.weight
        self.out = nn.Linear(5, out[0])
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.randn(width), persistent=False)
        self.scale = torch.randn(width)
        self.kept: Tensor | None = None
        self.grown = torch.zeros(1)

    def forward(self, index: Tensor) -> Tensor:
        """[N] to [N, out]."""
        self.kept = torch.ones(2)
        self.grown = torch.zeros(len(index))
        return self.out(self.head(self.act(self.norm(self.table(index))) * self.scale + self.shift))


class Offset(nn.Module):
    """Adds a buffer outside the state dict to its output, which no cut changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.register_buffer("offset", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 4] to [N, 3]."""
        return self.layers(x) + self.offset


class Lists(nn.Module):
    """Keeps a tensor in a list, and reads a value in its constructor."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.rates = torch.linspace(0, rate, 3).tolist()
        self.points = [torch.arange(4.0)]
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 4] to [N, 2]."""
        return self.linear(x * self.points[0]) * self.rates[1]


def endless(depth: int = 10**5) -> nn.Module:
    """Builds more layers than any file has tensors for."""
    return nn.Sequential(*(nn.Linear(1, 1) for _ in range(depth)))
