"""The exact sets of what goes together, against declarations made by hand."""

import pytest
import torch

from prunegate.groups import make_groups
from prunegate.labels.trace import trace
from prunegate.sites import find_sites
from tests.zoo import ZOO, Unit


def found_units(model: torch.nn.Module, example: object) -> list[Unit]:
    traced = trace(model, example)
    sites = find_sites(traced, lambda call: (id(call.frame.code), call.frame.lasti) if call.frame else None)
    _, gate_map = make_groups(traced, sites.consumed)
    units: list[Unit] = [{} for _ in range(gate_map.n_gates)]
    for key, gates in gate_map.dims.items():
        for position, gate in enumerate(gates.tolist()):
            if gate >= 0:
                units[gate][key] = (*units[gate].get(key, ()), position)
    return units


def as_set(units: list[Unit]) -> set[frozenset[tuple[tuple[str, int], tuple[int, ...]]]]:
    return {frozenset((key, tuple(sorted(at))) for key, at in unit.items()) for unit in units}


@pytest.mark.parametrize("name", sorted(ZOO))
def test_exact_units(name: str) -> None:
    torch.manual_seed(0)
    model = ZOO[name]().double()
    found = found_units(model, model.example())
    declared = list(model.units())
    assert as_set(found) == as_set(declared)
    assert len(found) == len(declared)
