"""Groups that stay whole because the model's own arithmetic cannot follow their cut."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunegate.gated import GatedModel
from prunegate.groups import BLOCK, Group
from prunegate.select import Width

__all__ = ["followed", "warn_of", "with_whole"]


def followed(gated: GatedModel, widths: Sequence[Width]) -> list[Width]:
    """What each group may keep, when those of which units cannot go stay whole: found by a trial cut to half.

    A budget that did not know would choose units that the cut then keeps, and be exceeded. A warning names the groups.

    Args:
        gated: The gated model.
        widths: What each group may keep by what was asked for.
    """
    whole = gated.planner.whole_under(_half(gated.groups, widths, gated.gate_map.start()))
    if whole:
        warn_of(whole)
    return with_whole(gated.groups, widths, whole)


def _half(groups: Sequence[Group], widths: Sequence[Width], start: Tensor) -> Tensor:
    """A mask that closes about half of every group of which units may go."""
    mask = start.clone()
    generator = torch.Generator().manual_seed(0)
    for group, width in zip(groups, widths, strict=True):
        if not (width.held or width.one_of or group.kind == BLOCK):
            least = max(width.low, (group.size + 1) // 2)
            mask[group.slice] = torch.randperm(group.size, generator=generator) < least
    return mask


def with_whole(groups: Sequence[Group], widths: Sequence[Width], whole: Collection[str]) -> list[Width]:
    """The widths, where the groups of these names stay whole."""
    return [
        replace(width, low=group.size, high=group.size) if group.name in whole else width
        for group, width in zip(groups, widths, strict=True)
    ]


def warn_of(whole: Mapping[str, str], then: str = "") -> None:
    """Warns that groups stay whole.

    Args:
        whole: Their names, with what cannot follow.
        then: What comes of it.
    """
    places = "; ".join(sorted(set(whole.values())))
    warnings.warn(
        f"the groups {', '.join(whole)} stay whole: {places}. Write it so that sizes come from the tensors that have "
        f"them, or leave the groups out by ignore={then}",
        stacklevel=4,
    )
