"""Draws follow the distributions that they are named after, on every backend and dtype."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from prunegate.gumbel import Philox, gumbel_sigmoid, gumbel_softmax

DRAWS = 1_000_000
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Seeds are fixed: a right sampler fails a check of this level for one seed in ten thousand, and that seed is not ours.
LEVEL = 1e-4


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    return float(stats.chisquare(counts.double().numpy(), expected.numpy()).pvalue)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("categories", [2, 5, 40])
def test_category_frequencies_are_softmax(backend: str, dtype: torch.dtype, categories: int) -> None:
    logits = torch.linspace(-2, 2, categories).to(dtype)
    sample = gumbel_softmax(logits.expand(min(DRAWS, 8 * DRAWS // categories), -1), tau=0.3, hard=True, backend=backend)
    counts = sample.float().sum(0)
    assert counts.sum() == len(sample)
    assert chi_square(counts, logits.double().softmax(0)) > LEVEL


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_frequencies_are_sigmoid(backend: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([-6.0, -1.5, 0.0, 0.7, 4.0], dtype=dtype)
    sample = gumbel_sigmoid(logits.expand(DRAWS // 5, 5), hard=True, backend=backend).float()
    for gate, probability in zip(sample.T, logits.double().sigmoid(), strict=True):
        assert stats.binomtest(int(gate.sum()), len(gate), float(probability)).pvalue > LEVEL


def test_many_categories_keep_their_tail(backend: str) -> None:
    # The winner of many equal categories comes from the noise's upper tail, where a coarse uniform number fails.
    sample = gumbel_softmax(torch.zeros(500, 20_000), hard=True, backend=backend)
    winners = sample.nonzero()[:, 1]
    assert stats.kstest((winners.double() / 20_000).numpy(), "uniform").pvalue > LEVEL


def are_logistic(scores: torch.Tensor, tau: float) -> bool:
    # Float32 cannot tell gates from 1 that are nearer than an ulp, so the comparison is inside the range it holds.
    edge = 12 * min(tau, 1.0)
    low, high = stats.logistic.cdf([-edge, edge])
    inside = scores[scores.abs() < edge].numpy()
    fits = stats.kstest(inside, lambda x: (stats.logistic.cdf(x) - low) / (high - low)).pvalue
    return min(fits, stats.binomtest(len(inside), len(scores), high - low).pvalue) > LEVEL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tau", [0.2, 1.0, 5.0])
def test_relaxed_pair_has_the_concrete_distribution(backend: str, tau: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([0.4, -0.6], dtype=dtype)
    sample = gumbel_softmax(logits.expand(100_000, 2), tau=tau, backend=backend).double()
    assert are_logistic((sample[:, 0].log() - sample[:, 1].log()) * tau - 1.0, tau)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tau", [0.2, 1.0, 5.0])
def test_relaxed_gate_has_the_concrete_distribution(backend: str, tau: float, dtype: torch.dtype) -> None:
    sample = gumbel_sigmoid(torch.full((100_000,), 0.5, dtype=dtype), tau=tau, backend=backend)
    assert are_logistic(torch.logit(sample.double()) * tau - 0.5, tau)


def test_rows_and_columns_are_independent(backend: str) -> None:
    sample = gumbel_sigmoid(torch.zeros(2000, 64), hard=True, backend=backend).double()
    correlation = torch.corrcoef((sample - 0.5).T).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(2000)
    lagged = torch.corrcoef(torch.stack([sample.flatten()[:-1], sample.flatten()[1:]]))[0, 1]
    assert abs(float(lagged)) < 4 / math.sqrt(sample.numel())


def test_consecutive_draws_differ(backend: str) -> None:
    generator = Philox(5)
    first, second = (gumbel_sigmoid(torch.zeros(1000), hard=True, generator=generator, backend=backend) for _ in "ab")
    assert 400 < int((first != second).sum()) < 600


@pytest.mark.parametrize("generator", [None, 11], ids=["torch", "philox"])
def test_ragged_rows_have_their_own_softmax(backend: str, generator: int | None) -> None:
    rows = [torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.5]), torch.tensor([2.0, 0.0, 0.0, 0.0, 1.0, 1.0])]
    repeats = 4000
    logits = torch.cat(rows).repeat(repeats)
    segments = torch.tensor([0] + [len(row) for row in rows] * repeats).cumsum(0)
    source = None if generator is None else Philox(generator)
    sample = gumbel_softmax(logits, hard=True, segments=segments, generator=source, backend=backend)
    counts = sample.reshape(repeats, -1).sum(0).split([len(row) for row in rows])
    assert float(counts[1]) == repeats
    for row, count in zip(rows, counts, strict=True):
        assert count.sum() == repeats
        if len(row) > 1:
            assert chi_square(count, row.double().softmax(0)) > LEVEL
