"""How much faster networks become: latency of dense and slim at several budgets, measured in turn on this machine.

    python tools/bench_speed.py --out runs/speed
    python tools/bench_speed.py --models resnet50 --flops 0.5 --batches 16 --rounds 15

For each budget the units to keep are chosen from the weights' magnitudes (random weights: what is measured is speed)
with ``round_to="auto"`` (see ``prunegate.Budget``), and the model is cut. Dense and slim models run in turn, in both
memory formats, ``rounds`` times after one that is not timed; a model's time is the median in its better format, and a
speed-up is the ratio of the two.
With ``--latency`` the budget is on measured latency instead of FLOPs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import prunegate
from prunegate.cli.pruning import rounding

MODELS = ("resnet50", "mobilenetv2_100", "deit_small_patch16_224", "convnext_tiny", "swin_tiny_patch4_window7_224")


@dataclass
class Row:
    """One measured model: ``asked`` is the budget as a share, 1 for the dense model; times in milliseconds."""

    model: str
    batch: int
    asked: float
    flops: int
    share: float
    layout: str
    milliseconds: float
    quartiles: tuple[float, float]
    speedup: float


def cut(name: str, budget: str, shares: Sequence[float], example: Tensor,
        round_to: int | str) -> list[tuple[float, int, nn.Module]]:  # fmt: skip
    """(budget, FLOPs per image, model) of the dense model and of one cut for each share."""
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    found = [(1.0, prunegate.count_flops(dense, example[:1]), dense)]
    for share in shares:
        gated = prunegate.attach(dense, example if budget == "latency" else example[:1])
        prunegate.Budget(gated, **{budget: share}, steps=1, round_to=round_to).finish()
        slim = gated.export().eval()
        found.append((share, prunegate.count_flops(slim, example[:1]), slim))
    return found


def measure(models: Sequence[nn.Module], example: Tensor, rounds: int) -> list[dict[str, list[float]]]:
    """Milliseconds of each model in each memory format, all in turn."""
    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    taken: list[dict[str, list[float]]] = [{layout: [] for layout in layouts} for _ in models]
    with torch.inference_mode():
        for layout, memory_format in layouts.items():
            data = example.to(memory_format=memory_format)
            for model in models:
                model.to(memory_format=memory_format)
            for turn in range(rounds + 1):
                for model, times in zip(models, taken, strict=True):
                    start = time.perf_counter()
                    model(data)
                    if turn:
                        times[layout].append(1e3 * (time.perf_counter() - start))
    return taken


def rows_of(name: str, budget: str, shares: Sequence[float], batch: int, rounds: int,
            round_to: int | str) -> list[Row]:  # fmt: skip
    """Cuts one network and times it at one batch size."""
    example = torch.randn(batch, *timm.create_model(name, pretrained=False).pretrained_cfg["input_size"])
    models = cut(name, budget, shares, example, round_to)
    rows: list[Row] = []
    for (asked, flops, _), times in zip(models, measure([m for *_, m in models], example, rounds), strict=True):
        layout = min(times, key=lambda each: median(times[each]))
        middle = median(times[layout])
        low, _, high = quantiles(times[layout], n=4)
        dense = rows[0] if rows else None
        rows.append(Row(name, batch, asked, flops, flops / (dense.flops if dense else flops), layout, middle,
                        (low, high), (dense.milliseconds if dense else middle) / middle))  # fmt: skip
    return rows


def markdown(rows: Sequence[Row], shares: Sequence[float]) -> str:
    """The speed-ups, one line per network and batch size."""
    lines = ["| network | batch | dense, ms | " + " | ".join(f"{share:g}" for share in shares) + " |",
             "|---|---|---|" + "---|" * len(shares)]  # fmt: skip
    for dense in (row for row in rows if row.asked == 1):
        own = {row.asked: row for row in rows if (row.model, row.batch) == (dense.model, dense.batch)}
        cells = " | ".join(f"{own[share].speedup:.2f}x" for share in shares)
        lines.append(f"| {dense.model} | {dense.batch} | {dense.milliseconds:.1f} | {cells} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; ``argv`` is the command line without the program's name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm model names")
    parser.add_argument("--flops", nargs="+", type=float, default=[0.7, 0.5, 0.3], help="shares of the dense FLOPs")
    parser.add_argument("--latency", nargs="+", type=float, help="shares of the dense latency, instead of FLOPs")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round-to", type=rounding, default="auto",
                        help='kept widths are multiples of this (default: "auto", what the processor likes)')
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number if left out")
    parser.add_argument("--out", type=Path, help="folder for speed.json and speed.md")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    budget, shares = ("latency", args.latency) if args.latency else ("flops", args.flops)
    console = Console(highlight=False)
    console.print(f"cpu, float32, {torch.get_num_threads()} threads, torch {torch.__version__}, budgets on {budget}, "
                  f"round_to={args.round_to}, {args.rounds} rounds")  # fmt: skip
    rows: list[Row] = []
    for name in args.models:
        for batch in args.batches:
            found = rows_of(name, budget, shares, batch, args.rounds, args.round_to)
            rows += found
            table = Table("budget", "GFLOPs", "share", "layout", "median, ms", "quartiles", "speed-up",
                          title=f"{name}, batch {batch}")  # fmt: skip
            for row in found:
                low, high = row.quartiles
                table.add_row(f"{row.asked:g}", f"{row.flops / 1e9:.3f}", f"{row.share:.3f}", row.layout,
                              f"{row.milliseconds:.1f}", f"{low:.1f}-{high:.1f}", f"{row.speedup:.2f}x")  # fmt: skip
            console.print(table)
    text = markdown(rows, shares)
    console.print(text, markup=False)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "speed.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
        (args.out / "speed.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
