"""Opens a slim file in a process of its own and checks that it repeats stored outputs, bit for bit.

    python recipes/reopen.py runs/demo/slim.safetensors runs/demo/outputs.safetensors

The second file holds ``images`` and the ``outputs`` for them. Neither gates nor samplers are imported on the way.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file

import prunegate

UNWANTED = ("prunegate.gates", "prunegate.gumbel")


def main(slim_path: str, outputs_path: str) -> None:
    """Loads, compares, says so.

    Args:
        slim_path: A file that ``prunegate.save`` wrote.
        outputs_path: A safetensors file with ``images`` and ``outputs``.

    Raises:
        SystemExit: The outputs differ, or the search's machinery was imported.
    """
    stored = load_file(outputs_path)
    slim = prunegate.load(slim_path).eval()
    with torch.inference_mode():
        outputs = slim(stored["images"])
    if not torch.equal(outputs, stored["outputs"]):
        raise SystemExit(f"outputs differ by up to {(outputs - stored['outputs']).abs().max():.3g}")
    imported = [name for name in sys.modules if name.startswith(UNWANTED)]
    if imported:
        raise SystemExit(f"loading a slim file imported {imported}")
    print(f"a second process opened {slim_path}: outputs equal bit for bit, neither gates nor samplers imported")


if __name__ == "__main__":
    main(*sys.argv[1:])
