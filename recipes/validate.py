"""Evaluates a slim model, or any of timm's, the way timm's own ``validate.py`` does, on a folder or a named data set.

    python recipes/validate.py runs/demo/slim.safetensors --dataset digits
    python recipes/validate.py resnet50-half/ --data-dir /data/imagenet/val
    python recipes/validate.py resnet50 --pretrained --data-dir /data/imagenet/val

Images are resized, cropped and normalised as the model's own configuration says, unless the flags say otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import torch
from data import ArrayDataset, read_named
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy
from torch.nn import functional as F

import prunegate
from prunegate.cli.models import add_model_arguments, open_model

__all__ = ["evaluate", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the evaluation and prints the result, one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, "MODEL")
    parser.add_argument("--data-dir", metavar="DIR", help="root of the data set, or a folder with one of each class")
    parser.add_argument("--dataset", default="", help="digits, fashion-mnist, or a timm name; empty: ImageFolder")
    parser.add_argument("--split", default="validation", help="split of the data set")
    parser.add_argument("--class-map", default="", metavar="FILE", help="class to index mapping")
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-j", "--workers", type=int, default=2)
    parser.add_argument("--img-size", type=int, help="side of the images; the model's own where left out")
    parser.add_argument("--in-chans", type=int, help="colour channels; the model's own where left out")
    parser.add_argument("--crop-pct", type=float, help="centre crop")
    parser.add_argument("--mean", type=float, nargs="+", help="mean of the pixels")
    parser.add_argument("--std", type=float, nargs="+", help="standard deviation of the pixels")
    parser.add_argument("--interpolation", default="", help="how images are resized")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        model = open_model(args)
    except prunegate.PruneGateError as error:
        print(f"validate: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"model": args.model, **evaluate(model, args)}))
    return 0


@torch.inference_mode()
def evaluate(model: torch.nn.Module, args: argparse.Namespace) -> dict[str, float]:
    """Top-1, top-5, loss and images per second of a model on what the arguments name."""
    device = torch.device(args.device)
    model = model.eval().to(device)
    config = resolve_data_config(vars(args), model=model)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    dataset: ArrayDataset | None = read_named(args.dataset, args.data_dir, args.split, mode)
    if dataset is None:
        dataset = create_dataset(args.dataset, root=args.data_dir, split=args.split, class_map=args.class_map,
                                 input_img_mode=mode)  # fmt: skip
    loader = create_loader(
        dataset, input_size=config["input_size"], batch_size=args.batch_size, interpolation=config["interpolation"],
        mean=config["mean"], std=config["std"], num_workers=args.workers, crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"], device=device, use_prefetcher=device.type == "cuda",
    )  # fmt: skip
    losses, first, fifth = AverageMeter(), AverageMeter(), AverageMeter()
    started = time.perf_counter()
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        output = model(images)
        output = output[0] if isinstance(output, tuple | list) else output
        top1, top5 = accuracy(output, labels, topk=(1, min(5, output.shape[1])))
        for meter, value in ((losses, F.cross_entropy(output, labels)), (first, top1), (fifth, top5)):
            meter.update(float(value), len(labels))
    speed = first.count / (time.perf_counter() - started)
    return {"top1": round(first.avg, 4), "top5": round(fifth.avg, 4), "loss": round(losses.avg, 5),
            "images": first.count, "images_per_second": round(speed, 1)}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
