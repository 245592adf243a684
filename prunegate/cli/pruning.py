"""``prunegate prune``: a one-shot cut, with repair if asked for."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from prunegate.checkpoint import save
from prunegate.cli.images import read_images
from prunegate.cli.models import add_model_arguments, example_for, open_model
from prunegate.errors import PruneGateError
from prunegate.flops import count_flops
from prunegate.hub import save_for_hub
from prunegate.oneshot import one_shot
from prunegate.refitting import refit
from prunegate.scores import SCORES

__all__ = ["add_arguments", "rounding", "run"]


def rounding(text: str) -> int | str:
    """What ``--round-to`` takes: a number, or ``auto``."""
    return text if text == "auto" else int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_model_arguments(parser, "MODEL")
    parser.add_argument("--flops", type=float, help="budget: share of the dense FLOPs, or an absolute number")
    parser.add_argument("--params", type=float, help="budget: share of the dense parameters, or an absolute number")
    parser.add_argument("--score", default="magnitude", choices=sorted(SCORES), help="what stays (default: magnitude)")
    parser.add_argument("--round-to", type=rounding, default=1, metavar="N",
                        help="make kept widths a multiple of this; auto: what the device likes")  # fmt: skip
    parser.add_argument("--ignore", nargs="*", default=[], help="patterns of groups to leave whole")
    parser.add_argument("--data", metavar="FOLDER", help="pictures, without labels, for --score taylor and --refit")
    parser.add_argument("--images", type=int, default=256, metavar="N", help="how many of them (default: 256)")
    parser.add_argument("--refit", action="store_true", help="repair the cut on those pictures, without training")
    parser.add_argument("--out", metavar="FILE", help="where the slim model goes (default: slim.safetensors)")
    parser.add_argument("--hub", metavar="FOLDER", help="write a folder for a model hub, with a model card")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs the command; returns what ``--json`` prints."""
    if (args.refit or args.score == "taylor") and not args.data:
        raise PruneGateError("--refit and --score taylor need pictures: --data FOLDER")
    dense = open_model(args)
    example = example_for(dense, args.input_size)
    images = read_images(args.data, dense, args.images) if args.data else None
    budget = {name: getattr(args, name) for name in ("flops", "params") if getattr(args, name) is not None}
    slim = one_shot(dense, example, args.score, batches=None if images is None else images.split(32),
                    round_to=args.round_to, ignore=args.ignore, **budget).eval()  # fmt: skip
    repaired = len(refit(slim, dense, [images]).layers) if args.refit and images is not None else 0
    found: dict[str, Any] = {"model": args.model, "score": args.score, "refitted_layers": repaired}
    for name, model in (("dense", dense), ("slim", slim)):
        params = sum(parameter.numel() for parameter in model.parameters())
        found[name] = {"flops": count_flops(model, example), "params": params}
    flops = f"{found['dense']['flops']:,}", f"{found['slim']['flops']:,}"
    if args.out or not args.hub:
        found["file"] = args.out or "slim.safetensors"
        save(slim, found["file"])
    if args.hub:
        found["folder"] = args.hub
        save_for_hub(slim, args.hub, {"FLOPs (one multiply-add is one)": flops})
    if not args.json:
        share = {key: found["slim"][key] / found["dense"][key] for key in ("flops", "params")}
        console.print(f"{args.model}: {share['flops']:.1%} of the FLOPs, {share['params']:.1%} of the parameters "
                      f"kept{f'; {repaired} layers repaired' if repaired else ''}", highlight=False)  # fmt: skip
        console.print(f"written to {' and '.join(found[key] for key in ('file', 'folder') if key in found)}",
                      highlight=False, soft_wrap=True)  # fmt: skip
    return found
