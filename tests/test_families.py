"""All families of timm: unit counts by arithmetic, and the sweep of ``tools/coverage.py`` as a slow test."""

import importlib
import re
import types
from pathlib import Path

import pytest
import timm
import torch

import prunegate
from tests.models import random_mask, randomise, relative_error
from tests.oracle import check_against_the_oracle
from tools import coverage


def stages(widths: tuple[int, ...], depths: tuple[int, ...], per_block: tuple[int, ...]) -> int:
    """A hierarchical network: one residual stream a stage, and so many units in each block of the stage."""
    return sum(widths) + sum(depth * units for depth, units in zip(depths, per_block, strict=True))


def plain_transformer(width: int, depth: int, heads: int, hidden: int) -> int:
    return width + depth * (heads + hidden)


# Units in hierarchical transformers of widths 96 to 768: heads of width 32, and MLPs four times as wide.
SWIN = stages((96, 192, 384, 768), (2, 2, 6, 2), tuple(w // 32 + 4 * w for w in (96, 192, 384, 768)))
# resnet18: two convolutions a block, the second writes to the stream.
RESNET18 = stages((64, 128, 256, 512), (2, 2, 2, 2), (64, 128, 256, 512))
# Inverted residuals of mobilenetv2: stem, streams, head, then the expanded widths.
MOBILENETV2 = 32 + sum((16, 24, 32, 64, 96, 160, 320)) + 1280 + 6 * (16 + 2 * 24 + 3 * 32 + 4 * 64 + 3 * 96 + 3 * 160)

# Model and its number of units.
COUNTS = {
    "deit_tiny_patch16_224": plain_transformer(192, 12, 3, 768),
    "vit_tiny_patch16_224": plain_transformer(192, 12, 3, 768),
    "beit_base_patch16_224": plain_transformer(768, 12, 12, 3072),
    "samvit_base_patch16_224": plain_transformer(768, 12, 12, 3072),
    "naflexvit_base_patch16_parfac_gap": plain_transformer(768, 12, 12, 3072),
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "swinv2_cr_tiny_224": SWIN,
    "davit_tiny": SWIN,  # 1, 1, 3 and 1 pairs of spatial and channel attention
    "nest_tiny": stages((96, 192, 384), (2, 2, 8), tuple(w // 32 + 4 * w for w in (96, 192, 384))),
    "resnet18": RESNET18,
    "resnetv2_18": RESNET18,
    # A squeeze of a sixteenth in each block.
    "legacy_seresnet18": RESNET18 + 2 * (4 + 8 + 16 + 32),
    "resnet50": 64 + stages((256, 512, 1024, 2048), (3, 4, 6, 3), (128, 256, 512, 1024)),
    # A bottleneck's 32 groups go as wholes, on both sides of the grouped convolution.
    "resnext50_32x4d": 64 + stages((256, 512, 1024, 2048), (3, 4, 6, 3), (32, 32, 32, 32)),
    # 58 dense layers of 128 and 32 channels; stem and transitions.
    "densenet121": 58 * (128 + 32) + 64 + 128 + 256 + 512,
    "convnext_atto": stages((40, 80, 160, 320), (2, 2, 6, 2), (160, 320, 640, 1280)),
    "convmixer_768_32": 33 * 768,
    "mixer_s32_224": 512 + 8 * (256 + 2048),
    "poolformerv2_s12": stages((64, 128, 320, 512), (2, 2, 6, 2), (256, 512, 1280, 2048)),
    "mobilenetv2_100": MOBILENETV2,
    # Groups of eight channels: of 19 and 46 groups whole ones go; of 3 and 7, the same position of each, on both sides.
    "regnetx_002": 32 + stages((24, 56, 152, 368), (1, 1, 4, 7), (2 * 8, 2 * 8, 19, 46)),
}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_number_of_units(name: str) -> None:
    model = timm.create_model(name)
    gated = prunegate.attach(model)
    assert gated.logits.numel() == COUNTS[name]


def test_an_operation_without_a_rule_freezes_what_enters_it_and_nothing_else() -> None:
    with torch.library._scoped_library("prunegate_test", "DEF") as library:
        library.define("strange(Tensor x) -> Tensor")
        library.impl("strange", lambda x: x * x.mean(), "CPU")

        class Odd(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = torch.nn.Linear(3, 6), torch.nn.Linear(6, 5), torch.nn.Linear(5, 2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = torch.ops.prunegate_test.strange(self.a(x))
                return self.c(self.b(x).relu())

        gated = prunegate.attach(Odd(), torch.randn(4, 3))
        assert [(group.name, group.size) for group in gated.groups] == [("b", 5)]
        reasons = {item.tensor: item for item in gated.frozen if item.operation == "strange"}
        assert set(reasons) >= {"a.weight", "a.bias"}
        assert reasons["a.weight"].count == 6
        gated.mask = torch.tensor([True, False, True, False, False])
        assert gated.export().b.out_features == 2


def test_no_model_is_named_in_the_library() -> None:
    """Not one of timm's architectures or families decides anything."""
    # Others register models with timm, too; each entry point says where it comes from.
    homes = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    own = {name: home.rpartition(".")[2] for name, home in homes.items() if home.startswith("timm.")}
    names = {name for name in (*own, *own.values()) if not name.startswith("test_")}
    assert len(names) > 1000
    words = set()
    for path in Path(prunegate.__file__).parent.rglob("*.py"):
        words |= set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", path.read_text()))
    assert words & names == set()


@pytest.mark.slow
@pytest.mark.parametrize("family", coverage.families())
def test_family(family: str) -> None:
    row = coverage.work(("timm", family, ""))
    assert row.passed, row
    assert row.same_class
    assert row.effect >= 0.05
    assert row.prunable >= 0.6


@pytest.mark.slow
@pytest.mark.parametrize("family", coverage.families())
def test_family_against_the_oracle(family: str) -> None:
    """What is masked, in eval and train mode, is what gating each consumer's operand gives."""
    model, example = coverage.build_timm(coverage.smallest_of_family(family))
    check_against_the_oracle(randomise(model), example, gradient=False)


class InDouble(types.ModuleType):
    """torch, for a module of code in which ``torch.float32`` is to mean float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_models_with_float32_inside_are_exact_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and softmaxes compute in float32 whatever weights are in; told otherwise, only rounding is left."""
    pytest.importorskip("transformers", reason="transformers is not a dependency; install it to run this test")
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    monkeypatch.setattr(modeling, "torch", InDouble("torch"))
    model, example = coverage.builders_of("transformers")[name]()
    model = randomise(model).eval()
    gated = prunegate.attach(model, example).eval()
    for seed in range(3):
        gated.mask = random_mask(gated, seed)
        with torch.no_grad():
            masked, dense = gated(example), model(example)
            assert relative_error(masked, gated.export()(example)) <= 1e-8
        assert relative_error(dense, masked) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(coverage.SOURCES))
def test_models_of_other_packages(source: str) -> None:
    if source != "torchvision":
        pytest.importorskip(source, reason=f"{source} is not a dependency; install it to run this sweep")
    rows = [coverage.work((source, source, name)) for name in coverage.builders_of(source)]
    assert [row for row in rows if not row.passed] == []
