"""The search recipe: every method of both spaces ends in a plan that another process can build from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import search
import torch

import prunegate

SMALL = ["--dataset", "digits", "--img-size", "12", "--train-size", "300", "--test-size", "100", "--batch-size",
         "32", "--search-steps", "12", "--train-steps", "6", "--trials", "2", "--candidates", "2", "--seeds",
         "0"]  # fmt: skip


def test_cell_space_with_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = search.main(["--space", "cell", *SMALL, "--output", str(tmp_path)])
    assert [each["method"] for each in results] == ["gates", "random", "uniform"]
    assert json.loads((tmp_path / "cell.json").read_text()) == results
    assert "| cell | uniform |" in capsys.readouterr().out
    for each in results:
        assert each["flops"] <= each["budget"]
        assert set(each["chosen"]) == {f"edge{a}{b}" for b in range(1, 4) for a in range(b)}
        plan = prunegate.Plan.from_json((tmp_path / f"cell-{each['method']}-0.json").read_text())
        slim = prunegate.apply_plan(search.Cells(1, 10), plan)
        assert not any(isinstance(module, prunegate.Choice) for module in slim.modules())
        assert prunegate.count_flops(slim, torch.zeros(1, 1, 12, 12)) == each["flops"]
        assert sum(p.numel() for p in slim.parameters()) == each["params"]


def test_mobile_space_chooses_kernels_skips_and_expansions(tmp_path: Path) -> None:
    results = search.main(["--space", "mobile", *SMALL, "--methods", "gates", "uniform", "--output", str(tmp_path)])
    narrowed = []
    for result in results:
        assert result["flops"] <= result["budget"]
        assert set(result["chosen"].values()) <= {"mb3", "mb5", "mb7", "skip"}
        plan = prunegate.Plan.from_json((tmp_path / f"mobile-{result['method']}-0.json").read_text())
        slim = prunegate.apply_plan(search.Mobile(1, 10), plan)
        blocks = [block for block in slim.blocks if hasattr(block, "conv_dw")]
        assert len(blocks) >= 3  # those of stride 2 cannot be skipped
        for block in blocks:
            hidden, width = block.conv_pw.out_channels, block.conv_pw.in_channels
            assert 3 * width <= hidden <= 6 * width
            assert block.conv_dw.groups == hidden
            narrowed.append(hidden < 6 * width)
    assert any(narrowed)


def test_random_architectures_keep_to_a_budget() -> None:
    gated = prunegate.attach(search.Cells(1, 10), torch.zeros(1, 1, 12, 12), units=())
    most = search.largest(gated) // 2
    torch.manual_seed(0)
    costs = {gated.cost.flops(search.random_mask(gated, most)) for _ in range(10)}
    assert len(costs) > 1
    assert all(0.85 * most <= cost <= most for cost in costs)
    with pytest.raises(SystemExit, match="no random architecture"):
        search.random_mask(gated, 1)
