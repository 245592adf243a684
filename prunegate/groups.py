"""Label classes become gates, and gates with the same signature become groups."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from prunegate.blocks import Block
from prunegate.labels.heads import head_roots
from prunegate.labels.planes import varying
from prunegate.labels.trace import Trace
from prunegate.labels.unionfind import FROZEN, Reason

__all__ = ["ALWAYS", "BLOCK", "Frozen", "GateMap", "Group", "add_blocks", "find_frozen", "freeze_kinds", "make_groups"]

ALWAYS = -1
"""The gate index of a position that is always there."""

BLOCK = "block"
"""Kind of a group whose one unit is a branch; it may be left empty."""


@dataclass(frozen=True)
class Group:
    """Gates that remove positions of the same tensors.

    Attributes:
        name: Qualified name of the first module that produces the units; unique in the model.
        kind: What a unit is: ``"channel"``, ``"head"``, ``"head_dim"`` (one position of every head that
            attention joins), ``"block"`` (a branch of a residual network), ``"norm_group"`` or ``"conv_group"``; of a
            group of kind ``"choice"``, whose units are operators, exactly one stays.
        slice: Where the group's gates stand in the model's flat vector of logits.
        members: The (tensor name, dimension) pairs from which a unit's positions are removed.
    """

    name: str
    kind: str
    slice: slice
    members: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """Number of units."""
        return int(self.slice.stop - self.slice.start)


@dataclass(frozen=True)
class Frozen:
    """Positions of one tensor dimension that cannot be pruned, for one reason.

    Attributes:
        tensor: Qualified name of the parameter.
        dim: Its dimension.
        count: Number of frozen positions.
        total: Size of the dimension.
        why: The rule that decided it.
        operation: The operation that was being handled.
        module: Qualified name of the module that called it.
    """

    tensor: str
    dim: int
    count: int
    total: int
    why: str
    operation: str
    module: str


@dataclass(frozen=True, eq=False)
class GateMap:
    """Which gate decides about each position of each tensor dimension.

    Attributes:
        of_label: Gate of every label, int64 ``[number of labels]``, ``ALWAYS`` where there is none.
        dims: For each (tensor name, dimension) that gates act on, the gate of each position, ``ALWAYS`` where none.
        n_gates: Number of gates.
        choices: Where the gates of each choice of operators stand, by its name; they follow all others.
        inner: As ``dims``, for positions inside heads where ``dims`` holds the gates of the heads: such a position
            stays if both its gates are open.
        blocks: The branches that may vanish, by their gates.
    """

    of_label: Tensor
    dims: Mapping[tuple[str, int], Tensor]
    n_gates: int
    choices: Mapping[str, slice] = field(default_factory=dict)
    inner: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    blocks: Mapping[int, Block] = field(default_factory=dict)

    def removed(self, mask: Tensor) -> list[Block]:
        """The blocks that a mask (bool ``[n_gates]``) removes."""
        return [block for gate, block in self.blocks.items() if not bool(mask[gate])]

    @functools.cached_property
    def inside(self) -> dict[int, Tensor]:
        """For the gate of each block, the gates of all that goes with it, int64; inner blocks first."""
        found = {}
        for gate, block in self.blocks.items():
            within, beyond = [[torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]]
            for (name, _), gates in (*self.dims.items(), *self.inner.items()):
                (within if name in block.tensors else beyond).append(gates)
            own = torch.unique(torch.cat(within))
            own = own[(own >= 0) & ~torch.isin(own, torch.cat(beyond))]
            nested = [other for other, each in self.blocks.items() if id(each.call) in block.calls]
            found[gate] = torch.cat([own, torch.tensor(nested, dtype=torch.int64)])
        return dict(sorted(found.items(), key=lambda item: len(item[1])))

    def worth(self, scores: Tensor) -> Tensor:
        """Scores, ``[n_gates]``, by which a branch counts with all that goes with it.

        What is inside a removed branch costs nothing, so a choice by cost leaves it open: its scores are not lost with
        the branch, and the branch must bring them.
        """
        scores = scores.clone()
        for gate, inside in self.inside.items():
            scores[gate] = scores[gate] * (1 + scores[inside].sum())
        return scores

    def kept(self, mask: Tensor) -> dict[tuple[str, int], Tensor]:
        """Which positions stay of each tensor dimension that gates act on, bool, for a mask (bool ``[n_gates]``)."""
        stays = torch.cat([mask, torch.ones(1, dtype=torch.bool)])  # gate -1: always there
        kept = {key: stays[gates] for key, gates in self.dims.items()}
        return kept | {key: kept[key] & stays[gates] for key, gates in self.inner.items()}

    def start(self) -> Tensor:
        """The mask of the model as it was given: every unit, and the first operator of every choice."""
        mask = torch.ones(self.n_gates, dtype=torch.bool)
        for own in self.choices.values():
            mask[own.start + 1 : own.stop] = False
        return mask


def make_groups(trace: Trace, consumed: Collection[tuple[str, int]]) -> tuple[tuple[Group, ...], GateMap]:
    """Orders the live label classes into groups of gates.

    Args:
        trace: A finished labelling.
        consumed: The (parameter name, dimension) pairs that some contraction sums over; they consume units, the
            other dimensions of weights make them.

    Returns:
        The groups, in the order in which their first units appear among the model's tensors, and the map of gates.
    """
    kinds = _kinds(trace)
    roots = trace.labels.roots().numpy()
    # Tensors that are pruned together often share a plane, which is then looked at once. Planes are told by identity,
    # in order of the tensors; those of positions inside heads come last.
    planes: dict[int, tuple[int, Tensor]] = {}
    entries: list[tuple[str, int, int]] = []
    found = [(node, plane) for node in trace.tensors.values() for plane in node.planes]
    if trace.labels.has_inner:
        found.sort(key=lambda each: trace.algebra.is_inner(each[1]))
    for _, plane in found:
        planes.setdefault(id(plane), (len(planes), plane))
    for name, node in trace.tensors.items():
        for plane in node.planes:
            entries.append((name, plane.shape.index(plane.numel()), planes[id(plane)][0]))
    own = [plane.flatten().numpy() for _, plane in planes.values()]
    sizes = [len(labels) for labels in own]
    positions = roots[np.concatenate(own)] if own else roots[:0]
    # Classes with the same set of (tensor, dimension) keys have the same sum of the keys' random words. A class that
    # stands at several positions of one key is read and written there alike, so the word counts once.
    words = np.zeros(len(planes), dtype=np.uint64)
    np.add.at(words, [at for _, _, at in entries],
              np.random.default_rng(0).integers(1, 2**63, len(entries), dtype=np.uint64))  # fmt: skip
    signature = np.zeros(len(roots), dtype=np.uint64)
    stop = 0
    for word, size in zip(words, sizes, strict=True):
        start, stop = stop, stop + size
        signature[positions[start:stop]] += word
    signature[FROZEN] = 0
    first = np.full(len(roots), len(positions))
    first[positions[::-1]] = np.arange(len(positions))[::-1]
    live = np.flatnonzero(signature)
    live = live[np.argsort(first[live])]  # roots, in order of first appearance
    _, at, kind_of = np.unique(signature[live], return_index=True, return_inverse=True)
    n_groups = len(at)
    group_of = np.argsort(np.argsort(at))[kind_of.reshape(-1)]
    live = live[np.argsort(group_of, kind="stable")]
    counts = np.bincount(group_of, minlength=n_groups)

    of_label = np.full(len(roots), ALWAYS)
    of_label[live] = np.arange(len(live))
    of_label = of_label[roots]
    group_at = np.full(len(roots), n_groups)  # one more than there are, for what is frozen
    group_at[live] = np.arange(n_groups).repeat(counts)
    touched = np.zeros((len(planes), n_groups + 1), dtype=bool)
    touched[np.arange(len(planes)).repeat(sizes), group_at[positions]] = True
    groups_on = [np.flatnonzero(row).tolist() for row in touched[:, :n_groups]]
    parts = torch.from_numpy(of_label[positions]).split(sizes)
    members: list[list[tuple[str, int]]] = [[] for _ in range(n_groups)]
    dims: dict[tuple[str, int], Tensor] = {}
    inner: dict[tuple[str, int], Tensor] = {}
    for name, dim, number in entries:
        for group in groups_on[number]:
            members[group].append((name, dim))
        if groups_on[number]:
            (inner if (name, dim) in dims else dims)[name, dim] = parts[number]
    groups = _describe(trace, counts.tolist(), live.tolist(), members, kinds, consumed)
    return groups, GateMap(torch.from_numpy(of_label), dims, len(live), inner=inner)


def add_blocks(groups: Sequence[Group], gate_map: GateMap,
               blocks: Sequence[Block]) -> tuple[tuple[Group, ...], GateMap]:  # fmt: skip
    """Gates for branches that may vanish, behind those of units: a group for each."""
    taken = {group.name for group in groups}
    found: list[Group] = []
    of_label = gate_map.of_label.clone()
    for block in blocks:
        gate = gate_map.n_gates + len(found)
        count = itertools.count(2)
        name = block.name
        while name in taken:
            name = f"{block.name}#{next(count)}"
        taken.add(name)
        of_label[block.label] = gate
        found.append(Group(name, BLOCK, slice(gate, gate + 1), ()))
    gates = {group.slice.start: block for group, block in zip(found, blocks, strict=True)}
    n_gates = gate_map.n_gates + len(found)
    return (*groups, *found), replace(gate_map, of_label=of_label, n_gates=n_gates, blocks=gates)


def freeze_kinds(trace: Trace, units: Collection[str]) -> None:
    """Freezes the kinds of units that ``units`` leaves out; ``"channel"`` is every kind that has no name in it."""
    if "head" in units and "channel" in units:
        return
    labels = trace.labels
    roots = labels.classes()
    heads = torch.zeros(len(labels), dtype=torch.bool)
    heads[head_roots(trace.algebra)] = True
    heads &= ~labels.is_inner(torch.arange(len(labels)))
    if "head" not in units:
        labels.freeze(roots[heads[roots]], Reason('units= leaves out "head"'))
    if "channel" not in units:
        others = ~heads[roots] & ~labels.is_inner(roots)
        labels.freeze(roots[others], Reason('units= leaves out "channel"'))


def _kinds(trace: Trace) -> dict[int, str]:
    """Kind of every live label class that is more than a channel, by its root."""
    kinds: dict[int, str] = {}
    for kind, plane in trace.algebra.kinds:
        for root in torch.unique(trace.labels.find(plane)).tolist():
            if root != FROZEN and kinds.get(root) != "head":
                kinds[root] = kind
    if not trace.labels.has_inner:
        return kinds
    roots = trace.labels.classes()
    return kinds | dict.fromkeys(roots[trace.labels.is_inner(roots)].tolist(), "head_dim")


def _describe(trace: Trace, sizes: list[int], roots: list[int], members: list[list[tuple[str, int]]],
              kinds: Mapping[int, str], consumed: Collection[tuple[str, int]]) -> tuple[Group, ...]:  # fmt: skip
    taken: dict[str, int] = {}
    groups: list[Group] = []
    for index, size in enumerate(sizes):
        start = groups[-1].slice.stop if groups else 0
        name = _group_name(trace, members[index], consumed)
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            name = f"{name}#{taken[name]}"
        kind = kinds.get(roots[start], "channel")
        groups.append(Group(name, kind, slice(start, start + size), tuple(members[index])))
    return tuple(groups)


def _group_name(trace: Trace, members: list[tuple[str, int]], consumed: Collection[tuple[str, int]]) -> str:
    """The first module whose weight makes the units; else the first module, else the first tensor, that has them."""
    for name, dim in members:
        if name in trace.parameters and "." in name and trace.tensors[name].ndim > 1 and (name, dim) not in consumed:
            return name.rpartition(".")[0]
    owned = next((name for name, _ in members if "." in name), None)
    return members[0][0] if owned is None else owned.rpartition(".")[0]


def find_frozen(trace: Trace) -> tuple[Frozen, ...]:
    """What cannot be pruned: for each dimension of each parameter, how many positions are frozen and why."""
    found = []
    frozen_labels = trace.labels.roots() == FROZEN
    for name in trace.tensors:
        if name not in trace.parameters:
            continue
        node = trace.tensors[name]
        for plane in node.planes:
            dim = next(iter(varying(plane)))
            own = plane.flatten()
            frozen = own[frozen_labels[own]]
            counts: dict[Reason, int] = {}
            for known in trace.labels.reasons(frozen):
                reason = known or Reason("frozen")
                counts[reason] = counts.get(reason, 0) + 1
            for reason, count in counts.items():
                found.append(Frozen(name, dim, count, own.numel(), reason.why, reason.operation, reason.module))
    return tuple(found)
