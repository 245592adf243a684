"""``prunegate inspect``: what can be pruned, what cannot and why, and what each part costs."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prunegate.attaching import attach
from prunegate.cli.models import add_model_arguments, example_for, open_model
from prunegate.gated import GatedModel

__all__ = ["add_arguments", "describe", "draw", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_model_arguments(parser, "MODEL")
    parser.add_argument("--units", nargs="+", default=["channel", "head"], help="kinds of units")
    parser.add_argument("--ignore", nargs="*", default=[], help="patterns of names that get no gates")
    parser.add_argument("--depth", type=int, default=2, help="how many levels of names make one part")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs the command; returns what ``--json`` prints."""
    model = open_model(args)
    gated = attach(model, example_for(model, args.input_size), units=args.units, ignore=args.ignore)
    found = {"model": args.model, **describe(gated, args.depth)}
    if not args.json:
        draw(found, console)
    return found


def describe(gated: GatedModel, depth: int = 2) -> dict[str, Any]:
    """What the tables show, as plain data.

    Args:
        gated: An attached model.
        depth: How many levels of a module's name make one part.
    """
    cost, everything = gated.cost, torch.ones(gated.logits.numel(), dtype=torch.bool)
    groups = []
    for group in gated.groups:
        without = everything.clone()
        without[group.slice.start] = False
        groups.append({
            "name": group.name, "kind": group.kind, "units": group.size,
            "members": [list(member) for member in group.members],
            "flops_of_one": cost.flops() - cost.flops(without), "params_of_one": cost.params() - cost.params(without),
        })  # fmt: skip
    frozen = [
        {"tensor": item.tensor, "dim": item.dim, "count": item.count, "total": item.total, "why": item.why,
         "operation": item.operation, "module": item.module}
        for item in gated.frozen
    ]  # fmt: skip
    return {
        "class": type(gated.model).__name__,
        "input": [list(leaf.shape) for leaf in torch.utils._pytree.tree_leaves(gated.example_input)],
        "gates": gated.logits.numel(),
        "flops": cost.flops(),
        "params": cost.params(),
        "groups": groups,
        "frozen": frozen,
        "parts": _parts(gated, depth),
    }


def _parts(gated: GatedModel, depth: int) -> list[dict[str, Any]]:
    flops: Counter[str] = Counter()
    params: Counter[str] = Counter()
    for name, count in gated.cost.flops_by_module().items():
        flops[".".join(name.split(".")[:depth])] += count
    for name, parameter in gated.model.named_parameters():
        owner = name.rpartition(".")[0]
        params[".".join(owner.split(".")[:depth])] += parameter.numel()
    order = dict.fromkeys([*params, *flops])
    return [{"name": name, "flops": flops[name], "params": params[name]} for name in order]


def draw(found: dict[str, Any], console: Console) -> None:
    """Prints what :func:`describe` found."""
    console.print(f"[bold]{found['model']}[/] ({found['class']}) on {found['input']}: {found['gates']:,} gates in "
                  f"{len(found['groups'])} groups, {found['flops']:,} FLOPs (one multiply-add is one), "
                  f"{found['params']:,} parameters", highlight=False)  # fmt: skip

    table = Table(title="What can be pruned", caption="of one: what the dense model loses with one unit")
    _columns(table, "group", "kind", ">units", ">tensors", ">FLOPs of one", ">parameters of one")
    for group in found["groups"]:
        table.add_row(group["name"], group["kind"], f"{group['units']:,}", str(len(group["members"])),
                      f"{group['flops_of_one']:,}", f"{group['params_of_one']:,}")  # fmt: skip
    console.print(table)

    table = Table(title="What cannot be pruned, and why", caption="--json lists every tensor")
    _columns(table, "why", "operation", ">positions", "tensors, and their dimensions")
    for (why, operation), items in _by_reason(found["frozen"]).items():
        first = ", ".join(f"{item['tensor']} {item['dim']}" for item in items[:3])
        more = f" and {len(items) - 3} more" if len(items) > 3 else ""
        table.add_row(why, operation, f"{sum(item['count'] for item in items):,}", first + more)
    console.print(table)

    table = Table(title="What each part costs")
    _columns(table, "part", ">FLOPs", ">share", ">parameters", ">share")
    for part in found["parts"]:
        table.add_row(part["name"] or "(the model itself)", f"{part['flops']:,}",
                      f"{part['flops'] / max(found['flops'], 1):.1%}", f"{part['params']:,}",
                      f"{part['params'] / max(found['params'], 1):.1%}")  # fmt: skip
    console.print(table)


def _by_reason(frozen: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for item in frozen:
        found.setdefault((item["why"], item["operation"]), []).append(item)
    return found


def _columns(table: Table, *names: str) -> None:
    for index, name in enumerate(names):
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left",
                         overflow="fold", no_wrap=index == 0 and "why" not in names)  # fmt: skip
