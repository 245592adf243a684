"""The tables behind ``tools/inspect.py``: gate groups, what is frozen and why, and what each part costs."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.utils import ParseKwargs

import prunegate

__all__ = ["describe", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, or the same as JSON.

    Args:
        argv: Command line without the program's name; ``None`` takes the process's own.
    """
    parser = argparse.ArgumentParser(description="Shows what can be pruned of a timm model, and what its parts cost.")
    parser.add_argument("model", help="timm model name")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="more of create_model's")
    parser.add_argument("--input-size", nargs=3, type=int, metavar="N", help="channels, height, width")
    parser.add_argument("--units", nargs="+", default=["channel", "head"], help="kinds of units")
    parser.add_argument("--ignore", nargs="*", default=[], help="patterns of names that get no gates")
    parser.add_argument("--depth", type=int, default=2, help="how many levels of names make one part")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(argv)

    options = dict(args.model_kwargs)
    if args.input_size:
        options["in_chans"] = args.input_size[0]
    model = timm.create_model(args.model, **options).eval()
    example = torch.zeros(1, *args.input_size) if args.input_size else None
    try:
        gated = prunegate.attach(model, example, units=args.units, ignore=args.ignore)
    except prunegate.PruneGateError as error:
        raise SystemExit(f"{args.model}: {error}") from None
    found = {"model": args.model, **describe(gated, args.depth)}
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _draw(found, Console())


def describe(gated: prunegate.GatedModel, depth: int = 2) -> dict[str, Any]:
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


def _parts(gated: prunegate.GatedModel, depth: int) -> list[dict[str, Any]]:
    flops: Counter[str] = Counter()
    params: Counter[str] = Counter()
    for name, count in gated.cost.flops_by_module().items():
        flops[".".join(name.split(".")[:depth])] += count
    for name, parameter in gated.model.named_parameters():
        owner = name.rpartition(".")[0]
        params[".".join(owner.split(".")[:depth])] += parameter.numel()
    order = dict.fromkeys([*params, *flops])
    return [{"name": name, "flops": flops[name], "params": params[name]} for name in order]


def _draw(found: dict[str, Any], console: Console) -> None:
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
