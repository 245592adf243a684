"""How much faster networks become under onnxruntime: dense and slim in turn, one thread, ImageNet's size.

    python tools/bench_onnx.py --folder runs/onnx --write        # cuts and exports, and checks every file: slow
    python tools/bench_onnx.py --folder runs/onnx                # times what is there

Units are chosen by the magnitudes of random weights, ``round_to=8``: speed is what is measured. Each file's outputs are
compared with torch's at two batch sizes before it counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table

import prunegate
from prunegate.cli.deployment import deploy, open_onnx
from prunegate.cli.models import example_for

__all__ = ["NETWORKS", "main", "times", "write"]

NETWORKS = (
    "resnet18", "resnet50", "resnext50_32x4d", "regnety_002", "densenet121", "mobilenetv2_100", "mobilenetv3_small_100",
    "efficientnet_b0", "tf_efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224",
)  # fmt: skip


def write(name: str, folder: Path, flops: float) -> None:
    """Writes ``NAME-dense.onnx``, ``NAME-slim.onnx`` and what is known of them, ``NAME.json``."""
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    example = example_for(dense, None)
    slim = prunegate.one_shot(dense, example, flops=flops, round_to=8).eval()
    found = {"flops": [prunegate.count_flops(model, example) for model in (dense, slim)],
             "input": list(example.shape)}  # fmt: skip
    for which, model in (("dense", dense), ("slim", slim)):
        record = deploy(model, example, folder, ["onnx"], name=f"{name}-{which}")[1]
        found[which] = {"error": record["error"], "bytes": record["bytes"]}
    (folder / f"{name}.json").write_text(json.dumps(found))


def times(files: Sequence[Path], shape: Sequence[int], seconds: float, rounds: int = 9) -> list[list[float]]:
    """Milliseconds of each file in turn, for as many rounds as there is time for, and ``rounds`` at least."""
    runs = [open_onnx(file) for file in files]
    images = torch.randn(tuple(shape))
    for run in runs:
        run(images)
    found: list[list[float]] = [[] for _ in runs]
    started = time.perf_counter()
    while len(found[0]) < rounds or time.perf_counter() - started < seconds:
        for run, values in zip(runs, found, strict=True):
            before = time.perf_counter()
            run(images)
            values.append((time.perf_counter() - before) * 1e3)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Writes files, or times them and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="timm names")
    parser.add_argument("--folder", type=Path, required=True, help="where the files are")
    parser.add_argument("--write", action="store_true", help="cut and export instead of timing; files there are kept")
    parser.add_argument("--flops", type=float, default=0.5, help="share of the dense FLOPs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="least time for each network")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.write:
        for name in args.networks:
            if not (args.folder / f"{name}.json").exists():
                write(name, args.folder, args.flops)
        return
    table = Table(title=f"onnxruntime, one image, {args.threads} threads, medians (and quartiles of the ratio)")
    for name in ("network", "GFLOPs", "dense, ms", "slim, ms", "dense / slim", "quartiles", "largest error"):
        table.add_column(name, justify="left" if name == "network" else "right")
    for name in args.networks:
        found = json.loads((args.folder / f"{name}.json").read_text())
        files = [args.folder / f"{name}-{which}.onnx" for which in ("dense", "slim")]
        dense, slim = (np.array(values) for values in times(files, found["input"], args.seconds))
        low, middle, high = np.quantile(dense / slim, (0.25, 0.5, 0.75))
        error = max(found[which]["error"] for which in ("dense", "slim"))
        table.add_row(name, " to ".join(f"{count / 1e9:.2f}" for count in found["flops"]), f"{np.median(dense):.2f}",
                      f"{np.median(slim):.2f}", f"{middle:.2f}", f"{low:.2f}-{high:.2f}", f"{error:.0e}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
