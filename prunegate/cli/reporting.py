"""``prunegate report``: one page about a run of the recipe, made from what its folder holds."""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from prunegate.attaching import attach
from prunegate.checkpoint import load, load_dense
from prunegate.cli.page import render
from prunegate.errors import PruneGateError
from prunegate.gated import GatedModel, example_input_of
from prunegate.slim.apply import plan_of

__all__ = ["add_arguments", "collect", "kept_mask", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("folder", metavar="RUN_DIR", help="output folder of recipes/prune.py or recipes/demo.py")
    parser.add_argument("--out", metavar="FILE", help="where the page goes (default: report.html in RUN_DIR)")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs the command; returns what ``--json`` prints."""
    folder = Path(args.folder)
    found = collect(folder)
    path = Path(args.out) if args.out else folder / "report.html"
    path.write_text(render(found), encoding="utf-8")
    if not args.json:
        console.print(f"written to {path} ({path.stat().st_size / 1e3:.0f} kB)", highlight=False, soft_wrap=True)
    return {"file": str(path), **found}


def collect(folder: Path) -> dict[str, Any]:
    """All that the page shows, as plain data.

    Args:
        folder: What the recipe wrote.

    Raises:
        PruneGateError: There is no ``slim.safetensors`` or ``summary.csv`` in it.
    """
    for name in ("slim.safetensors", "summary.csv"):
        if not (folder / name).is_file():
            raise PruneGateError(f"{folder} has no {name}; expected the output folder of recipes/prune.py")
    asked = _read(folder / "args.yaml", yaml.safe_load)
    measured = _read(folder / "report.json", json.loads)
    with (folder / "summary.csv").open(newline="") as file:
        rows = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]
    slim, dense = load(folder / "slim.safetensors"), load_dense(folder / "slim.safetensors").eval()
    gated = attach(dense, _example(dense, asked), units=asked.get("units") or ("channel", "head"),
                   ignore=asked.get("ignore") or ())  # fmt: skip
    mask = kept_mask(gated, slim)
    before, after = gated.cost.flops_by_module(), gated.cost.flops_by_module(mask)
    parts: dict[str, list[int]] = {}
    for name in before:
        part = parts.setdefault(".".join(name.split(".")[:2]), [0, 0])
        part[0] += before[name]
        part[1] += after[name]
    frozen: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], list[str]] = {}
    for item in gated.frozen:
        frozen[item.why, item.operation] += item.count
        where.setdefault((item.why, item.operation), []).append(f"{item.tensor}, dimension {item.dim}")
    return {
        "name": folder.resolve().name,
        "model": asked.get("model") or type(dense).__name__,
        "asked": {key: asked[key] for key in ("flops", "params", "latency", "latency_ms", "memory_mb", "round_to")
                  if asked.get(key) is not None},
        "flops": [gated.cost.flops(), gated.cost.flops(mask)],
        "params": [gated.cost.params(), gated.cost.params(mask)],
        "measured": measured,
        "rows": rows,
        "groups": [{"name": group.name, "kind": group.kind, "units": group.size,
                    "kept": int(mask[group.slice].sum())} for group in gated.groups],
        "parts": [{"name": name or "(the model itself)", "dense": a, "slim": b} for name, (a, b) in parts.items()],
        "frozen": [{"why": why, "operation": operation, "positions": count, "where": where[why, operation]}
                   for (why, operation), count in frozen.most_common()],
    }  # fmt: skip


def kept_mask(gated: GatedModel, slim: torch.nn.Module) -> torch.Tensor:
    """The mask under which a slim model was cut, read from its plan, bool ``[n_gates]``.

    Args:
        gated: The dense architecture, attached.
        slim: What was cut from it.
    """
    kept = plan_of(slim).kept
    mask = torch.ones(gated.logits.numel(), dtype=torch.bool)
    for (name, dim), gates in gated.gate_map.dims.items():
        if dim in kept.get(name, {}):
            stays = torch.zeros(len(gates), dtype=torch.bool)
            stays[torch.tensor(kept[name][dim])] = True
            gone = gates[~stays]
            mask[gone[gone >= 0]] = False
    return mask


def _example(dense: torch.nn.Module, asked: dict[str, Any]) -> torch.Tensor:
    channels, height, width = example_input_of(dense).shape[1:]
    if asked.get("img_size"):
        height = width = asked["img_size"]
    if asked.get("input_size"):
        channels, height, width = asked["input_size"]
    return torch.zeros(1, channels, height, width)


def _read(path: Path, parse: Any) -> dict[str, Any]:
    found = parse(path.read_text()) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _number(text: str | None) -> float | str | None:
    try:
        return float(text) if text else None
    except ValueError:
        return text
