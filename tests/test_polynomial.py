"""Cost polynomials against enumeration of every mask and against finite differences."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from torch import Tensor

from prunegate.polynomial import Polynomial, PolynomialBuilder

Terms = list[tuple[int, list[int | Tensor]]]


def random_terms(n_gates: int, degree: int, seed: int) -> Terms:
    """Terms whose factors share gates, repeat positions and hold constant positions."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    lengths = [torch.randint(-1, n_gates, (draw(1, 7),), generator=generator) for _ in range(4)]
    terms: Terms = [(draw(1, 50), [])]
    for _ in range(6):
        factors: list[int | Tensor] = [lengths[draw(0, 4)] for _ in range(degree)]
        terms.append((draw(1, 50), [*factors, draw(1, 4)]))
    terms.append((draw(1, 9), [lengths[0]] * degree))
    return terms


def build(n_gates: int, terms: Terms) -> Polynomial:
    builder = PolynomialBuilder(n_gates)
    for coefficient, factors in terms:
        builder.add(coefficient, factors)
    return builder.build()


def evaluate(terms: Terms, mask: Tensor) -> int:
    """The definition, position by position."""

    def live(factor: int | Tensor) -> int:
        if isinstance(factor, int):
            return factor
        return sum(1 for gate in factor.tolist() if gate < 0 or bool(mask[gate]))

    return sum(coefficient * math.prod(live(f) for f in factors) for coefficient, factors in terms)


def masks(n_gates: int) -> list[Tensor]:
    return [torch.tensor(bits) for bits in itertools.product([False, True], repeat=n_gates)]


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_every_mask_costs_what_its_positions_say(degree: int, seed: int) -> None:
    terms = random_terms(6, degree, seed)
    polynomial = build(6, terms)
    for mask in masks(6):
        assert polynomial.exact(mask) == evaluate(terms, mask)
    assert polynomial.dense == evaluate(terms, torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_expectation_is_the_weighted_mean_over_all_masks(degree: int, seed: int) -> None:
    terms = random_terms(6, degree, seed)
    p = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean = 0.0
    for mask in masks(6):
        mean += float(torch.where(mask, p, 1 - p).prod()) * evaluate(terms, mask)
    torch.testing.assert_close(float(build(6, terms).expected(p)), mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("degree", [2, 3])
def test_gradient_agrees_with_finite_differences(degree: int) -> None:
    polynomial = build(8, random_terms(8, degree, 5))
    p = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(polynomial.expected, (p,), rtol=1e-6)


def test_gradient_at_a_mask_is_the_cost_of_each_gate() -> None:
    terms = random_terms(7, 3, 2)
    polynomial = build(7, terms)
    mask = torch.tensor([True, False, True, True, False, False, True])
    gradient = polynomial.gradient(mask)
    for gate in range(7):
        with_gate, without = mask.clone(), mask.clone()
        with_gate[gate], without[gate] = True, False
        assert float(gradient[gate]) == pytest.approx(evaluate(terms, with_gate) - evaluate(terms, without))


def test_values_and_slopes_by_class_counts() -> None:
    polynomial = build(9, random_terms(9, 3, 3))
    mask = torch.rand(9, generator=torch.Generator().manual_seed(0)) > 0.4
    counts = torch.bincount(polynomial.classes[mask], minlength=polynomial.sizes.numel()).double().numpy()
    assert float(polynomial.at(counts)) == polynomial.exact(mask)
    slope = polynomial.slope(counts)
    for c in range(len(counts)):
        ahead, behind = counts.copy(), counts.copy()
        ahead[c] += 1e-4
        behind[c] -= 1e-4
        assert slope[c] == pytest.approx((polynomial.at(ahead) - polynomial.at(behind)) / 2e-4, rel=1e-6, abs=1e-6)
    both = polynomial.at(torch.stack([torch.as_tensor(counts), torch.as_tensor(counts) * 0]).numpy())
    assert both.shape == (2,)
    assert both[1] == polynomial.exact(torch.zeros(9, dtype=torch.bool))


def test_like_terms_merge_and_gates_of_a_layer_share_a_class() -> None:
    builder = PolynomialBuilder(10)
    stream, hidden = torch.arange(6), torch.arange(6, 10)
    for _ in range(3):
        builder.add(2, [stream, hidden.clone(), 1])
        builder.add(5, [hidden, stream.clone()])
    polynomial = builder.build()
    assert polynomial.n_terms == 1
    assert polynomial.dense == 3 * (2 + 5) * 6 * 4
    assert polynomial.classes.tolist() == [0] * 6 + [1] * 4


def test_values_beyond_the_reach_of_floats_stay_exact() -> None:
    builder = PolynomialBuilder(3)
    builder.add(10**18 + 1, [torch.arange(3), torch.arange(3)])
    assert builder.build().exact(torch.tensor([True, True, False])) == 4 * (10**18 + 1)


def test_a_polynomial_without_gates_is_its_constant() -> None:
    builder = PolynomialBuilder(0)
    builder.add(7, [3, torch.full((2,), -1)])
    polynomial = builder.build()
    assert polynomial.dense == 42
    assert float(polynomial.expected(torch.zeros(0))) == 42


@pytest.mark.parametrize("mask", [torch.ones(4), torch.ones(3, dtype=torch.bool)])
def test_masks_of_another_kind_are_refused(mask: Tensor) -> None:
    builder = PolynomialBuilder(4)
    builder.add(1, [torch.arange(4)])
    with pytest.raises(ValueError, match=r"expected bool \(4,\)"):
        builder.build().exact(mask)


def test_a_step_at_the_size_of_resnet50_takes_under_two_milliseconds() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(64, 1000, (50,), generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    groups = [torch.arange(int(a), int(b)) for a, b in itertools.pairwise(starts)]
    builder = PolynomialBuilder(int(starts[-1]))
    for i in range(160):
        builder.add(9 * 196, [groups[i % 50], groups[(i * 7 + i // 50) % 50]])
    polynomial = builder.build()
    assert polynomial.n_gates > 25_000
    logits = torch.randn(polynomial.n_gates, generator=generator, requires_grad=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken = []
        for _ in range(15):
            start = time.perf_counter()
            polynomial.expected(torch.sigmoid(logits)).backward()
            taken.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    # The fastest run: the others say how busy the machine was.
    assert min(taken) < 2e-3
