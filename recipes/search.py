"""Searches an architecture with gates, and compares it with what random search and a uniform supernet find.

    python recipes/search.py --space mobile --dataset fashion-mnist --data-dir fm --flops 0.5 --seeds 0 1 2

Two spaces: ``mobile``, inverted residuals of timm with kernel 3, 5 or 7, expansion 3 to 6 by gates on the expanded
channels, and a skip where shapes allow it; and ``cell``, the cell of NAS-Bench-201 (Dong and Yang, arXiv 2001.00326):
six edges, each one of five operators, the same in all cells. Every method gets the same budget and the same number of
steps, ends in a plan (JSON), and the network that is built from the plan is trained from scratch:

- ``gates``: weights and gates learn together under ``prunegate.Budget``;
- ``random``: random architectures under the budget, trained for an equal part of the steps; the best in validation;
- ``uniform``: a supernet whose paths are drawn uniformly (Guo et al., arXiv 1904.00420); of random architectures under
  the budget the best in validation with its weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import data
import torch
from timm.data import create_dataset
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn
from torch.nn import functional as F

import prunegate

METHODS = ("gates", "random", "uniform")
EXPANSIONS = (3 / 6, 4 / 6, 1.0)


# ---------------------------------------------------------------------- the spaces


class Mobile(nn.Module):
    """A small mobile network with a choice at every block.

    Args:
        in_chans: Channels of an image.
        classes: Number of classes.
        widths: Channels of each stage; each begins with a block of stride 2.
        depth: Blocks of a stage.
    """

    def __init__(self, in_chans: int, classes: int, widths: Sequence[int] = (16, 24, 32), depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]),
                                  nn.ReLU())  # fmt: skip
        blocks: list[nn.Module] = []
        before = widths[0]
        for width in widths:
            for at in range(depth):
                stride = 2 if at == 0 else 1
                kernels = (3, 5, 7)
                operators: list[nn.Module] = [
                    InvertedResidual(before, width, kernel, stride=stride, exp_ratio=6.0) for kernel in kernels
                ]
                names = [f"mb{kernel}" for kernel in kernels]
                if stride == 1:
                    operators.append(nn.Identity())
                    names.append("skip")
                blocks.append(prunegate.Choice(operators, names))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] to [N, classes]."""
        return self.head(self.blocks(self.stem(x)))


class Nothing(nn.Module):
    """The operator that lets nothing through."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros."""
        return x * 0


def conv(width: int, kernel: int) -> nn.Module:
    """ReLU, convolution, batch norm."""
    return nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False),
                         nn.BatchNorm2d(width))  # fmt: skip


class Cell(nn.Module):
    """Four nodes; every node is the sum of what the edges from all earlier ones bring."""

    def __init__(self, width: int) -> None:
        super().__init__()
        names = ("conv3", "conv1", "skip", "pool", "none")
        self.edges = nn.ModuleDict({
            f"{start}{end}": prunegate.Choice(
                [conv(width, 3), conv(width, 1), nn.Identity(), nn.AvgPool2d(3, 1, 1), Nothing()],
                names, key=f"edge{start}{end}",
            )
            for end in range(1, 4) for start in range(end)
        })  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        nodes = [x]
        for end in range(1, 4):
            total = self.edges[f"0{end}"](nodes[0])
            for start in range(1, end):
                total = total + self.edges[f"{start}{end}"](nodes[start])
            nodes.append(total)
        return nodes[-1]


class Reduction(nn.Module):
    """A residual block of stride 2 between stages."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.ReLU(), nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))
        self.second = conv(width, 3)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(before, width, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, width, H/2, W/2]."""
        return self.second(self.first(x)) + self.shortcut(x)


class Cells(nn.Module):
    """Three stages of cells, as in NAS-Bench-201, narrower.

    Args:
        in_chans: Channels of an image.
        classes: Number of classes.
        width: Channels of the first stage; each further one has twice as many.
        depth: Cells of a stage.
    """

    def __init__(self, in_chans: int, classes: int, width: int = 8, depth: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_chans, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)]
        for stage in range(3):
            if stage:
                layers.append(Reduction(width, 2 * width))
                width *= 2
            layers += [Cell(width) for _ in range(depth)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                  nn.Linear(width, classes))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] to [N, classes]."""
        return self.head(self.features(x))


SPACES = {"mobile": Mobile, "cell": Cells}


# ---------------------------------------------------------------------- the recipe


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs the comparison.

    Args:
        argv: Command line without the program's name; ``None`` takes the process's own.

    Returns:
        One entry for each seed and method: test accuracy in per cent, FLOPs, parameters, what was chosen, seconds.
    """
    args = parse(argv)
    splits = load(args)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for seed in args.seeds:
        for method in args.methods:
            started = time.perf_counter()
            torch.manual_seed(seed)
            model = build(args, splits)
            gated = attach(args, model, splits)
            most = int(args.flops * largest(gated))
            {"gates": by_gates, "random": by_random, "uniform": by_uniform}[method](args, gated, splits, most)
            text = gated.plan().to_json()
            name = f"{args.space}-{method}-{seed}"
            (folder / f"{name}.json").write_text(text)
            searched = time.perf_counter() - started
            # What another program would do: build the network, cut it along the plan, train it from scratch.
            torch.manual_seed(seed)
            slim = prunegate.apply_plan(build(args, splits), prunegate.Plan.from_json(text))
            train(slim, slim.parameters(), splits["train"], args.train_steps, args)
            example = splits["train"][0][:1]
            result = {
                "space": args.space, "method": method, "seed": seed,
                "top1": accuracy(slim.eval(), splits["test"]), "flops": prunegate.count_flops(slim, example),
                "budget": most, "params": sum(p.numel() for p in slim.parameters()), "chosen": gated.chosen,
                "search_seconds": round(searched, 1), "seconds": round(time.perf_counter() - started, 1),
            }  # fmt: skip
            results.append(result)
            print(f"{name}: {result['top1']:.2f}% with {result['flops']:,} FLOPs of {most:,} "
                  f"({result['seconds']:.0f} s)", flush=True)  # fmt: skip
            (folder / f"{args.space}.json").write_text(json.dumps(results, indent=1))
    print(table(results))
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", choices=tuple(SPACES), default="mobile")
    parser.add_argument("--dataset", default="digits", help="digits, fashion-mnist, or the name of a timm dataset")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--img-size", type=int, default=28)
    parser.add_argument("--train-size", type=int, default=10_000, help="most images to train and to validate on")
    parser.add_argument("--test-size", type=int, default=10_000, help="most images to test on")
    parser.add_argument("--flops", type=float, default=0.5, help="share of the costliest network of the space")
    parser.add_argument("--search-steps", type=int, default=600)
    parser.add_argument("--train-steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--candidates", type=int, default=30, help="architectures that a uniform supernet rates")
    parser.add_argument("--trials", type=int, default=4, help="architectures that random search trains")
    parser.add_argument("--paths", choices=("single", "topk", "all"), default="single")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="runs/search")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    return args


Split = tuple[Tensor, Tensor]


def load(args: argparse.Namespace) -> dict[str, Split]:
    """Images float32 ``[n, channels, size, size]`` and labels of three parts; a fifth of training is validation."""
    images, labels = read(args, "train", args.train_size)
    kept, held = data.split_off(len(labels), 0.2, 0)
    return {
        "train": (images[kept], labels[kept]),
        "validation": (images[held], labels[held]),
        "test": read(args, "test", args.test_size),
    }


def read(args: argparse.Namespace, split: str, most: int) -> Split:
    """The first images of one split, in memory."""
    if args.dataset == "digits":
        source: Any = data._digits(split, "L")
    elif args.dataset == "fashion-mnist":
        source = data._idx_folder(Path(args.data_dir or "."), split, "L")
    else:
        source = create_dataset(args.dataset, root=args.data_dir, split="train" if split == "train" else "validation")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:most].tolist()
    images, labels = [], []
    for index in order:
        image, label = source[index]
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, -1).permute(2, 0, 1).float()
        images.append(F.interpolate(pixels[None], (args.img_size, args.img_size), mode="bilinear")[0])
        labels.append(label)
    stacked = torch.stack(images) / 255
    return (stacked - 0.5) / 0.5, torch.tensor(labels)


def build(args: argparse.Namespace, splits: dict[str, Split]) -> nn.Module:
    """A network with every choice of the space."""
    images, labels = splits["train"]
    return SPACES[args.space](images.shape[1], int(labels.max()) + 1)


def attach(args: argparse.Namespace, model: nn.Module, splits: dict[str, Split]) -> prunegate.GatedModel:
    """Gates on the choices, and on the expanded channels of the mobile space."""
    example = splits["train"][0][:1]
    if args.space == "cell":
        return prunegate.attach(model, example, units=(), paths=args.paths)
    # The channels of the stream between blocks stay: kernels, skips and expansions are what is searched.
    return prunegate.attach(model, example, ignore=["stem*", "*.bn3*"], paths=args.paths)


def by_gates(args: argparse.Namespace, gated: prunegate.GatedModel, splits: dict[str, Split], most: int) -> None:
    """Weights and gates learn together."""
    expanded = {"min_keep": EXPANSIONS[0]} if len(gated.groups) > len(gated.chosen) else {}
    budget = prunegate.Budget(gated, flops=most, steps=args.search_steps, **expanded)
    groups = budget.param_groups(args.lr)
    train(gated, groups, splits["train"], args.search_steps, args, budget)


def by_random(args: argparse.Namespace, gated: prunegate.GatedModel, splits: dict[str, Split], most: int) -> None:
    """Trains a few random architectures, each for an equal part of the steps, and keeps the best."""
    found: list[tuple[float, Tensor]] = []
    for _ in range(args.trials):
        gated.mask = random_mask(gated, most)
        slim = gated.export()
        for module in slim.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        train(slim, slim.parameters(), splits["train"], args.search_steps // args.trials, args)
        found.append((accuracy(slim.eval(), splits["validation"]), gated.mask))
    gated.mask = max(found, key=lambda each: each[0])[1]


def by_uniform(args: argparse.Namespace, gated: prunegate.GatedModel, splits: dict[str, Split], most: int) -> None:
    """Trains a supernet on uniform paths, and keeps the architecture that does best with its weights."""
    train(gated, gated.parameters(), splits["train"], args.search_steps, args, draw=lambda: random_mask(gated))
    found: list[tuple[float, Tensor]] = []
    for _ in range(args.candidates):
        gated.mask = random_mask(gated, most)
        gated.train()  # running statistics belong to no single path: batch norms take those of the batch
        found.append((accuracy(gated, splits["validation"]), gated.mask))
    gated.mask = max(found, key=lambda each: each[0])[1]


def largest(gated: prunegate.GatedModel) -> int:
    """FLOPs of the costliest network: every choice at its costliest operator, the others as they are."""
    mask = gated.mask
    for own in gated.gate_map.choices.values():
        costs = []
        for at in range(own.start, own.stop):
            mask[own] = False
            mask[at] = True
            costs.append(gated.cost.flops(mask))
        mask[own] = False
        mask[own.start + costs.index(max(costs))] = True
    return gated.cost.flops(mask)


def random_mask(gated: prunegate.GatedModel, most: int | None = None) -> Tensor:
    """A random architecture; one that costs between 85% and 100% of ``most``, if that is given."""
    for _ in range(10_000):
        mask = torch.ones(gated.logits.numel(), dtype=torch.bool)
        for group in gated.groups:
            own = group.slice
            if group.kind == "choice":
                mask[own] = False
                mask[own.start + int(torch.randint(group.size, ()))] = True
            else:
                share = EXPANSIONS[int(torch.randint(len(EXPANSIONS), ()))]
                mask[own.start + max(1, round(share * group.size)) : own.stop] = False
        if most is None or 0.85 * most <= gated.cost.flops(mask) <= most:
            return mask
    raise SystemExit(f"no random architecture costs between 85% and 100% of {most:,} FLOPs; choose another --flops")


def train(model: nn.Module, parameters: Any, split: Split, steps: int, args: argparse.Namespace,
          budget: prunegate.Budget | None = None, draw: Any = None) -> None:  # fmt: skip
    """Trains with AdamW and a cosine schedule.

    Args:
        model: Dense, gated or slim.
        parameters: What the optimizer gets.
        split: Images and labels.
        steps: Number of steps.
        args: Batch size and learning rate.
        budget: Of a search.
        draw: Gives the mask of each step, for a supernet.
    """
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    stream = batches(split, args.batch_size)
    for _ in range(steps):
        images, labels = next(stream)
        if draw is not None:
            model.mask = draw()  # type: ignore[assignment]
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.05)
        if budget is not None:
            loss = loss + budget.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if budget is not None:
            budget.step()


def batches(split: Split, size: int) -> Iterator[Split]:
    """Random batches without end."""
    images, labels = split
    while True:
        order = torch.randperm(len(labels))
        for start in range(0, len(labels) - size + 1, size):
            chosen = order[start : start + size]
            yield images[chosen], labels[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, size: int = 256) -> float:
    """Top-1 in per cent, in the mode in which the model is."""
    images, labels = split
    hits = sum(
        int((model(images[at : at + size]).argmax(1) == labels[at : at + size]).sum())
        for at in range(0, len(labels), size)
    )
    return 100 * hits / len(labels)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    lines = ["| space | method | top-1 (%) | FLOPs | parameters | seconds |", "| --- | --- | --- | --- | --- | --- |"]
    for method in dict.fromkeys(each["method"] for each in results):
        own = [each for each in results if each["method"] == method]
        top1 = [each["top1"] for each in own]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        means = {key: statistics.mean(each[key] for each in own) for key in ("flops", "params", "seconds")}
        lines.append(
            f"| {own[0]['space']} | {method} | {statistics.mean(top1):.2f} ± {spread:.2f} ({len(own)} seeds) | "
            f"{means['flops']:,.0f} | {means['params']:,.0f} | {means['seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
