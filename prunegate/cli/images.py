"""Pictures from a folder, as a model wants them: for calibration, labels are not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunegate.errors import PruneGateError

__all__ = ["read_images"]

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_images(folder: str, model: nn.Module, count: int, seed: int = 0) -> Tensor:
    """Up to ``count`` pictures from anywhere under a folder, prepared as for the model's evaluation.

    Args:
        folder: Where to look.
        model: Its ``pretrained_cfg`` says size, mean and so on.
        count: How many, at random where there are more.
        seed: Of the choice.

    Returns:
        float32 ``[count, channels, height, width]``.

    Raises:
        PruneGateError: There are none, or Pillow cannot read one.
    """
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in _ENDINGS)
    if not found:
        raise PruneGateError(f"{folder} holds no pictures ({', '.join(_ENDINGS)}); --data names a folder with some")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    config = resolve_model_data_config(model)
    transform: Any = create_transform(**config)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    pictures = []
    for at in sorted(order):
        try:
            with Image.open(found[at]) as picture:
                pictures.append(transform(picture.convert(mode)))
        except OSError as error:
            raise PruneGateError(f"{found[at]} cannot be read as a picture: {error}") from error
    return torch.stack(pictures)
