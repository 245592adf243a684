"""Networks of random operations: whatever follows whatever, masked equals slim, and costs are exact."""

import random
import warnings

import pytest
import torch

import prunegate
from prunegate.budget.following import followed
from prunegate.budget.limits import make_widths
from prunegate.select import least_cost
from tests.models import random_mask, randomise
from tests.operations import OPERATIONS, SIZE, Sequential


def check(names: list[str], seed: int) -> None:
    """Attaches to a network of these operations and cuts it along two masks.

    Some operations are written so that nothing can follow there: units are then kept, which is warned of.
    """
    torch.manual_seed(seed)
    model = randomise(Sequential(names).double(), seed=seed).eval()
    x = torch.randn(2, 3, SIZE, SIZE).double()
    gated = prunegate.attach(model, x).eval()
    with torch.no_grad():
        torch.testing.assert_close(gated(x), model(x), rtol=1e-10, atol=1e-10)
        for mask in (random_mask(gated, seed), random_mask(gated, seed + 1)):
            gated.mask = mask
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".* cannot follow the cut")
                slim = gated.export()
            masked = gated(x)
            torch.testing.assert_close(slim(x), masked, rtol=0, atol=1e-8 * float(masked.abs().max()))
            assert prunegate.count_flops(slim, x) == gated.cost.flops(gated.mask)
            assert sum(parameter.numel() for parameter in slim.parameters()) == gated.cost.params(gated.mask)


@pytest.mark.parametrize("name", OPERATIONS)
def test_one(name: str) -> None:
    check([name], 0)


def sequence(seed: int) -> list[str]:
    """Two or three operations, drawn by ``seed``."""
    generator = random.Random(seed)
    return generator.choices(sorted(OPERATIONS), k=generator.choice([2, 3]))


@pytest.mark.parametrize("seed", range(40))
def test_a_few_in_a_row(seed: int) -> None:
    check(sequence(seed), seed)


@pytest.mark.parametrize("seed", range(700, 720))
def test_budgets_hold(seed: int) -> None:
    """Half-way to the least that can be reached, whatever has to stay whole."""
    torch.manual_seed(seed)
    model = randomise(Sequential(sequence(seed)).double(), seed=seed).eval()
    x = torch.randn(2, 3, SIZE, SIZE).double()
    gated = prunegate.attach(model, x)
    dense = prunegate.count_flops(model, x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* stay whole")
        widths = followed(gated, make_widths(gated.groups, gated.cost.polynomials["params"], 8, 1, None, None, ()))
        most = (least_cost(gated.cost.polynomials["flops"], widths) + dense) // 2
        prunegate.Budget(gated, flops=most, steps=1).finish()
    slim = gated.export()
    assert prunegate.count_flops(slim, x) <= most < dense


@pytest.mark.slow
@pytest.mark.parametrize("first", range(40, 640, 50))
def test_many_in_a_row(first: int) -> None:
    for seed in range(first, first + 50):
        try:
            check(sequence(seed), seed)
        except Exception as error:
            error.add_note(f"seed {seed}: {sequence(seed)}")
            raise
