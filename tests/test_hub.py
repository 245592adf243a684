"""Folders for a model hub: opened by prunegate, by timm, and read by a person."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import prunegate
from tests import buildable, models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = models.build("resnet18", num_classes=7).float()
    slim = prunegate.one_shot(net, torch.randn(1, 3, 64, 64), flops=0.5)
    path = tmp_path_factory.mktemp("hub") / "resnet18-half"
    prunegate.save_for_hub(slim, path, {"top-1": ("70.1%", "69.9%")}, license="apache-2.0")
    return path


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_both_ways_give_the_same_model(folder: Path) -> None:
    ours = prunegate.load(folder)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    with torch.no_grad():
        assert torch.equal(ours(images()), theirs(images()))
    assert type(theirs).__name__ == "ResNet"
    assert theirs.num_classes == 7


@pytest.mark.parametrize("order", ["import prunegate, timm", "import timm, prunegate"])
def test_a_fresh_process_finds_it_whichever_is_imported_first(folder: Path, order: str) -> None:
    code = f"{order}\nm = timm.create_model('local-dir:{folder}', pretrained=True)\nprint(m.conv1.out_channels)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output) == prunegate.load(folder).conv1.out_channels


def test_importing_prunegate_alone_does_not_import_timm() -> None:
    code = "import prunegate, sys; print('timm' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False False"


def test_what_timm_does_with_its_models_works(folder: Path) -> None:
    slim = prunegate.load(folder)
    config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
    assert config["input_size"] == (3, 224, 224)
    features = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
    with torch.no_grad():
        maps = features(images())
    assert [each.shape[1] for each in maps] == features.feature_info.channels()
    assert features.feature_info.channels() == [info["num_chs"] for info in slim.feature_info]
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3)
    assert other(images()).shape == (2, 3)
    fresh = timm.create_model(f"local-dir:{folder}", pretrained=False)
    assert fresh.conv1.weight.shape == slim.conv1.weight.shape
    assert not torch.equal(fresh.conv1.weight, slim.conv1.weight)


def test_the_card_says_what_was_cut(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    slim = prunegate.load(folder)
    dense = sum(p.numel() for p in timm.create_model("resnet18", num_classes=7).parameters())
    own = sum(p.numel() for p in slim.parameters())
    assert card.startswith("---\ntags:")
    assert "license: apache-2.0" in card
    assert f"| parameters | {dense:,} | {own:,} |" in card
    assert "| top-1 | 70.1% | 69.9% |" in card
    assert f"| `conv1.weight` | 64 x 3 x 7 x 7 | {slim.conv1.out_channels} x 3 x 7 x 7 |" in card
    config = json.loads((folder / "config.json").read_text())
    assert config["pruned_architecture"] == "resnet18"


def test_the_dense_architecture_comes_back(folder: Path) -> None:
    dense = prunegate.checkpoint.load_dense(folder)
    assert {n: p.shape for n, p in dense.named_parameters()} == {
        n: p.shape for n, p in timm.create_model("resnet18", num_classes=7).named_parameters()
    }


def test_models_of_other_libraries_are_folders_too(tmp_path: Path) -> None:
    prunegate.save_for_hub(buildable.Net().eval(), tmp_path / "net", builder=buildable.Net)
    assert type(prunegate.load(tmp_path / "net", allow=("tests.buildable",))) is buildable.Net
    assert "local-dir" not in (tmp_path / "net" / "README.md").read_text()


def test_bad_input(tmp_path: Path, folder: Path) -> None:
    net = timm.create_model("resnet18")
    with pytest.raises(prunegate.CheckpointError, match="expected the dense and the slim"):
        prunegate.save_for_hub(net, tmp_path / "a", {"top-1": "70%"})
    with pytest.raises(prunegate.CheckpointError, match="cannot be changed"):
        timm.create_model(f"local-dir:{folder}", pretrained=True, output_stride=8)
    with pytest.raises(prunegate.CheckpointError, match="made from a folder"):
        timm.create_model("prunegate_slim")
    with pytest.raises(prunegate.CheckpointError, match="there is no file"):
        prunegate.load(tmp_path)
