"""What the measurements on Fashion-MNIST share: its images, two small networks, a training loop and a count."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import prunegate

sys.path.append(str(Path(__file__).parents[1] / "recipes"))

from data import read_named

__all__ = ["NETWORKS", "Block", "accuracy", "predictions", "read", "residual", "train", "transformer"]


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width_out)
        self.second = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(width_out)
        self.around: nn.Module = nn.Identity()
        if width_in != width_out:
            self.around = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] to [N, out, H / stride, W / stride]."""
        inner = self.first_norm(self.first(x)).relu()
        return (self.second_norm(self.second(inner)) + self.around(x)).relu()


def residual() -> nn.Module:
    """A residual network of 78,000 parameters for 28 by 28 pixels."""
    stem = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def transformer() -> nn.Module:
    """Timm's vision transformer with four blocks of width 64 on patches of 4 by 4 pixels: 205,000 parameters."""
    network: nn.Module = VisionTransformer(img_size=28, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=4,
                                           num_heads=4)  # fmt: skip
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {"residual": residual, "transformer": transformer}
"""By name."""


def read(folder: str, split: str) -> tuple[Tensor, Tensor]:
    """Images ``[n, 1, 28, 28]``, about normal, and labels of a split (``"train"`` or ``"test"``)."""
    part = read_named("fashion-mnist", folder, split, "L")
    assert part is not None
    images = (torch.from_numpy(part.images.copy()).float()[:, None] / 255 - 0.286) / 0.353
    return images, torch.from_numpy(part.labels)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, flops: float | None = None,
          lr: float = 4e-3) -> nn.Module:  # fmt: skip
    """Trains a model in one cycle of the learning rate; with a budget, searches, cuts and gives the slim model.

    Args:
        model: Any classifier of the images; trained in place.
        images: All images.
        labels: Their classes.
        epochs: How often all are seen.
        flops: Share of the dense FLOPs to search for.
        lr: Largest learning rate of the cycle, AdamW's.
    """
    steps = epochs * (len(images) // 128)
    trained = model if flops is None else prunegate.attach(model.eval(), images[:1])
    budget = None if flops is None else prunegate.Budget(trained, flops=flops, steps=steps)
    optimizer = torch.optim.AdamW(trained.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    trained.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images))[: len(images) // 128 * 128].split(128):
            cross_entropy(trained(images[index]), labels[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if budget is not None:
                budget.step()
    slim: nn.Module = trained.export() if isinstance(trained, prunegate.GatedModel) else trained
    return slim.eval()


def accuracy(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Share of the images whose class is named, in per cent."""
    return 100 * float((predictions(model, images) == labels).float().mean())


@torch.no_grad()
def predictions(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The class that the model names of each image, int64 ``[n]``."""
    return torch.cat([model(part).argmax(1) for part in images.split(1000)])
