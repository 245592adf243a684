"""One search for several budgets, against a search for each of them alone; both of the same number of steps.

    python recipes/budgets.py --flops 0.7 0.5 0.3 --between 0.6 0.4 --output runs/budgets
    python tools/pareto.py runs/budgets/budgets.json --out runs/budgets/pareto.png

A small network on scikit-learn's digits. Every cut is exported, its batch norms are re-estimated, and it is tested as
it is: what is compared is the search, not fine-tuning.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import search
import torch
from torch import nn
from torch.nn import functional as F

import prunegate


def network(classes: int = 10) -> nn.Module:
    """Three convolutions with batch norms, a mean, a linear layer; for one channel."""
    layers: list[nn.Module] = []
    for before, width, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs the comparison.

    Args:
        argv: Command line without the program's name; ``None`` takes the process's own.

    Returns:
        One entry for each seed, way and budget: test accuracy in per cent, FLOPs, milliseconds of a batch.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=float, nargs="+", default=[0.5, 0.3, 0.15], help="budgets, shares of dense")
    parser.add_argument("--between", type=float, nargs="*", default=[0.4, 0.2], help="cut afterwards, never trained")
    parser.add_argument("--dense-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", default="runs/budgets")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    setup = search.parse(["--dataset", "digits", "--img-size", "8", "--batch-size", "64", "--lr", "2e-3"])
    splits = search.load(setup)

    results: list[dict[str, Any]] = []
    for seed in args.seeds:
        torch.manual_seed(seed)
        dense = network()
        search.train(dense, dense.parameters(), splits["train"], args.dense_steps, setup)
        results.append(measure("dense", seed, 1.0, dense, splits))
        nested = run(dense, args.flops, args.steps, splits, setup)
        for share in sorted({*args.flops, *args.between}, reverse=True):
            results.append(measure("one search for all", seed, share, nested.export(flops=share), splits))
        for share in args.flops:
            alone = run(dense, share, args.steps, splits, setup)
            results.append(measure("a search for each", seed, share, alone.export(), splits))
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "budgets.json").write_text(json.dumps(results, indent=1))
    print(table(results))
    return results


def run(dense: nn.Module, flops: Any, steps: int, splits: dict[str, search.Split],
        setup: argparse.Namespace) -> prunegate.GatedModel:  # fmt: skip
    """A finished search from the trained dense network."""
    gated = prunegate.attach(copy.deepcopy(dense), splits["train"][0][:1])
    budget = prunegate.Budget(gated, flops=flops, steps=steps)
    search.train(gated, budget.param_groups(setup.lr), splits["train"], steps, setup, budget)
    return gated


def measure(way: str, seed: int, share: float, model: nn.Module, splits: dict[str, search.Split]) -> dict[str, Any]:
    """What one network does and costs, with the statistics of its own batch norms."""
    images = splits["train"][0]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    model.train()
    with torch.no_grad():
        for batch in images[:1024].split(128):
            model(batch)
    model.eval()
    times = []
    with torch.no_grad():
        for _ in range(20):
            start = time.perf_counter()
            model(images[:64])
            times.append(1000 * (time.perf_counter() - start))
        loss = float(F.cross_entropy(model(splits["test"][0]), splits["test"][1]))
    return {
        "method": way, "seed": seed, "share": share, "top1": search.accuracy(model, splits["test"]), "loss": loss,
        "flops": prunegate.count_flops(model, images[:1]), "latency_ms": statistics.median(times),
    }  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    lines = ["| share of FLOPs | way | top-1 (%) | FLOPs |", "| --- | --- | --- | --- |"]
    for share, way in dict.fromkeys((each["share"], each["method"]) for each in results):
        own = [each for each in results if (each["share"], each["method"]) == (share, way)]
        top1 = [each["top1"] for each in own]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        flops = statistics.mean(each["flops"] for each in own)
        lines.append(f"| {share} | {way} | {statistics.mean(top1):.2f} ± {spread:.2f} | {flops:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
