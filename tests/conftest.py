"""What every test starts from: one thread, the same random numbers, no window system."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
# Several workers share the machine's cores: more threads in each would only wait for one another.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Starts each test from the same random state, so that no test depends on the order in which they run."""
    torch.manual_seed(0)
