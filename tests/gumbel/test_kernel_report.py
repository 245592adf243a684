"""The ahead-of-time report: kernels compile for GPUs that are not here, and its byte count is right."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def report():
    path = Path(__file__).parents[2] / "tools" / "kernel_report.py"
    spec = importlib.util.spec_from_file_location("kernel_report", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_report"] = module
    spec.loader.exec_module(module)
    return module


def test_bytes_are_counted_by_operation(report) -> None:
    values = torch.randn(1000)
    with report.BytesMoved() as counter:
        values.view(10, 100).exp()
        torch.empty(1000).exponential_()
        values.add_(1)
    assert counter.total == 4000 * (2 + 1 + 2)


def test_the_slowest_resource_is_the_limit(report) -> None:
    card = report.Card("card", 1e12, 100, 1e9, 64)
    counts = {"instructions": 10.0, "integer": 2.0, "multiply": 2.0, "float_": 2.0, "special": 1.0}

    def slowest(**more: float) -> tuple[float, str]:
        return report.limit(report.Binary(32, 0, 0, **(counts | more)), 8, card)

    assert slowest() == (1.25e11, "bandwidth")
    assert slowest(instructions=1000.0) == (1.28e10, "issue")
    assert slowest(integer=100.0) == (6.4e10, "integer unit")
    assert slowest(float_=200.0, multiply=100.0) == (3.2e10, "float unit")
    assert slowest(special=100.0) == (1.6e10, "special functions")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_without_spills(report, capability: int, capsys: pytest.CaptureFixture[str]) -> None:
    report.main(["--capability", str(capability)])
    assert "gates forward" in capsys.readouterr().out
