"""A categorical gate for any code: a hard index that explores while it is unsure and exploits once it is not."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from prunegate.errors import SamplerError
from prunegate.gumbel import gumbel_softmax

__all__ = ["Gate"]


class Gate(nn.Module):
    """Picks one of ``n`` alternatives: a sample in train mode, the most likely one in eval mode.

    The forward value is exactly one-hot, the gradient that of the relaxed sample (straight-through Gumbel-softmax,
    Jang et al., arXiv 1611.01144), so what is computed from ``gate() @ bank`` trains the choice. Without logits of its
    own (``n=None``) the gate samples from what a network gives it: an expert, a policy, where to look.

    Args:
        n: Number of alternatives, 2 or more, for a gate with logits of its own; ``None`` for one that is given them.
        shape: Leading shape of its own logits, for several gates in one: the logits are ``[*shape, n]``.
        tau: Temperature of the relaxed sample, above 0. May be assigned at any time.
        hard: Whether samples are one-hot; if not, they are the relaxed probabilities.
        estimator: ``"st"`` or ``"reinmax"``, as in :func:`prunegate.gumbel_softmax`.
        rao_samples: Conditional draws that the gradient is averaged over, as there.

    Attributes:
        logits: float32 ``[*shape, n]``, zeros at first; ``None`` for a gate that is given them.
        tau: The temperature.

    Raises:
        SamplerError: An argument is out of range, or logits are given to a gate that has its own (or not to one that
            has none).

    Example:
        >>> import torch, prunegate
        >>> gate = prunegate.Gate(3)
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> row = gate() @ bank
        >>> row.shape, int(gate().sum())
        (torch.Size([2]), 1)
        >>> gate.logits.data[2] = 5.0
        >>> int(gate.index()), round(gate.entropy().item(), 2)
        (2, 0.08)
    """

    logits: nn.Parameter | None

    def __init__(self, n: int | None = None, shape: tuple[int, ...] = (), *, tau: float = 1.0, hard: bool = True,
                 estimator: str = "st", rao_samples: int = 0) -> None:  # fmt: skip
        super().__init__()
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 2):
            raise SamplerError(
                f"a gate over n={n!r} alternatives was asked for; expected a whole number of 2 or more, or None for a "
                "gate that is given its logits when it is called"
            )
        if n is None and shape:
            raise SamplerError(f"shape={shape!r} is that of a gate's own logits; pass n= too, or leave it out")
        self.logits = None if n is None else nn.Parameter(torch.zeros(*shape, n))
        self.hard = hard
        self.estimator = estimator
        self.rao_samples = rao_samples
        self.tau = tau

    @property
    def tau(self) -> float:
        """Temperature of the relaxed sample, above 0."""
        return self._tau

    @tau.setter
    def tau(self, value: float) -> None:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise SamplerError(f"tau={value!r} was given; expected a finite number above 0")
        self._tau = float(value)

    def forward(self, logits: Tensor | None = None) -> Tensor:
        """One draw.

        Args:
            logits: ``[..., n]`` for a gate without its own; -inf rules an alternative out.

        Returns:
            Weights ``[..., n]`` that sum to 1: one-hot where ``hard``. In eval mode those of the most likely
            alternative, without noise.
        """
        given = self._logits(logits)
        if self.training:
            return gumbel_softmax(given, self.tau, self.hard, estimator=self.estimator, rao_samples=self.rao_samples)
        soft = torch.softmax(given / self.tau, -1)
        if not self.hard:
            return soft
        return _one_hot(given.argmax(-1), soft) + (soft - soft.detach())

    def sample(self, logits: Tensor | None = None) -> Tensor:
        """Hard indices drawn from the distribution, int64 ``[...]``, in either mode; without gradient."""
        with torch.no_grad():
            return gumbel_softmax(self._logits(logits), hard=True).argmax(-1)

    def index(self, logits: Tensor | None = None) -> Tensor:
        """The most likely alternative, int64 ``[...]``."""
        return self._logits(logits).detach().argmax(-1)

    def probabilities(self, logits: Tensor | None = None) -> Tensor:
        """The chance of each alternative, ``[..., n]``, differentiable; the temperature plays no part in it."""
        return torch.softmax(self._logits(logits), -1)

    def log_prob(self, index: Tensor, logits: Tensor | None = None) -> Tensor:
        """Logarithm of the chance of the alternatives ``index`` (int64 ``[...]``), for score-function gradients."""
        log = torch.log_softmax(self._logits(logits), -1)
        return log.expand(*index.shape, log.shape[-1]).gather(-1, index.unsqueeze(-1)).squeeze(-1)

    def entropy(self, logits: Tensor | None = None) -> Tensor:
        """Entropy in nats, ``[...]``, between 0 (settled) and log(n) (undecided); differentiable."""
        log = torch.log_softmax(self._logits(logits), -1)
        chance = log.exp()
        return -torch.where(chance > 0, chance * log, 0.0).sum(-1)

    def _logits(self, given: Tensor | None) -> Tensor:
        if self.logits is None:
            if not isinstance(given, Tensor):
                raise SamplerError("this gate has no logits of its own; pass it logits [..., n], or make it with n=")
            return given
        if given is not None:
            raise SamplerError("this gate has logits of its own; make it with n=None to pass it others")
        return self.logits

    def extra_repr(self) -> str:
        """What is shown of the gate."""
        shown: Any = "given logits" if self.logits is None else tuple(self.logits.shape)
        return f"{shown}, tau={self.tau}, hard={self.hard}, estimator={self.estimator!r}"


def _one_hot(index: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).scatter_(-1, index.unsqueeze(-1), 1.0)
