"""Gradients: exact given the noise, right on average, twice differentiable."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from prunegate.gumbel import Philox, aten, gumbel_sigmoid, gumbel_softmax, reference
from prunegate.gumbel.arguments import make_options


def options(tau: float = 1.0, tau_backward: float | None = None, estimator: str = "st", rao: int = 0):
    return make_options(tau, tau_backward, True, estimator, rao)


def gradient(sample: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(sample, logits, weight)[0]


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("tau_backward", [None, 2.0])
def test_given_the_noise_a_hard_gate_has_the_relaxed_gradient(tau: float, tau_backward: float | None) -> None:
    logits = torch.randn(1000, requires_grad=True)
    noise, weight = torch.randn(1000), torch.randn(1000)
    sample = reference.sigmoid(logits, noise, options(tau, tau_backward))
    assert sample.equal((logits + noise > 0).float())
    soft = torch.sigmoid((logits + noise) / (tau_backward or tau))
    assert_close(gradient(sample, logits, weight), weight * soft * (1 - soft) / (tau_backward or tau))


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("tau_backward", [None, 2.0])
def test_given_the_noise_a_hard_row_has_the_relaxed_gradient(tau: float, tau_backward: float | None) -> None:
    logits = torch.randn(50, 7, requires_grad=True)
    noise, weight = torch.randn(50, 7), torch.randn(50, 7)
    sample = reference.softmax(logits, noise, options(tau, tau_backward), -1)
    assert sample.argmax(-1).equal((logits + noise).argmax(-1))
    soft = torch.softmax((logits + noise) / (tau_backward or tau), -1)
    inner = soft * (weight - (soft * weight).sum(-1, keepdim=True)) / (tau_backward or tau)
    assert_close(gradient(sample, logits, weight), inner)


@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("tau_backward", [None, 1.5])
@pytest.mark.parametrize("shape", [(300, 4), (300, 20), (3, 5000)])
def test_fast_rows_equal_the_oracle_given_the_same_noise(
    tau: float, tau_backward: float | None, shape: tuple[int, ...]
) -> None:
    logits, weight = torch.randn(shape, requires_grad=True), torch.randn(shape)
    how = options(tau, tau_backward)
    torch.manual_seed(1)
    sample = gumbel_softmax(logits, tau, True, tau_backward=tau_backward, backend="aten")
    torch.manual_seed(1)
    if shape[1] <= aten.SHORT_ROW:
        noise = aten.gumbel_noise(logits.T, None).T
    else:
        noise = aten.gumbel_noise(logits, None)
    expected = reference.softmax(logits, noise, how, -1)
    assert sample.equal(expected)
    # The gradient's own scale is 1 / tau.
    scale = tau_backward or tau
    ours, theirs = (scale * gradient(x, logits, weight) for x in (sample, expected))
    assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("tau_backward", [None, 1.5])
def test_fast_gates_equal_the_oracle_given_the_same_noise(tau: float, tau_backward: float | None) -> None:
    logits, weight = torch.randn(5000, requires_grad=True), torch.randn(5000)
    torch.manual_seed(1)
    sample = gumbel_sigmoid(logits, tau, True, tau_backward=tau_backward, backend="aten")
    torch.manual_seed(1)
    expected = reference.sigmoid(logits, aten.logistic_noise(logits, None), options(tau, tau_backward))
    assert sample.equal(expected)
    assert_close(gradient(sample, logits, weight), gradient(expected, logits, weight), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_mean_gradient_is_that_of_torch(backend: str, tau: float) -> None:
    rows = 60_000
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    logits = torch.tensor([0.3, -0.2, 0.9, -1.0, 0.0]).repeat(rows, 1).requires_grad_()
    ours = gradient(gumbel_softmax(logits, tau, True, backend=backend), logits, weight.expand(rows, -1))
    theirs = gradient(F.gumbel_softmax(logits, tau, True), logits, weight.expand(rows, -1))
    spread = ((ours.var(0) + theirs.var(0)) / rows).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4.5 * spread).all()
    assert_close(ours.std(0), theirs.std(0), rtol=0.03, atol=0)


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_mean_gate_gradient_is_that_of_the_torch_pair(backend: str, tau: float) -> None:
    rows = 200_000
    logits = torch.full((rows,), 0.8, requires_grad=True)
    ours = gradient(gumbel_sigmoid(logits, tau, True, backend=backend), logits, torch.ones(rows))
    pair = F.gumbel_softmax(torch.stack([logits, torch.zeros(rows)], -1), tau, True)[:, 0]
    theirs = gradient(pair, logits, torch.ones(rows))
    spread = float(((ours.var() + theirs.var()) / rows).sqrt())
    assert abs(float(ours.mean() - theirs.mean())) < 4.5 * spread
    assert_close(ours.std(), theirs.std(), rtol=0.02, atol=0)


@pytest.mark.parametrize("tau_backward", [None, 2.0])
def test_relaxed_samples_pass_gradcheck(backend: str, tau_backward: float | None) -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    if tau_backward is None:
        check = (gradcheck, gradgradcheck)
        for test in check:
            assert test(lambda x: gumbel_softmax(x, 0.7, generator=Philox(3), backend=backend), logits)
            assert test(lambda x: gumbel_sigmoid(x, 0.7, generator=Philox(3), backend=backend), logits)
    else:
        weight = torch.randn(4, 5, dtype=torch.float64)
        for sample in (gumbel_softmax, gumbel_sigmoid):
            mixed = sample(logits, 0.7, tau_backward=2.0, generator=Philox(3), backend=backend)
            colder = sample(logits, 0.7, generator=Philox(3), backend=backend)
            hotter = sample(logits, 2.0, generator=Philox(3), backend=backend)
            assert mixed.equal(colder)
            assert_close(gradient(mixed, logits, weight), gradient(hotter, logits, weight))


@pytest.mark.parametrize("sampler", [gumbel_softmax, gumbel_sigmoid])
@pytest.mark.parametrize("columns", [20, 70])
def test_hard_samples_have_second_derivatives(sampler, columns: int, backend: str) -> None:
    logits, weight = torch.randn(6, columns, requires_grad=True), torch.randn(6, columns)
    probe = torch.randn(6, columns)

    def derivatives(hard: bool) -> list[torch.Tensor]:
        torch.manual_seed(2)
        sample = sampler(logits, 0.8, hard, backend=backend)
        (first,) = torch.autograd.grad((sample * weight).sum(), logits, create_graph=True)
        (second,) = torch.autograd.grad((first * probe).sum(), logits)
        return [first.detach(), second]

    hard, soft = derivatives(True), derivatives(False)
    assert hard[1].abs().max() > 1e-3
    assert_close(hard, soft)


def test_short_hard_rows_have_second_derivatives() -> None:
    # J(y) g differentiated once more, against the same expression written out on the sampler's own relaxed output.
    logits, weight, probe = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4), torch.randn(6, 4)
    hard, soft = aten._HardSoftmax.apply(logits, 0.8, None)
    (first,) = torch.autograd.grad((hard * weight).sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad((first * probe).sum(), logits, retain_graph=True)
    written = soft * (weight - (soft * weight).sum(-1, keepdim=True)) / 0.8
    (expected,) = torch.autograd.grad((written * probe).sum(), logits)
    assert_close(first, written)
    assert_close(second, expected)


@pytest.mark.parametrize("sampler", [gumbel_softmax, gumbel_sigmoid])
def test_a_learned_temperature_gets_its_gradient(sampler) -> None:
    logits = torch.randn(6, 5, dtype=torch.float64)
    tau = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: sampler(logits, t, generator=Philox(3)), tau)
    hard = sampler(logits, tau, True, generator=Philox(3))
    soft = sampler(logits, tau, False, generator=Philox(3))
    weight = torch.randn_like(soft)
    assert_close(gradient(hard, tau, weight), gradient(soft, tau, weight))


def test_ragged_rows_have_the_gradient_of_each_row(backend: str) -> None:
    lengths = [3, 1, 40, 7]
    logits, weight = torch.randn(sum(lengths), requires_grad=True), torch.randn(sum(lengths))
    segments = [0, 3, 4, 44, 51]
    for extra in ({}, {"tau_backward": 2.0}, {"estimator": "reinmax"}, {"rao_samples": 3}):
        arguments = {"tau": 0.7, "hard": True, "segments": segments, **extra}
        sample = gumbel_softmax(logits, generator=Philox(9, 4), backend=backend, **arguments)
        oracle = gumbel_softmax(logits, generator=Philox(9, 4), backend="reference", **arguments)
        assert [float(row.sum()) for row in sample.detach().split(lengths)] == [1, 1, 1, 1]
        assert sample.equal(oracle)
        assert_close(gradient(sample, logits, weight), gradient(oracle, logits, weight), atol=1e-6, rtol=1e-5)
