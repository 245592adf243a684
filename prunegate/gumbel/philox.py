"""Counter-based random numbers: the same (seed, step) gives the same draw on every device and every rank.

Philox 4x32 with seven rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the fewest that
the paper finds to pass all of BigCrush. Its ten are a margin for uses unknown; ours is known, and every round costs a
twentieth of a draw. The key is the seed; the counter is (column // 4, row, step, draw), and word ``column % 4`` of the
result belongs to the column. A number therefore depends on where it is used and on nothing else: not on block sizes,
thread counts or strides.

This file holds the generator and the slow, obvious form in torch operations. The C and Triton kernels make the
same words and turn them into the same noise, up to the last bits of a logarithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
ROUNDS = 7


class Philox:
    """A counter-based generator for ``generator=``: every sampling call uses one step.

    Unlike ``torch.Generator`` it gives the same gates on CPU, CUDA and every rank of a distributed run. Its state
    is a tensor, so that a CUDA graph advances it on replay.

    Args:
        seed: Any integer; its low 64 bits are used.
        step: Number of the next draw, 0 to 2**32 - 1.
        device: Where the logits live that will be sampled.

    Attributes:
        state: Seed and step of the next draw, int64 ``[2]``.
    """

    def __init__(self, seed: int, step: int = 0, device: torch.device | str | None = None) -> None:
        seed &= (1 << 64) - 1
        self.state = torch.tensor([seed - (1 << 64) if seed >> 63 else seed, step & _MASK], device=device)

    @classmethod
    def over(cls, state: Tensor) -> Philox:
        """A generator that reads, and moves on, a state that somebody else keeps: int64 ``[2]`` of seed and step."""
        generator = cls.__new__(cls)
        generator.state = state
        return generator

    @property
    def seed(self) -> int:
        """The seed, 0 to 2**64 - 1."""
        return int(self.state[0]) & ((1 << 64) - 1)

    @property
    def step(self) -> int:
        """Number of the next draw."""
        return int(self.state[1])

    def take(self) -> Tensor:
        """The state of the next draw, int64 ``[2]`` of seed and step; moves on to the one after it."""
        state = self.state.clone()
        self.state[1] += 1
        return state

    def __repr__(self) -> str:
        """Seed, next step and device."""
        return f"Philox(seed={self.seed}, step={self.step}, device='{self.state.device}')"


def take_state(generator: torch.Generator | Philox | None, device: torch.device) -> Tensor:
    """The seed and step of one draw, int64 ``[2]`` on ``device``, from any kind of generator."""
    if isinstance(generator, Philox):
        return generator.take()
    return torch.empty(2, dtype=torch.int64, device=device).random_(generator=generator)


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    # High and low word of a 32 by 32 bit product; halves keep every step inside a signed 64-bit integer.
    low = a * (constant & 0xFFFF)
    high = a * (constant >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def words(state: Tensor, row: Tensor, column: Tensor, draw: int = 0) -> Tensor:
    """Random words at the given places.

    Args:
        state: Seed and step, int64 ``[2]``.
        row: Row number of each place, int64, 0 to 2**32 - 1.
        column: Column number of each place, int64, 0 to 2**34 - 1; broadcasts with ``row``.
        draw: 0 for the sample itself, 1 and up for the conditional draws of an estimator.

    Returns:
        Uniform integers from 0 to 2**32 - 1, int64, of the broadcast shape.
    """
    row, column = torch.broadcast_tensors(row, column)
    keys = [state[0] & _MASK, (state[0] >> 32) & _MASK]
    counter = [column >> 2, row, (state[1] & _MASK).expand_as(row), torch.full_like(row, draw)]
    for _ in range(ROUNDS):
        high0, low0 = _multiply(counter[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(counter[2], _MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ keys[0], low1, high0 ^ counter[3] ^ keys[1], low0]
        keys = [(key + weyl) & _MASK for key, weyl in zip(keys, _WEYL, strict=True)]
    return torch.stack(counter, -1).gather(-1, (column & 3).unsqueeze(-1)).squeeze(-1)


def _lower_half(word: Tensor) -> Tensor:
    # The word's low 31 bits as a number in (0, 0.5]; small ones keep their full relative precision.
    return ((word & 0x7FFFFFFF).float() + 0.5) * 2.0**-32


def gumbel(word: Tensor) -> Tensor:
    """Standard Gumbel noise of each random word, float32, from -3.2 to 22.9.

    The word's top bit says which half of (0, 1) the uniform number is in and the rest how far it is from the
    nearest end, so both tails are as fine as 32 bits allow.
    """
    near = _lower_half(word)
    exponential = torch.where(word >> 31 == 1, -torch.log1p(-near), -torch.log(near))
    return -torch.log(exponential)


def logistic(word: Tensor) -> Tensor:
    """Standard logistic noise of each random word, float32, from -22.9 to 22.9; the word's top bit is its sign."""
    near = _lower_half(word)
    size = torch.log((1 - near) / near)
    return torch.where(word >> 31 == 1, size, -size)
