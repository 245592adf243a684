"""The logits of all gates of a model in one parameter, and the sample of this step."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunegate.gumbel import gumbel_sigmoid
from prunegate.gumbel.philox import Philox
from prunegate.operators import OperatorSampler, Route

__all__ = ["NOISE_FLOOR", "Gates", "Phase", "Sample"]

NOISE_FLOOR = 0.02
"""Below this scale the noise no longer changes a draw, only the rounding of ``logits / noise``."""

Phase = Literal["open", "score", "search", "fixed"]


class Sample:
    """The gates of this step, one piece per site. Read by every consumer during forward and recomputation.

    A copy starts empty: a sample belongs to one forward of one model.
    """

    def __init__(self) -> None:
        self.pieces: Sequence[Tensor] | None = None
        self.routes: Mapping[str, Route] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Sample:
        duplicate = Sample()
        memo[id(self)] = duplicate
        return duplicate

    def __reduce__(self) -> tuple[type[Sample], tuple[()]]:
        return Sample, ()


class Gates(nn.Module):
    """Every gate of a model: one flat vector of logits, sampled by one call per forward.

    Attributes:
        logits: float32 ``[n_gates]``; the chance that a gate is open is ``sigmoid(logits / noise)``.
        phase: ``"open"``: no gating at all. ``"score"``: every gate is 1 and the gradient that reaches a logit is that
            of its gate. ``"search"``: in train mode one hard sample a forward, in eval mode the selector's mask.
            ``"fixed"``: ``fixed_mask`` in both modes.
        fixed_mask: bool ``[n_gates]``, the mask of phase ``"fixed"``.
        selector: Gives the current hard mask in phase ``"search"``; given a number, the mask for so many FLOPs.
        sample: What consumers read.
        counter: Seed and number of the next draw, int64 ``[2]``; ``None`` while draws come from torch's generator.

    Args:
        n_gates: Number of gates.
        pieces: What sites multiply by: for each piece the gate of each of its positions, int64, in the shape in which
            it broadcasts against what it multiplies; -1 where a position is always there.
        sample: Where the gates of a step are put.
        start: bool ``[n_gates]``, the mask of the model as it was given; every gate open if left out.
        operators: Draws the operators of choices, whose gates are the last; ``None`` where there are none.
    """

    fixed_mask: Tensor
    start: Tensor
    shown: Tensor
    settings: Tensor
    counter: Tensor | None
    index: Tensor

    def __init__(self, n_gates: int, pieces: Sequence[Tensor], sample: Sample, start: Tensor | None = None,
                 operators: OperatorSampler | None = None) -> None:  # fmt: skip
        super().__init__()
        self.operators = operators
        start = torch.ones(n_gates, dtype=torch.bool) if start is None else start
        self.logits = nn.Parameter(torch.zeros(n_gates))
        self.phase: Phase = "open"
        self.selector: Callable[..., Tensor] | None = None
        self.sample = sample
        self._shapes = [tuple(piece.shape) for piece in pieces]
        self._sizes = [piece.numel() for piece in pieces]
        flat = torch.cat([piece.reshape(-1) for piece in pieces]) if pieces else torch.zeros(0).long()
        # Positions that are always there read the constant 1 that is appended to the gates.
        self.register_buffer("index", torch.where(flat < 0, n_gates, flat), persistent=False)
        self.register_buffer("fixed_mask", start.clone(), persistent=False)
        self.register_buffer("start", start.clone(), persistent=False)
        self.register_buffer("shown", start.clone(), persistent=False)
        self.register_buffer("counter", None, persistent=False)
        # Temperature and noise are tensors so that a compiled step is not compiled again as they move.
        self.register_buffer("settings", torch.tensor([1.0, 1.0]), persistent=False)
        self._gathered: Tensor | None = None
        self._watch()

    @property
    def tau(self) -> float:
        """Temperature of the relaxed gate whose gradient is used, above 0."""
        return float(self.settings[0])

    @tau.setter
    def tau(self, value: float) -> None:
        self.settings[0] = value

    @property
    def noise(self) -> float:
        """Scale of the logistic noise, 0 to 1; values under the floor act as the floor."""
        return float(self.settings[1])

    @noise.setter
    def noise(self, value: float) -> None:
        self.settings[1] = value

    def seed(self, seed: int, step: int = 0) -> None:
        """Draws from here on are a function of ``seed`` and their number alone: the same on every rank and device.

        Args:
            seed: Any integer; its low 64 bits are used.
            step: Number of the next draw.
        """
        self.counter = Philox(seed, step, self.logits.device).state

    def _generator(self) -> Philox | None:
        return None if self.counter is None else Philox.over(self.counter)

    def probabilities(self) -> Tensor:
        """The chance that each gate is open, ``[n_gates]`` in (0, 1), differentiable."""
        logits = self.logits / self.settings[1].clamp(min=NOISE_FLOOR)
        return torch.sigmoid(logits) if self.operators is None else self.operators.probabilities(logits)

    def mask(self) -> Tensor:
        """The current hard mask, bool ``[n_gates]``."""
        if self.phase == "fixed":
            return self.fixed_mask
        if self.phase == "search" and self.selector is not None:
            return self.selector()
        return self.start

    def refresh(self) -> None:
        """Keeps the current mask at hand for compiled code, which cannot choose one: eval mode calls this."""
        if self.phase == "search" and not torch.compiler.is_compiling():
            self.shown.copy_(self.mask())

    def _hard(self) -> Tensor:
        if self.phase == "search" and torch.compiler.is_compiling():
            return self.shown
        return self.mask()

    def draw(self, training: bool) -> None:
        """Sets the sample that consumers read, for the forward that follows.

        Hard values in the forward; the gradient is that of the relaxed gate (straight-through, Jang et al.,
        arXiv 1611.01144), so that closed gates learn too.
        """
        if self.phase == "open":
            self.sample.pieces = self.sample.routes = None
            return
        if self.phase == "score":
            gates = 1 + (self.logits - self.logits.detach())
        elif self.phase == "search" and training:
            noise = self.settings[1].clamp(min=NOISE_FLOOR)
            tau = self.settings[0] / noise
            # Straight-through, though ReinMax has less bias at one noise: where the noise fades, ReinMax hears only the
            # few units near the threshold, and groups share worse. An MLP cut to 5% of its FLOPs on digits, 8 seeds:
            # -3.2 +- 1.2 points; averaging over 10 conditional draws: -1.1 +- 1.1.
            gates = gumbel_sigmoid(self.logits / noise, tau, hard=True, generator=self._generator())
        else:
            soft = torch.sigmoid(self.logits / self.settings[0])
            gates = self._hard().to(soft.dtype) + (soft - soft.detach())
        if self.operators is not None:
            self._draw_operators(self.operators, training)
            gates = self.operators.put(gates, self.sample.routes or {})
        padded = torch.cat([gates, gates.new_ones(1)])
        pieces = padded.index_select(0, self.index).split(self._sizes)
        self.sample.pieces = tuple(piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True))

    def _draw_operators(self, operators: OperatorSampler, training: bool) -> None:
        noise = self.settings[1].clamp(min=NOISE_FLOOR)
        if self.phase == "score":  # all operators train alike
            self.sample.routes = operators.draw(torch.zeros_like(self.logits), self.settings[0], self._generator())
        elif self.phase == "search" and training:
            self.sample.routes = operators.draw(self.logits / noise, self.settings[0] / noise, self._generator())
        else:
            self.sample.routes = operators.fixed(self._hard())

    def take_gradient(self) -> Tensor | None:
        """The gradient of the logits gathered by backward passes since the last call, ``[n_gates]``, or ``None``."""
        gathered, self._gathered = self._gathered, None
        return gathered

    def _watch(self) -> None:
        # The user's optimizer must never see a gradient here: whatever backward leaves is moved away at once.
        reference = weakref.ref(self)

        def move(parameter: Tensor) -> None:
            gates, gradient = reference(), parameter.grad
            parameter.grad = None
            if gates is not None and gradient is not None:
                gates._gathered = gradient if gates._gathered is None else gates._gathered + gradient

        self.logits.register_post_accumulate_grad_hook(move)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gates:
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        state = {key: value for key, value in self.__dict__.items() if key not in ("_gathered", "selector")}
        duplicate.__dict__.update(copy.deepcopy(state, memo))
        duplicate._gathered = None
        duplicate.selector = self.selector  # a copy's eval mode follows the search of the original
        duplicate._watch()
        return duplicate

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gates:
        before = self.logits
        super()._apply(fn, recurse)
        # Half precision is for the network; a logit moves by steps that half precision cannot hold.
        self.logits.data = self.logits.data.float()
        self.settings = self.settings.float()
        if self.logits is not before:
            self._watch()
        return self
