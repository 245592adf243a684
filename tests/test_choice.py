"""Choices of operators: what runs, what is left, what it costs, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunegate
from prunegate import Choice
from prunegate.budget.memory import MemoryModel
from prunegate.gated import GatedModel
from prunegate.rederive import rederive
from tests.models import randomise, relative_error


class Inverted(nn.Module):
    """Expansion, depthwise convolution, projection, shortcut."""

    def __init__(self, width: int, kernel: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        self.expand = nn.Conv2d(width, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden)
        self.project = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        return x + self.project(F.hardswish(self.depthwise(F.relu(self.norm(self.expand(x))))))


class Nothing(nn.Module):
    """Gives zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        return x * 0


class Net(nn.Module):
    """Choices alone, in a list, in a dictionary, nested, and two with one key."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.block = Choice([Inverted(width, 3, 2), Inverted(width, 5, 3), nn.Identity()], ["k3", "k5", "skip"])
        self.listed = nn.ModuleList(
            Choice([nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)], ["wide", "narrow"], key="pair")
            for _ in range(2)
        )
        self.named = nn.ModuleDict({"outer": Choice([
            nn.Sequential(nn.Conv2d(width, width, 1), Choice([nn.ReLU(), nn.Conv2d(width, width, 1)])),
            Nothing(),
        ])})  # fmt: skip
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, 4]."""
        x = self.block(F.relu(self.stem(x)))
        for layer in self.listed:
            x = F.relu(layer(x))
        return self.head((x + self.named["outer"](x)).mean((2, 3)))


INNER = "named.outer.operators.0.1"
OPTIONS = {"block": ("k3", "k5", "skip"), "pair": ("wide", "narrow"), "named.outer": ("0", "1"), INNER: ("0", "1")}


def made(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return randomise(Net(), seed).eval(), torch.randn(2, 3, 9, 9, dtype=torch.float64)


def architectures() -> list[dict[str, str]]:
    return [dict(zip(OPTIONS, each, strict=True)) for each in itertools.product(*OPTIONS.values())]


def random_units(gated: GatedModel, seed: int) -> Tensor:
    """About half of each group's units, and the operators of the mask as it is."""
    generator = torch.Generator().manual_seed(seed)
    mask = gated.mask
    for group in gated.groups:
        if group.kind != "choice":
            mask[group.slice] = torch.rand(group.size, generator=generator) < 0.5
            mask[group.slice.start + int(torch.randint(group.size, (), generator=generator))] = True
    return mask


def by_hand(model: Net, chosen: dict[str, str], x: Tensor) -> Tensor:
    """The network written out with operators picked by name."""

    def pick(choice: Any, name: str) -> nn.Module:
        return choice.operators[choice.names.index(chosen[name])]

    x = pick(model.block, "block")(F.relu(model.stem(x)))
    for layer in model.listed:
        x = F.relu(pick(layer, "pair")(x))
    if chosen["named.outer"] == "0":
        first, inner = model.named["outer"].operators[0]
        x = x + pick(inner, INNER)(first(x))
    return model.head(x.mean((2, 3)))


def test_ungated_choice_runs_its_first_operator() -> None:
    model, x = made()
    first = {name: options[0] for name, options in OPTIONS.items()}
    torch.testing.assert_close(model(x), by_hand(model, first, x))
    gated = prunegate.attach(model, x)
    torch.testing.assert_close(gated(x), model(x))
    torch.testing.assert_close(gated.train()(x), model.train()(x))
    assert gated.chosen == first
    assert gated.cost.flops() == prunegate.count_flops(model, x)


def test_attach_finds_every_choice_and_gives_it_one_segment_of_the_logits() -> None:
    gated = prunegate.attach(*made())
    found = {group.name: group for group in gated.groups if group.kind == "choice"}
    assert {name: gated.trace.choices[name].options for name in found} == OPTIONS
    assert set(gated.trace.choices["pair"].sites) == {"listed.0", "listed.1"}
    units = sum(group.size for group in gated.groups if group.kind != "choice")
    starts = [group.slice.start for group in found.values()]
    assert min(starts) == units
    assert gated.logits.numel() == units + 3 + 2 + 2 + 2


@pytest.mark.parametrize("chosen", architectures(), ids=lambda each: "-".join(each.values()))
def test_every_architecture_computes_what_is_written_out_and_exports_plain_modules(chosen: dict[str, str]) -> None:
    model, x = made()
    gated = prunegate.attach(model, x)
    gated.choose(chosen)
    assert relative_error(gated(x), by_hand(model, chosen, x)) < 1e-12
    gated.mask = random_units(gated, 1)
    slim = gated.export()
    assert relative_error(gated(x), slim(x)) < 1e-8
    assert not any(isinstance(module, Choice) for module in slim.modules())
    assert type(slim) is Net
    assert gated.cost.flops(gated.mask) == prunegate.count_flops(slim, x)
    assert gated.cost.params(gated.mask) == sum(p.numel() for p in slim.parameters())
    plan = gated.plan()
    assert prunegate.Plan.from_json(plan.to_json()) == plan
    again = prunegate.apply_plan(model, plan)
    torch.testing.assert_close(again(x), slim(x), rtol=0, atol=0)


def test_chosen_operators_stand_where_their_choices_stood() -> None:
    model, x = made()
    gated = prunegate.attach(model, x)
    gated.choose({"block": "skip", "pair": "narrow", INNER: "0"})
    slim: Any = gated.export()
    assert type(slim.block) is nn.Identity
    assert [layer.kernel_size for layer in slim.listed] == [(1, 1), (1, 1)]
    assert type(slim.named["outer"]) is nn.Sequential
    assert type(slim.named["outer"][1]) is nn.ReLU
    assert gated.plan().choices["block"].name == "skip"


def test_search_exported_model_can_be_pruned_again() -> None:
    model, x = made()
    gated = prunegate.attach(model, x)
    gated.choose({"block": "k5"})
    gated.mask = random_units(gated, 3)
    slim = gated.export()
    again = prunegate.attach(slim, x)
    again.mask = random_units(again, 4)
    twice = again.export()
    assert relative_error(again(x), twice(x)) < 1e-8
    whole = prunegate.apply_plan(model, gated.plan().compose(again.plan()))
    torch.testing.assert_close(whole(x), twice(x), rtol=0, atol=0)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, x = made()
    gated = prunegate.attach(model, x)
    gated.choose({"block": "k5", "named.outer": "1"})
    gated.mask = random_units(gated, 2)
    slim = gated.export()
    prunegate.save(slim, tmp_path / "slim.safetensors", builder=Net)
    twin = prunegate.load(tmp_path / "slim.safetensors", allow=("tests.test_choice",))
    torch.testing.assert_close(twin(x), slim(x), rtol=0, atol=0)
    assert not any(isinstance(module, Choice) for module in twin.modules())


class Moved(Inverted):
    """As its base, with a width in the source."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        n, _, h, w = x.shape
        y = F.relu(self.norm(self.expand(x)))
        y = self.depthwise(y.reshape(n, self.expand.weight.numel() // x.shape[1], h, w))
        return x + self.project(F.hardswish(y.view(n, -1, h, w)))


def test_edits_are_found_again_where_the_source_is_another() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        blocks = Choice([Moved(6, 3, 2), Moved(6, 5, 3)])
        kernel = prunegate.Kernel(nn.Conv2d(6, 6, 5, padding=2, groups=6), (3, 5))
        return nn.Sequential(nn.Conv2d(3, 6, 3), blocks, kernel, nn.Flatten(), nn.Linear(6 * 49, 2))

    x = torch.randn(1, 3, 9, 9)
    gated = prunegate.attach(net(), x)
    gated.choose({"1": "1", "2": "3"})
    gated.mask = random_units(gated, 5)
    slim, plan = gated.export(), gated.plan()
    again = rederive(net(), plan, {"input_size": (3, 9, 9)})
    assert again.choices == plan.choices
    torch.testing.assert_close(prunegate.apply_plan(net(), again)(x), slim(x))


class Rich(nn.Module):
    """Many operators with many parameters, beside nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        heavy = [nn.Sequential(*(nn.Linear(4, 4) for _ in range(30))) for _ in range(8)]
        self.choice = Choice([*heavy, nn.Identity()])
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 4] to [N, 2]."""
        return self.out(self.choice(x))


def test_file_of_a_small_model_builds_the_large_one_it_was_chosen_from(tmp_path: Path) -> None:
    gated = prunegate.attach(Rich(), torch.randn(1, 4), units=())
    gated.choose({"choice": "8"})
    slim = gated.export()
    prunegate.save(slim, tmp_path / "slim.safetensors", builder=Rich)
    twin = prunegate.load(tmp_path / "slim.safetensors", allow=("tests.test_choice",))
    assert [tuple(p.shape) for p in twin.parameters()] == [(2, 4), (2,)]


def small_space() -> GatedModel:
    """Five units and two choices, one inside the other, with random logits."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 2, 1),
        Choice([nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), Choice([nn.Conv2d(3, 2, 1),
                                                                              nn.Conv2d(3, 2, 3, padding=1)])),
                nn.Identity(), nn.Conv2d(2, 2, 1)]),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2),
    )  # fmt: skip
    gated = prunegate.attach(net, torch.randn(1, 2, 4, 4))
    gated.logits.data = torch.randn(gated.logits.numel())
    return gated


def weighted_masks(gated: GatedModel) -> Iterator[tuple[Tensor, float]]:
    """Every mask, and its chance if all gates are drawn on their own."""
    chances = gated.prunegate.probabilities().detach().double()
    choices = list(gated.gate_map.choices.values())
    units = range(choices[0].start)
    for bits in itertools.product((False, True), repeat=len(units)):
        for picked in itertools.product(*(range(own.start, own.stop) for own in choices)):
            mask = torch.zeros(gated.logits.numel(), dtype=torch.bool)
            mask[: len(units)] = torch.tensor(bits)
            mask[list(picked)] = True
            chance = float(torch.where(mask, chances, 1 - chances)[: len(units)].prod())
            yield mask, chance * float(chances[list(picked)].prod())


def test_expected_cost_is_that_of_all_architectures_weighted_by_their_chances() -> None:
    gated = small_space()
    masks = list(weighted_masks(gated))
    assert len(masks) == 2**5 * 3 * 2
    assert sum(chance for _, chance in masks) == pytest.approx(1, rel=1e-6)
    flops = sum(chance * gated.cost.flops(mask) for mask, chance in masks)
    params = sum(chance * gated.cost.params(mask) for mask, chance in masks)
    assert gated.cost.expected_flops().item() == pytest.approx(flops, rel=1e-6)
    assert gated.cost.expected_params().item() == pytest.approx(params, rel=1e-6)


def test_expected_latency_is_that_of_all_architectures_weighted_by_their_chances() -> None:
    gated = small_space()

    def timer(function: Any, args: Any, kwargs: Any) -> float:
        return 1.0 + args[0].numel() / 100  # proportional to the width of what is read, which a table can hold exactly

    table = prunegate.LatencyTable.measure(gated, timer)
    cost = table.polynomial(gated)
    masks = list(weighted_masks(gated))
    predicted = [table.predict(gated, mask) for mask, _ in masks]
    assert [cost.exact(mask) / 1e9 for mask, _ in masks] == pytest.approx(predicted, rel=1e-6)
    assert len({round(each, 3) for each in predicted}) > 10
    expected = sum(chance * each for (_, chance), each in zip(masks, predicted, strict=True))
    found = cost.expected(gated.prunegate.probabilities())
    assert found.item() / 1e9 == pytest.approx(expected, rel=1e-6)
    # A budget projects this very expectation.
    budget = prunegate.Budget(gated, latency=0.9, latency_table=table, steps=40)
    assert budget.expected("latency") == pytest.approx(
        sum(chance * table.predict(gated, mask) for mask, chance in weighted_masks(gated)), rel=1e-5
    )


def test_parameters_shared_by_operators_count_once() -> None:
    shared = nn.Linear(4, 4)
    net = nn.Sequential(
        Choice([nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.Tanh()), nn.Identity()]), nn.Linear(4, 2)
    )
    gated = prunegate.attach(net, torch.randn(1, 4), units=())
    for name, count in (("0", 30), ("1", 30), ("2", 10)):
        gated.choose({"0": name})
        assert gated.cost.params(gated.mask) == count == sum(p.numel() for p in gated.export().parameters())


# ---------------------------------------------------------------------- the paths of a step


class Counting(nn.Module):
    """Multiplies by a number and counts how often it runs."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([factor]))
        self.runs = [0]

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3] to the same."""
        self.runs[0] += 1
        return x * self.factor


def searching(paths: str, **more: Any) -> tuple[GatedModel, list[Counting]]:
    """A gated choice of four numbers in the middle of a search."""
    net = nn.Sequential(Choice([Counting(1.0), Counting(2.0), Counting(3.0), Counting(4.0)]))
    gated = prunegate.attach(net, torch.ones(1, 3), units=(), paths=paths, **more)
    gated.logits.data = torch.tensor([0.0, 0.5, -0.5, 0.2])
    gated.prunegate.phase = "search"
    return gated.train(), list(gated.model[0].operators)


def step(gated: GatedModel, operators: list[Counting]) -> tuple[float, list[int], Tensor]:
    before = [op.runs[0] for op in operators]
    out = gated(torch.ones(1, 3))
    out.sum().backward()
    gradient = gated.prunegate.take_gradient()
    assert gradient is not None
    return float(out.detach()[0, 0]), [op.runs[0] - n for op, n in zip(operators, before, strict=True)], gradient


def test_single_path_runs_one_operator_and_learns_through_its_factor() -> None:
    gated, operators = searching("single")
    drawn = []
    for _ in range(300):
        value, runs, gradient = step(gated, operators)
        at = runs.index(1)
        assert sum(runs) == 1
        assert value == at + 1
        # The gradient of the relaxed sample's own component: raising the logit of what ran raises its weight.
        assert float(gradient[at]) > 0
        assert float(gradient.sum()) == pytest.approx(0, abs=1e-5)
        drawn.append(at)
    share = torch.bincount(torch.tensor(drawn), minlength=4) / 300
    torch.testing.assert_close(share, torch.softmax(gated.logits.detach(), 0), atol=0.09, rtol=0)


def test_top_k_paths_give_the_drawn_output_and_compare_the_others() -> None:
    gated, operators = searching("topk", top_k=3)
    for _ in range(20):
        value, runs, gradient = step(gated, operators)
        assert sum(runs) == 3
        assert runs[round(value) - 1] == 1
        assert value == pytest.approx(round(value))
        assert bool(gradient.any())


def test_all_paths_are_weighted_by_the_relaxed_sample() -> None:
    gated, operators = searching("all")
    values = set()
    for _ in range(20):
        value, runs, _ = step(gated, operators)
        assert runs == [1, 1, 1, 1]
        assert 1 < value < 4
        values.add(round(value, 3))
    assert len(values) > 10
    gated.eval()
    gated.prunegate.phase = "fixed"
    before = [op.runs[0] for op in operators]
    gated(torch.ones(1, 3))
    assert [op.runs[0] - n for op, n in zip(operators, before, strict=True)] == [1, 0, 0, 0]


def test_operators_that_write_into_their_input_are_refused_where_others_read_it() -> None:
    net = nn.Sequential(nn.Linear(3, 3), Choice([nn.ReLU(inplace=True), nn.Tanh()]))
    gated = prunegate.attach(net, torch.ones(1, 3), units=(), paths="all")
    gated.prunegate.phase = "search"
    with pytest.raises(prunegate.AttachError, match="in place"):
        gated.train()(torch.ones(1, 3))


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Distinct memory that a forward keeps for backward."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    assert out.requires_grad
    return sum(seen.values())


def test_single_path_keeps_little_more_for_backward_than_a_fixed_network() -> None:
    def block(kernel: int) -> nn.Module:
        return Inverted(16, kernel, 6)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), *(Choice([block(3), block(5), block(7)]) for _ in range(4)))
    fixed = nn.Sequential(nn.Conv2d(3, 16, 3), *(block(3) for _ in range(4)))
    x = torch.randn(8, 3, 32, 32)
    held = {}
    for paths in ("single", "all"):
        gated = prunegate.attach(net, x[:1], units=(), paths=paths)
        gated.prunegate.phase = "search"
        held[paths] = saved_bytes(gated.train(), x)
    plain = saved_bytes(fixed, x)
    assert held["single"] <= 1.1 * plain
    assert held["all"] > 2 * plain


# ---------------------------------------------------------------------- budgets


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_budget_holds_its_target_and_ends_under_it(share: float) -> None:
    model, x = made()
    model, x = model.float(), x.float()
    gated = prunegate.attach(model, x)
    budget = prunegate.Budget(gated, flops=share, steps=40)
    optimizer = torch.optim.SGD(budget.param_groups(1e-3))
    for _ in range(40):
        loss = gated(x).square().mean() + budget.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if budget.phase == "search":
            assert budget.expected() == pytest.approx(budget.target(), rel=1e-3)
        budget.step()
    spent, most = gated.cost.flops(gated.mask), int(share * gated.cost.flops())
    assert 0.8 * most <= spent <= most
    assert prunegate.count_flops(gated.export(), x) == spent


def test_search_finds_the_operator_that_the_task_needs() -> None:
    torch.manual_seed(0)

    class Negate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x

    net = nn.Sequential(Choice([nn.Identity(), Negate(), Nothing(), nn.Tanh()], ["same", "minus", "none", "tanh"]),
                        nn.Linear(4, 4, bias=False))  # fmt: skip
    net[1].weight.data = torch.eye(4)
    gated = prunegate.attach(net, torch.ones(1, 4), units=(), paths="topk", top_k=4)
    budget = prunegate.Budget(gated, params=1.0, steps=200)
    for _ in range(200):
        x = torch.randn(32, 4)
        (F.mse_loss(gated(x), -x) + budget.loss()).backward()
        budget.step()
    assert gated.chosen == {"0": "minus"}


def test_budgets_out_of_reach_name_what_the_cheapest_path_costs() -> None:
    model, x = made()
    gated = prunegate.attach(model, x, units=())
    costs = []
    for chosen in architectures():
        gated.choose(chosen)
        costs.append(gated.cost.flops(gated.mask))
    gated.mask = None
    with pytest.raises(prunegate.BudgetError, match=f"reachable is {min(costs):,} to {max(costs):,}"):
        prunegate.Budget(gated, flops=min(costs) - 1, steps=10)
    with pytest.raises(prunegate.BudgetError, match="out of reach"):
        prunegate.Budget(gated, flops=max(costs) + 1, steps=10)
    for most in (min(costs), max(costs)):
        gated.mask = None
        budget = prunegate.Budget(gated, flops=most, steps=10)
        budget.finish()
        assert gated.cost.flops(gated.mask) <= most
        assert most == max(costs) or gated.cost.flops(gated.mask) == most


def test_latency_knows_which_operators_run() -> None:
    model, x = made()
    model, x = model.float(), x.float()
    gated = prunegate.attach(model, x)

    def timer(function: Any, args: Any, kwargs: Any, *rest: Any) -> float:
        return 1.0 + sum(arg.numel() for arg in args if isinstance(arg, Tensor)) / 1000

    table = prunegate.LatencyTable.measure(gated, timer)
    cost = table.polynomial(gated)
    for chosen in architectures()[::5]:
        gated.choose(chosen)
        slim = prunegate.attach(gated.export(), x)
        own = prunegate.LatencyTable.measure(slim, timer)
        assert table.predict(gated, gated.mask) == pytest.approx(own.predict(slim))
        assert cost.exact(gated.mask) / 1e9 == pytest.approx(own.predict(slim), rel=0.05)
    first = {name: options[0] for name, options in OPTIONS.items()}
    gated.choose(first)
    assert cost.dense == cost.exact(gated.mask)
    assert table.predict(gated) == table.predict(gated, gated.mask)
    gated.mask = None
    budget = prunegate.Budget(gated, latency=0.7, latency_table=table, steps=10)
    budget.finish()
    assert cost.exact(gated.mask) <= 0.7 * cost.dense


class Strided(nn.Module):
    """Gives a part of what it made."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        return F.interpolate(x.sigmoid(), scale_factor=2.0)[:, :, ::2, ::2]


class Edges(nn.Module):
    """Skips of skips, what a choice gave held for long, choices in a choice, a shared key, views."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()

        def conv() -> nn.Module:
            return nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
                                 nn.Conv2d(2 * width, width, 1))  # fmt: skip

        def edge(key: str | None = None) -> nn.Module:
            return Choice([conv(), nn.Identity(), Strided()], ["conv", "skip", "part"], key=key)

        self.stem = nn.Conv2d(2, width, 1)
        self.first, self.second = edge(), edge()
        self.nested = Choice([nn.Sequential(nn.Tanh(), Choice([nn.Identity(), nn.Conv2d(width, width, 1)])),
                              nn.Identity()])  # fmt: skip
        self.keyed = nn.ModuleList(edge("key") for _ in range(2))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 2, H, W] to the same."""
        x = self.stem(x)
        y = self.second(self.first(x))
        y = self.nested(y) + self.keyed[0](x)
        return self.head(self.keyed[1](y) * y.mean())


def masks_of(gated: GatedModel) -> list[Tensor]:
    """Every architecture, with the units that they start from and with about half of them."""
    found = []
    for picked in itertools.product(*(range(own.start, own.stop) for own in gated.gate_map.choices.values())):
        for seed in range(2):
            mask = random_units(gated, seed) if seed else gated.mask
            for own in gated.gate_map.choices.values():
                mask[own] = False
            mask[list(picked)] = True
            found.append(mask)
    return found


def test_peak_memory_of_every_architecture_is_that_of_the_network_without_choices() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 6, 6)
    gated = prunegate.attach(Edges(), x)
    memory = MemoryModel(gated)
    peaks = set()
    for mask in masks_of(gated)[::7]:
        gated.mask = mask
        slim = prunegate.attach(gated.export(), x)
        peak, point = memory.peak(mask)
        assert peak == MemoryModel(slim).peak()[0]
        assert memory.cost(point).exact(mask) == peak
        peaks.add(peak)
    assert len(peaks) > 8
    gated.mask = None
    assert memory.peak()[0] == memory.peak(gated.mask)[0]


def test_expected_memory_at_each_point_is_that_of_all_architectures_weighted_by_their_chances() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 4)
    gated = prunegate.attach(Edges(1), x)
    gated.logits.data = torch.randn(gated.logits.numel())
    chances = gated.prunegate.probabilities().detach().double()
    for own in gated.gate_map.choices.values():
        chances[own] /= chances[own].sum()
    memory = MemoryModel(gated)
    points = [memory.cost(at) for at in range(len(memory.points))]
    units = [g for group in gated.groups if group.kind != "choice" for g in range(group.slice.start, group.slice.stop)]
    some = units[:2]  # the others stay, for the sake of time
    chances[units[2:]] = 1.0
    expected = torch.zeros(len(points), dtype=torch.float64)
    largest = 0.0
    choices = list(gated.gate_map.choices.values())
    for bits in itertools.product((False, True), repeat=len(some)):
        for picked in itertools.product(*(range(own.start, own.stop) for own in choices)):
            mask = torch.ones(gated.logits.numel(), dtype=torch.bool)
            for own in choices:
                mask[own] = False
            mask[some] = torch.tensor(bits)
            mask[list(picked)] = True
            chance = float(torch.where(mask[some], chances[some], 1 - chances[some]).prod())
            chance *= float(chances[list(picked)].prod())
            held = torch.tensor([point.exact(mask) for point in points], dtype=torch.float64)
            assert int(held.max()) == memory.peak(mask)[0]
            expected += chance * held
            largest += chance * float(held.max())
    found = torch.stack([point.expected(chances) for point in points])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-6)
    assert 0.6 * largest < float(found.max()) <= largest


@pytest.mark.parametrize("share", [0.8, 0.6])
def test_memory_budget_with_choices_is_met(share: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 16, 16)
    gated = prunegate.attach(Edges(4), x)
    most = MemoryModel(gated).peak()[0]
    budget = prunegate.Budget(gated, memory_mb=share * most / 2**20, steps=30)
    for _ in range(30):
        (gated.train()(x).square().mean() + budget.loss()).backward()
        budget.step()
    used = MemoryModel(prunegate.attach(gated.export(), x)).peak()[0]
    assert 0.8 * share * most < used <= share * most
    assert budget.expected("memory") == pytest.approx(used / 2**20)


def test_budget_can_hold_a_choice_at_its_first_operator() -> None:
    model, x = made()
    gated = prunegate.attach(model, x, units=())
    budget = prunegate.Budget(gated, flops=0.9, steps=10, ignore=["block"])
    budget.finish()
    assert gated.chosen["block"] == "k3"


def test_ignored_choice_gets_no_gate() -> None:
    gated = prunegate.attach(*made(), ignore=["block"])
    assert "block" not in gated.chosen
    assert isinstance(gated.export().block, Choice)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("operators", "names", "message"),
    [
        ([], None, "given 0 operators"),
        ([nn.ReLU()], None, "given 1 operator;"),
        ([nn.ReLU(), nn.Tanh()], ["a", "a"], "'a' twice"),
        ([nn.ReLU(), nn.Tanh()], ["a"], "1 names for 2"),
        ([nn.ReLU(), torch.tanh], None, "expected torch.nn.Module"),
        ([nn.ReLU(), nn.Tanh()], "ab", "a list of names"),
    ],
)
def test_malformed_choices_are_refused(operators: list[Any], names: Any, message: str) -> None:
    with pytest.raises(prunegate.AttachError, match=message):
        Choice(operators, names)


def test_one_module_cannot_be_two_operators() -> None:
    relu = nn.ReLU()
    with pytest.raises(prunegate.AttachError, match="twice"):
        Choice([relu, relu])


def test_operators_of_different_shapes_are_named_with_both() -> None:
    net = nn.Sequential(Choice([nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, padding=1)], ["valid", "same"]))
    with pytest.raises(prunegate.AttachError, match=r"'valid' gives \(1, 4, 6, 6\), 'same' gives \(1, 4, 8, 8\)"):
        prunegate.attach(net, torch.zeros(1, 3, 8, 8))


def test_shared_keys_need_the_same_names() -> None:
    net = nn.Sequential(Choice([nn.ReLU(), nn.Tanh()], ["a", "b"], key="k"),
                        Choice([nn.ReLU(), nn.Tanh()], ["a", "c"], key="k"), nn.Linear(2, 2))  # fmt: skip
    with pytest.raises(prunegate.AttachError, match="same names"):
        prunegate.attach(net, torch.zeros(1, 2), units=())


def test_plans_that_do_not_fit_are_refused() -> None:
    model, x = made()
    gated = prunegate.attach(model, x)
    text = gated.plan().to_json()
    with pytest.raises(prunegate.PlanError, match=r"'k9' at 'block'.*'k3', 'k5', 'skip'"):
        prunegate.apply_plan(model, prunegate.Plan.from_json(text.replace('"k3"', '"k9"')))
    with pytest.raises(prunegate.PlanError, match=r"'stem'.*no Choice"):
        prunegate.apply_plan(model, prunegate.Plan.from_json(text.replace('"block":["k3"', '"stem":["k3"')))
    with pytest.raises(prunegate.PlanError, match=r"takes 'operators.1'"):
        prunegate.apply_plan(model, prunegate.Plan.from_json(
            text.replace('["k3","operators.0"]', '["k3","operators.1"]')))  # fmt: skip
    with pytest.raises(prunegate.PlanError, match="expected a list"):
        prunegate.Plan.from_json(text.replace('["k3","operators.0"]', '"k3"'))


def test_masks_keep_exactly_one_operator() -> None:
    gated = prunegate.attach(*made())
    for value in (True, False):
        mask = gated.mask
        mask[gated.gate_map.choices["block"]] = value
        with pytest.raises(prunegate.MaskError, match=r"choice 'block'.*exactly one"):
            gated.mask = mask
    with pytest.raises(prunegate.MaskError, match="no operator 'k9'"):
        gated.choose({"block": "k9"})
    with pytest.raises(prunegate.MaskError, match="no choice 'blocks'"):
        gated.choose({"blocks": "k3"})


def test_ways_to_run_are_checked() -> None:
    with pytest.raises(prunegate.AttachError, match="paths='both'"):
        prunegate.attach(*made(), paths="both")
    with pytest.raises(prunegate.AttachError, match="top_k=1"):
        prunegate.attach(*made(), paths="topk", top_k=1)
