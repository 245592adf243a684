"""Dense and slim side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

import prunegate
from prunegate.cli.timing import latencies

__all__ = ["Measured", "latencies", "measure", "table", "write_report"]


@dataclass
class Measured:
    """What one model costs and how well it does.

    Attributes:
        top1: Per cent of the test split.
        flops: One multiply-add counts as one FLOP; for one image.
        params: Number of parameters.
        file_bytes: Size of its file.
        latency_ms: Median of one forward, by batch size.
    """

    top1: float
    flops: int
    params: int
    file_bytes: int
    latency_ms: dict[int, float]


def measure(models: Mapping[str, nn.Module], top1: Mapping[str, float], files: Mapping[str, Path],
            example: torch.Tensor, batches: Sequence[int] = (1, 32)) -> dict[str, Measured]:  # fmt: skip
    """Measures each model; latencies are interleaved, so that what else the machine does falls on all alike.

    Args:
        models: By name.
        top1: Per cent of the test split, by name.
        files: Where each was saved, by name.
        example: One image, ``[1, channels, height, width]``, on the models' device.
        batches: Batch sizes to time.
    """
    times = {size: latencies(models, example.expand(size, -1, -1, -1).contiguous()) for size in batches}
    return {
        name: Measured(
            top1=top1[name],
            flops=prunegate.count_flops(model, example),
            params=sum(parameter.numel() for parameter in model.parameters()),
            file_bytes=files[name].stat().st_size,
            latency_ms={size: times[size][name] for size in batches},
        )
        for name, model in models.items()
    }


def table(dense: Measured, slim: Measured, device: str) -> Table:
    """The two side by side.

    Args:
        dense: Before.
        slim: After.
        device: What the latencies were taken on.
    """
    drawn = Table(title="Dense and slim", caption=f"one multiply-add is one FLOP; latency on {device}")
    for name in ("", "dense", "slim", "slim / dense"):
        drawn.add_column(name, justify="left" if not name else "right")
    difference = f"{slim.top1 - dense.top1:+.2f}"
    drawn.add_row("top-1 on the test split", f"{dense.top1:.2f}%", f"{slim.top1:.2f}%", difference)
    pairs = [
        ("FLOPs", dense.flops, slim.flops, "{:,.0f}"),
        ("parameters", dense.params, slim.params, "{:,.0f}"),
        ("file, bytes", dense.file_bytes, slim.file_bytes, "{:,.0f}"),
        *(
            (f"median latency, batch {size}, ms", dense.latency_ms[size], slim.latency_ms[size], "{:.3f}")
            for size in dense.latency_ms
        ),
    ]
    for name, before, after, style in pairs:
        drawn.add_row(name, style.format(before), style.format(after), f"{after / before:.3f}")
    return drawn


def write_report(measured: Mapping[str, Measured], path: Path) -> None:
    """Writes the table's numbers as JSON."""
    path.write_text(json.dumps({name: asdict(one) for name, one in measured.items()}, indent=2) + "\n")
