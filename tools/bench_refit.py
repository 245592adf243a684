"""What a repair without training gives back: networks trained on Fashion-MNIST, cut by several scores, refitted.

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

sys.path.append(str(Path(__file__).parents[1]))

import prunegate
from prunegate.scores import SCORES
from tools.fashion import NETWORKS, accuracy, read, train

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, cuts, repairs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--network", choices=NETWORKS, default="residual")
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES))
    parser.add_argument("--images", type=int, default=20_000, help="training images of the dense network")
    parser.add_argument("--epochs", type=int, default=2, help="of the dense network")
    parser.add_argument("--flops", type=float, nargs="+", default=[0.7, 0.5], help="shares to cut to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    images, labels = read(args.data_dir, "train")
    test = read(args.data_dir, "test")
    dense = train(NETWORKS[args.network](), images[: args.images], labels[: args.images], args.epochs)
    calibration = images[args.images : args.images + 384]
    whole = accuracy(dense, *test)
    table = Table(title=f"{args.network} on Fashion-MNIST, test accuracy in per cent; dense {whole:.2f}")
    for name in ("FLOPs", "score", "cut", "refitted", "of the loss recovered"):
        table.add_column(name, justify="left" if name == "score" else "right")
    for flops in args.flops:
        for score in args.scores:
            if score == "bn" and not any(isinstance(module, torch.nn.BatchNorm2d) for module in dense.modules()):
                continue
            torch.manual_seed(args.seed + 1)
            slim = prunegate.one_shot(dense, images[:1], score, batches=calibration.split(64), flops=flops).eval()
            repaired = copy.deepcopy(slim)
            prunegate.refit(repaired, dense, [calibration])
            cut, after = accuracy(slim, *test), accuracy(repaired, *test)
            share = f"{(after - cut) / (whole - cut):.0%}" if whole > cut else ""
            table.add_row(f"{flops:.0%}", score, f"{cut:.2f}", f"{after:.2f}", share)
    Console().print(table)


if __name__ == "__main__":
    main()
