"""Which choices are read, and that a budget is spent on these alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunegate
from prunegate import Choice
from prunegate.budget.readers import Readers
from prunegate.gated import GatedModel


class Nothing(nn.Module):
    """Gives zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        return x * 0


def edge(width: int, key: str | None = None) -> nn.Module:
    conv = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return Choice([conv, nn.Identity(), Nothing()], ["conv", "skip", "none"], key=key)


class Cell(nn.Module):
    """Three nodes and the edges between them; a view is changed in place on the way."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.c = edge(width), edge(width), edge(width)
        self.inner = Choice([nn.Sequential(edge(width), nn.Conv2d(width, width, 1)), Nothing()], ["deep", "none"])
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, 2]."""
        middle = self.a(x)
        last = self.b(middle) + self.c(x)
        last.flatten(2).add_(self.inner(middle).flatten(2))
        return self.head(last.mean((2, 3)))


def made(net: nn.Module | None = None) -> tuple[GatedModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    return prunegate.attach(net or Cell(), x, units=()), x


def depends(gated: GatedModel, site: str, x: Tensor) -> bool:
    """Whether the output changes when what the choice gives does."""
    slim: Any = gated.export().eval()
    before = slim(x)
    handle = slim.get_submodule(site).register_forward_hook(lambda module, args, out: out + 1)
    after = slim(x)
    handle.remove()
    return not torch.equal(before, after)


def test_chances_of_a_mask_are_whether_the_output_depends_on_what_a_choice_gives() -> None:
    gated, x = made()
    readers = Readers(gated.trace, gated.gate_map.choices)
    options = {name: record.options for name, record in gated.trace.choices.items()}
    seen = set()
    for picked in itertools.product(*options.values()):
        chosen = dict(zip(options, picked, strict=True))
        gated.choose(chosen)
        read = readers.chances(gated.mask.double())
        for name in ("a", "b", "c", "inner"):
            found = read[gated.gate_map.choices[name]].tolist()
            assert found == [float(depends(gated, name, x))] * len(found), (chosen, name)
            seen.add((name, found[0]))
    assert seen == {("a", 0.0), ("a", 1.0), ("b", 1.0), ("c", 1.0), ("inner", 1.0)}


def test_chances_between_masks_are_those_of_independent_readers() -> None:
    gated, _ = made()
    own = gated.gate_map.choices
    p = torch.ones(gated.logits.numel(), dtype=torch.float64)
    p[own["a"]] = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    p[own["b"]] = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    p[own["c"]] = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    p[own["inner"]] = torch.tensor([0.4, 0.6], dtype=torch.float64)
    p[own["inner.operators.0.0"]] = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    read = Readers(gated.trace, own).chances(p)
    assert float(read[own["a"]][0]) == pytest.approx(1 - (1 - 0.3) * (1 - 0.4 * 0.8))
    assert read[own["inner.operators.0.0"]].tolist() == [1.0, 1.0, 1.0]  # where it runs at all


class InPlace(nn.Module):
    """One choice is added to a buffer by an operation that returns nothing, another is only added to."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.unread = edge(3), edge(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, 2]."""
        read, total, aside = self.read(x), x.clone(), self.unread(x)
        torch._foreach_add_([total], [read])
        aside.add_(total)
        return self.head(total.mean((2, 3)))


def test_what_is_written_in_place_is_read_and_what_it_is_written_to_is_not() -> None:
    gated, _ = made(InPlace())
    read = Readers(gated.trace, gated.gate_map.choices).chances(gated.mask.double())
    assert read[gated.gate_map.choices["read"]].tolist() == [1.0] * 3
    assert read[gated.gate_map.choices["unread"]].tolist() == [0.0] * 3


def test_choices_with_one_key_are_read_where_one_of_them_is() -> None:
    net = nn.Sequential(edge(3, "k"), edge(3), edge(3, "k"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    gated, _ = made(net)
    gated.choose({"k": "conv", "1": "none"})
    read = Readers(gated.trace, gated.gate_map.choices).chances(gated.mask.double())
    assert read.tolist() == [1.0] * 6
    gated.choose({"k": "none", "1": "conv"})
    read = Readers(gated.trace, gated.gate_map.choices).chances(gated.mask.double())
    assert read[gated.gate_map.choices["1"]].tolist() == [0.0] * 3


class Dead(nn.Module):
    """What stands before an edge that the task closes, and beside it what the task does not mind."""

    def __init__(self) -> None:
        super().__init__()
        self.before = edge(4)
        self.gate = Choice([nn.Identity(), Nothing()], ["open", "none"])
        self.beside = edge(4)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 4, H, W] to the same."""
        return self.head(self.gate(self.before(x)) + self.beside(x))


def searched(steps: int = 60) -> tuple[GatedModel, prunegate.Budget]:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    gated = prunegate.attach(Dead(), x, units=())
    gated.logits.data[gated.gate_map.choices["gate"]] = torch.tensor([-2.0, 2.0])  # closed, and learns nothing else
    cheap, costly = gated.gate_map.start(), gated.cost.flops()
    for own in gated.gate_map.choices.values():
        cheap[own] = False
        cheap[own.stop - 1] = True
    one = (gated.cost.flops(cheap) + costly) // 2
    budget = prunegate.Budget(gated, flops=one + 10, steps=steps)
    return gated, budget


def test_budget_is_spent_on_what_is_read() -> None:
    gated, budget = searched()
    own = gated.gate_map.choices
    for _ in range(60):
        if budget.phase == "search":
            assert budget.expected() == pytest.approx(budget.target(), rel=2e-3)
        if budget.step_count == 40:
            # Far more for the convolution that is read, and what evaluation sees meanwhile has no other.
            logits = gated.logits.detach()
            bonus = {name: float(logits[own[name]][0] - logits[own[name]][1]) for name in ("before", "beside")}
            assert bonus["beside"] > 10 * abs(bonus["before"])
            assert gated.eval().chosen["before"] != "conv"
        budget.step()
    assert gated.chosen["gate"] == "none"
    assert gated.chosen["beside"] == "conv"
    assert gated.chosen["before"] != "conv"


def test_a_budget_that_is_not_used_up_says_why() -> None:
    gated = prunegate.attach(Dead(), torch.randn(2, 4, 6, 6), units=())
    gated.logits.data[gated.gate_map.choices["gate"]] = torch.tensor([-20.0, 20.0])
    budget = prunegate.Budget(gated, flops=1.0, steps=10)
    budget.finish()
    assert gated.chosen["gate"] == "none"
    assert gated.cost.flops(gated.mask) < 0.9 * gated.cost.flops()
    assert "; no dearer operator or unit that fits would score higher" in budget.report()


def test_final_choice_closes_what_its_own_closing_of_another_leaves_unread() -> None:
    gated, _ = searched()
    own = gated.gate_map.choices
    with torch.no_grad():
        gated.logits.zero_()
        gated.logits[own["gate"]] = torch.tensor([0.0, 0.01])  # read in the search, in two draws of five
        gated.logits[own["before"]] = torch.tensor([3.0, 0.0, 0.0])
    budget = prunegate.Budget(gated, flops=searched()[1].state_dict()["limits"]["flops"], steps=10)
    budget.finish()
    assert gated.chosen["gate"] == "none"
    assert gated.chosen["before"] != "conv"
    assert gated.chosen["beside"] == "conv"


def test_several_budgets_are_spent_on_what_is_read() -> None:
    gated, _ = searched()
    closed = gated.logits.detach().clone()
    budget = prunegate.Budget(gated, flops=[1.0, 0.7], steps=10)
    with torch.no_grad():
        gated.logits.copy_(closed)
    budget.finish()
    for share in (1.0, 0.7):
        slim = gated.export(flops=share)
        assert isinstance(slim.gate, Nothing)
        assert isinstance(slim.beside, nn.Sequential)
        assert not isinstance(slim.before, nn.Sequential)


def test_resumed_search_pays_the_same_bonus() -> None:
    gated, budget = searched(20)
    for _ in range(9):
        budget.step()
    state, logits = budget.state_dict(), gated.logits.detach().clone()
    other, resumed = searched(20)
    other.logits.data.copy_(logits)
    resumed.load_state_dict(state)
    for each in (gated, other):  # a user's change is on top of the bonus that was paid
        each.logits.data[0] += 0.5
    for _ in range(3):
        budget.step()
        resumed.step()
        torch.testing.assert_close(other.logits, gated.logits, rtol=0, atol=0)
