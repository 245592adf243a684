"""Resolutions of one module: the same units, exact costs and cuts at every size, with channels and choices inside."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunegate
from prunegate import Choice, Kernel, Resolution
from prunegate.budget.memory import MemoryModel
from prunegate.gated import GatedModel
from prunegate.rederive import rederive
from tests.models import random_mask, randomise, relative_error
from tests.test_choice import weighted_masks
from tests.zoo import ZOO, Tricky, Unit

OF_ONE_SIZE = {"ClassToken", "Halo", "NormAfterFlatten", "WindowShift"}
PICTURES = [name for name, module in sorted(ZOO.items())
            if isinstance(x := module().example(), Tensor) and x.ndim == 4 and name != "NeverMeets"]  # fmt: skip


class Inner(nn.Module):
    """A norm over kept channels, a kernel, a choice, and a reshape by numbers that depend on the size."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.width = width
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.norm = nn.BatchNorm2d(width)
        self.kernel = Kernel(nn.Conv2d(width, width, 5, padding=2, groups=width), (3, 5))
        self.block = Choice([nn.Conv2d(width, width, 3, padding=1), nn.Identity()], ["conv", "skip"])
        self.all = nn.GroupNorm(1, width)
        self.out = nn.Conv2d(width, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, 8]."""
        x = F.relu(self.norm(self.stem(x)))
        n, _, h, w = x.shape
        x = (x + self.block(self.kernel(x))).reshape(n, self.width, h * w).view(n, -1, h, w)
        return F.relu(self.out(self.all(x))).flatten(2).mean(2)


class Net(nn.Module):
    """A resolution around a pooled network, and one around a part of a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.inner = Resolution(Inner(), (16, 12, 8))
        self.side = nn.Conv2d(3, 8, 3, padding=1)
        part = nn.Sequential(nn.Conv2d(8, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 8, 3, padding=1))
        self.part = Resolution(nn.Sequential(part, nn.Upsample((16, 16))), ((16, 16), (8, 10)))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 16, 16] to [N, 4]."""
        x = self.first(x)
        y = self.side(x)
        return self.head(self.inner(x) + F.relu(y + self.part(y)).mean((2, 3)))


OPTIONS = {
    "inner": ("16", "12", "8"), "inner.resized.module.kernel": ("5", "3"),
    "inner.resized.module.block": ("conv", "skip"), "part": ("16x16", "8x10"),
}  # fmt: skip


def made(net: nn.Module | None = None) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return randomise(net or Net()).eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)


def at(module: nn.Module, size: Any, x: Tensor) -> Tensor:
    """The module on its input resized by hand."""
    return module(F.interpolate(x, size, mode="bilinear", align_corners=False))


def by_hand(model: Any, chosen: dict[str, str], x: Tensor) -> Tensor:
    """The network written out at the sizes that are chosen."""
    inner = model.inner.resized.module
    inner.kernel.chosen = inner.kernel.names.index(chosen["inner.resized.module.kernel"])
    inner.block.chosen = inner.block.names.index(chosen["inner.resized.module.block"])
    x = model.first(x)
    y = model.side(x)
    part = at(model.part.resized.module, tuple(map(int, chosen["part"].split("x"))), y)
    out = model.head(at(inner, int(chosen["inner"]), x) + F.relu(y + part).mean((2, 3)))
    inner.kernel.chosen = inner.block.chosen = 0
    return out


def halve(gated: GatedModel, seed: int) -> None:
    """Removes about half of each group's units, and leaves the choices as they are."""
    mask = random_mask(gated, seed)
    for own in gated.gate_map.choices.values():
        mask[own] = gated.mask[own]
    gated.mask = mask


def check_exact(gated: GatedModel, x: Any) -> Any:
    """Cuts by the current mask, and holds the result to the masked model and its costs."""
    mask = gated.mask
    slim = gated.export()
    assert relative_error(gated(x), slim(x)) < 1e-8
    assert gated.cost.flops(mask) == prunegate.count_flops(slim, x)
    assert gated.cost.params(mask) == sum(p.numel() for p in slim.parameters())
    assert not any(isinstance(module, Choice) for module in slim.modules())
    return slim


@pytest.mark.parametrize("chosen", [dict(zip(OPTIONS, each, strict=True))
                                    for each in itertools.product(*OPTIONS.values())],
                         ids=lambda each: "-".join(each.values()))  # fmt: skip
def test_every_choice_computes_what_is_written_out_and_exports_plain_modules(chosen: dict[str, str]) -> None:
    model, x = made()
    gated = prunegate.attach(model, x)
    assert {name: record.options for name, record in gated.trace.choices.items()} == OPTIONS
    gated.choose(chosen)
    assert relative_error(gated(x), by_hand(model, chosen, x)) < 1e-12
    slim = check_exact(gated, x)
    assert type(slim.inner) is nn.Sequential
    assert [type(each) for each in slim.inner] == [nn.Upsample, Inner]
    assert slim.inner.resize.size == int(chosen["inner"])
    whole = gated(x)
    halve(gated, 1)
    gated.choose(chosen)
    assert relative_error(gated(x), whole) > 1e-3
    slim = check_exact(gated, x)
    plan = prunegate.Plan.from_json(gated.plan().to_json())
    assert plan == gated.plan()
    torch.testing.assert_close(prunegate.apply_plan(model, plan)(x), slim(x), rtol=0, atol=0)


class Picture(nn.Module):
    """A module of the zoo behind a resolution that takes two steps."""

    def __init__(self, module: Tricky) -> None:
        super().__init__()
        height, width = module.input_shape[2:]
        self.at = Resolution(module, ((height, width), (height - 2, width - 2)))

    def forward(self, x: Tensor) -> Any:
        """What the module gives."""
        return self.at(x)


@pytest.mark.parametrize("name", sorted({*PICTURES} - OF_ONE_SIZE))
def test_units_of_a_module_are_the_same_at_all_its_sizes(name: str) -> None:
    torch.manual_seed(0)
    module = ZOO[name]()
    x = module.example()
    gated = prunegate.attach(randomise(Picture(module)).eval(), x)
    found: list[Unit] = [{} for _ in range(gated.gate_map.choices["at"].start)]
    for key, gates in gated.gate_map.dims.items():
        for position, gate in enumerate(gates.tolist()):
            if gate >= 0:
                found[gate][key] = (*found[gate].get(key, ()), position)
    prefix = "at.resized.module."
    wanted = [{(prefix + tensor, dim): at for (tensor, dim), at in unit.items()} for unit in module.units()]
    assert sorted(map(sorted, map(dict.items, found))) == sorted(map(sorted, map(dict.items, wanted)))
    for size in gated.trace.choices["at"].options:
        halve(gated, 0)
        gated.choose({"at": size})
        check_exact(gated, x)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit2"])
def test_timm_models_keep_their_units_at_three_resolutions(name: str) -> None:
    torch.manual_seed(0)
    dynamic = {"dynamic_img_size": True} if "vit" in name else {}
    alone = timm.create_model(name, num_classes=10, **dynamic)
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    model = randomise(nn.Sequential(Resolution(alone, (96, 80, 64)))).eval()
    gated = prunegate.attach(model, x)
    own = prunegate.attach(alone, F.interpolate(x, 96, mode="bilinear"))
    assert [(group.kind, group.size) for group in gated.groups[:-1]] == [(g.kind, g.size) for g in own.groups]
    costs = []
    for size in ("96", "80", "64"):
        halve(gated, 0)
        gated.choose({"0": size})
        slim = check_exact(gated, x)
        costs.append(gated.cost.flops(gated.mask))
        assert slim[0].resize.size == int(size)
    assert costs[0] > 1.3 * costs[1] > 1.69 * costs[2]


class Small(nn.Module):
    """Five channels, two of them in the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 2, 3, padding=1)
        self.choice = Choice([nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        """[N, 2, H, W] to [N, 2]."""
        return self.choice(self.stem(x)).mean((2, 3))


def test_expected_costs_are_those_of_all_architectures_weighted_by_their_chances() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Resolution(Small(), (6, 4, 3)), nn.Linear(2, 2))
    x = torch.randn(1, 2, 6, 6)
    gated = prunegate.attach(net, x)
    gated.logits.data = torch.randn(gated.logits.numel())
    choices = list(gated.gate_map.choices.values())
    assert choices[0].start == 5  # units
    expected = {"flops": 0.0, "params": 0.0}
    for mask, chance in weighted_masks(gated):
        expected["flops"] += chance * gated.cost.flops(mask)
        expected["params"] += chance * gated.cost.params(mask)
    assert gated.cost.expected_flops().item() == pytest.approx(expected["flops"], rel=1e-6)
    assert gated.cost.expected_params().item() == pytest.approx(expected["params"], rel=1e-6)
    gated.cost.expected_flops().backward()
    gradient = gated.logits.grad if gated.logits.grad is not None else gated.prunegate.take_gradient()
    assert gradient is not None
    assert float(gradient[choices[0].start]) > 0 > float(gradient[choices[0].stop - 1])


def test_parameters_count_once_and_are_the_same_at_every_size() -> None:
    model, x = made()
    gated = prunegate.attach(model, x)
    counts = []
    for size in OPTIONS["inner"]:
        gated.choose({"inner": size})
        counts.append(gated.cost.params(gated.mask))
    assert counts == [sum(p.numel() for p in model.parameters())] * 3
    assert len({name for name in model.state_dict() if "stem.weight" in name}) == 1


def test_peak_memory_at_every_size_is_that_of_the_exported_model() -> None:
    model, x = made()
    gated = prunegate.attach(model, x)
    memory = MemoryModel(gated)
    peaks = set()
    for inner, part in itertools.product(OPTIONS["inner"], OPTIONS["part"]):
        halve(gated, 2)
        gated.choose({"inner": inner, "part": part})
        peak, point = memory.peak(gated.mask)
        assert peak == MemoryModel(prunegate.attach(gated.export(), x)).peak()[0]
        assert memory.cost(point).exact(gated.mask) == peak
        peaks.add(peak)
    assert len(peaks) > 1


@pytest.mark.parametrize("paths", ["single", "topk", "all"])
def test_search_brings_the_resolution_to_a_budget(paths: str) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 3, 16, 16)
    gated = prunegate.attach(net, x, paths=paths)
    budget = prunegate.Budget(gated, flops=0.35, steps=20)
    for _ in range(20):
        (gated(x).square().mean() + budget.loss()).backward()
        budget.step()
    assert gated.cost.flops(gated.mask) <= 0.35 * gated.cost.flops()
    assert prunegate.count_flops(gated.export(), x) == gated.cost.flops(gated.mask)


def test_single_path_runs_one_resolution_and_all_paths_weigh_them() -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x.shape[-1])
            return torch.full_like(x[..., 0, 0], x.shape[-1])

    x = torch.ones(1, 2, 8, 8)
    for paths in ("single", "all"):
        net = nn.Sequential(Resolution(Sizes(), (8, 4)), nn.Linear(2, 2))
        gated = prunegate.attach(net, x, units=(), paths=paths).train()
        gated.prunegate.phase = "search"
        seen = gated.model[0].resized.module.seen
        seen.clear()
        for _ in range(40):
            gated(x)
        assert set(seen) == {8, 4}
        assert len(seen) == (40 if paths == "single" else 80)


def test_shared_key_chooses_one_size_for_several_modules() -> None:
    torch.manual_seed(0)

    def branch() -> nn.Module:
        return Resolution(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (8, 6), key="size")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList([branch(), branch()])
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.branches[0](x) + self.branches[1](x.flip(-1)))

    model = randomise(Two()).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gated = prunegate.attach(model, x)
    assert list(gated.trace.choices) == ["size"]
    gated.choose({"size": "6"})
    slim = check_exact(gated, x)
    assert [each.resize.size for each in slim.branches] == [6, 6]


def test_resolution_of_a_whole_model_saved_and_loaded(tmp_path: Path) -> None:
    gated = prunegate.attach(*made(whole()))
    halve(gated, 1)
    gated.choose({"": "12"})
    slim = check_exact(gated, made()[1])
    prunegate.save(slim, tmp_path / "slim.safetensors", builder=whole)
    twin = prunegate.load(tmp_path / "slim.safetensors", allow=("tests.test_resolution",))
    torch.testing.assert_close(twin(made()[1]), slim(made()[1]), rtol=0, atol=0)
    assert twin.resize.size == 12


def whole() -> nn.Module:
    """A model that is a resolution."""
    return Resolution(Inner(), (16, 12, 8))


def test_exported_model_can_be_pruned_again_and_its_edits_found_again() -> None:
    model, x = made()
    gated = prunegate.attach(model, x)
    halve(gated, 3)
    gated.choose({"inner": "12", "part": "8x10"})
    slim, plan = gated.export(), gated.plan()
    again = rederive(made()[0], plan, {"input_size": (3, 16, 16)})
    assert again.choices == plan.choices
    torch.testing.assert_close(prunegate.apply_plan(model, again)(x), slim(x), rtol=0, atol=0)
    second = prunegate.attach(slim, x)
    halve(second, 4)
    twice = check_exact(second, x)
    assert twice.inner.resize.size == 12


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (8, "list of whole numbers"),
        ("88", "list of whole numbers"),
        ([], "list of whole numbers"),
        ([8, 0], "list of whole numbers"),
        ([8, 4.0], "list of whole numbers"),
        ([8, True], "list of whole numbers"),
        ([8, (4, 4)], "list of whole numbers"),
        ([(8, 8), (4,)], "list of whole numbers"),
        ([(), ()], "list of whole numbers"),
        ([8], "two or more"),
        ([8, 8], "all different"),
    ],
)
def test_malformed_sizes_are_refused(sizes: Any, message: str) -> None:
    with pytest.raises(prunegate.AttachError, match=message):
        Resolution(nn.AdaptiveAvgPool2d(1), sizes)


def test_what_is_no_module_and_unknown_modes_are_refused() -> None:
    with pytest.raises(prunegate.AttachError, match=r"a builtin.*torch.nn.Module"):
        Resolution(torch.tanh, (8, 4))
    with pytest.raises(prunegate.AttachError, match=r"mode='cubic'.*bicubic"):
        Resolution(nn.Identity(), (8, 4), mode="cubic")
    with pytest.raises(prunegate.AttachError, match="key=3"):
        Resolution(nn.Identity(), (8, 4), key=3)


def test_outputs_that_depend_on_the_size_are_named_with_both_shapes() -> None:
    net = nn.Sequential(Resolution(nn.Conv2d(3, 4, 3, 2), (8, 4)))
    with pytest.raises(prunegate.AttachError, match=r"'8' gives \(1, 4, 3, 3\), '4' gives \(1, 4, 1, 1\)"):
        prunegate.attach(net, torch.zeros(1, 3, 8, 8))


def test_module_that_cannot_run_at_a_size_is_named_with_it() -> None:
    net = nn.Sequential(Resolution(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), (8, 4)))
    with pytest.raises(prunegate.AttachError, match=r"'4' of the choice '0' does not run.*1x48 and 192x4"):
        prunegate.attach(net, torch.zeros(1, 3, 8, 8))
