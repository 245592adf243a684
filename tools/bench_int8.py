"""What eight bits cost after pruning: networks trained on Fashion-MNIST, cut by a search, quantised, and counted.

    python tools/bench_int8.py --data-dir /usr/share/datasets/fashion-mnist

Quantisation is onnxruntime's, static, weights by channel; ranges come from 512 training images, without labels.
Accuracies are of the 10,000 test images.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1]))

from prunegate.cli.deployment import deploy, open_onnx
from tools.fashion import NETWORKS, accuracy, read, train

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, cuts, quantises and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=20_000, help="training images")
    parser.add_argument("--epochs", type=int, default=2, help="of dense training, and again of the search")
    parser.add_argument("--flops", type=float, default=0.5, help="share of the dense FLOPs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    images, labels = (part[: args.images + 512] for part in read(args.data_dir, "train"))
    test = read(args.data_dir, "test")
    table = Table(title="Fashion-MNIST, test accuracy in per cent; kilobytes of ONNX files")
    for name in ("network", "dense", "dense int8", "slim", "slim int8", "dense kB", "slim kB", "slim int8 kB"):
        table.add_column(name, justify="left" if name == "network" else "right")
    for name in args.networks:
        torch.manual_seed(args.seed)
        dense = train(NETWORKS[name](), images[: args.images], labels[: args.images], args.epochs)
        slim = train(copy.deepcopy(dense), images[: args.images], labels[: args.images], args.epochs, args.flops)
        row, sizes = [], []
        with tempfile.TemporaryDirectory() as folder:
            for model in (dense, slim):
                _, plain, eight = deploy(model, images[:1], Path(folder), ["onnx", "int8"], calibration=images[-512:])
                row += [accuracy(open_onnx(Path(record["file"])), *test) for record in (plain, eight)]
                sizes += [plain["bytes"], eight["bytes"]]
        kilobytes = [f"{sizes[i] / 1e3:.0f}" for i in (0, 2, 3)]
        table.add_row(name, *(f"{value:.2f}" for value in row), *kilobytes)
    Console().print(table)


if __name__ == "__main__":
    main()
