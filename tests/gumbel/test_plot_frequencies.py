"""The picture of frequencies: hard samples follow softmax in it, and the file that the README shows stays small."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("plot_frequencies", ROOT / "tools" / "plot_frequencies.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hard_samples_follow_softmax_and_cold_soft_ones_nearly_do(tool) -> None:
    _, far = tool.draw(20_000)
    assert set(far) == set(tool.TEMPERATURES)
    assert max(far.values()) < 4
    expected = torch.tensor(tool.LOGITS, dtype=torch.float64).softmax(0)
    gaps = [float((tool.frequencies(tau, 20_000, False) - expected).abs().max()) for tau in tool.TEMPERATURES]
    assert gaps == sorted(gaps)
    assert gaps[0] < 0.015
    assert gaps[-1] > 0.2


def test_the_picture_is_written_and_small(tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.svg", "b.svg"):
        tool.main(["--draws", "1000", "--output", str(tmp_path / name)])
    written = (tmp_path / "a.svg").read_bytes()
    assert written == (tmp_path / "b.svg").read_bytes()
    assert b"softmax" in written
    assert len(written) < 100_000
    assert "standard errors" in capsys.readouterr().out
    assert (ROOT / "tools" / "pictures" / "frequencies.svg").stat().st_size < 100_000
