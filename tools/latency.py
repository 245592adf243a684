"""Times a timm model's operators over a grid of widths on this machine, and writes a latency table.

    python tools/latency.py resnet50 --device cpu --dtype float32 --batch 1
    python tools/latency.py deit_small_patch16_224 --extend latency.json --check 10 --slim 0.5

The table serves ``prunegate.Budget(gated, latency=0.5, latency_table="latency.json", steps=...)``. With ``--check``,
random masks are cut and measured, and their times stand beside the predicted ones. With ``--slim``, the model is cut by
such a budget (by the size of its weights: what is measured is speed) and runs in turn with the dense one;
``--predicted`` leaves out the measurements by which a budget corrects its choice.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys

import numpy as np
import timm
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import prunegate
from prunegate.budget.latency import LatencyTable
from prunegate.budget.stopwatch import time_in_turn
from prunegate.budget.whole import cut, measure
from prunegate.cli.pruning import rounding
from prunegate.labels.trace import call_model


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of a timm model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, help="image size; the model's own if left out")
    parser.add_argument("--threads", type=int, help="number of CPU threads")
    parser.add_argument("--extend", metavar="TABLE", help="add to this table instead of starting a new one")
    parser.add_argument("--out", default="latency.json", help="where the table goes (--extend: there)")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="measure N random cuts against predictions")
    parser.add_argument("--slim", type=float, nargs="+", default=[], metavar="SHARE",
                        help="cut to these shares of the dense latency; measure dense and slim in turn")  # fmt: skip
    parser.add_argument("--predicted", action="store_true", help="with --slim: choose by predicted times alone")
    parser.add_argument("--round-to", type=rounding, default=1,
                        help="multiple that widths are rounded to for --slim; auto: what the device likes")  # fmt: skip
    return parser.parse_args(argv)


def random_mask(gated: prunegate.GatedModel, generator: torch.Generator) -> torch.Tensor:
    """A mask that keeps a random share of every group."""
    mask = torch.zeros(gated.logits.numel(), dtype=torch.bool)
    for group in gated.groups:
        share = 0.2 + 0.8 * float(torch.rand((), generator=generator))
        kept = torch.randperm(group.size, generator=generator)[: max(1, round(share * group.size))]
        mask[group.slice.start + kept] = True
    return mask


def check(gated: prunegate.GatedModel, table: LatencyTable, count: int, console: Console) -> float:
    """Prints predicted and measured times of random cuts; returns the median relative error.

    Each cut runs in turn with the dense model: what the machine's speed does meanwhile stands in the dense model's
    time, and not in the share.
    """
    generator = torch.Generator().manual_seed(0)
    dense = cut(gated, gated.gate_map.start())
    report = Table("mask", "FLOPs kept", "predicted ms", "measured ms", "error", "dense then, ms", "share", "error")
    errors, of_shares = [], []
    for number in range(count):
        mask = random_mask(gated, generator)
        measured = measure(gated, dense, cut(gated, mask))
        predicted = table.predict(gated, mask)
        errors.append(abs(predicted / measured.slim_ms - 1))
        of_shares.append(abs(predicted / table.predict(gated) / measured.share - 1))
        kept = gated.cost.flops(mask) / gated.cost.flops()
        report.add_row(str(number), f"{kept:.1%}", f"{predicted:.3f}", f"{measured.slim_ms:.3f}", f"{errors[-1]:.1%}",
                       f"{measured.dense_ms:.3f}", f"{measured.share:.3f}", f"{of_shares[-1]:.1%}")  # fmt: skip
    console.print(report)
    for name, found in (("", errors), (" of the share of dense", of_shares)):
        median = statistics.median(found)
        console.print(f"median error{name} {median:.1%}, from {min(found):.1%} to {max(found):.1%}")
    return statistics.median(errors)


def slim_down(gated: prunegate.GatedModel, table: LatencyTable, args: argparse.Namespace, console: Console) -> None:
    """Prints the measured times of cuts by latency budgets, and of the dense model, all in one run."""
    models = {"dense": cut(gated, gated.gate_map.start())}
    predicted = {"dense": table.predict(gated)}
    for share in args.slim:
        gated.mask = None
        gated.logits.data.zero_()
        budget = prunegate.Budget(gated, latency=share, latency_table=table, latency_check=not args.predicted, steps=1,
                                  round_to=args.round_to)  # fmt: skip
        budget.finish()
        console.print(budget.report(), markup=False)
        models[f"latency={share:g}"] = gated.export().eval()
        predicted[f"latency={share:g}"] = table.predict(gated, gated.mask)
    with torch.inference_mode():
        calls = [functools.partial(call_model, model, gated.example_input) for model in models.values()]
        turns = time_in_turn(calls, gated.logits.is_cuda, least_seconds=8.0)
    report = Table("budget", "predicted ms", "measured ms", "quartiles", "measured share of dense")
    for (name, expected), own in zip(predicted.items(), turns.T, strict=True):
        low, middle, high = np.quantile(own, [0.25, 0.5, 0.75])
        # Turn by turn, so that it does not depend on what the machine's speed did meanwhile.
        share = np.median(own / turns[:, 0])
        report.add_row(name, f"{expected:.3f}", f"{middle:.3f}", f"{low:.3f}-{high:.3f}", f"{share:.3f}")
    console.print(report)


def main(argv: list[str] | None = None) -> int:
    """Runs the tool."""
    args = parse(argv)
    console = Console()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    try:
        model = timm.create_model(args.model).eval().to(args.device, dtype)
        size = model.pretrained_cfg["input_size"]
        if args.size:
            size = (size[0], args.size, args.size)
        gated = prunegate.attach(model, torch.randn(args.batch, *size, device=args.device, dtype=dtype))
        known = LatencyTable.load(args.extend) if args.extend else None
        with Progress(console=console) as progress:
            task = progress.add_task(f"operators of {args.model}")
            table = LatencyTable.measure(
                gated, known=known, progress=lambda done, total: progress.update(task, completed=done, total=total)
            )
    except (prunegate.PruneGateError, RuntimeError) as error:
        console.print(f"{args.model}: {error}", style="red", markup=False)
        return 1
    path = args.extend or args.out
    table.save(path)
    console.print(
        f"{len(table.operators)} operators on {table.device}; {args.model} at batch {args.batch}: "
        f"{table.predict(gated):.3f} ms dense; written to {path}"
    )
    added, factor = table.overhead_of(gated)
    console.print(f"between operators {added:.3f} ms; in the model operators take {factor:.3f} times as long as alone")
    doubt = table.doubt(gated)
    if doubt:
        console.print(doubt, style="yellow", markup=False)
    if args.check:
        check(gated, table, args.check, console)
    if args.slim:
        slim_down(gated, table, args, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
