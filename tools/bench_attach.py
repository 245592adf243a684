"""Time and memory of ``prunegate.attach`` beside Torch-Pruning's ``DependencyGraph().build_dependency``.

    python tools/bench_attach.py --models resnet50 densenet121 --rounds 7

Both find which parameters must be cut together, on one core, in turn within one process; ratios are medians over the
rounds. ``build_dependency`` ends with a graph from which ``get_all_groups`` has yet to gather the groups; ``attach``
ends with groups, costs and a model that runs gated. Both baselines are shown, and a plain forward.

Before anything is timed, a random half mask is checked: the cut model must agree with the masked one, and its counted
FLOPs with the predicted ones. Memory is taken in a process of its own, as the growth of the peak of resident memory;
the bound for ``attach`` is twice the parameters plus what one forward grows by.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from statistics import median

import timm
import torch
import torch_pruning
from resident import peak_growth
from rich.console import Console
from rich.table import Table
from torch import nn

import prunegate


def _forward(model: nn.Module, example: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(example)


def _build_dependency(model: nn.Module, example: torch.Tensor) -> torch_pruning.DependencyGraph:
    return torch_pruning.DependencyGraph().build_dependency(model, example)


def _get_all_groups(model: nn.Module, example: torch.Tensor) -> list[object]:
    return list(_build_dependency(model, example).get_all_groups())


JOBS: dict[str, Callable[[nn.Module, torch.Tensor], object]] = {
    "attach": prunegate.attach,
    "build_dependency": _build_dependency,
    "the same and get_all_groups": _get_all_groups,
    "one forward": _forward,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark, or one memory measurement on behalf of it.

    Args:
        argv: Command line without the program's name; ``None`` takes the process's own.
    """
    parser = argparse.ArgumentParser(description="attach beside Torch-Pruning's build_dependency")
    parser.add_argument("--models", nargs="+", default=["resnet50", "densenet121"], help="timm model names")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after one that is not")
    parser.add_argument("--memory", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.memory:
        print(json.dumps(_peak_growth(args.models[0], args.memory)))
        return

    console = Console(highlight=False)
    console.print(f"one core, float32, cpu, batch 1 at the model's own size; torch {torch.__version__}, "
                  f"Torch-Pruning {version('torch-pruning')}; {args.rounds} rounds")  # fmt: skip
    for name in args.models:
        _check(name)
        table = Table("", title=name)
        for column in ("median, s", "fastest", "slowest", "attach / this", "peak, MiB"):
            table.add_column(column, justify="right")
        taken = _time(name, args.rounds)
        grown = {job: _in_own_process(name, job) for job in JOBS}
        for job, seconds in taken.items():
            ratio = median(a / b for a, b in zip(taken["attach"], seconds, strict=True))
            times = (f"{value:.3f}" for value in (median(seconds), min(seconds), max(seconds)))
            table.add_row(job, *times, f"{ratio:.2f}", f"{grown[job] / 2**20:.1f}")
        parameters = sum(tensor.numel() * tensor.element_size() for tensor in timm.create_model(name).parameters())
        limit = (2 * parameters + grown["one forward"]) / 2**20
        table.caption = f"bound for the peak of attach: {limit:.1f} MiB"
        console.print(table)


def _time(name: str, rounds: int) -> dict[str, list[float]]:
    model = timm.create_model(name).eval()
    example = torch.randn(1, *model.pretrained_cfg["input_size"])
    found: dict[str, list[float]] = {job: [] for job in JOBS}
    for _ in range(rounds + 1):
        for job, taken in found.items():
            started = time.perf_counter()
            JOBS[job](model, example)
            taken.append(time.perf_counter() - started)
    return {job: taken[1:] for job, taken in found.items()}


def _check(name: str) -> None:
    """A mask that keeps about half: masked and cut outputs agree, predicted and counted FLOPs are equal."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    example = torch.randn(1, *model.pretrained_cfg["input_size"])
    gated = prunegate.attach(model, example)
    mask = torch.rand(gated.logits.numel()) < 0.5
    for group in gated.groups:
        mask[group.slice.start] = True
    gated.mask = mask
    slim = gated.export()
    with torch.no_grad():
        torch.testing.assert_close(slim(example), gated.eval()(example), rtol=1e-3, atol=1e-3)
    counted = prunegate.count_flops(slim, example)
    if counted != gated.cost.flops(mask):
        raise SystemExit(f"{name}: {gated.cost.flops(mask):,} FLOPs were predicted, {counted:,} counted")


def _in_own_process(name: str, job: str) -> int:
    command = [sys.executable, __file__, "--models", name, "--memory", job]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def _peak_growth(name: str, job: str) -> int:
    """Bytes by which the peak of resident memory rises above what the process holds before the job."""
    model = timm.create_model(name).eval()
    example = torch.randn(1, *model.pretrained_cfg["input_size"])
    # Code that is read from disk on first use is not the job's memory: a small model pulls it in beforehand.
    JOBS[job](timm.create_model("resnet18", num_classes=2).eval(), torch.randn(1, 3, 32, 32))
    return peak_growth(lambda: JOBS[job](model, example))


if __name__ == "__main__":
    main()
