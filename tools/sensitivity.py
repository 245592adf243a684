"""Before any training: what each group of units costs, and what goes wrong when its lowest-scored quarter goes.

    python tools/sensitivity.py resnet50 --pretrained --data pictures/
    python tools/sensitivity.py resnet18 --checkpoint mine.pth --score fpgm --json

For each group alone, the quarter of its units with the least score is closed and the model runs on calibration images
(random ones where there are none). Shown are the share of FLOPs and parameters that this saves, the change of the
output (root mean square, as a share of the output's own spread), and how often the predicted class stays the same.
No labels are needed. The picture sets saving against change: groups at the top left are best left alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

import prunegate
from prunegate.batches import logits_of
from prunegate.cli.images import read_images
from prunegate.cli.models import add_model_arguments, example_for, open_model
from prunegate.scores import SCORES, score_units

__all__ = ["main", "measure", "plot"]


def measure(gated: prunegate.GatedModel, scores: Tensor, images: Tensor, share: float = 0.25) -> list[dict[str, Any]]:
    """One record per group that has more than one unit, in the order of the network.

    Args:
        gated: An attached model; its mask is released afterwards.
        scores: float64 ``[n_gates]``; the least go.
        images: What the model runs on.
        share: Of each group, in (0, 1); at least one unit goes and one stays.
    """
    gated.eval()
    cost, records = gated.cost, []
    with torch.no_grad():
        whole = logits_of(gated(images)).flatten(0, -2)
        spread = float(whole.std()) or 1.0
        for group in gated.groups:
            if group.size < 2:
                continue
            count = min(group.size - 1, max(1, round(share * group.size)))
            mask = torch.ones(gated.logits.numel(), dtype=torch.bool)
            mask[group.slice.start + torch.argsort(scores[group.slice])[:count]] = False
            gated.mask = mask
            cut = logits_of(gated(images)).flatten(0, -2)
            records.append({
                "group": group.name, "kind": group.kind, "units": group.size, "closed": count,
                "flops_saved": 1 - cost.flops(mask) / max(cost.flops(), 1),
                "params_saved": 1 - cost.params(mask) / max(cost.params(), 1),
                "change": float((cut - whole).square().mean().sqrt()) / spread,
                "same_class": float((cut.argmax(-1) == whole.argmax(-1)).double().mean()),
            })  # fmt: skip
    gated.mask = None
    return records


def plot(records: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draws change against saving, the most sensitive groups by name."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.scatter([100 * r["flops_saved"] for r in records], [r["change"] for r in records], color="#2f6f9f")
    for record in sorted(records, key=lambda r: -r["change"])[:8]:
        axis.annotate(record["group"], (100 * record["flops_saved"], record["change"]), fontsize=8,
                      xytext=(4, 4), textcoords="offset points")  # fmt: skip
    axis.set_xlabel("FLOPs saved, %")
    axis.set_ylabel("change of the output, share of its spread")
    axis.set_title(title)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, "MODEL")
    parser.add_argument("--score", default="magnitude", choices=sorted(SCORES), help="what goes first")
    parser.add_argument("--share", type=float, default=0.25, help="how much of each group goes (default: 0.25)")
    parser.add_argument("--data", metavar="FOLDER", help="pictures to run on; random ones where left out")
    parser.add_argument("--images", type=int, default=32, metavar="N", help="how many (default: 32)")
    parser.add_argument("--out", metavar="FILE", help="where the picture goes (default: sensitivity.png)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    try:
        if not 0 < args.share < 1:
            raise prunegate.PruneGateError(f"--share {args.share} was given; expected a number between 0 and 1")
        model = open_model(args)
        images = (read_images(args.data, model, args.images) if args.data
                  else example_for(model, args.input_size, args.images))  # fmt: skip
        gated = prunegate.attach(model, images[:1])
        scores = score_units(gated, args.score, images.split(8))
    except prunegate.PruneGateError as error:
        print(f"sensitivity: {error}", file=sys.stderr)
        return 1
    records = measure(gated, scores, images, args.share)
    seen = f"{len(images)} {'pictures' if args.data else 'random images'}"
    title = f"{Path(args.model).name}: {args.share:.0%} of one group closed, by {args.score}, on {seen}"
    plot(records, title, Path(args.out or "sensitivity.png"))
    if args.json:
        print(json.dumps({"model": args.model, "score": args.score, "images": seen, "groups": records}, indent=2))
        return 0
    table = Table(title=title, caption="the most sensitive groups first")
    for name in ("group", "units", "closed", "FLOPs saved", "parameters saved", "change of the output", "same class"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for record in sorted(records, key=lambda r: -r["change"]):
        table.add_row(record["group"], str(record["units"]), str(record["closed"]), f"{record['flops_saved']:.2%}",
                      f"{record['params_saved']:.2%}", f"{record['change']:.3f}",
                      f"{record['same_class']:.0%}")  # fmt: skip
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
