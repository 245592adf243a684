"""The ImageNet settings: every key is one of the recipe's, and each file runs end to end on a few made-up pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import options
import prune
import pytest
import timm
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "recipes/imagenet").glob("*.yaml"))


def test_the_page_names_every_file_and_no_other() -> None:
    page = (ROOT / "recipes/imagenet.md").read_text()
    named = re.findall(r"--config (\S+\.yaml)", page)
    assert sorted(named) == [str(path.relative_to(ROOT)) for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_an_argument_and_the_weights_exist(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    known = vars(options.parse_args([]))
    assert set(given) <= set(known)
    for key, value in given.items():
        if isinstance(value, bool) or isinstance(known[key], str):
            assert isinstance(value, type(known[key])), key
    assert timm.is_model_pretrained(given["model"])
    assert vars(options.parse_args(["--config", str(path)]))["flops"] == given["flops"]
    # A fifth of all epochs is the search.
    assert given["search_epochs"] / (given["search_epochs"] + given["epochs"]) == pytest.approx(0.2)


@pytest.mark.slow
# timm's ImageFolder leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_runs_on_a_tiny_image_folder(path: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, n in (("train", 10), ("validation", 2)):
        for label in ("left", "right"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 100, (40, 40, 3), dtype=np.uint8)
                pixels[:, slice(0, 20) if label == "left" else slice(20, 40)] += 100
                Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.png")
    settings = yaml.safe_load(path.read_text())
    settings |= {"pretrained": False, "num_classes": 2, "batch_size": 8, "search_epochs": 2, "epochs": 1, "workers": 0,
                 "warmup_epochs": 0, "amp": False, "device": "cpu", "val_fraction": 0.2, "img_size": 32,
                 "output": str(tmp_path / "runs")}  # fmt: skip
    if "deit" in settings["model"]:
        settings["model_kwargs"] = {"img_size": 32}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    folder, _ = prune.main(["--config", str(tmp_path / "settings.yaml"), "--data-dir", str(tmp_path)])
    measured = json.loads((folder / "report.json").read_text())
    assert measured["slim"]["flops"] <= settings["flops"] * measured["dense"]["flops"]
