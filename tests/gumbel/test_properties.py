"""Properties that hold for any input, looked for by hypothesis."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from prunegate.gumbel import Philox, backends, gumbel_sigmoid, gumbel_softmax

NAMES = [name for name in ("reference", "aten", "cpu") if backends()[name].startswith("available")]
numbers = st.floats(-1e4, 1e4, width=32)
taus = st.floats(1e-3, 100)
quick = settings(max_examples=60, deadline=None)


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Float32 rows, some of whose categories may be masked out."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 90))
    values = draw(st.lists(numbers, min_size=1, max_size=12))
    logits = torch.tensor(values).repeat(rows * columns)[: rows * columns].reshape(rows, columns)
    masked = draw(st.lists(st.integers(0, columns - 1), max_size=3))
    logits[:, [column for column in masked if column]] = -math.inf
    return logits


@quick
@given(logits=matrices(), tau=taus, seed=st.integers(0, 2**64 - 1), name=st.sampled_from(NAMES), turned=st.booleans())
def test_a_hard_sample_is_one_hot_possible_and_repeatable(
    logits: torch.Tensor, tau: float, seed: int, name: str, turned: bool
) -> None:
    if turned:
        logits = logits.T.contiguous().T
    leaf = logits.requires_grad_()
    sample = gumbel_softmax(leaf, tau, True, generator=Philox(seed), backend=name)
    assert ((sample == 0) | (sample == 1)).all()
    assert (sample.sum(-1) == 1).all()
    assert (sample[logits.isneginf()] == 0).all()
    assert sample.equal(gumbel_softmax(leaf, tau, True, generator=Philox(seed), backend=name))
    (gradient,) = torch.autograd.grad(sample, leaf, torch.ones_like(sample).cumsum(-1))
    assert gradient.isfinite().all()
    # A softmax does not move when all logits move together.
    assert_close(gradient.double().sum(-1) * tau, torch.zeros(len(gradient)).double(), atol=2e-3, rtol=0)


@quick
@given(logits=matrices(), tau=taus, seed=st.integers(0, 2**64 - 1), name=st.sampled_from(NAMES))
def test_a_relaxed_sample_is_a_distribution_whose_mode_is_the_hard_sample(
    logits: torch.Tensor, tau: float, seed: int, name: str
) -> None:
    soft = gumbel_softmax(logits, tau, generator=Philox(seed), backend=name)
    hard = gumbel_softmax(logits, tau, True, generator=Philox(seed), backend=name)
    assert_close(soft.sum(-1), torch.ones(len(soft)))
    assert (soft >= 0).all()
    assert ((soft * hard).sum(-1) == soft.amax(-1)).all()


@quick
@given(logits=matrices(), tau=taus, seed=st.integers(0, 2**64 - 1), name=st.sampled_from(NAMES))
def test_gates_are_exact_and_their_gradient_is_not_negative(
    logits: torch.Tensor, tau: float, seed: int, name: str
) -> None:
    leaf = logits.requires_grad_()
    gates = gumbel_sigmoid(leaf, tau, True, generator=Philox(seed), backend=name)
    soft = gumbel_sigmoid(leaf, tau, generator=Philox(seed), backend=name)
    assert ((gates == 0) | (gates == 1)).all()
    assert (soft[gates == 1] >= 0.5).all()
    assert (soft[gates == 0] <= 0.5).all()
    (gradient,) = torch.autograd.grad(gates, leaf, torch.ones_like(gates))
    assert ((gradient >= 0) & (gradient <= 0.2501 / tau)).all()


@quick
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    seed=st.integers(0, 2**64 - 1),
    name=st.sampled_from(NAMES),
)
def test_ragged_rows_are_the_same_rows_alone(lengths: list[int], seed: int, name: str) -> None:
    logits = torch.linspace(-2, 2, sum(lengths))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    sample = gumbel_softmax(logits, 0.5, True, segments=offsets, generator=Philox(seed), backend=name)
    assert sample.split(lengths)[0].sum() == (lengths[0] > 0)
    assert float(sample.sum()) == sum(length > 0 for length in lengths)
    if lengths[0]:
        alone = gumbel_softmax(logits[: lengths[0]], 0.5, True, generator=Philox(seed), backend=name)
        assert sample[: lengths[0]].equal(alone)
