"""Evaluation of a slim file on real data, against a count by hand."""

from __future__ import annotations

import json
from pathlib import Path

import data
import pytest
import timm
import torch
import validate

import prunegate


def test_the_slim_file_is_evaluated_on_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()
    prunegate.save(prunegate.one_shot(net, torch.zeros(1, 1, 32, 32), score="random", flops=0.6), tmp_path / "s")
    flags = "--dataset digits --img-size 32 --in-chans 1 --mean 0.5 --std 0.5 --crop-pct 1 -j 0 --device cpu".split()
    assert validate.main([str(tmp_path / "s"), *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    dataset = data.read_named("digits", None, "validation", "L")
    dataset.transform = timm.data.create_transform((1, 32, 32), mean=(0.5,), std=(0.5,), crop_pct=1.0,
                                                   interpolation="bicubic")  # fmt: skip
    images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    slim = prunegate.load(tmp_path / "s")
    with torch.no_grad():
        right = (slim(torch.stack(images)).argmax(1) == torch.tensor(labels)).float().mean()
    assert found["images"] == len(dataset) == 360
    assert found["top1"] == pytest.approx(100 * float(right), abs=0.3)
    assert found["top5"] >= found["top1"]


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main(["nowhere.safetensors", "--dataset", "digits"]) == 1
    assert "neither a file nor a timm model" in capsys.readouterr().err
