"""Loaders for the three parts of a data set: one to train on, one for every choice, one that is read at the end."""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_dataset, create_loader
from torch.utils.data import DataLoader, Dataset, IterableDataset

__all__ = ["CLASSES", "ArrayDataset", "create_loaders", "create_mixup", "read_named", "split_off"]

CLASSES = {"digits": 10, "fashion-mnist": 10}
"""Number of classes of the data sets that this module reads itself."""


class ArrayDataset(Dataset):
    """Grey images that lie in memory.

    Args:
        images: uint8 ``[n, height, width]``.
        labels: int64 ``[n]``.
        mode: ``"L"`` or ``"RGB"``: what the network takes.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, mode: str) -> None:
        self.images, self.labels, self.mode = images, labels, mode
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The transformed image and its label."""
        image = Image.fromarray(self.images[index]).convert(self.mode)
        return (self.transform(image) if self.transform else image), int(self.labels[index])


class Part(Dataset):
    """Some of the samples of a data set whose transform it shares, so that timm's loaders can set it."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, list(indices)

    @property
    def transform(self) -> Any:
        """What happens to every image."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        """The sample at a place of this part."""
        return self.dataset[self.indices[index]]


def split_off(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Divides ``range(count)`` at random, the same way for the same seed.

    Args:
        count: Number of samples.
        fraction: Share of the second part, in (0, 1).
        seed: Of the shuffle.

    Returns:
        The larger and the smaller part, each in ascending order.

    Raises:
        ValueError: One of the parts would be empty.
    """
    held = round(count * fraction)
    if not 0 < held < count:
        raise ValueError(
            f"a fraction of {fraction} of {count} samples leaves one side empty; give a fraction between 0 and 1"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held:]), sorted(order[:held])


def create_loaders(args: argparse.Namespace, config: dict[str, Any], device: torch.device,
                   ) -> tuple[DataLoader, DataLoader, DataLoader]:  # fmt: skip
    """Loaders of the training, validation and test parts.

    The validation part comes out of the training split unless ``--val-split`` names one. Training images are
    augmented, the others never.

    Args:
        args: The recipe's arguments.
        config: Data configuration of the model, from ``timm.data.resolve_data_config``.
        device: Where batches go.

    Raises:
        ValueError: The data set cannot be divided and names no validation split.
    """
    mode = "L" if config["input_size"][0] == 1 else "RGB"

    def split(name: str, training: bool = False) -> Dataset:
        own = read_named(args.dataset, args.data_dir, name, mode)
        if own is not None:
            return own
        return create_dataset(args.dataset, root=args.data_dir, split=name, is_training=training, input_img_mode=mode,
                              class_map=args.class_map, download=args.dataset_download, batch_size=args.batch_size,
                              seed=args.seed)  # fmt: skip

    # Two views of one split: each has a transform of its own.
    train, held, test = split(args.train_split, training=True), split(args.val_split or args.train_split), split(
        args.test_split
    )
    if not args.val_split:
        if isinstance(train, IterableDataset):
            raise ValueError(f"{args.dataset} is a stream and cannot be divided; name a split with --val-split")
        kept, validation = split_off(len(train), args.val_fraction, args.seed)
        train, held = Part(train, kept), Part(held, validation)

    common: dict[str, Any] = {
        "input_size": config["input_size"], "mean": config["mean"], "std": config["std"], "num_workers": args.workers,
        "distributed": args.distributed, "pin_memory": args.pin_mem, "device": device,
        "persistent_workers": args.workers > 0,
    }  # fmt: skip
    plain = {
        **common, "batch_size": args.validation_batch_size, "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"], "crop_mode": config["crop_mode"],
    }  # fmt: skip
    augmented = {
        **common, "batch_size": args.batch_size, "is_training": True, "no_aug": args.no_aug, "re_prob": args.reprob,
        "re_mode": args.remode, "scale": args.scale, "ratio": args.ratio, "hflip": args.hflip, "vflip": args.vflip,
        "color_jitter": args.color_jitter, "auto_augment": args.aa,
        "interpolation": config["interpolation"] if args.no_aug else args.train_interpolation,
    }  # fmt: skip
    return create_loader(train, **augmented), create_loader(held, **plain), create_loader(test, **plain)


def create_mixup(args: argparse.Namespace) -> Mixup | None:
    """The mixup and cutmix that the arguments ask for; its targets are soft and smoothed."""
    if args.mixup <= 0 and args.cutmix <= 0:
        return None
    return Mixup(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, prob=args.mixup_prob,
                 switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
                 num_classes=args.num_classes)  # fmt: skip


def read_named(dataset: str, folder: str | None, split: str, mode: str) -> ArrayDataset | None:
    """A split of a data set in :data:`CLASSES`; ``None`` for any other name.

    Args:
        dataset: Its name.
        folder: Where the files of Fashion-MNIST are.
        split: ``"train"``, or any other name for the test split.
        mode: ``"L"`` or ``"RGB"``.
    """
    if dataset == "digits":
        return _digits(split, mode)
    return _idx_folder(Path(folder or "."), split, mode) if dataset == "fashion-mnist" else None


def _digits(split: str, mode: str) -> ArrayDataset:
    """scikit-learn's 1,797 digits of 8 by 8 pixels; a fifth of every class, always the same, is the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    chosen = np.sort(train if split == "train" else test)
    return ArrayDataset(pixels[chosen], labels[chosen], mode)


def _idx_folder(folder: Path, split: str, mode: str) -> ArrayDataset:
    """A folder with the four files of MNIST and its relatives, packed or not."""
    prefix = "train" if split == "train" else "t10k"
    images, labels = (_read_idx(folder, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    return ArrayDataset(images, labels.astype(np.int64), mode)


def _read_idx(folder: Path, name: str) -> np.ndarray:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            dims = data[3]  # the magic number: two zeros, the type (8: uint8), the number of dimensions
            shape = np.frombuffer(data, ">i4", count=dims, offset=4)
            return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)
    raise FileNotFoundError(f"{folder} holds neither {name} nor {name}.gz; --data-dir names the folder with them")
