"""What the examples share: scikit-learn's handwritten digits, a small network, and a look at what came out."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import prunegate

__all__ = ["accuracy", "data", "network", "report"]


def data(batch_size: int = 64) -> tuple[DataLoader, DataLoader]:
    """Loaders of 1,437 training and 360 test images, ``[1, 8, 8]``."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    loader = DataLoader(TensorDataset(x[train], y[train]), batch_size, shuffle=True, drop_last=True)
    return loader, DataLoader(TensorDataset(x[test], y[test]), 360)


def network() -> nn.Sequential:
    """Three convolutions with batch norm and a classifier."""
    layers: list[nn.Module] = []
    for width_in, width_out in ((1, 32), (32, 32), (32, 64)):
        layers += [nn.Conv2d(width_in, width_out, 3, padding=1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Share of the images whose class the model names."""
    model.eval()
    device = next(model.parameters()).device
    hits = [(model(images.to(device)).argmax(1).cpu() == labels).float() for images, labels in loader]
    return float(torch.cat(hits).mean())


def report(slim: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Prints and returns the test accuracy and the share of the dense FLOPs."""
    example: Tensor = torch.zeros(1, 1, 8, 8)
    slim = slim.cpu()
    share = prunegate.count_flops(slim, example) / prunegate.count_flops(network(), example)
    found = accuracy(slim, loader), share
    print(f"{found[0]:.1%} of the test images right, with {found[1]:.1%} of the FLOPs")
    return found
