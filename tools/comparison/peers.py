"""How other libraries cut a trained network to a share of its FLOPs.

Neither takes a budget in FLOPs, so the share of units (Torch-Pruning) or the number of parameters (torch-kirigami) is
found by bisection: the largest cut network that does not exceed the budget, by the FLOPs that ``prunegate.count_flops``
counts for everybody.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from timm.layers import Attention
from timm.models.swin_transformer import PatchMerging, WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

import prunegate

__all__ = ["Costs", "kirigami", "torch_pruning"]

_SCANNED = 16  # shares of units or parameters that are tried
_FINEST = 0.002
_BISECTIONS = 7

Costs = dict[tuple[int, float], float]


def _accumulate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Leaves the summed gradient of the loss in ``grad``, which Taylor scores read."""
    model.zero_grad()
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()


def _copy(model: nn.Module) -> nn.Module:
    """A copy with its gradients."""
    duplicate = copy.deepcopy(model)
    for ours, theirs in zip(duplicate.parameters(), model.parameters(), strict=True):
        ours.grad = None if theirs.grad is None else theirs.grad.clone()
    return duplicate


def _largest(cuts: Sequence[Callable[[float], nn.Module | None]], example: Tensor, most: float,
             costs: Costs) -> nn.Module:  # fmt: skip
    """The cut of greatest FLOPs not above ``most``.

    Costs need not fall with the share (Torch-Pruning skips layers that it would empty), so shares are scanned first,
    and then refined beside the best.

    Args:
        cuts: Ways to cut, the library's defaults first; each takes a share of units or parameters that stays, and
            gives ``None`` where the result does not run. A later one is tried if those before fall short by a tenth.
        example: One input.
        most: Greatest number of FLOPs.
        costs: What cuts tried before cost, by the number of the way and the share; new ones are added.
    """

    def within(number: int, share: float) -> float:
        """FLOPs of a cut, or 0 where it does not run or exceeds the budget."""
        if (number, share) not in costs:
            model = cuts[number](share)
            costs[number, share] = 0.0 if model is None else float(prunegate.count_flops(model, example))
        return costs[number, share] if costs[number, share] <= most else 0.0

    best, found = 0.0, (0, 0.0)
    for number in range(len(cuts)):
        for share in [(i + 0.5) / _SCANNED for i in range(_SCANNED)]:
            if within(number, share) > best:
                best, found = within(number, share), (number, share)
        reach = 0.5 / _SCANNED
        while found[0] == number and best and reach > _FINEST:
            for share in (found[1] - reach, found[1] + reach):
                if within(number, share) > best:
                    best, found = within(number, share), (number, share)
            reach /= 2
        if best >= 0.9 * most:
            break
    model = cuts[found[0]](found[1]) if best else None
    if model is None:
        raise RuntimeError("no cut of this method reaches the budget")
    model.zero_grad()
    return model


def torch_pruning(dense: nn.Module, example: Tensor, most: float, batches: Iterable[tuple[Tensor, Tensor]],
                  costs: Costs, *, taylor: bool, everywhere: bool) -> nn.Module:  # fmt: skip
    """Torch-Pruning 1.6.1, as in its examples for CNNs, timm's transformers (whole heads are removed) and Swin.

    It needs to be told how patches are merged, as in its example for Swin; the heads of windows it leaves whole, since
    it cannot shorten their table of position biases along with them.

    Args:
        dense: The trained network; left as it is.
        example: One input.
        most: Greatest number of FLOPs.
        batches: What gradients are gathered on.
        costs: What cuts of this network by this method, tried for other budgets, cost.
        taylor: Score by first-order Taylor expansion instead of magnitude.
        everywhere: Compare the scores of all layers (global) instead of removing the same share of each (local).
    """
    import torch_pruning as tp

    class Merging(tp.function.BasePruningFunc):
        """Four neighbours' channels in a row, normalised and projected."""

        def prune_in_channels(self, layer: PatchMerging, idxs: Sequence[int]) -> nn.Module:
            rows = [neighbour * layer.dim + index for neighbour in range(4) for index in idxs]
            tp.prune_linear_in_channels(layer.reduction, rows)
            tp.prune_layernorm_out_channels(layer.norm, rows)
            layer.dim -= len(idxs)
            return layer

        def prune_out_channels(self, layer: PatchMerging, idxs: Sequence[int]) -> nn.Module:
            tp.prune_linear_out_channels(layer.reduction, idxs)
            layer.out_dim = layer.reduction.out_features
            return layer

        def get_in_channels(self, layer: PatchMerging) -> int:
            return layer.dim

        def get_out_channels(self, layer: PatchMerging) -> int:
            return layer.reduction.out_features

    scored = copy.deepcopy(dense).eval()
    if taylor:
        _accumulate(scored, batches)

    def cut(highest: float, head_share: float, share: float) -> nn.Module | None:
        model = _copy(scored)
        heads = {module.qkv: module.num_heads for module in model.modules() if isinstance(module, Attention)}
        windows = {module.qkv: module.num_heads for module in model.modules() if isinstance(module, WindowAttention)}
        importance = tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = tp.pruner.BasePruner(
                model, example, importance, global_pruning=everywhere, pruning_ratio=1 - share,
                max_pruning_ratio=highest,
                ignored_layers=[_last_linear(model)], num_heads=heads | windows, prune_num_heads=bool(heads),
                prune_head_dims=not heads, head_pruning_ratio=head_share * (1 - share),
                customized_pruners={PatchMerging: Merging()},
                root_module_types=[nn.Conv2d, nn.Linear, PatchMerging],
            )  # fmt: skip
            pruner.step()
        for module in model.modules():
            if isinstance(module, Attention):
                module.num_heads = pruner.num_heads[module.qkv]
                module.attn_dim = module.qkv.out_features // 3
                if not module.num_heads or module.attn_dim % module.num_heads:
                    return None
                module.head_dim = module.attn_dim // module.num_heads
        return model if _runs(model, example) else None

    # Where everything would go from a layer the library leaves it whole, and counts its heads wrong: then a cap on
    # what goes from a layer, and fewer heads, give it the best chance.
    return _largest([partial(cut, *setting) for setting in ((1.0, 1.0), (0.9, 1.0), (0.9, 0.5), (0.75, 0.0))],
                    example, most, costs)  # fmt: skip


def kirigami(dense: nn.Module, example: Tensor, most: float, batches: Iterable[tuple[Tensor, Tensor]],
             costs: Costs, *, taylor: bool) -> nn.Module:  # fmt: skip
    """torch-kirigami's greedy planner with its group magnitude or its Taylor score."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Greedy, GroupMagnitude, ParameterBudget, Pruner, WeightTaylor

    scored = copy.deepcopy(dense).eval()
    if taylor:
        _accumulate(scored, batches)
    parameters = sum(parameter.numel() for parameter in dense.parameters())

    def cut(share: float) -> nn.Module | None:
        model = _copy(scored)
        pruner = Pruner(model, graph=DependencyGraph.build(model, args=(example,)))
        metric = WeightTaylor() if taylor else GroupMagnitude(p=2)
        try:
            model, _ = pruner.prune(pruner.discover_candidates(), strategy=Greedy(metric),
                                    budget=ParameterBudget(max_params=max(1, int(share * parameters))))  # fmt: skip
        except Exception as error:
            if "lanning" not in type(error).__name__ and "udget" not in type(error).__name__:
                raise
            return None
        return model

    # Its greedy planner takes minutes where Torch-Pruning takes a second; the FLOPs do fall with the parameters.
    low, high, best = 0.0, 1.0, None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if costs.get((0, middle), 0.0) > most:
            high = middle
            continue
        model = cut(middle)
        costs[0, middle] = float("inf") if model is None else float(prunegate.count_flops(model, example))
        if costs[0, middle] <= most:
            low, best = middle, model
        else:
            high = middle
    if best is None:
        raise RuntimeError("no cut of this method reaches the budget")
    best.zero_grad()
    return best


def _last_linear(model: nn.Module) -> nn.Module:
    """The classifier: its outputs are classes."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def _runs(model: nn.Module, example: Tensor) -> bool:
    try:
        with torch.no_grad():
            model(example)
    except RuntimeError:
        return False
    return True
