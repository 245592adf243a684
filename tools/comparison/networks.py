"""The networks that are pruned: timm's, at sizes that one core trains in a minute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import nn

__all__ = ["NETWORKS", "Network"]


@dataclass(frozen=True)
class Network:
    """How to build a network.

    Attributes:
        size: Side of its images.
        build: Makes it, with random weights.
        about: For the report.
    """

    size: int
    build: Callable[[], nn.Module]
    about: str

    def fresh(self, seed: int) -> nn.Module:
        """A network with the random weights of a seed."""
        torch.manual_seed(seed)
        return self.build()


def _timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=10, in_chans=1, **arguments)


def _mobile(width: int) -> nn.Module:
    """Inverted residuals as in MobileNetV2, three stages of widths 1, 2 and 4 times ``width``."""
    stages = [[f"ds_r1_k3_s1_e1_c{width}"],
              *([f"ir_r2_k3_s{stride}_e4_c{many * width}"] for stride, many in ((1, 1), (2, 2), (2, 4)))]  # fmt: skip
    return EfficientNet(decode_arch_def(stages), num_classes=10, in_chans=1, stem_size=width, num_features=16 * width,
                        act_layer=nn.ReLU6)  # fmt: skip


NETWORKS = {
    "mobile": Network(14, partial(_mobile, 16), "MobileNetV2's blocks, widths 16/32/64, 14x14"),
    "deit": Network(28, _timm("deit_tiny_patch16_224", img_size=28, patch_size=7, embed_dim=64, depth=4, num_heads=4),
                    "deit_tiny, width 64, 4 blocks of 4 heads, 16 patches of 7x7"),
    "convnext": Network(28, _timm("convnext_atto", patch_size=3, depths=(1, 1, 2, 1), dims=(16, 32, 64, 128)),
                        "convnext_atto, depths 1/1/2/1, widths 16/32/64/128, patches of 3x3, 28x28"),
    "swin": Network(28, _timm("swin_tiny_patch4_window7_224", img_size=28, patch_size=4, window_size=4, embed_dim=32,
                              depths=(2, 2), num_heads=(2, 4)),
                    "swin_tiny, widths 32/64, 2 + 2 blocks of 2 and 4 heads, windows of 4x4 patches of 4x4, 28x28"),
    "resnet": Network(14, _timm("resnet18", channels=(16, 32, 64, 128)), "resnet18, widths 16/32/64/128, 14x14"),
    "mobile-small": Network(14, partial(_mobile, 8), "MobileNetV2's blocks, widths 8/16/32, 14x14"),
    "deit-small": Network(14, _timm("deit_tiny_patch16_224", img_size=14, patch_size=7, embed_dim=64, depth=4,
                                    num_heads=4), "deit_tiny, width 64, 4 blocks of 4 heads, 4 patches of 7x7"),
    "mobilenetv3": Network(28, _timm("mobilenetv3_small_050"), "mobilenetv3_small_050, 28x28"),
    "mobilenetv2": Network(28, _timm("mobilenetv2_100"), "mobilenetv2_100, 28x28"),
}  # fmt: skip
"""By name. Those named small take a few seconds; the last two are timm's as they are, for whoever has the time."""
