"""Models with nothing left at its initial value, masks, and comparisons: what the equality tests share."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunegate.gated import GatedModel

FAST = (
    "resnet18", "mobilenetv3_small_100", "tf_efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224",
    "mixer_s32_224", "regnety_002",
)  # fmt: skip
SLOW = (
    "resnet50", "resnext50_32x4d", "densenet121", "mobilenetv2_100", "efficientnet_b0",
    "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224",
)  # fmt: skip


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, biases and statistics in float64: zero-initialised branches and unit scales hide faults."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.std() > 1e-6:
                parameter.add_(draw(parameter) * 0.1 * parameter.std())
            elif parameter.numel() and parameter.abs().max() < 0.5:
                parameter.copy_(0.5 * draw(parameter))  # biases, layer scales, tokens
            else:
                parameter.copy_(1 + 0.3 * draw(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * draw(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    return model


def build(name: str, **kwargs: Any) -> nn.Module:
    """A timm model in eval mode, float64, randomised."""
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **kwargs)).eval()


def random_mask(gated: GatedModel, seed: int, share: float = 0.5) -> Tensor:
    """Keeps each unit with the given chance, at least one of every group and never all of a group that has two."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(gated.logits.numel(), generator=generator) < share
    for group in gated.groups:
        part = mask[group.slice]
        at = int(torch.randint(group.size, (1,), generator=generator))
        if not bool(part.any()):
            part[at] = True
        elif bool(part.all()) and group.size > 1:
            part[at] = False
    return mask


def outputs(tree: Any) -> list[Tensor]:
    """All floating-point tensors of a model's output."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def relative_error(a: Any, b: Any) -> float:
    """Largest difference over the largest value, over all outputs."""
    pairs = list(zip(outputs(a), outputs(b), strict=True))
    scale = max(float(x.detach().abs().max()) for x, _ in pairs)
    return max(float((x - y).detach().abs().max()) for x, y in pairs) / scale
