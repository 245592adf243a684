"""Tokens, windows and sequences."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.base import Tricky, Unit, affine, conv_in, conv_out


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


class GatedRecurrent(Tricky):
    """A recurrent layer with three gates, which turns its result in place to put the batch first, and a plain one."""

    input_shape = (2, 4, 3)

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.rnn, self.head = nn.GRU(3, 5, batch_first=True), nn.RNN(5, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.gru(x)[0])[0]).mean(1)

    def units(self) -> Iterator[Unit]:
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        for i in range(5):
            rows = {(f"gru.{name}", 0): (i, 5 + i, 10 + i) for name in names}
            yield rows | {("gru.weight_hh_l0", 1): (i,), ("rnn.weight_ih_l0", 1): (i,)}
        for i in range(4):
            yield {(f"rnn.{name}", 0): (i,) for name in names} | {("rnn.weight_hh_l0", 1): (i,)} | conv_in("head", i)


class StepByStep(Tricky):
    """A cell that runs in a loop, and makes its first state by its own width."""

    input_shape = (2, 4, 3)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Linear(3, 5), nn.LSTMCell(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in self.embed(x).unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])

    def units(self) -> Iterator[Unit]:
        for i in range(5):
            yield conv_out("embed", i) | {("cell.weight_ih", 1): (i,)}
        for i in range(4):
            gates = tuple(4 * gate + i for gate in range(4))
            rows = {(f"cell.{name}", 0): gates for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            yield rows | {("cell.weight_hh", 1): (i,)} | conv_in("head", i)


class TurnedInPlace(Tricky):
    """Tensors get other shapes in place."""

    input_shape = (2, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x.transpose_(1, 2).unsqueeze_(0)  # of a square: only the strides tell
        x = x.squeeze_(0).swapaxes_(1, 2)
        return self.head(self.b(x).mean(1).t_().t_())

    def units(self) -> Iterator[Unit]:
        for i in range(4):
            yield conv_out("a", i) | conv_in("b", i)
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


class StateSpace(Tricky):
    """A selective scan: inner channels each carry a state, whose width is a unit as well.

    A state's decay is a row of a table, what it takes up and gives back are made from the token.
    """

    input_shape = (2, 5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.state, self.rank = 4, 3, 2
        self.into, self.select = nn.Linear(6, 2 * self.inner), nn.Linear(self.inner, self.rank + 2 * self.state)
        self.step, self.conv = nn.Linear(self.rank, self.inner), nn.Conv1d(self.inner, self.inner, 3, groups=self.inner)
        self.decay, self.skip = nn.Parameter(torch.zeros(self.inner, self.state)), nn.Parameter(torch.ones(self.inner))
        self.out = nn.Linear(self.inner, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.into(x).chunk(2, dim=-1)
        x = F.silu(self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2))
        step, take, give = self.select(x).split([self.rank, self.state, self.state], dim=-1)
        step = F.softplus(self.step(step))
        decay = torch.exp(step.unsqueeze(-1) * -torch.exp(self.decay))
        taken = (step * x).unsqueeze(-1) * take.unsqueeze(2)
        state, ys = torch.zeros_like(taken[:, 0]), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + taken[:, t]
            ys.append((state * give[:, t].unsqueeze(1)).sum(-1))
        y = torch.stack(ys, 1) + self.skip * x
        return self.out(y * F.silu(gate)).mean(1)

    def units(self) -> Iterator[Unit]:
        for i in range(4):
            made = conv_out("into", i, 4 + i) | conv_out("conv", i) | conv_in("select", i) | conv_out("step", i)
            yield made | {("decay", 0): (i,), ("skip", 0): (i,)} | conv_in("out", i)
        for i in range(3):
            yield conv_out("select", 2 + i, 5 + i) | {("decay", 1): (i,)}
        for i in range(2):
            yield conv_out("select", i) | conv_in("step", i)


class PositionByConvolution(Tricky):
    """Tokens become a map again, for a depthwise convolution that tells them where they are."""

    input_shape = (2, 9, 4)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Linear(4, 6), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.fc1, self.fc2, self.head = nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, _, c = x.shape
        image = x.transpose(1, 2).view(b, c, 3, 3)
        x = (self.conv(image) + image).flatten(2).transpose(1, 2)
        return self.head(x + self.fc2(self.fc1(x).relu())).mean(1)

    def units(self) -> Iterator[Unit]:
        for i in range(6):
            made = conv_out("embed", i) | conv_out("conv", i) | conv_out("fc2", i)
            yield made | conv_in("fc1", i) | conv_in("head", i)
        for i in range(5):
            yield conv_out("fc1", i) | conv_in("fc2", i)


class BothWays(Tricky):
    """A recurrent layer that runs forwards and backwards: each direction has units of its own, side by side."""

    input_shape = (2, 4, 3)

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True, bidirectional=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0]).mean(1)

    def units(self) -> Iterator[Unit]:
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        for i in range(4):
            # Both directions keep one hidden size, so the same unit of each goes.
            gates = tuple(4 * gate + i for gate in range(4))
            rows = {(f"rnn.{name}{end}", 0): gates for name in names for end in ("", "_reverse")}
            columns = {(f"rnn.weight_hh_l0{end}", 1): (i,) for end in ("", "_reverse")}
            yield rows | columns | conv_in("head", i, 4 + i)
