"""The sensitivity table against models that were really cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import prunegate
from prunegate.scores import score_units
from tests import models
from tools import sensitivity


def test_records_are_those_of_the_cut_models() -> None:
    net = models.build("test_resnet", num_classes=5)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    gated = prunegate.attach(net, x[:1])
    scores = score_units(gated, "magnitude")
    records = sensitivity.measure(gated, scores, x)
    assert [record["group"] for record in records] == [group.name for group in gated.groups if group.size > 1]
    assert gated.mask.all()
    record, group = records[2], gated.groups[2]
    mask = torch.ones_like(gated.mask)
    mask[group.slice.start + scores[group.slice].argsort()[: group.size // 4]] = False
    gated.mask = mask
    slim = gated.export()
    with torch.no_grad():
        dense, cut = net(x), slim(x)
    assert record["closed"] == group.size // 4
    assert record["change"] == pytest.approx(float((cut - dense).square().mean().sqrt() / dense.std()))
    assert record["flops_saved"] == pytest.approx(
        1 - prunegate.count_flops(slim, x[:1]) / prunegate.count_flops(net, x[:1])
    )


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "s.png"
    assert sensitivity.main(["test_vit", "--images", "2", "--json", "--out", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {record["kind"] for record in found["groups"]} >= {"head", "channel"}
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert sensitivity.main(["test_vit", "--share", "2"]) == 1
    assert "between 0 and 1" in capsys.readouterr().err
