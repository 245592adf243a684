"""What the sampler tests share: the backends to run on, and one thread for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from prunegate.gumbel import backends


@pytest.fixture(params=["reference", "aten", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that samples CPU tensors."""
    reason = backends()[request.param]
    if not reason.startswith("available"):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """A fixed default generator, and one thread, so that statistics are the same on every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(20240229)
    yield
    torch.set_num_threads(threads)
