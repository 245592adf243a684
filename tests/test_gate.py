"""The stand-alone gate: its distribution, its gradients, and two problems that it must solve."""

from __future__ import annotations

import math

import bandit
import pointer
import pytest
import torch

import prunegate


def test_samples_follow_the_softmax_of_the_logits() -> None:
    gate = prunegate.Gate(4)
    assert gate.logits is not None
    gate.logits.data = torch.tensor([0.0, 1.0, -1.0, 0.5])
    drawn = torch.stack([gate() for _ in range(4000)])
    assert torch.equal(drawn.detach().unique(), torch.tensor([0.0, 1.0]))
    expected = torch.tensor([0.0, 1.0, -1.0, 0.5]).exp()
    torch.testing.assert_close(drawn.detach().mean(0), expected / expected.sum(), atol=0.04, rtol=0)
    indices = torch.stack([gate.sample() for _ in range(2000)])
    assert indices.dtype == torch.int64
    share = torch.bincount(indices, minlength=4) / 2000
    torch.testing.assert_close(share, expected / expected.sum(), atol=0.05, rtol=0)


def test_eval_mode_takes_the_most_likely_and_keeps_the_gradient() -> None:
    gate = prunegate.Gate(3, shape=(2,)).eval()
    assert gate.logits is not None
    gate.logits.data = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    out = gate()
    assert out.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    values = torch.tensor([1.0, 2.0, 4.0])
    (out @ values).sum().backward()
    soft = torch.softmax(gate.logits.detach(), -1)
    expected = soft * (values - (soft * values).sum(-1, keepdim=True))
    torch.testing.assert_close(gate.logits.grad, expected)
    assert gate.index().tolist() == [1, 0]


def test_temperature_shapes_the_relaxed_sample_and_not_the_distribution() -> None:
    gate = prunegate.Gate(3, tau=0.1, hard=False)
    sharp = torch.stack([gate() for _ in range(200)]).amax(-1).mean()
    gate.tau = 10.0
    flat = torch.stack([gate() for _ in range(200)]).amax(-1).mean()
    assert sharp > 0.9 > 0.5 > flat
    torch.testing.assert_close(gate.probabilities().detach(), torch.full((3,), 1 / 3))


def test_entropy_and_log_prob_are_those_of_torch() -> None:
    logits = torch.randn(5, 4)
    gate = prunegate.Gate()
    reference = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(gate.entropy(logits), reference.entropy())
    index = torch.tensor([0, 3, 1, 2, 2])
    torch.testing.assert_close(gate.log_prob(index, logits), reference.log_prob(index))
    assert float(gate.entropy(torch.tensor([0.0, -math.inf]))) == 0
    assert not gate.sample(torch.tensor([0.0, -math.inf]).expand(50, 2)).any()


def test_one_distribution_gives_the_log_prob_of_many_indices() -> None:
    gate = prunegate.Gate(3)
    torch.testing.assert_close(gate.log_prob(torch.tensor([0, 1, 2, 1])).detach(), torch.full((4,), -math.log(3)))


@pytest.mark.parametrize("n", [1, 0, 2.5, True])
def test_number_of_alternatives_is_checked(n: object) -> None:
    with pytest.raises(prunegate.SamplerError, match="2 or more"):
        prunegate.Gate(n)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(prunegate.SamplerError, match="tau=0"):
        prunegate.Gate(3, tau=0)
    with pytest.raises(prunegate.SamplerError, match="own logits"):
        prunegate.Gate(shape=(2,))
    with pytest.raises(prunegate.SamplerError, match="no logits of its own"):
        prunegate.Gate()()
    with pytest.raises(prunegate.SamplerError, match="n=None"):
        prunegate.Gate(2)(torch.zeros(2))
    with pytest.raises(prunegate.SamplerError, match="estimator"):
        prunegate.Gate(2, estimator="best")()


@pytest.mark.parametrize("seed", range(3))
def test_bandit_finds_the_right_arms(seed: int) -> None:
    result = bandit.main(["--seed", str(seed)])
    assert result["right"] == 1
    assert result["regret_last"] < result["regret_first"] / 5
    assert result["entropy"] < 0.5 * math.log(5)


@pytest.mark.parametrize("estimator", ["st", "reinmax"])
def test_pointer_learns_where_to_look(estimator: str) -> None:
    result = pointer.main(["--steps", "300", "--estimator", estimator])
    assert result["right"] > 0.97 > 10 * result["chance"]
    assert result["entropy"] < 0.5
