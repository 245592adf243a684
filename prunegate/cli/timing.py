"""``prunegate bench``: a slim model beside the dense one that it was cut from."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from prunegate.cli.models import example_for, open_dense, open_model
from prunegate.flops import count_flops

__all__ = ["add_arguments", "latencies", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("model", metavar="SLIM", help="a file or folder that prunegate saved")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N", help="images at a time (default: 1)")
    parser.add_argument("--input-size", nargs=3, type=int, metavar=("C", "H", "W"), help="size of one image")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the processor")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time for each batch size")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs the command; returns what ``--json`` prints."""
    args.pretrained, args.checkpoint, args.num_classes = False, None, None
    if args.threads:
        torch.set_num_threads(args.threads)
    slim, dense = open_model(args), open_dense(args.model)
    models = {"dense": dense.to(args.device), "slim": slim.to(args.device)}
    example = example_for(slim, args.input_size).to(args.device)
    found: dict[str, Any] = {"model": args.model, "device": args.device, "threads": torch.get_num_threads()}
    for name, model in models.items():
        found[name] = {"flops": count_flops(model, example), "params": sum(p.numel() for p in model.parameters()),
                       "milliseconds": {}}  # fmt: skip
    for batch in args.batch:
        times = latencies(models, example.repeat(batch, *[1] * (example.dim() - 1)), args.seconds)
        for name, value in times.items():
            found[name]["milliseconds"][str(batch)] = value
    if not args.json:
        _draw(found, console)
    return found


@torch.inference_mode()
def latencies(models: Mapping[str, nn.Module], inputs: Tensor, seconds: float = 2.0) -> dict[str, float]:
    """Median milliseconds of one forward of each model, one run of each in turn.

    Args:
        models: By name; put into eval mode.
        inputs: What they run on.
        seconds: How long to go on, at least; never less than nine rounds.
    """
    wait = torch.cuda.synchronize if inputs.is_cuda else lambda: None
    for model in models.values():
        model.eval()
        for _ in range(3):
            model(inputs)
    found: dict[str, list[float]] = {name: [] for name in models}
    started, rounds = time.perf_counter(), 0
    while rounds < 9 or time.perf_counter() - started < seconds:
        for name, model in models.items():
            wait()
            before = time.perf_counter()
            model(inputs)
            wait()
            found[name].append((time.perf_counter() - before) * 1e3)
        rounds += 1
    return {name: statistics.median(values) for name, values in found.items()}


def _draw(found: dict[str, Any], console: Console) -> None:
    table = Table(title=found["model"], caption=f"one multiply-add is one FLOP; {found['device']}, "
                  f"{found['threads']} threads, medians of runs in turn")  # fmt: skip
    for name in ("", "dense", "slim", "slim / dense"):
        table.add_column(name, justify="right" if name else "left")
    dense, slim = found["dense"], found["slim"]
    rows = [("FLOPs", dense["flops"], slim["flops"], ",.0f"), ("parameters", dense["params"], slim["params"], ",.0f")]
    rows += [(f"batch {batch}, ms", value, slim["milliseconds"][batch], ".3f")
             for batch, value in dense["milliseconds"].items()]  # fmt: skip
    for name, before, after, style in rows:
        table.add_row(name, format(before, style), format(after, style), f"{after / before:.3f}")
    console.print(table)
