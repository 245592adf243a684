"""Draws accuracy against FLOPs, and against latency where it was measured, with the front of each method.

    python tools/pareto.py runs/budgets/budgets.json runs/search/cell.json --out pareto.png

A file is a JSON list with an object for each network: ``method``, ``top1`` (per cent), ``flops``, and perhaps
``latency_ms``; what ``recipes/search.py`` and ``recipes/budgets.py`` write.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw", "front", "main", "read"]

_AXES = {"flops": "FLOPs (one multiply-add is one)", "latency_ms": "latency (ms)"}


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in cost and accuracy at once, by rising cost.

    Args:
        points: Pairs of cost and accuracy.

    Example:
        >>> front([(1.0, 50.0), (2.0, 40.0), (3.0, 60.0)])
        [(1.0, 50.0), (3.0, 60.0)]
    """
    found: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or accuracy > found[-1][1]:
            found.append((cost, accuracy))
    return found


def read(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The networks of several files.

    Raises:
        ValueError: A file is not such a list.
    """
    networks: list[dict[str, Any]] = []
    for path in paths:
        try:
            entries = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        for at, entry in enumerate(entries if isinstance(entries, list) else [None]):
            missing = [key for key in ("method", "top1", "flops") if not isinstance(entry, dict) or key not in entry]
            if missing:
                raise ValueError(
                    f"{path}: entry {at} lacks {missing}; expected a list of objects with method, top1 and flops"
                )
            networks.append(entry)
    if not networks:
        raise ValueError("the files hold no networks")
    return networks


def draw(networks: Sequence[dict[str, Any]], out: str | Path) -> list[str]:
    """Draws one panel for each cost that any network has, and returns the costs drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    costs = [cost for cost in _AXES if any(cost in each for each in networks)]
    figure = Figure(figsize=(5.5 * len(costs), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(costs), squeeze=False)[0]
    for panel, cost in zip(panels, costs, strict=True):
        for method in dict.fromkeys(each["method"] for each in networks):
            points = [(each[cost], each["top1"]) for each in networks if each["method"] == method and cost in each]
            if not points:
                continue
            dots = panel.scatter(*zip(*points, strict=True), s=14, alpha=0.5)
            panel.plot(*zip(*front(points), strict=True), color=dots.get_facecolor()[0][:3], label=method)
        panel.set_xlabel(_AXES[cost])
        panel.set_ylabel("top-1 (%)")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(out, dpi=130)
    return costs


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="JSON files")
    parser.add_argument("--out", default="pareto.png", help="the picture: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    try:
        networks = read(args.results)
    except (OSError, ValueError) as error:
        print(f"pareto: {error}", file=sys.stderr)
        return 2
    costs = draw(networks, args.out)
    for cost in costs:
        points = [(each[cost], each["top1"]) for each in networks if cost in each]
        print(f"front by {cost}: " + "; ".join(f"{a:,.6g}: {b:.2f}%" for a, b in front(points)))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
