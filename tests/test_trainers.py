"""Each example trainer reaches the budget and still reads digits."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import prunegate

FOLDER = Path(__file__).parents[1] / "recipes" / "trainers"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("plain", "torch"),
        pytest.param("with_accelerate", "accelerate", marks=pytest.mark.slow),
        pytest.param("with_lightning", "lightning", marks=pytest.mark.slow),
        pytest.param("with_transformers", "transformers", marks=pytest.mark.slow),
    ],
)
def test_trainer(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed")
    if name == "with_transformers":
        pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    monkeypatch.syspath_prepend(str(FOLDER))
    right, share = importlib.import_module(name).main()
    sys.modules.pop(name)
    assert 0.49 <= share <= 0.5
    assert right > 0.9


def test_three_lines_in_timms_script(tmp_path: Path) -> None:
    script = Path(__file__).with_name("trainer_script.py")
    command = [sys.executable, str(FOLDER / "with_timm.py"), str(script), "--flops", "0.6"]
    shown = subprocess.check_output([*command, "--show"], text=True).splitlines()
    before = script.read_text().splitlines()
    assert [line for line in shown if line not in before] == [line for line in shown if "prunegate" in line]
    assert len(shown) == len(before) + 3
    subprocess.run([*command, "--", str(tmp_path / "out"), "test_resnet"], check=True, capture_output=True)
    slim = prunegate.load(tmp_path / "out" / "slim.safetensors")
    example = torch.zeros(1, 3, 160, 160)
    dense = timm.create_model("test_resnet", num_classes=3)
    assert 0.57 <= prunegate.count_flops(slim, example) / prunegate.count_flops(dense, example) <= 0.6
