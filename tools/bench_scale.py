"""How ``attach``, costs and the cut grow: with depth, with the batch, with the resolution.

    python tools/bench_scale.py
    python tools/bench_scale.py --layers 500 1000 2000 4000 --batches 1 64 --sizes 224 448
    python tools/bench_scale.py --layers --models --large       # needs 8 GB

Depth: residual networks of more and more convolutions, each with a norm. Seconds of ``attach``, of the first costs, of
one cost and of one expectation with its gradient, and of ``export``; when layers double, a time that grows linearly
doubles. Batch and resolution: seconds and growth of the peak of resident memory, for ``attach`` and for a plain
forward without gradients, each in a process of its own. Large: ``attach`` alone, at the model's own resolution. One
thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import timm
import torch
from resident import peak_growth
from rich.console import Console
from rich.table import Table
from torch import nn

import prunegate

WIDTH = 16
LARGE = ("vit_giant_patch14_dinov2", "eva02_large_patch14_448", "convnextv2_huge", "maxvit_xlarge_tf_512")


class Residual(nn.Module):
    """Two convolutions with norms, added to their input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH))  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Adds the branch."""
        return torch.relu(x + self.layers(x))


def deep(layers: int) -> nn.Module:
    """A network of ``layers`` convolutions between a stem and a classifier."""
    blocks = [Residual() for _ in range(layers // 2)]
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(WIDTH, 10)).eval()  # fmt: skip


def seconds(job: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def depth_row(layers: int, rounds: int) -> list[float]:
    """Seconds of ``attach``, the first costs, a cost, an expectation with its gradient, and ``export``."""
    model, example = deep(layers), torch.randn(1, 3, 8, 8)
    return [median(each) for each in zip(*(_stages(model, example) for _ in range(rounds)), strict=True)]


def _stages(model: nn.Module, example: torch.Tensor) -> list[float]:
    start = time.perf_counter()
    gated = prunegate.attach(model, example)
    taken = [time.perf_counter() - start]
    mask = torch.ones(gated.logits.numel(), dtype=torch.bool)
    for group in gated.groups:
        mask[group.slice.start + WIDTH // 2 : group.slice.stop] = False
    taken.append(seconds(lambda: gated.cost.flops(mask)))
    taken.append(seconds(lambda: gated.cost.flops(mask)))
    taken.append(seconds(lambda: gated.cost.expected_flops().backward()))
    gated.mask = mask
    taken.append(seconds(gated.export))
    expected, counted = gated.cost.flops(mask), prunegate.count_flops(gated.export(), example)
    if counted != expected:
        raise SystemExit(f"{expected:,} FLOPs were predicted, {counted:,} counted")
    return taken


def depth_table(layers: Sequence[int], rounds: int) -> Table:
    """One row a depth, each time beside its multiple of the row above."""
    table = Table("layers", title="depth: seconds, and the multiple of the row above")
    for column in ("attach", "first costs", "cost", "expectation, gradient", "export"):
        table.add_column(column, justify="right")
    depth_row(min(layers), 1)
    above: list[float] | None = None
    for count in layers:
        row = depth_row(count, rounds)
        cells = [f"{value:.4f}" if above is None else f"{value:.4f} ({value / before:.1f}x)"
                 for value, before in zip(row, above or row, strict=True)]  # fmt: skip
        table.add_row(f"{count:,}", *cells)
        above = row
    return table


JOBS: dict[str, Callable[[nn.Module, torch.Tensor], object]] = {
    "attach": prunegate.attach,
    "forward": torch.no_grad()(lambda model, example: model(example)),
}


def measure(name: str, batch: int, size: int, job: str, rounds: int) -> dict[str, float]:
    """Median seconds, growth of the peak of resident memory in bytes on the first run, and the model's own bytes."""
    size_is_fixed = timm.get_pretrained_cfg_value(name, "fixed_input_size")
    model = timm.create_model(name, **({"img_size": size} if size_is_fixed else {})).eval()
    example = torch.empty(batch, 3, size, size).normal_()
    run = JOBS[job]
    # Code that is read from disk on first use is not the job's memory: a small model pulls it in beforehand.
    run(timm.create_model("resnet18", num_classes=2).eval(), torch.randn(1, 3, 32, 32))
    grown = peak_growth(lambda: run(model, example))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    taken = median(seconds(lambda: run(model, example)) for _ in range(rounds))
    return {"seconds": taken, "bytes": grown, "weights": weights}


def in_own_process(name: str, batch: int, size: int, job: str, rounds: int) -> dict[str, float]:
    """What :func:`measure` finds where nothing ran before."""
    command = [sys.executable, __file__, "--one", name, str(batch), str(size), job, "--rounds", str(rounds)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def input_table(names: Sequence[str], batches: Sequence[int], sizes: Sequence[int], rounds: int) -> Table:
    """One row a model, batch and resolution."""
    table = Table("model", "batch", "pixels", title="batch and resolution: seconds, and MiB above the model")
    for column in ("attach, s", "attach, MiB", "forward, s", "forward, MiB"):
        table.add_column(column, justify="right")
    cases = [(batch, sizes[0]) for batch in batches] + [(batches[0], size) for size in sizes[1:]]
    for name in names:
        for batch, size in cases:
            cells = []
            for job in JOBS:
                found = in_own_process(name, batch, size, job, rounds)
                cells += [f"{found['seconds']:.2f}", f"{found['bytes'] / 2**20:.0f}"]
            table.add_row(name, str(batch), str(size), *cells)
    return table


def large_table(names: Sequence[str], rounds: int) -> Table:
    """One row a model."""
    table = Table("model", "pixels", title="large models: seconds, and MiB above the weights")
    for column in ("weights, MiB", "attach, s", "attach, MiB"):
        table.add_column(column, justify="right")
    for name in names:
        size = timm.get_pretrained_cfg_value(name, "input_size")[-1]
        found = in_own_process(name, 1, size, "attach", rounds)
        table.add_row(name, str(size), f"{found['weights'] / 2**20:,.0f}", f"{found['seconds']:.1f}",
                      f"{found['bytes'] / 2**20:.0f}")  # fmt: skip
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables.

    Args:
        argv: Command line without the program's name; ``None`` takes the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[250, 500, 1000, 2000], help="depths, each doubled")
    parser.add_argument("--models", nargs="*", default=["resnet50", "swin_tiny_patch4_window7_224"],
                        help="timm names for the second table")  # fmt: skip
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448],
                        help="resolutions, the first for all batches")  # fmt: skip
    parser.add_argument("--large", nargs="*", metavar="MODEL",
                        help=f"attach to large models too; without names: {', '.join(LARGE)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "BATCH", "SIZE", "JOB"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.one:
        name, batch, size, job = args.one
        print(json.dumps(measure(name, int(batch), int(size), job, args.rounds)))
        return
    console = Console(highlight=False)
    console.print(f"one core, float32, cpu; torch {torch.__version__}; median of {args.rounds}")
    if args.layers:
        console.print(depth_table(args.layers, args.rounds))
    if args.models:
        console.print(input_table(args.models, args.batches, args.sizes, args.rounds))
    if args.large is not None:
        console.print(large_table(args.large or LARGE, args.rounds))


if __name__ == "__main__":
    main()
