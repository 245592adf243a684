"""Fashion-MNIST in memory: a training part, a validation part cut from the training file, and the test file."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["HOW_TO_GET", "Images", "load", "load_test", "made_up"]

HOW_TO_GET = """Fashion-MNIST's four files (train-images-idx3-ubyte.gz and so on) are needed. On Debian or Ubuntu

    apt-get install dataset-fashion-mnist        # from non-free; then --data /usr/share/datasets/fashion-mnist

or unpacked without root

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion
    # then --data fashion/usr/share/datasets/fashion-mnist

torchvision's own download (its FashionMNIST/raw folder) serves as well."""

_TRAINING_IMAGES = 10_240
_VALIDATION_IMAGES = 5_000
_SPLIT_SEED = 2024


@dataclass(frozen=True)
class Images:
    """Images with labels, normalised.

    Attributes:
        images: float32 ``[n, 1, size, size]``.
        labels: int64 ``[n]``.
    """

    images: Tensor
    labels: Tensor

    def batches(self, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``steps`` batches in an order that depends on the seed alone; every other image is mirrored, at random.

        Every image comes once before any comes again.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.zeros(0, dtype=torch.int64)
        for _ in range(steps):
            while order.numel() < size:
                order = torch.cat([order, torch.randperm(len(self.labels), generator=generator)])
            picked, order = order[:size], order[size:]
            images = self.images[picked]
            mirrored = torch.rand(size, generator=generator) < 0.5
            yield torch.where(mirrored[:, None, None, None], images.flip(-1), images), self.labels[picked]

    def part(self, n: int) -> Images:
        """The first ``n``."""
        return Images(self.images[:n], self.labels[:n])


def load(folder: Path, size: int) -> tuple[Images, Images]:
    """The training and the validation part, both from the training file; the test file is not opened.

    Args:
        folder: Where the files are.
        size: 28, or a divisor of it, to which images are averaged.
    """
    images, labels = _read(folder, "train", size)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    training, validation = order[:_TRAINING_IMAGES], order[-_VALIDATION_IMAGES:]
    return Images(images[training], labels[training]), Images(images[validation], labels[validation])


def load_test(folder: Path, size: int) -> Images:
    """The test part, for the one reading at the end."""
    return Images(*_read(folder, "t10k", size))


def made_up(size: int, n: int = 640) -> Images:
    """Blobs whose place tells their class, for ``--smoke``: learnable in a few steps, and no file needed."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 10
    images = 0.3 * torch.randn(n, 1, size, size, generator=generator)
    for label in range(10):
        row, column = (place * size // 4 for place in divmod(label, 4))
        images[labels == label, :, row : row + 2, column : column + 2] += 3
    return Images(images, labels)


def _read(folder: Path, part: str, size: int) -> tuple[Tensor, Tensor]:
    pixels = _idx(folder, f"{part}-images-idx3-ubyte").reshape(-1, 1, 28, 28)
    labels = _idx(folder, f"{part}-labels-idx1-ubyte")
    images = torch.from_numpy(pixels.astype(np.float32)) / 255
    if size != 28:
        images = F.avg_pool2d(images, 28 // size)
    # Mean and deviation of the training pixels at full size.
    return (images - 0.286) / 0.353, torch.from_numpy(labels.astype(np.int64))


def _idx(folder: Path, name: str) -> np.ndarray:
    for path, opener in [(folder / name, open), (folder / f"{name}.gz", gzip.open)]:
        if path.is_file():
            with opener(path, "rb") as file:
                data = file.read()
            return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    raise SystemExit(f"{folder} holds neither {name} nor {name}.gz.\n\n{HOW_TO_GET}")
