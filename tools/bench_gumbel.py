"""Time and memory of the samplers beside ``torch.nn.functional.gumbel_softmax(hard=True)``, forward and backward.

    python tools/bench_gumbel.py --rounds 9
    python tools/bench_gumbel.py --rounds 9 --avx2

Baseline and backends run in turn within one process, on one thread, in float32; a row shows the median time and the
median of the rounds' ratios with their quartiles. On the CPU it is processor time, so that what else the machine does
counts less. Binary gates are compared with the baseline on logits [n, 2], and
a model of many layers with a loop over its layers. Before a backend is timed, its samples and gradients are checked
against softmax and against the baseline's mean gradient.

``--avx2`` shows what a machine without AVX-512 would: torch's own kernels and ours are held to AVX2.

Last, LayerNorm over kept positions beside torch's own over all; the gates are differentiated too.

Memory is the peak of what torch allocates over one forward and backward, less the sample and the gradient that the
caller keeps, in units of the sample (for binary gates the baseline's sample is a pair a gate).
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import median, quantiles
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from prunegate.gumbel import backends, cpu, gumbel_sigmoid, gumbel_softmax, masked_layer_norm

LAYERS = 500


class Case(NamedTuple):
    """One thing to sample: its name, the logits, and whether they are binary gates."""

    name: str
    logits: Tensor
    binary: bool
    layers: int = 1


def make_cases(device: str, quick: bool) -> list[Case]:
    """The cases of the table; smaller ones where ``quick``."""
    shrink = 16 if quick else 1
    generator = torch.Generator().manual_seed(0)

    def logits(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    cases = [Case("binary, 26,560", logits(26_560), True), Case("binary, 10^6", logits(1_000_000 // shrink), True)]
    for rows, columns in [(100_000, 32), (4096, 1024), (1_000_000, 4), (64, 50_257)]:
        cases.append(Case(f"[{rows}, {columns}]", logits(max(rows // shrink, 4), columns), False))
    cases.append(Case(f"{LAYERS} layers, 26,560 gates", logits(26_560), True, LAYERS))
    return cases


def baseline(case: Case) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that samples with torch and returns the sample and the gradient of the logits."""
    logits = torch.stack([case.logits, torch.zeros_like(case.logits)], -1) if case.binary else case.logits
    gradient = torch.linspace(-1, 1, logits.shape[-1], device=logits.device).expand_as(logits).contiguous()
    pieces = [piece.contiguous().requires_grad_() for piece in logits.tensor_split(case.layers)]
    weights = [piece.contiguous() for piece in gradient.tensor_split(case.layers)]

    def run() -> tuple[Tensor, Tensor]:
        for piece, weight in zip(pieces, weights, strict=True):
            sample = F.gumbel_softmax(piece, hard=True)
            (found,) = torch.autograd.grad(sample, piece, weight)
        return sample, found

    return run


def candidate(case: Case, backend: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """The same with one of our backends; all layers in one call."""
    logits = case.logits.clone().requires_grad_()
    columns = 2 if case.binary else logits.shape[-1]
    weight = torch.linspace(-1, 1, columns, device=logits.device)
    if case.binary:
        # The gate is the pair's first member: what it gets is the difference of the pair's weights.
        weight = weight[0] - weight[1]
    weight = weight.expand_as(logits).contiguous()

    def run() -> tuple[Tensor, Tensor]:
        sample = (gumbel_sigmoid if case.binary else gumbel_softmax)(logits, hard=True, backend=backend)
        (found,) = torch.autograd.grad(sample, logits, weight)
        return sample, found

    return run


def check(case: Case, backend: str) -> None:
    """Refuses to time what is wrong: values, frequencies and the mean gradient."""
    whole = Case(case.name, case.logits, case.binary)
    sample, gradient = candidate(whole, backend)()
    _, expected = baseline(whole)()
    assert bool(((sample == 0) | (sample == 1)).all())
    if case.binary:
        probability = case.logits.sigmoid()
        expected = expected[..., 0]
    else:
        probability = case.logits.softmax(-1)
        assert bool((sample.sum(-1) == 1).all())
        assert float(gradient.sum(-1).abs().max()) < 1e-4
    # Rows and columns differ, so it is totals over many of them that are compared, each with its own spread.
    variance = probability * (1 - probability)
    for missed, spread in zip(_totals(sample - probability), _totals(variance), strict=True):
        assert abs(missed) <= 6 * spread**0.5, f"{backend}: frequencies are off"
    for part in (gradient - expected).tensor_split(16, dim=-1):
        # Columns of one row depend on each other; rows do not, and gates do not.
        gaps = (part if case.binary else part.sum(-1)).double()
        assert abs(float(gaps.sum())) <= 6 * float(gaps.square().sum()) ** 0.5, f"{backend}: gradients are off"


def _totals(values: Tensor) -> list[float]:
    return [float(part.detach().double().sum()) for part in values.tensor_split(16, dim=-1)]


def clock(run: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds of one run, the mean of several: of the processor for the CPU, on the wall for a GPU."""
    now = time.perf_counter if device == "cuda" else time.process_time
    start = now()
    for _ in range(repeats):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (now() - start) / repeats


def extra_memory(run: Callable[[], tuple[Tensor, Tensor]]) -> float:
    """Peak of torch's allocations over one run, in samples, without the sample and the gradient that are kept."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # or the profiler reports each of its starts and stops
    size = run()[0].nbytes
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = run()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    growth = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    peak = max(growth)
    del kept
    return peak / size - 2


def measure(case: Case, names: list[str], rounds: int, device: str) -> list[tuple[str, ...]]:
    """One table row for the baseline and for each backend."""
    runs = {"torch": baseline(case)} | {name: candidate(case, name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    repeats = {}
    for name, run in runs.items():
        run()
        once = clock(run, 1, device)
        repeats[name] = max(1, min(100, int(0.02 / once)))
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(clock(run, repeats[name], device))
    rows = []
    for name, taken in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds["torch"], taken, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        ratio = "" if name == "torch" else f"{median(ratios):.1f}x ({low:.1f} to {high:.1f})"
        rows.append((case.name, name, f"{median(taken) * 1e6:,.0f}", ratio))
    return rows


def norms(rounds: int, device: str) -> Table:
    """LayerNorm over kept positions beside torch's own over all, forward and backward."""
    table = Table("rows", "torch, µs", "masked, µs", "times torch (quartiles)", title="LayerNorm over kept positions")
    for shape in [(4, 197, 192), (4, 197, 384), (8, 197, 384), (16, 197, 768)]:
        columns = shape[-1]
        x, weight, bias, gradient = (torch.randn(size, device=device) for size in (shape, columns, columns, shape))
        keep = (torch.arange(columns, device=device) % 3 > 0).float()
        plain = [tensor.requires_grad_() for tensor in (x, weight, bias)]
        masked = [*plain, keep.requires_grad_()]

        def ours(masked: list[Tensor] = masked, gradient: Tensor = gradient) -> tuple[Tensor, ...]:
            x, weight, bias, keep = masked
            return torch.autograd.grad(masked_layer_norm(x, keep, weight, bias), masked, gradient)

        def theirs(plain: list[Tensor] = plain, gradient: Tensor = gradient) -> tuple[Tensor, ...]:
            x, weight, bias = plain
            return torch.autograd.grad(F.layer_norm(x, x.shape[-1:], weight, bias), plain, gradient)

        times = [(clock(theirs, 5, device), clock(ours, 5, device)) for _ in range(4 * rounds)][rounds:]
        low, middle, high = quantiles([mine / torchs for torchs, mine in times], n=4)
        micro = [f"{median(taken) * 1e6:,.0f}" for taken in zip(*times, strict=True)]
        table.add_row(str([*shape]), *micro, f"{middle:.2f} ({low:.2f} to {high:.2f})")
    return table


def hold_to_avx2() -> None:
    """Makes torch and the C path use AVX2 where they could use AVX-512.

    Raises:
        SystemExit: If torch has chosen its kernels already: it does so once in a process, on its first operation.
    """
    os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        raise SystemExit("torch uses other kernels than those for AVX2; set ATEN_CPU_CAPABILITY=avx2 and try again.")
    extension, reason = cpu.load()
    if extension is not None and extension.level > 1:
        held = extension._replace(level=1), "available, held to AVX2 and FMA"
        cpu.load = lambda: held
    elif extension is None:
        print(f"cpu: {reason}")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table.

    Args:
        argv: Command line without the program's name; ``None`` takes it from ``sys.argv``.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds over baseline and backends (default 9)")
    parser.add_argument("--quick", action="store_true", help="smaller cases, for a first look")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--avx2", action="store_true", help="hold torch and the C path to AVX2")
    parser.add_argument("--backends", nargs="+", help="default: all that are available but the reference")
    options = parser.parse_args(argv)
    if options.avx2:
        hold_to_avx2()
    torch.set_num_threads(1)
    # Not the seed of the logits: noise from the same numbers would depend on them.
    torch.manual_seed(1)
    listed = backends()
    fitting = ("aten", "cpu") if options.device == "cpu" else ("aten", "triton")
    usable = [name for name in fitting if listed.get(name, "").startswith("available")]
    names = options.backends or usable
    on_cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, one thread"
    device = torch.cuda.get_device_name() if options.device == "cuda" else on_cpu
    title = f"forward and backward, float32, {device}, torch {torch.__version__}, {options.rounds} rounds"
    table = Table("case", "backend", "median µs", "times faster (quartiles)", title=title)
    cases = make_cases(options.device, options.quick)
    for case in cases:
        for name in names:
            check(case, name)
        for row in measure(case, names, options.rounds, options.device):
            table.add_row(*row)
        table.add_section()
    memory = Table("case", "torch", *names, title="peak memory beside the sample and its gradient, in samples")
    for case in cases:
        if case.logits.nbytes >= 4_000_000:
            runs = [baseline(case), *(candidate(case, name) for name in names)]
            memory.add_row(case.name, *(f"{extra_memory(run):.2f}" for run in runs))
    console = Console(width=110)
    console.print(table)
    console.print(memory)
    console.print(norms(options.rounds, options.device))
    for name, reason in listed.items():
        console.print(f"{name}: {reason}")


if __name__ == "__main__":
    main()
