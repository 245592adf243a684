"""Estimators of the gradient against what they promise: exact second order, right conditional draws, less noise."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from prunegate.gumbel import gumbel_sigmoid, gumbel_softmax, reference
from prunegate.gumbel.arguments import make_options


def gradient(sample: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(sample, logits, weight)[0]


def test_reinmax_gates_close_to_the_published_form(backend: str) -> None:
    logits, weight = torch.randn(500, requires_grad=True), torch.randn(500)
    gates = gumbel_sigmoid(logits, 0.3, True, estimator="reinmax", backend=backend)
    probability = logits.sigmoid()
    expected = weight * torch.where(gates == 1, (1 - probability) / 2, probability / 2)
    assert_close(gradient(gates, logits, weight), expected)


def test_reinmax_is_exact_for_quadratic_losses() -> None:
    # Heun's step integrates a linear slope exactly; straight-through does not. By enumeration, without sampling.
    torch.manual_seed(0)
    logits = torch.randn(4, dtype=torch.float64, requires_grad=True)
    matrix, vector = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    one_hot = torch.eye(4, dtype=torch.float64)

    def loss(sample: torch.Tensor) -> torch.Tensor:
        return sample @ matrix @ sample + vector @ sample

    probability = logits.softmax(0)
    (exact,) = torch.autograd.grad(sum(probability[i] * loss(one_hot[i]) for i in range(4)), logits, retain_graph=True)
    means = {}
    for estimator in ("reinmax", "st"):
        options = make_options(1.0, None, True, estimator, 0)
        means[estimator] = sum(
            probability[i].detach()
            * torch.autograd.grad(loss(reference.softmax(logits, one_hot[i] * 1e3, options, 0)), logits)[0]
            for i in range(4)
        )
    assert_close(means["reinmax"], exact)
    assert (means["st"] - exact).norm() > 0.1 * exact.norm()


def test_reinmax_pair_is_the_reinmax_gate() -> None:
    logits, weight = torch.randn(50, requires_grad=True), torch.randn(50)
    options = make_options(1.0, 1.7, True, "reinmax", 0)
    noise = torch.randn(50)
    gate = reference.sigmoid(logits, noise, options)
    pair_noise = torch.stack([noise, torch.zeros(50)], -1)
    pair = reference.softmax(torch.stack([logits, torch.zeros(50)], -1), pair_noise, options, -1)[:, 0]
    assert gate.equal(pair)
    assert_close(gradient(gate, logits, weight), gradient(pair, logits, weight))


def test_conditional_scores_are_those_of_rejection_sampling() -> None:
    logits = torch.tensor([0.5, -0.3, 1.2, 0.0], dtype=torch.float64)
    accepted = logits + reference.gumbel_noise(logits.expand(200_000, 4), None)
    accepted = accepted[accepted.argmax(-1) == 1]
    value = torch.eye(4, dtype=torch.float64)[1].expand(len(accepted), 4)
    noise = reference.gumbel_noise(accepted, None)
    drawn = reference._gumbel_given(value, logits.log_softmax(0), noise, -1) + logits.logsumexp(0)
    assert (drawn.argmax(-1) == 1).all()
    for column in range(4):
        assert stats.ks_2samp(accepted[:, column].numpy(), drawn[:, column].numpy()).pvalue > 1e-4
    gaps = [(x[:, 1] - x[:, 2]).numpy() for x in (accepted, drawn)]
    assert stats.ks_2samp(*gaps).pvalue > 1e-4


@pytest.mark.parametrize("is_open", [True, False])
def test_conditional_gates_are_those_of_rejection_sampling(is_open: bool) -> None:
    logits = torch.full((200_000,), -0.7, dtype=torch.float64)
    accepted = logits + reference.logistic_noise(logits, None)
    accepted = accepted[(accepted > 0) == is_open]
    value = torch.full_like(accepted, float(is_open))
    drawn = reference._logistic_given(value, logits[: len(accepted)], reference.logistic_noise(accepted, None))
    assert ((drawn > 0) == is_open).all()
    assert stats.ks_2samp(accepted.numpy(), drawn.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("sampler", [gumbel_softmax, gumbel_sigmoid])
def test_conditional_draws_keep_the_mean_and_lower_the_noise(sampler, backend: str) -> None:
    rows, tau = 30_000, 0.3
    weight = torch.tensor([1.0, -2.0, 0.5]).expand(rows, -1)
    logits = torch.tensor([0.3, -0.2, 0.9]).repeat(rows, 1).requires_grad_()
    gradients = {
        samples: gradient(sampler(logits, tau, True, rao_samples=samples, backend=backend), logits, weight)
        for samples in (0, 1, 16)
    }
    for samples in (1, 16):
        spread = ((gradients[0].var(0) + gradients[samples].var(0)) / rows).sqrt()
        assert ((gradients[0].mean(0) - gradients[samples].mean(0)).abs() < 4.5 * spread).all()
    assert_close(gradients[1].var(0), gradients[0].var(0), rtol=0.05, atol=0)
    assert (gradients[16].var(0) < 0.5 * gradients[0].var(0)).all()


def test_annealing_the_backward_temperature_costs_noise() -> None:
    logits = torch.zeros(50_000, requires_grad=True)
    spread = {}
    for tau_backward in (1.0, 0.1):
        sample = gumbel_sigmoid(logits, 1.0, True, tau_backward=tau_backward)
        spread[tau_backward] = float(gradient(sample, logits, torch.ones_like(sample)).std())
    assert spread[0.1] > 3 * spread[1.0]


@pytest.mark.parametrize("kind", [{"estimator": "reinmax"}, {"rao_samples": 4}, {"tau_backward": 0.5}], ids=str)
def test_estimators_stay_finite_at_the_edges(kind: dict[str, object], backend: str) -> None:
    rows = torch.randn(40, 20) * 1e4
    rows[:, ::3] = -torch.inf
    for sampler in (gumbel_softmax, gumbel_sigmoid):
        logits = rows.clone().requires_grad_()
        sample = sampler(logits, 0.5, True, backend=backend, **kind)
        assert gradient(sample, logits, torch.randn_like(sample)).isfinite().all()
        assert sample.isfinite().all()
