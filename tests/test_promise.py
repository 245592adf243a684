"""The final choice where a cost is more than its polynomial, and what is held on conditions."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from prunegate.budget.alternatives import disjoint, either, together
from prunegate.budget.promise import Promise
from prunegate.polynomial import PolynomialBuilder
from prunegate.select import Limit, Width


def test_what_a_polynomial_overlooks_is_filled_up() -> None:
    """Units of the second group are free up to six, though the polynomial charges for each."""
    builder = PolynomialBuilder(16)
    for part in (torch.arange(8), torch.arange(8, 16)):
        builder.add(10, [part])
    cost = builder.build()

    def exact(mask: Tensor) -> int:
        return 10 * int(mask[:8].sum()) + (0 if int(mask[8:].sum()) <= 6 else 1000)

    scores = torch.cat([torch.linspace(2, 1, 8), torch.linspace(0.2, 0.1, 8)]).double()
    promise = Promise([Limit("latency", cost, 45)], [Width(slice(0, 8), 1, 8), Width(slice(8, 16), 1, 8)],
                      torch.ones(16, dtype=torch.bool), {"latency": exact})  # fmt: skip
    chosen = promise.choose(scores)
    assert chosen.mask.tolist() == [True] * 4 + [False] * 4 + [True] * 6 + [False] * 2
    assert "one step more of any group would exceed a budget" in promise.report(chosen.mask, chosen)


def test_conditions_add_up_to_one_where_one_of_them_holds() -> None:
    """Against every choice of three operators at each of three places."""
    a, b, c = "abc"
    conditions = [frozenset({(a, 0)}), frozenset({(a, 0), (b, 1)}), frozenset({(b, 1)}), frozenset({(a, 2), (c, 0)}),
                  frozenset({(c, 0)})]  # fmt: skip
    for count in range(1, len(conditions) + 1):
        for some in itertools.combinations(conditions, count):
            terms = list(disjoint(either(some)))
            for chosen in itertools.product(range(3), repeat=3):
                here = set(zip("abc", chosen, strict=True))
                value = sum(coefficient for coefficient, joint in terms if joint <= here)
                assert value == any(condition <= here for condition in some)


def test_operators_of_one_place_exclude_one_another() -> None:
    assert together(frozenset({("a", 0)}), frozenset({("a", 1)})) is None
    assert together(frozenset({("a", 0)}), frozenset({("b", 1)})) == {("a", 0), ("b", 1)}
