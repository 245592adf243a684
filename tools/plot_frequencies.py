"""Draws what the sampler promises: hard samples follow softmax at any temperature, soft ones approach them as it falls.

    python tools/plot_frequencies.py --output tools/pictures/frequencies.svg

Left: how often each of six categories is drawn at several temperatures, with intervals of three standard errors,
beside softmax of the logits. Right: the mean of the relaxed samples, which softmax is only near to at low
temperatures. The distance printed is the largest difference from softmax over the categories, in standard errors.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from prunegate.gumbel import Philox, gumbel_softmax

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LOGITS = (1.5, 0.8, 0.2, -0.3, -1.0, -2.0)
TEMPERATURES = (0.1, 0.5, 1.0, 2.0, 10.0)


def frequencies(tau: float, draws: int, hard: bool) -> Tensor:
    """Mean sample over many draws at one temperature, ``[categories]``."""
    logits = torch.tensor(LOGITS).expand(draws, -1)
    # A fixed seed, and a step for each temperature, so that the picture is the same wherever it is drawn.
    generator = Philox(2024, TEMPERATURES.index(tau))
    return gumbel_softmax(logits, tau, hard, generator=generator).mean(0, dtype=torch.float64)


def draw(draws: int) -> tuple[plt.Figure, dict[float, float]]:
    """The picture; and for each temperature, how far hard samples are from softmax, in standard errors."""
    expected = torch.tensor(LOGITS, dtype=torch.float64).softmax(0)
    error = (expected * (1 - expected) / draws).sqrt()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    place = torch.arange(len(LOGITS)).double()
    width = 0.8 / len(TEMPERATURES)
    colours = matplotlib.colormaps["viridis"](torch.linspace(0.1, 0.9, len(TEMPERATURES)).numpy())
    far = {}
    for i, (tau, colour) in enumerate(zip(TEMPERATURES, colours, strict=True)):
        at = (place + (i - (len(TEMPERATURES) - 1) / 2) * width).numpy()
        hard, soft = (frequencies(tau, draws, kind) for kind in (True, False))
        far[tau] = float(((hard - expected) / error).abs().max())
        left.bar(at, hard.numpy(), width, yerr=(3 * error).numpy(), color=colour, label=f"tau {tau:g}", ecolor="black")
        right.bar(at, soft.numpy(), width, color=colour)
    for axes, title in [(left, "hard: frequencies of draws"), (right, "soft: mean of relaxed samples")]:
        axes.hlines(expected.numpy(), place.numpy() - 0.45, place.numpy() + 0.45, color="crimson", label="softmax")
        axes.set(title=title, xlabel="category", xticks=place.numpy())
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel(f"share of {draws:,} draws")
    left.legend(frameon=False, fontsize=8)
    return figure, far


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the picture and prints how far the frequencies are from softmax.

    Args:
        argv: Command line without the program's name; ``None`` takes it from ``sys.argv``.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100_000, help="draws at each temperature (default 100000)")
    parser.add_argument("--output", type=Path, default=Path("tools/pictures/frequencies.svg"), help="SVG or PNG")
    options = parser.parse_args(argv)
    # Text stays text and identifiers do not change from run to run, so that the file is small and comparable.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "frequencies"})
    figure, far = draw(options.draws)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    stamp = {"Date": None} if options.output.suffix == ".svg" else None
    figure.savefig(options.output, dpi=110, metadata=stamp)
    for tau, distance in far.items():
        print(f"tau {tau:g}: hard samples within {distance:.1f} standard errors of softmax")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
