"""What gates add to a training step: gated over dense, step by step in turn, on one thread.

    python tools/bench_step.py --rounds 9
    python tools/bench_step.py --models resnet50 --shapes 8x128 --modes compiled

By default each model runs at two shapes, eager and compiled (compiling takes a minute or more for each step).
Before anything is timed, both must give the same loss with every gate open. Times are of the process's own clock, so
that what else the machine does falls on neither; the ratio is the median over rounds, with its quartiles.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import prunegate


def main() -> None:
    """Prints one line for each model."""
    parser = argparse.ArgumentParser(description="Times a gated training step beside a dense one.")
    parser.add_argument("--models", nargs="+", default=["resnet50", "deit_small_patch16_224"])
    parser.add_argument("--shapes", nargs="+", default=["8x224", "8x128"], help="images in a step, and their side")
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=9, help="pairs of steps")
    parser.add_argument("--profile", action="store_true", help="which operations the gated step adds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, float32, SGD, one thread, {args.rounds} rounds")
    for name, shape, mode in itertools.product(args.models, args.shapes, args.modes):
        batch, size = map(int, shape.split("x"))
        torch.compiler.reset()
        steps = make_steps(name, batch, size, mode == "compiled")
        ratios, dense = compare(steps, args.rounds)
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name}, {batch} images of {size}x{size}, {mode}: gated / dense {middle:.3f} "
              f"(quartiles {low:.3f} to {high:.3f}), dense step {dense * 1e3:.0f} ms", flush=True)  # fmt: skip
        if args.profile:
            profile(steps)


def make_steps(name: str, batch: int, size: int, compiled: bool) -> dict[str, Callable[[], None]]:
    """A dense step and one of a search, on weights of their own."""
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    found: dict[str, Callable[[], None]] = {}
    losses = []
    for kind in ("dense", "gated"):
        torch.manual_seed(0)
        options = {"img_size": size} if "vit" in name or "deit" in name else {}
        model: nn.Module = timm.create_model(name, num_classes=10, **options)
        budget = None
        if kind == "gated":
            model = prunegate.attach(model, images[:1])
        with torch.no_grad():
            losses.append(float(nn.functional.cross_entropy(model.eval()(images), labels)))
        model.train()
        if isinstance(model, prunegate.GatedModel):
            model.logits.data.fill_(1.0)  # nothing to score: the search begins at once
            budget = prunegate.Budget(model, flops=0.5, steps=10**6)
        run = torch.compile(model) if compiled else model
        found[kind] = step_of(run, model, budget, images, labels)
    if abs(losses[0] - losses[1]) > 1e-5 * abs(losses[0]):
        raise SystemExit(f"{name}: the gated model's loss is {losses[1]}, the dense one's {losses[0]}")
    return found


def step_of(run: Callable[[Tensor], Tensor], model: nn.Module, budget: prunegate.Budget | None, images: Tensor,
            labels: Tensor) -> Callable[[], None]:  # fmt: skip
    """Forward, backward, optimizer, and the budget's own step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        loss = nn.functional.cross_entropy(run(images), labels)
        if budget is not None:
            loss = loss + budget.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if budget is not None:
            budget.step()

    return step


def compare(steps: dict[str, Callable[[], None]], rounds: int) -> tuple[list[float], float]:
    """Ratios of one gated to one dense step, in turn, and the median of the dense one in seconds."""
    for step in steps.values():
        step()
        step()
    ratios, dense = [], []
    for round_ in range(rounds):
        times = {}
        for kind in ("dense", "gated") if round_ % 2 else ("gated", "dense"):
            before = time.process_time()
            steps[kind]()
            times[kind] = time.process_time() - before
        ratios.append(times["gated"] / times["dense"])
        dense.append(times["dense"])
    return ratios, statistics.median(dense)


def profile(steps: dict[str, Callable[[], None]]) -> None:
    """The operations in which the two steps differ most."""
    found = {}
    for kind, step in steps.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            step()
        found[kind] = {event.key: event.self_cpu_time_total / 1e3 for event in trace.key_averages()}
    names = found["dense"].keys() | found["gated"].keys()
    more = {name: found["gated"].get(name, 0) - found["dense"].get(name, 0) for name in names}
    for name in sorted(more, key=more.__getitem__, reverse=True)[:10]:
        print(f"  {more[name]:8.1f} ms more in {name}")


if __name__ == "__main__":
    main()
