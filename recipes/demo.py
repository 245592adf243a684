"""The whole way on real data in a few minutes: a ResNet-18 that reads handwritten digits, at half its FLOPs.

It calls the pruning recipe on scikit-learn's 1,797 digits, then has a second process open the slim file and repeat
its outputs. What it made stays in ``runs/demo``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import prune
import torch
from safetensors.torch import save_file

ARGUMENTS = (
    "--model resnet18 --dataset digits --in-chans 1 --img-size 32 --mean 0.5 --std 0.5 --crop-pct 1 "
    "--scale 0.8 1.0 --ratio 0.9 1.1 --hflip 0 --color-jitter 0 "
    "--batch-size 64 --workers 0 --opt sgd --weight-decay 5e-4 --lr 0.05 --smoothing 0.1 "
    "--dense-epochs 6 --search-epochs 8 --epochs 6 --flops 0.5 --kd-model-name dense --device cpu --seed 0 "
    "--output runs --experiment demo"
).split()


def main() -> None:
    """Runs the recipe, then the second process."""
    # Tensors are small here: where other programs want the cores, two threads mostly wait for one another.
    torch.set_num_threads(1)
    folder, slim = prune.main([*ARGUMENTS, *sys.argv[1:]])
    images = torch.randn(16, 1, 32, 32)
    with torch.inference_mode():
        save_file({"images": images, "outputs": slim(images)}, folder / "outputs.safetensors")
    reopen = Path(__file__).with_name("reopen.py")
    command = [sys.executable, reopen, folder / "slim.safetensors", folder / "outputs.safetensors"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
