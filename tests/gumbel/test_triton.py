"""The Triton kernels against the oracle: in the interpreter everywhere, on a GPU where there is one."""

from __future__ import annotations

import collections
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from prunegate.errors import SamplerError
from prunegate.gumbel import Philox, backends, gumbel_sigmoid, triton
from prunegate.gumbel.arguments import make_options

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


class Launches:
    """Stands in for the kernels: notes what is launched, and that its tensors are on the device."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattr__(self, name: str):
        return collections.defaultdict(lambda: lambda *arguments, **flags: self.note(name, arguments))

    def note(self, name: str, arguments: tuple[object, ...]) -> None:
        self.names.append(name)
        assert {each.device.type for each in arguments if isinstance(each, torch.Tensor)} == {"cuda"}


@has_triton
@pytest.mark.parametrize("own", [True, False], ids=["philox", "torch"])
def test_no_launch_looks_at_what_is_on_the_device(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fake tensors have no values: whatever would make the host wait for one, and so break a CUDA graph, raises.
    launches = Launches()
    monkeypatch.setattr(triton, "_kernels", lambda: launches)
    monkeypatch.setattr(triton, "is_plain_eager", lambda tensor: True)
    with FakeTensorMode():
        generator = None
        if own:
            generator = Philox(3)
            generator.state = torch.empty(2, dtype=torch.int64, device="cuda")
        kind = make_options(torch.empty((), device="cuda"), None, True, "st", 0)

        def run(sampler, *shape: int, **rows: object) -> list[str]:
            logits = torch.empty(shape, device="cuda", requires_grad=True)
            sample = sampler(logits, kind, generator=generator, **rows)
            assert sample.device.type == "cuda"
            # The engine would look for the device; the function's own backward does not.
            node = sample.grad_fn
            while not hasattr(node, "saved_tensors"):
                node = node.next_functions[0][0]
            function = triton._Sigmoid if sampler is triton.sample_sigmoid else triton._Softmax
            with torch.no_grad():
                function.backward(node, torch.empty_like(node.saved_tensors[0]))
            names = launches.names.copy()
            launches.names.clear()
            return names

        offsets = torch.empty(5, dtype=torch.int64, device="cuda")
        assert run(triton.sample_sigmoid, 26_560) == ["gates_forward", "gates_backward"]
        assert run(triton.sample_softmax, 100, 32, offsets=None) == ["tile_forward", "tile_backward"]
        long = ["part_winners", "row_choice", "part_sums", "part_finish"]
        assert run(triton.sample_softmax, 4000, 5000, offsets=None) == long
        assert run(triton.sample_softmax, 64, 50_257, offsets=None) == long
        assert run(triton.sample_softmax, 900, offsets=offsets) == ["ragged_winners", "ragged_sums"]
        with pytest.raises(DataDependentOutputException):
            offsets.tolist()


@pytest.mark.skipif(torch.cuda.is_available() or triton.interpreting(), reason="there is something to run on")
def test_without_a_gpu_the_reason_is_given() -> None:
    assert not backends()["triton"].startswith("available")
    with pytest.raises(SamplerError, match="backend='triton' is not available here"):
        gumbel_sigmoid(torch.zeros(3), backend="triton")
