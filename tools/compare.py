"""Accuracy at equal FLOPs: PruneGate beside Torch-Pruning, torch-kirigami, one-shot scores and training from scratch.

    python tools/compare.py --data /usr/share/datasets/fashion-mnist --output runs/compare
    python tools/compare.py --output runs/compare --data ... --test      # once, when every choice is made
    python tools/compare.py --smoke

Every method starts from the same dense weights and gets the same images in the same order, optimizer, learning rates
and number of steps (a search is part of them). FLOPs are counted by ``prunegate.count_flops`` for all. Whatever is
chosen is chosen on a validation part of the training file. Each network that comes out is kept; ``--test`` reads the
test file for all of them at once and writes the final table.

Rows are appended to rows.jsonl as they end, and a second call goes on where the first one stopped. The report is a
Markdown table and a plot, with paired differences to PruneGate.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from comparison.images import HOW_TO_GET, Images, load, load_test, made_up
from comparison.methods import METHODS, Cell
from comparison.networks import NETWORKS
from comparison.peers import Costs
from comparison.report import write_report
from comparison.training import Recipe, accuracy, batches_for, optimizer_for, train
from torch import nn

import prunegate

_DISTILLED = " + distillation"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, and writes the report.

    Args:
        argv: Command line without the program's name; ``None`` takes it from ``sys.argv``.
    """
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    output: Path = args.output
    (output / "cells").mkdir(parents=True, exist_ok=True)
    recipe = Recipe(args.steps, args.dense_steps, args.batch, args.lr)
    if args.smoke:
        recipe = replace(recipe, steps=20, dense_steps=40, batch=32)
    settings = asdict(recipe)
    kept = output / "recipe.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        raise SystemExit(f"{output} holds results of another recipe, {kept.read_text()}; choose another --output")
    if not kept.exists():  # another process may be reading it
        kept.write_text(json.dumps(settings))

    rows = _rows(output / "rows.jsonl")
    done = {_key(row) for row in rows}
    images: dict[int, tuple[Images, Images]] = {}
    costs: dict[tuple[Any, ...], Costs] = defaultdict(dict)
    # The seeds are the outer loop, so that whatever has ended compares all methods alike.
    for seed, network, share, method in itertools.product(args.seeds, args.networks, args.budgets, args.methods):
        row: dict[str, Any] = {"network": network, "budget": share, "method": method, "seed": seed}
        if _key(row) in done:
            continue
        size = NETWORKS[network].size
        if size not in images:
            images[size] = _images(args, size)
        training, validation = images[size]
        of_dense = args.dense_seeds[seed % len(args.dense_seeds)] if args.dense_seeds else seed
        longer = of_dense == (args.dense_seeds or args.seeds)[0]
        dense, dense_row = _dense(output, network, of_dense, longer, recipe, training, validation)
        row["dense_seed"] = of_dense
        if dense_row is not None:
            rows.append(dense_row)
        cell = Cell(NETWORKS[network], dense, share, seed, recipe, training, validation, method.endswith(_DISTILLED),
                    costs=costs[network, method, seed])  # fmt: skip
        ours = _file(output, row | {"method": "prunegate"})
        if ours.exists():
            cell.found = torch.load(ours, weights_only=False)
        start = time.process_time()
        torch.manual_seed(seed)
        try:
            outcome = METHODS[method.removesuffix(_DISTILLED)](cell)
        except Exception as error:  # a method that cannot do a network is a result too
            row |= {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        else:
            flops = prunegate.count_flops(outcome.model, cell.example)
            row |= {
                "flops": flops,
                "share": flops / prunegate.count_flops(dense, cell.example),
                "params": sum(parameter.numel() for parameter in outcome.model.parameters()),
                "before": outcome.before,
                "validation": accuracy(outcome.model, validation),
            }
            torch.save(outcome.model, _file(output, row))
        row["cpu_seconds"] = round(time.process_time() - start, 1)
        rows.append(row)
        _append(output / "rows.jsonl", row)
        print(json.dumps(row), flush=True)
    tested = _test(args, output, rows) if args.test else {}
    write_report(rows, tested, output, asdict(recipe))
    print(f"the report is in {output / 'table.md'} and {output / 'accuracy.png'}")


def _dense(output: Path, network: str, seed: int, longer: bool, recipe: Recipe, training: Images, validation: Images,
           ) -> tuple[nn.Module, dict[str, Any] | None]:  # fmt: skip
    """The dense network of a seed, from a file if it was trained before; then there is no new row.

    With ``longer`` the row says as well what more training would bring.
    """
    model = NETWORKS[network].fresh(seed)
    row: dict[str, Any] = {"network": network, "budget": 1.0, "method": "dense", "seed": seed}
    path = _file(output, row)
    if path.exists():
        return torch.load(path, weights_only=False), None
    steps = recipe.dense_steps
    batches = batches_for(training, recipe, steps, 100 + seed)
    train(model, batches, optimizer_for(model, recipe), recipe, range(steps), steps)
    row |= {"share": 1.0, "validation": accuracy(model, validation)}
    if longer:
        # Another cycle of the length that methods get: what it gains is what more training alone would.
        more = copy.deepcopy(model)
        batches = batches_for(training, recipe, recipe.steps, seed)
        train(more, batches, optimizer_for(more, recipe), recipe, range(recipe.steps), recipe.steps)
        row["longer"] = accuracy(more, validation)
    torch.save(model, path)
    _append(output / "rows.jsonl", row)
    print(json.dumps(row), flush=True)
    return model, row


def _test(args: argparse.Namespace, output: Path, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy on the test file of every network that was kept, by file name."""
    path = output / "test.json"
    if path.exists():
        raise SystemExit(f"{path} exists: the test file has been read for these results. They stand as they are")
    images: dict[int, Images] = {}
    found = {}
    for row in rows:
        if "error" in row:
            continue
        size = NETWORKS[row["network"]].size
        if size not in images:
            images[size] = made_up(size) if args.smoke else load_test(args.data, size)
        file = _file(output, row)
        found[file.name] = accuracy(torch.load(file, weights_only=False), images[size])
    path.write_text(json.dumps(found, indent=1))
    return found


def _images(args: argparse.Namespace, size: int) -> tuple[Images, Images]:
    if args.smoke:
        both = made_up(size)
        return both, both.part(200)
    if args.data is None:
        raise SystemExit(f"--data is needed.\n\n{HOW_TO_GET}")
    return load(args.data, size)


def _file(output: Path, row: dict[str, Any]) -> Path:
    name = "-".join(str(row[key]).replace(" ", "_") for key in ("network", "budget", "method", "seed"))
    return output / "cells" / f"{name}.pt"


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("network", "budget", "method", "seed"))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    every = [*METHODS, *(name + _DISTILLED for name in METHODS if name != "from scratch")]
    every_network = ["mobile", "deit", "convnext", "resnet"]
    parser = argparse.ArgumentParser(description=__doc__, epilog=HOW_TO_GET,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="where Fashion-MNIST's files are, see below")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), metavar="FOLDER")
    parser.add_argument("--networks", nargs="+", default=every_network, choices=NETWORKS)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.15, 0.3, 0.5, 0.7], help="shares of FLOPs")
    parser.add_argument("--methods", nargs="+", default=every, choices=every, metavar="METHOD",
                        help=f"of: {'; '.join(every)}")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--dense-seeds", nargs="+", type=int, help="train dense networks for these seeds only and let "
                        "the others share them in turn; by default every seed has its own")  # fmt: skip
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="after the dense network (default 400)")
    parser.add_argument("--dense-steps", type=int, default=Recipe.dense_steps, help="default 1200")
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--lr", type=float, default=Recipe.lr, help="peak learning rate of AdamW")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a minute on made-up images, to see that it works")
    parser.add_argument("--test", action="store_true", help="read the test file, for the final table; once only")
    args = parser.parse_args(argv)
    if args.smoke and args.networks == every_network and args.methods == every:
        args.networks, args.budgets, args.seeds, args.output = ["deit-small"], [0.4], [0], args.output / "smoke"
        args.methods = [name for name in every if "kirigami" not in name and _DISTILLED not in name]
    return args


if __name__ == "__main__":
    main()
