"""What the README and the docstrings show works as printed, and the commands they name exist."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import prunegate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a reader of the README has at hand: a loader and a number of epochs; weights here are not downloaded."""
    create = timm.create_model

    def without_download(name: str, pretrained: bool = False, **more: Any) -> torch.nn.Module:
        return create(name, **more)

    monkeypatch.setattr(timm, "create_model", without_download)
    monkeypatch.chdir(tmp_path)
    batches = [(torch.randn(2, 3, 224, 224), torch.randint(0, 1000, (2,))) for _ in range(2)]
    return {"loader": batches, "epochs": 2}


def run(block: str, reader: dict[str, Any]) -> None:
    exec(compile(block, "README.md", "exec"), reader)  # the document under test is our own


def test_the_first_examples_run_as_printed(reader: dict[str, Any]) -> None:
    for block in blocks("python")[:2]:
        run(block, reader)
    image = torch.randn(1, 3, 224, 224)
    dense, slim = timm.create_model("resnet50"), reader["slim"]
    assert type(slim) is type(dense)
    share = prunegate.count_flops(slim, image) / prunegate.count_flops(dense, image)
    assert 0.495 <= share <= 0.5
    loaded = prunegate.load("resnet50-half.safetensors").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(image), slim.eval()(image), rtol=0, atol=0)


def test_what_follows_runs_too(reader: dict[str, Any]) -> None:
    more = blocks("python")[2:]
    assert more, "the README shows one example only"
    # As printed, but on a network that repairs itself in seconds.
    reader |= {"model": timm.create_model("test_resnet").eval(), "prunegate": prunegate, "torch": torch}
    reader["loader"] = [(torch.randn(4, 3, 160, 160), None) for _ in range(2)]
    for block in more:
        reader.pop("slim", None)
        run(block, reader)
        assert isinstance(reader["slim"], torch.nn.Module)


def test_the_first_example_fits_fifteen_lines() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line.strip() and "import" not in line]
    assert len(lines) <= 15


def test_make_targets_that_the_readme_names_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", README, flags=re.MULTILINE))
    assert {"demo", "setup", "lint", "test", "test-all", "bench"} <= named
    assert named <= targets


def test_continuous_integration_does_nothing_that_the_readme_does_not_say() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    commands = [line for line in script.splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make lint", "make test"]
    assert all(command in README for command in commands)


def test_files_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"\b(?:recipes|tools|tests|prunegate)/[\w/]+\.py\b", README))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def modules() -> list[str]:
    found = pkgutil.walk_packages(prunegate.__path__, "prunegate.")
    # A kernel's module may need its compiler just to be imported; examples stand in the front doors.
    return [module.name for module in found if "triton" not in module.name]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
