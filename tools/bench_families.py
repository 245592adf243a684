"""Time of ``prunegate.attach`` and of ``export`` for the smallest model of each of timm's families, on one core.

    python tools/bench_families.py
    python tools/bench_families.py --families "vision_transformer*" convnext --output runs/families.json

One image at the model's own size, in float32. *attach* is the trace, labels, groups and the gated copy, *costs* is what
the first question about FLOPs adds to it, *export* cuts a random half-mask and compares masked with slim on the example
(two forwards). One forward of the dense model stands beside them. Each is timed once, as a user waits for it once; a
small network goes first, so that nothing is loaded while the clock runs. Models of more than 150 M parameters are made
shallower, as in ``tools/coverage.py``.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import prunegate

sys.path.insert(0, str(Path(__file__).parent.parent))  # when run as a file: what tools share
from tools import coverage


@dataclass
class Row:
    """Seconds for one model."""

    family: str
    model: str
    parameters: int
    forward: float
    attach: float
    costs: float
    export: float


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What ``run`` returns, and its seconds."""
    gc.collect()
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def measure(family: str, name: str) -> Row:
    """Attaches to one model and cuts half of it."""
    model, example = coverage.build_timm(name)
    model, example = model.eval(), example.float()
    coverage.randomise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(example)
        _, forward = timed(lambda: model(example))
    gated, attach = timed(lambda: prunegate.attach(model, example))
    _, costs = timed(gated.cost.flops)
    gated.mask = coverage.random_mask(gated, torch.Generator().manual_seed(0))
    _, export = timed(gated.export)
    return Row(family, name, sum(p.numel() for p in model.parameters()), forward, attach, costs, export)


def show(console: Console, rows: Sequence[Row]) -> None:
    """The table, slowest last, and what it sums up to."""
    table = Table("family", "model", *("M params", "forward s", "attach s", "costs s", "export s"))
    for row in sorted(rows, key=lambda each: each.attach):
        seconds = [f"{value:.2f}" for value in (row.forward, row.attach, row.costs, row.export)]
        table.add_row(row.family, row.model, f"{row.parameters / 1e6:.1f}", *seconds)
    console.print(table)
    attach = [row.attach + row.costs for row in rows]
    export = [row.export for row in rows]
    console.print(
        f"{len(rows)} families: attach with costs {median(attach):.2f} s in the median, {max(attach):.1f} s at most; "
        f"export {median(export):.2f} s in the median, {max(export):.1f} s at most.",
        highlight=False,
        soft_wrap=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark.

    Args:
        argv: Arguments, by default those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", metavar="PATTERN", default=["*"], help="timm modules (default: all)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the rows to this JSON file")
    args = parser.parse_args(argv)
    chosen = [name for name in coverage.families() if any(fnmatch.fnmatch(name, each) for each in args.families)]
    if not chosen:
        parser.error(f"no module of timm matches {' '.join(args.families)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    console, rows = Console(width=None if sys.stdout.isatty() else 120), []
    measure("", "test_resnet")  # loads what is loaded once
    for family in chosen:
        rows.append(measure(family, coverage.smallest_of_family(family)))
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    show(console, rows)


if __name__ == "__main__":
    main()
