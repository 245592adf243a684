"""Each example trainer reaches the budget and still reads digits."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

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
