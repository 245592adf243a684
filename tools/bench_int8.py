"""What eight bits cost after pruning: networks trained on Fashion-MNIST, cut by a search, quantised, and counted.

    python tools/bench_int8.py --data-dir /usr/share/datasets/fashion-mnist
    python tools/bench_int8.py --data-dir /usr/share/datasets/fashion-mnist --networks resnet50 convnext_atto

Quantisation is onnxruntime's, static, weights by channel; ranges come from 512 training images, without labels.
Accuracies are of the test images; "same" is the share of them of which the slim network names the same class with eight
bits as without. timm's networks are as wide and deep as for ImageNet, and start from random weights.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import interpolate

sys.path.append(str(Path(__file__).parents[1]))

from prunegate.cli.deployment import deploy, open_onnx
from tools.bench_onnx import NETWORKS as OF_TIMM
from tools.fashion import NETWORKS, accuracy, predictions, read, train

__all__ = ["build", "main", "measure"]

_COLUMNS = ("network", "dense", "dense int8", "dense kB", "slim", "slim int8", "slim kB", "slim int8 kB", "same, %")


def build(name: str) -> tuple[nn.Module, int, float]:
    """A network for one channel and ten classes, the side of its images in pixels, and a learning rate for it."""
    if name in NETWORKS:
        return NETWORKS[name](), 28, 4e-3
    # What is built for one size is so for patches and windows of up to 32 pixels: two of them a side.
    fixed = timm.get_pretrained_cfg_value(name, "fixed_input_size")
    side = 64 if fixed else 32
    return timm.create_model(name, in_chans=1, num_classes=10, **({"img_size": side} if fixed else {})), side, 1e-3


def measure(name: str, images: Tensor, labels: Tensor, calibration: Tensor, test: tuple[Tensor, Tensor], epochs: int,
            flops: float, both: bool) -> list[str]:  # fmt: skip
    """Trains, cuts and quantises one network, or the dense one too; the cells of its row."""
    dense, side, lr = build(name)
    if side != 28:
        images, calibration, seen = (
            interpolate(part, (side, side), mode="bilinear") for part in (images, calibration, test[0])
        )
        test = seen, test[1]
    dense = train(dense, images, labels, epochs, lr=lr)
    slim = train(copy.deepcopy(dense), images, labels, epochs, flops, lr)
    cells = [name]
    with tempfile.TemporaryDirectory() as folder:
        for model in (dense, slim):
            if model is dense and not both:
                cells += [f"{accuracy(dense, *test):.2f}", "", ""]
                continue
            _, plain, eight = deploy(model, images[:1], Path(folder), ["onnx", "int8"], calibration=calibration)
            named = [predictions(open_onnx(Path(record["file"])), test[0]) for record in (plain, eight)]
            cells += [f"{100 * float((classes == test[1]).float().mean()):.2f}" for classes in named]
            cells.append(f"{plain['bytes'] / 1e3:.0f}")
    return [*cells, f"{eight['bytes'] / 1e3:.0f}", f"{100 * float((named[0] == named[1]).float().mean()):.2f}"]


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, cuts, quantises and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS, *OF_TIMM], default=list(NETWORKS), metavar="NAME",
                        help="of " + ", ".join([*NETWORKS, *OF_TIMM]))  # fmt: skip
    parser.add_argument("--images", type=int, default=20_000, help="training images")
    parser.add_argument("--test-images", type=int, default=10_000, help="test images")
    parser.add_argument("--epochs", type=int, default=2, help="of dense training, and again of the search")
    parser.add_argument("--flops", type=float, default=0.5, help="share of the dense FLOPs")
    parser.add_argument("--slim-only", action="store_true", help="do not quantise the dense network for comparison")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    images, labels = (part[: args.images + 512] for part in read(args.data_dir, "train"))
    test = tuple(part[: args.test_images] for part in read(args.data_dir, "test"))
    title = f"Fashion-MNIST, accuracy in per cent on {len(test[0])} test images; kilobytes of ONNX files"
    table = Table(title=title)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "network" else "right")
    for name in args.networks:
        torch.manual_seed(args.seed)
        table.add_row(*measure(name, images[: args.images], labels[: args.images], images[args.images :], test,
                               args.epochs, args.flops, not args.slim_only))  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
