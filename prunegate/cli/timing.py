"""``prunegate bench``: a slim model beside the dense one that it was cut from."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from prunegate.budget.stopwatch import time_in_turn
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
    """Median milliseconds of one forward of each model, the models in turn.

    Args:
        models: By name; put into eval mode.
        inputs: What they run on.
        seconds: How long to go on, at least; never less than nine turns.
    """
    calls = [functools.partial(model.eval(), inputs) for model in models.values()]
    turns = time_in_turn(calls, inputs.is_cuda, seconds, least_rounds=9)
    return dict(zip(models, np.median(turns, axis=0).tolist(), strict=True))


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
