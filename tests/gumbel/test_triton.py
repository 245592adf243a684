"""The Triton kernels against the oracle: in the interpreter everywhere, on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prunegate.errors import SamplerError
from prunegate.gumbel import backends, gumbel_sigmoid, triton

CHECKS = Path(__file__).with_name("kernel_checks.py")
has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_checks(interpret: bool) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    # NumPy in the interpreter warns of the infinities and NaN that the kernels are there to handle.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    finished = subprocess.run([*command, str(CHECKS)], env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
    return finished.stdout


@has_triton
def test_the_kernels_pass_in_the_interpreter() -> None:
    assert " passed" in run_checks(interpret=True)


@has_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_pass_on_the_gpu() -> None:
    assert " passed" in run_checks(interpret=False)


@pytest.mark.skipif(torch.cuda.is_available() or triton.interpreting(), reason="there is something to run on")
def test_without_a_gpu_the_reason_is_given() -> None:
    assert not backends()["triton"].startswith("available")
    with pytest.raises(SamplerError, match="backend='triton' is not available here"):
        gumbel_sigmoid(torch.zeros(3), backend="triton")
