"""What a repair without training gives back: a network trained on Fashion-MNIST, cut by several scores, refitted.

    python tools/bench_refit.py --data-dir /usr/share/datasets/fashion-mnist

Accuracies are of the 10,000 test images. The repair sees 384 training images, without labels.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.append(str(Path(__file__).parents[1] / "recipes"))

from data import read_named

import prunegate
from prunegate.scores import SCORES

__all__ = ["main", "network"]


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width_out)
        self.second = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(width_out)
        self.around: nn.Module = nn.Identity()
        if width_in != width_out:
            self.around = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] to [N, out, H / stride, W / stride]."""
        inner = self.first_norm(self.first(x)).relu()
        return (self.second_norm(self.second(inner)) + self.around(x)).relu()


def network() -> nn.Sequential:
    """A residual network of 78,000 parameters for 28 by 28 pixels."""
    stem = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _read(folder: str, split: str) -> tuple[Tensor, Tensor]:
    part = read_named("fashion-mnist", folder, split, "L")
    assert part is not None
    images = (torch.from_numpy(part.images.copy()).float()[:, None] / 255 - 0.286) / 0.353
    return images, torch.from_numpy(part.labels)


def _train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    steps = epochs * (len(images) // 128)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(epochs):
        for index in torch.randperm(len(images))[: len(images) // 128 * 128].split(128):
            cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    hits = [model(x).argmax(1) == y for x, y in zip(images.split(1000), labels.split(1000), strict=True)]
    return 100 * float(torch.cat(hits).float().mean())


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, cuts, repairs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--images", type=int, default=20_000, help="training images of the dense network")
    parser.add_argument("--epochs", type=int, default=2, help="of the dense network")
    parser.add_argument("--flops", type=float, nargs="+", default=[0.7, 0.5], help="shares to cut to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    images, labels = _read(args.data_dir, "train")
    test = _read(args.data_dir, "test")
    dense = network()
    _train(dense, images[: args.images], labels[: args.images], args.epochs)
    calibration = images[args.images : args.images + 384]
    table = Table(title=f"Fashion-MNIST, test accuracy in per cent; dense {_accuracy(dense, *test):.2f}")
    for name in ("FLOPs", "score", "cut", "refitted"):
        table.add_column(name, justify="left" if name == "score" else "right")
    for flops in args.flops:
        for score in SCORES:
            torch.manual_seed(args.seed + 1)
            slim = prunegate.one_shot(dense, images[:1], score, batches=calibration.split(64), flops=flops).eval()
            repaired = copy.deepcopy(slim)
            prunegate.refit(repaired, dense, [calibration])
            table.add_row(f"{flops:.0%}", score, f"{_accuracy(slim, *test):.2f}", f"{_accuracy(repaired, *test):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
