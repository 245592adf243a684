"""The pictures of a run: what was kept of every layer, and the curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["plot_curves", "plot_kept"]

_KEPT, _GONE, _LINE, _OTHER = "#2f6f9f", "#d9dee3", "#2f6f9f", "#c8553d"


def plot_kept(names: Sequence[str], dense: Sequence[int], kept: Sequence[int], path: Path) -> None:
    """Draws, for every gate group, how many of its units stayed.

    Args:
        names: One for each group, in the model's order.
        dense: Units before.
        kept: Units after.
        path: The picture's file.
    """
    figure, axes = _figure(1, width=9, height=1.2 + 0.22 * len(names))
    axis = axes[0]
    rows = range(len(names))
    axis.barh(rows, dense, color=_GONE, label="removed")
    axis.barh(rows, kept, color=_KEPT, label="kept")
    for row, (before, after) in enumerate(zip(dense, kept, strict=True)):
        axis.text(before, row, f" {after}/{before}", va="center", fontsize=7)
    axis.set_yticks(rows, labels=names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("units")
    axis.set_xlim(0, max(dense) * 1.12)
    axis.set_title(f"{sum(kept):,} of {sum(dense):,} units kept")
    axis.legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=130)


def plot_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws loss, accuracy, FLOPs, temperature and noise over the epochs of all phases.

    Args:
        rows: What ``RunLog.rows`` holds.
        path: The picture's file.
    """
    figure, axes = _figure(4, width=9, height=9)
    series = (
        ("loss", (("train_loss", "training", _OTHER), ("eval_loss", "validation", _LINE))),
        ("top-1, %", (("train_top1", "training", _OTHER), ("eval_top1", "validation", _LINE))),
        ("FLOPs, millions", (("expected_flops", "expected", _LINE), ("target_flops", "target", _OTHER))),
        ("gates", (("tau", "temperature", _LINE), ("noise", "scale of the noise", _OTHER))),
    )
    phases = [row["phase"] for row in rows]
    borders = [i - 0.5 for i in range(1, len(phases)) if phases[i] != phases[i - 1]]
    for axis, (title, lines) in zip(axes, series, strict=True):
        scale = 1e6 if "millions" in title else 1
        for column, label, colour in lines:
            points = [(row["epoch"], row[column] / scale) for row in rows if row[column] != ""]
            style = "--" if column.startswith("target") else "-"
            axis.plot(*zip(*points, strict=True), style, color=colour, label=label, marker=".") if points else None
        for border in borders:
            axis.axvline(border, color="#9aa5ae", linewidth=0.8, linestyle=":")
        axis.set_ylabel(title)
        axis.set_xlim(-0.5, len(rows) - 0.5)
        if axis.lines:
            axis.legend(frameon=False)
    for start in [0, *(round(border + 0.5) for border in borders)]:
        axes[0].annotate(phases[start], (start, 1.02), xycoords=("data", "axes fraction"), fontsize=9)
    axes[-1].set_xlabel("epoch")
    figure.savefig(path, dpi=130)


def _figure(rows: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    # Not pyplot: it keeps every figure, and may want a screen.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
