"""``prunegate export``: other forms of a model, each verified by running it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prunegate.cli.deployment import TARGETS, deploy
from prunegate.cli.images import read_images
from prunegate.cli.models import add_model_arguments, example_for, open_dense, open_model

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_model_arguments(parser, "SLIM")
    parser.add_argument("--to", nargs="+", default=["onnx"], choices=sorted(TARGETS), help="targets (default: onnx)")
    parser.add_argument("--out", metavar="FOLDER", help="where files go (default: beside the model)")
    parser.add_argument("--check", action="store_true", help="run what was written and compare, at two batch sizes")
    parser.add_argument("--bench", action="store_true", help="time them, beside the same of the dense model")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the processor, for --bench")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time, for --bench (default: 1)")
    parser.add_argument("--data", metavar="FOLDER", help="pictures from which int8 takes its ranges")
    parser.add_argument("--images", type=int, default=64, metavar="N", help="how many of them (default: 64)")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs the command; returns what ``--json`` prints."""
    if args.threads:
        torch.set_num_threads(args.threads)
    model = open_model(args)
    path = Path(args.model)
    dense = open_dense(args.model) if args.bench and path.exists() else None
    folder = Path(args.out) if args.out else (path.parent if path.is_file() else path if path.is_dir() else Path("."))
    images = read_images(args.data, model, args.images) if args.data else None
    records = deploy(model, example_for(model, args.input_size, args.batch), folder, args.to, check=args.check,
                     bench=args.bench, dense=dense, calibration=images, name=path.stem)  # fmt: skip
    if not args.json:
        caption = "error: largest difference from torch (a share of the largest output, where that is below 1)"
        table = Table(title=path.stem, caption=caption)
        for name in ("target", "file", "megabytes", "error", "same class", "milliseconds", "dense", "dense / slim"):
            table.add_column(name, justify="right" if name not in ("target", "file") else "left", overflow="fold")
        for record in records:
            own, other = record.get("milliseconds"), record.get("dense_milliseconds")
            table.add_row(
                record["target"], record["file"] or "", f"{record['bytes'] / 1e6:.2f}" if record["bytes"] else "",
                f"{record['error']:.1e}" if "error" in record else "not checked",
                f"{record['same']:.1%}" if "same" in record else "", f"{own:.2f}" if own else "",
                f"{other:.2f}" if other else "", f"{other / own:.2f}" if own and other else "",
            )  # fmt: skip
        console.print(table)
    return {"model": args.model, "batch": args.batch, "threads": torch.get_num_threads(), "targets": records}
