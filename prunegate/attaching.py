"""``attach``: from a model to a gated model."""

from __future__ import annotations

import fnmatch
import gc
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prunegate.blocks import find_blocks
from prunegate.choice import Choice
from prunegate.cost import Cost
from prunegate.derive import removable_blocks
from prunegate.errors import AttachError
from prunegate.gated import GatedModel, example_input_of
from prunegate.groups import add_blocks, freeze_kinds, make_groups
from prunegate.install import install, running_copy
from prunegate.labels.heads import positions_in_heads
from prunegate.labels.paths import find_choices
from prunegate.labels.record import Call
from prunegate.labels.trace import trace
from prunegate.operators import PATHS, OperatorSampler, add_choices
from prunegate.sites import find_sites, with_blocks
from prunegate.slim.locate import locate
from prunegate.tensors import modules_of

__all__ = ["attach"]

_UNITS = ("channel", "head")
_KINDS = (*_UNITS, "head_dim", "block")


@contextmanager
def _collection_paused() -> Iterator[None]:
    """No collection of cyclic garbage inside, as it was outside.

    A trace makes some ten objects for every tensor, nearly all of which live until it ends: collections on the way find
    nothing and, in a process that holds a million objects, take longer than the trace.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_collection_paused()
def attach(model: nn.Module, example_input: Any = None, units: Collection[str] = _UNITS,
           ignore: Collection[str] = (), paths: str = "single", top_k: int = 2) -> GatedModel:  # fmt: skip
    """Puts a learnable gate on every removable unit of a model.

    The model is run once, in eval mode; it is not changed. The result shares its parameters and buffers.

    Args:
        model: Any ``nn.Module`` that runs on ``example_input``. It may be on the meta device: then nothing is
            allocated, and the result can be costed, masked, planned and exported, but not run.
        example_input: A tensor, a tuple of positional or a dict of keyword inputs; costs are counted at its batch size.
            For timm models it may be left out: a batch of one is made from the model's configuration.
        units: Which kinds get gates: ``"channel"`` (every kind that has no name of its own here) and ``"head"``; on
            request also ``"head_dim"``, one position of every head of an attention: queries and keys lose it together,
            and values with them where one tensor holds all three, not where heads come from a convolution; and
            ``"block"``, a branch that is added to a shortcut and that a mask may remove as a whole. Branches that
            share their code's line with others, or of which the code around their modules computes a part by itself,
            are none. A predicted peak of memory does not know removed branches, and predicted latency and memory know
            of a head's width only what its heads are.
        ignore: Shell-style patterns of qualified module or parameter names; units that these parameters are part of
            get no gate. A ``Choice`` that a pattern names keeps its first operator.
        paths: Which operators of a ``Choice`` run in a training step of a search. ``"single"``: the one that is drawn,
            at the memory of a fixed network. ``"topk"``: ``top_k`` of them; the output is that of the one that is
            drawn, and the gradient compares them. ``"all"``: all, weighted by the relaxed sample.
        top_k: See ``paths``.

    Returns:
        The gated model, all gates open.

    Raises:
        AttachError: The model is gated already or does not run on the input, a pattern or kind matches nothing, or
            no unit can be pruned.

    Example:
        >>> import torch, prunegate
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gated = prunegate.attach(net, torch.randn(1, 4))
        >>> [group.size for group in gated.groups]
        [8]
    """
    _check(model, units, paths, top_k)
    inputs = example_input_of(model) if example_input is None else example_input
    ignored = _matcher(model, ignore)
    choices = find_choices(model, ignored)
    traced = trace(model, inputs, ignore=ignored, choices=choices)
    if "head_dim" in units:
        inside = positions_in_heads(traced.algebra, traced.tensors)
        traced = trace(model, inputs, ignore=ignored, choices=choices, inside=inside)
    freeze_kinds(traced, units)

    def place(call: Call) -> Any:
        return locate(call.frame, call.name, traced.modules)

    blocks = find_blocks(traced, ignored) if "block" in units else []
    sites = find_sites(traced, place)
    units_alone = make_groups(traced, sites.consumed)
    blocks = removable_blocks(blocks, traced, *units_alone, inputs)
    groups, gate_map = add_blocks(*units_alone, blocks)
    groups, gate_map = add_choices(traced, groups, gate_map)
    sites = with_blocks(sites, blocks)
    operators = OperatorSampler(gate_map.choices, paths, top_k) if gate_map.choices else None
    if not groups:
        raise AttachError(
            f"{type(model).__name__} has no unit that can be pruned: every dimension of its parameters is fixed by "
            "its inputs, its outputs or an operation without a rule"
        )
    running = running_copy(model)
    gates = install(running, sites, gate_map, traced, operators)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "meta":  # gates have values, also where the model has none yet
        gates.to(device)
    return GatedModel(
        dense=model,
        running=running,
        gates=gates,
        groups=groups,
        cost=Cost.of_trace(traced, gate_map, gates),
        gate_map=gate_map,
        trace=traced,
        example_input=inputs,
    )


def _check(model: nn.Module, units: Collection[str], paths: str, top_k: int) -> None:
    if not isinstance(model, nn.Module):
        raise AttachError(f"a {type(model).__name__} was given; expected a torch.nn.Module")
    modules = [module for _, module in modules_of(model)]
    if any(isinstance(module, GatedModel) for module in modules):
        raise AttachError("the model is gated already; export() it first, or attach to the original model")
    unknown = [unit for unit in units if unit not in _KINDS]
    if paths not in PATHS:
        raise AttachError(f"paths={paths!r} was given; expected one of {PATHS}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 2:
        raise AttachError(f"top_k={top_k!r} was given; expected how many operators run at once, 2 or more")
    chooses = any(isinstance(module, Choice) for module in modules)
    if isinstance(units, str) or unknown or not (units or chooses):
        raise AttachError(f"units={units!r} was given; expected one or more of {_KINDS}, in a tuple")


def _matcher(model: nn.Module, patterns: Collection[str]) -> Any:
    """Says of a parameter's name whether a pattern matches it, its module, or a module around it."""
    if isinstance(patterns, str):
        patterns = (patterns,)
    if not patterns:
        return lambda name: False
    names = [name for name, _ in model.named_parameters()] + [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise AttachError(
                f"ignore pattern {pattern!r} matches no module and no parameter; names look like {names[0]!r} "
                "(shell-style wildcards are allowed)"
            )

    def matches(name: str) -> bool:
        parts = name.split(".")
        ancestors = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(fnmatch.fnmatchcase(each, pattern) for each in ancestors for pattern in patterns)

    return matches
