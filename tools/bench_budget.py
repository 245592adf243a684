"""What a budget costs the user's loop, and how long the final choice takes.

    python tools/bench_budget.py
    python tools/bench_budget.py --models resnet50 deit_small_patch16_224 --rounds 100

For each network: a ``budget.step()`` in the middle of a search, the expected FLOPs and their gradient, and the final
choice under one budget and under two, with the distance to the bound of the linear relaxation around it. Then the same
choice for made-up networks whose layers share inputs and outputs at random: 26,000 gates, and a thousand layers. One
thread, its own time, so that other programs on the machine count little.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles

import timm
import torch
from rich.console import Console
from rich.table import Table

import prunegate
from prunegate.polynomial import Polynomial, PolynomialBuilder
from prunegate.select import Limit, Width, select

MODELS = ("resnet50", "mobilenetv2_100", "deit_small_patch16_224", "convnext_tiny")
_WARM_UP = 30


def times(function: Callable[[], object], rounds: int, before: Callable[[], object] = lambda: None) -> list[float]:
    """Milliseconds of each call; ``before`` is not timed."""
    found = []
    for _ in range(rounds):
        before()
        start = time.thread_time()
        function()
        found.append(1e3 * (time.thread_time() - start))
    return found


def shown(milliseconds: Sequence[float]) -> str:
    """Median and quartiles."""
    if len(milliseconds) == 1:
        return f"{milliseconds[0]:,.0f}"
    low, _, high = quantiles(milliseconds, n=4)
    return f"{median(milliseconds):.2f} ({low:.2f}-{high:.2f})"


def of_model(name: str, rounds: int) -> list[str]:
    """One row of the table of networks."""
    torch.manual_seed(0)
    gated = prunegate.attach(timm.create_model(name))
    cells = [name, f"{gated.logits.numel():,}"]
    for asked in ({"flops": 0.5}, {"flops": 0.5, "params": 0.5}):
        with torch.no_grad():
            gated.logits.zero_()
        gated.mask = None
        budget = prunegate.Budget(gated, steps=20 * (rounds + _WARM_UP), **asked)

        def backward() -> None:
            (gated.logits * torch.randn_like(gated.logits)).sum().backward()

        times(budget.step, _WARM_UP, backward)
        step = times(budget.step, rounds, backward)
        if len(asked) == 1:
            cells += [shown(step), shown(times(lambda: gated.cost.expected_flops().backward(), rounds))]
            gated.prunegate.take_gradient()
        choice = times(budget.finish, 1)
        assert budget.selection is not None
        cells += [f"{choice[0]:,.0f}", f"{budget.selection.gap:.4%}"]
    return cells


def made_up(n_groups: int, low: int, high: int, n_terms: int,
            seed: int = 0) -> tuple[Polynomial, Polynomial, list[slice]]:  # fmt: skip
    """FLOPs and parameters of a network of ``n_groups`` layers, and where each layer's gates stand.

    Layers have ``low`` to ``high`` - 1 gates, and share their inputs and outputs at random in ``n_terms`` products.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(low, high, (n_groups,), generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    slices = [slice(int(a), int(b)) for a, b in itertools.pairwise(starts)]
    gates = [torch.arange(own.start, own.stop) for own in slices]
    flops, params = PolynomialBuilder(int(starts[-1])), PolynomialBuilder(int(starts[-1]))
    for i in range(n_terms):
        pair = [gates[i % n_groups], gates[(i * 7 + i // n_groups) % n_groups]]
        flops.add(int(torch.randint(1, 3000, (1,), generator=generator)), pair)
        params.add(9, pair)
    return flops.build(), params.build(), slices


def of_made_up(rounds: int, n_groups: int, low: int, high: int, n_terms: int) -> list[str]:
    """One row of the table of made-up networks."""
    flops, params, slices = made_up(n_groups, low, high, n_terms)
    scores = torch.rand(flops.n_gates, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    limits = [Limit("flops", flops, flops.dense // 2), Limit("params", params, params.dense // 2)]
    widths = [Width(own, 1, own.stop - own.start) for own in slices]
    cells = [f"{n_groups:,}", f"{flops.n_gates:,}"]
    for count in (1, 2):
        taken = times(lambda count=count: select(scores, limits[:count], widths), rounds)
        cells += [f"{median(taken):,.0f}", f"{select(scores, limits[:count], widths, thorough=True).gap:.4%}"]
    return cells


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; ``argv`` is the command line without the program's name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS, help="timm model names")
    parser.add_argument("--rounds", type=int, default=200, help="how often a step is timed")
    parser.add_argument("--made-up", action=argparse.BooleanOptionalAction, default=True, help="made-up networks too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console(highlight=False)
    console.print(f"cpu, one thread, torch {torch.__version__}; milliseconds, median and quartiles of {args.rounds}")
    table = Table("network", "gates", "step()", "expected FLOPs and gradient", "final choice", "gap",
                  "final choice, two budgets", "gap")  # fmt: skip
    for name in args.models:
        table.add_row(*of_model(name, args.rounds))
    if args.models:
        console.print(table)
    if args.made_up:
        table = Table("layers", "gates", "choice, one budget", "gap", "choice, two budgets", "gap")
        table.add_row(*of_made_up(3, 50, 64, 1000, 160))
        table.add_row(*of_made_up(1, 1000, 64, 200, 2500))
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
