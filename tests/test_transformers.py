"""Models of Hugging Face transformers, as their users have them: attached, cut, equal, saved and opened again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prunegate
from tests.models import random_mask, randomise, relative_error
from tools import coverage

pytest.importorskip("transformers", reason="transformers is not a dependency; install it to run these tests")

# Llama computes norms in float32 whatever its weights are in; with that taken out it is exact (test_families.py).
NAMES = {"vit": 1e-8, "deit": 1e-8, "swin": 1e-8, "convnext": 1e-8, "dinov2": 1e-8, "bert": 1e-8, "llama": 1e-5}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model itself, and its inputs by keyword."""
    wrapped, example = coverage.builders_of("transformers")[name]()
    key = "pixel_values" if example.is_floating_point() else "input_ids"
    return randomise(wrapped.model).eval(), {key: torch.cat([example, example.flip(-1)])}


@pytest.mark.parametrize("name", NAMES)
def test_cut_is_equal_and_saved(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    gated = prunegate.attach(model, inputs).eval()
    gated.mask = random_mask(gated, 0)
    slim = gated.export().eval()
    assert type(slim) is type(model)
    assert slim.config is not None
    assert gated.cost.params(gated.mask) == sum(p.numel() for p in slim.parameters())
    with torch.no_grad():
        wanted, found = gated(**inputs).logits, slim(**inputs).logits
        assert relative_error(wanted, found) <= NAMES[name]
        assert relative_error(model(**inputs).logits, found) > 0.01
    prunegate.save_for_hub(slim, tmp_path / name, {"FLOPs": (2, 1)})
    assert {path.name for path in (tmp_path / name).iterdir()} == {"config.json", "model.safetensors", "README.md"}
    twin = prunegate.load(tmp_path / name)
    assert type(twin) is type(model)
    with torch.no_grad():
        assert torch.equal(twin(**inputs).logits, found)
