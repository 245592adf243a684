"""Each example trainer reaches the budget and still reads digits."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of handwritten digits as timm's script reads it: splits, in them a folder for each class."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    root = tmp_path_factory.mktemp("digits")
    images, labels = datasets.load_digits(return_X_y=True)
    for index, (image, label) in enumerate(zip(images[:260], labels[:260], strict=True)):
        place = root / ("train" if index < 200 else "validation") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.from_numpy(image.reshape(8, 8) * (255 / 16)).round().to(torch.uint8)
        Image.fromarray(pixels.numpy()).convert("RGB").save(place / f"{index}.png")
    return root


WAYS = {
    "loss": "--scaler --clip-grad 1.0 --mixup 0.2 --model-ema --sched-on-updates --torchcompile eager",
    "task": "--task --amp --model-ema --grad-accum-steps 2 --clip-grad 0.02 --clip-mode agc --channels-last",
}
SLOW_WAYS = (("loss", 1), ("loss", 2), ("task", 2))


@pytest.mark.parametrize(
    ("way", "ranks"), [("task", 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW_WAYS)]
)
def test_three_lines_in_timms_script(way: str, ranks: int, pictures: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("trainer_script.py")
    adding = [str(FOLDER / "with_timm.py"), str(script), "--flops", "0.6"]
    shown = subprocess.check_output([sys.executable, *adding, "--show"], text=True).splitlines()
    before = script.read_text().splitlines()
    added = [line for line in shown if line not in before]
    assert len(added) == 3
    assert all("prunegate" in line for line in added)
    assert [line for line in shown if line not in added] == before

    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*(start if ranks > 1 else [sys.executable]), *adding, "--", str(pictures), "--output", str(tmp_path)]
    done = subprocess.run([*command, *WAYS[way].split()], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    slim = prunegate.load(tmp_path / "slim.safetensors")
    example = torch.zeros(1, 3, 160, 160)
    dense = timm.create_model("test_resnet", num_classes=10)
    assert 0.57 <= prunegate.count_flops(slim, example) / prunegate.count_flops(dense, example) <= 0.6
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert len(rows) == 3
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    # The last checkpoint is of the gated model, and the slim one has no weight that is not in it.
    checkpoint = torch.load(tmp_path / "last.pth.tar", weights_only=False)["state_dict"]
    assert {name for name in checkpoint if not name.startswith("prunegate.")} == set(dense.state_dict())
    assert "prunegate.logits" in checkpoint
    for name, parameter in slim.named_parameters():
        assert bool(torch.isin(parameter, checkpoint[name]).all()), name


def test_a_script_of_another_shape_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text("def main():\n    model = build()\n")
    done = subprocess.run([sys.executable, str(FOLDER / "with_timm.py"), str(other)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no main() with `model = create_model(...)`" in done.stderr
