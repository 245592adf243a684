"""Slim models in other batches and resolutions, in training, copied, saved, compiled; and what the checks would see."""

import copy
import inspect
import io
import pdb

import pytest
import torch
from torch import nn

import prunegate
from tests.models import build, random_mask, randomise
from tests.zoo import ZOO
from tools import coverage, shapes_free

FAST = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet", "test_nfnet")
# Their forwards compute sizes that follow from a head's width or a group's, so some of them are edited.
EDITED = ("GroupedQueries", "TalkingHeads", "ConditionalWeights", "RotaryBeforeHeads")


def cut(model: nn.Module, example: object, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    gated = prunegate.attach(model, example).eval()
    gated.mask = random_mask(gated, seed)
    return gated, gated.export().eval()


@pytest.mark.parametrize("name", FAST)
def test_networks(name: str) -> None:
    model = build(name)
    example = torch.randn(1, *model.pretrained_cfg["input_size"], dtype=torch.float64)
    gated, slim = cut(model, example)
    outcomes = shapes_free.check(model, gated, slim, example, 1e-8)
    assert outcomes == dict.fromkeys(shapes_free.CHECKS, "ok")


def test_dynamic_image_size() -> None:
    model = randomise(coverage.build_flexible("test_vit")[0]).eval()
    example = torch.randn(1, 3, 160, 160, dtype=torch.float64)
    gated, slim = cut(model, example)
    with torch.no_grad():
        shapes_free.CHECKS["resolution"](model, gated, slim, example, 1e-8)


@pytest.mark.parametrize("name", EDITED)
def test_edited_forwards(name: str) -> None:
    model = randomise(ZOO[name]()).eval()
    example = model.example()[:1]
    gated, slim = cut(model, example)
    assert type(slim) is not type(model), "choose another module: no method of this one needs an edit"
    outcomes = shapes_free.check(model, gated, slim, example, 1e-8)
    outcomes.pop("file")
    assert all(shapes_free.holds(outcome) for outcome in outcomes.values()), outcomes
    assert outcomes["batch"] == outcomes["training"] == outcomes["copies"] == "ok"


@pytest.mark.parametrize("name", EDITED)
def test_edited_forwards_step_in_a_debugger(name: str) -> None:
    """A breakpoint on their first line stops there, shows it, and steps through each line that follows."""
    model = randomise(ZOO[name]()).eval()
    example = model.example()[:1]
    slim = cut(model, example)[1]
    code = type(slim).forward.__code__
    lines = inspect.getsource(type(slim).forward).splitlines()
    screen = io.StringIO()
    debugger = pdb.Pdb(stdin=io.StringIO("continue\n" + "next\n" * 2 + "continue\n"), stdout=screen, readrc=False)
    assert debugger.set_break(code.co_filename, code.co_firstlineno + 1) is None, "there is no such line"
    debugger.runcall(slim, example)
    shown = [line.removeprefix("-> ") for line in screen.getvalue().splitlines() if line.startswith("-> ")]
    assert [lines[1].strip(), lines[2].strip()] == shown[1:3]


def test_what_is_wrong_is_seen() -> None:
    """A batch baked in, a parameter that is cut off, a copy that differs: each check can fail."""

    class Baked(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.unused = inner, nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)[:1].expand(x.shape[0], -1)

        def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
            return copy.deepcopy(nn.Sequential(self.inner, nn.Dropout(0.5)).train())

    model = build("test_resnet")
    example = torch.randn(1, *model.pretrained_cfg["input_size"], dtype=torch.float64)
    gated, slim = cut(model, example)
    outcomes = shapes_free.check(model, gated, Baked(slim), example, 1e-8)
    assert "apart" in outcomes["batch"]
    assert "no gradient reaches" in outcomes["training"]
    assert outcomes["resolution"] == "ok"
    assert not shapes_free.holds(outcomes["copies"])
    assert not shapes_free.holds(outcomes["file"])


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "repghostnet_050", "fastvit_t8"])
def test_branches_become_one_after_the_cut(name: str) -> None:
    from timm.utils import reparameterize_model

    model = build(name, num_classes=10)
    example = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    _, slim = cut(model, example)
    fused = reparameterize_model(slim).eval()
    assert sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in slim.parameters())
    with torch.no_grad():
        torch.testing.assert_close(fused(example), slim(example), rtol=1e-8, atol=1e-8)


def test_branches_of_the_zoo_become_one_after_the_cut() -> None:
    model = randomise(ZOO["Branches"]()).eval()
    _, slim = cut(model, model.example())
    with torch.no_grad():
        before = slim(model.example().fill_(0.5))
        slim.fuse()
        torch.testing.assert_close(slim(model.example().fill_(0.5)), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_compiled_and_exported(name: str) -> None:
    model = build(name)
    example = torch.randn(1, *model.pretrained_cfg["input_size"], dtype=torch.float64)
    gated, slim = cut(model, example)
    for function in shapes_free.COMPILED.values():
        function(model, gated, slim, example, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("family", coverage.families())
def test_family(family: str) -> None:
    row = coverage.work(("free", family, ""))
    assert not row.failure
    assert {name: outcome for name, outcome in row.free.items() if not shapes_free.holds(outcome)} == {}
