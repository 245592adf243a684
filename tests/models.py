"""Models with nothing left at its initial value, masks, and comparisons: what the equality tests share."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from prunegate.gated import GatedModel
from tools import coverage

FAST = (
    "resnet18", "mobilenetv3_small_100", "tf_efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224",
    "mixer_s32_224", "regnety_002",
)  # fmt: skip
SLOW = (
    "resnet50", "resnext50_32x4d", "densenet121", "mobilenetv2_100", "efficientnet_b0",
    "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224",
)  # fmt: skip


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with random weights, biases and statistics."""
    coverage.randomise(model.double(), torch.Generator().manual_seed(seed))
    return model


def build(name: str, **kwargs: Any) -> nn.Module:
    """A timm model in eval mode, float64, randomised."""
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **kwargs)).eval()


def random_mask(gated: GatedModel, seed: int) -> Tensor:
    """Keeps about half of each group, at least one unit and never all of several."""
    return coverage.random_mask(gated, torch.Generator().manual_seed(seed))


def outputs(tree: Any) -> list[Tensor]:
    """All floating-point tensors of a model's output."""
    return coverage.tensors(tree)


def relative_error(a: Any, b: Any) -> float:
    """Largest difference over the largest value, over all outputs."""
    with torch.no_grad():
        return coverage.apart(outputs(a), outputs(b))
