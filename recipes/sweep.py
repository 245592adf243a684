"""Runs the recipe over budgets and seeds; what is done is skipped, and what fails is recorded while the others go on.

    python recipes/sweep.py --flops 0.3 0.5 0.7 --seeds 0 1 2 --output runs/sweep -- --model resnet18 --dataset digits

What follows ``--`` is handed to ``recipes/prune.py``. With Ray installed (``pip install "ray[tune]"``) the runs go to
Ray Tune, which places them on the machines of a cluster; without it they run one after the other. Either way the
folder then holds ``results.csv``, one line for each run, and one folder for each.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunegate.files import put_text

__all__ = ["COLUMNS", "main", "trial"]

COLUMNS = ("name", "flops", "seed", "status", "top1", "dense_top1", "flops_share", "params_share", "error")
"""Of ``results.csv``. ``status`` is ``done`` or ``failed``; shares are of the dense model."""

_RECIPE = Path(__file__).with_name("prune.py")


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs what is not done yet.

    Args:
        argv: Command line without the program's name; ``None`` takes the process's own.

    Returns:
        The lines of ``results.csv``.
    """
    parser = argparse.ArgumentParser(description="Runs recipes/prune.py over budgets and seeds.")
    parser.add_argument("--flops", type=float, nargs="+", default=[0.5], help="budgets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds")
    parser.add_argument("--output", default="runs/sweep", metavar="DIR", help="where results go")
    parser.add_argument("--engine", choices=["auto", "ray", "serial"], default="auto", help="auto: Ray where it is")
    parser.add_argument("--gpus-per-trial", type=float, default=0, help="what Ray sets aside for one run")
    parser.add_argument("recipe", nargs="*", help="arguments of recipes/prune.py, behind --")
    args = parser.parse_args(argv)
    folder = Path(args.output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    points = [{"flops": flops, "seed": seed} for flops, seed in itertools.product(args.flops, args.seeds)]
    left = [point for point in points if _row(folder, point)["status"] != "done"]
    print(f"{len(points) - len(left)} of {len(points)} runs are done")
    has_ray = importlib.util.find_spec("ray") is not None
    if args.engine == "ray" and not has_ray:
        raise SystemExit('--engine ray needs Ray: pip install "ray[tune]", or leave the flag out')
    if has_ray and args.engine != "serial":
        _with_ray(left, folder, args)
    else:
        for point in left:
            print(trial(point, folder, args.recipe)["status"], _name(point), flush=True)
            _write(points, folder)
    return _write(points, folder)


def trial(point: dict[str, Any], folder: Path, recipe: Sequence[str]) -> dict[str, Any]:
    """One run, in a process of its own; a run that was begun goes on where it was stopped.

    Args:
        point: ``flops`` and ``seed``.
        folder: Of the sweep.
        recipe: More arguments of the recipe.

    Returns:
        Its line of the results.
    """
    own = folder / _name(point)
    command = [sys.executable, str(_RECIPE)]
    if (own / "args.yaml").is_file() and list((own / "state").glob("*.safetensors")):
        command += ["--resume", str(own)]
    else:
        command += [*recipe, "--flops", str(point["flops"]), "--seed", str(point["seed"]), "--output", str(folder),
                    "--experiment", own.name]  # fmt: skip
    own.mkdir(exist_ok=True)
    with (own / "log.txt").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ).returncode
    error = own / "error.txt"
    if code:
        last = [line for line in (own / "log.txt").read_text(errors="replace").splitlines() if line.strip()][-1:]
        put_text(error, f"exit status {code}: {last[0] if last else 'no output'}\n")
    else:
        error.unlink(missing_ok=True)
    return _row(folder, point)


def _name(point: dict[str, Any]) -> str:
    return f"flops{point['flops']:g}-seed{point['seed']}"


def _row(folder: Path, point: dict[str, Any]) -> dict[str, Any]:
    """What the folder of a run says about it."""
    own = folder / _name(point)
    row: dict[str, Any] = {"name": own.name, **point, "status": "", "error": ""}
    if (own / "error.txt").is_file():
        return row | {"status": "failed", "error": (own / "error.txt").read_text().strip()}
    if (own / "report.json").is_file() and not (own / "state").exists():
        report = json.loads((own / "report.json").read_text())
        dense, slim = report["dense"], report["slim"]
        row |= {
            "status": "done", "top1": slim["top1"], "dense_top1": dense["top1"],
            "flops_share": slim["flops"] / dense["flops"], "params_share": slim["params"] / dense["params"],
        }  # fmt: skip
    return row


def _write(points: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    rows = [row for point in points if (row := _row(folder, point))["status"]]
    beside = folder / ".results.csv.part"
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(folder / "results.csv")
    return rows


def _with_ray(points: Sequence[dict[str, Any]], folder: Path, args: argparse.Namespace) -> None:
    from ray import tune

    def run(config: dict[str, Any]) -> dict[str, Any]:
        row = trial(config["point"], folder, args.recipe)
        return {key: value for key, value in row.items() if isinstance(value, int | float | str)}

    if points:
        trainable = tune.with_resources(run, {"cpu": 1, "gpu": args.gpus_per_trial})
        tune.Tuner(trainable, param_space={"point": tune.grid_search(list(points))}).fit()


if __name__ == "__main__":
    main()
