"""How labels flow: alignment of operands, contraction, reduction. The ATen rules are written in these terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from prunegate.labels.planes import compress, is_line, pad_to, place, varying
from prunegate.labels.record import Call, FrameRecord, Node, Op
from prunegate.labels.unionfind import FROZEN, Labels, Reason

__all__ = ["Algebra", "Consumption", "Reduction"]

# Alignment of n operands converges in a few rounds; the bound only guards against a rule that never settles.
_MAX_ROUNDS = 32

Operand = tuple[list[Tensor], frozenset[int]]
"""The planes of one operand in common coordinates, and the dimensions on which it has real positions."""


@dataclass(frozen=True, eq=False)
class Consumption:
    """Labels that end here: a contraction sums over them, so this is where their gate acts.

    Attributes:
        op: The contraction.
        operands: The operands that carry the contracted labels, each with its contracted dimensions.
    """

    op: Op
    operands: tuple[tuple[Node, frozenset[int]], ...]


@dataclass(frozen=True, eq=False)
class Reduction:
    """A statistic over labelled positions, which must be taken over the kept ones only.

    Attributes:
        op: The operation that reduces.
        node: The reduced operand.
        plane: The plane that varies along reduced dimensions.
    """

    op: Op
    node: Node
    plane: Tensor


@dataclass
class Algebra:
    """The state of one labelling.

    Attributes:
        labels: The union-find.
        consumptions: Where labels end, in order.
        reductions: Where statistics over labelled positions are taken, in order.
        kinds: Labels that mean more than a channel, each with the kind ("head", "norm_group", "conv_group").
        born: The labels that parameters and buffers were born with: the first of them, and the tensor's name and
            dimension, in increasing order.
        op: The operation that is being handled.
        module_name: Qualified name of the module that a frame belongs to, for messages.
    """

    labels: Labels = field(default_factory=Labels)
    consumptions: list[Consumption] = field(default_factory=list)
    reductions: list[Reduction] = field(default_factory=list)
    kinds: list[tuple[str, Tensor]] = field(default_factory=list)
    born: list[tuple[int, str, int]] = field(default_factory=list)
    op: Op | None = None
    module_name: Callable[[FrameRecord | None], str] = lambda frame: ""
    # Many nodes share a raw plane. For each, by identity: the plane and its canonical form, None where all is frozen.
    _canonical: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    _canonical_at: int = -1

    # ------------------------------------------------------------------ reading and writing planes

    def reason(self, why: str) -> Reason:
        """The reason ``why``, with the operation and module that are being handled now."""
        if self.op is None:
            return Reason(why)
        call: Call | None = self.op.call
        return Reason(why, self.op.name, self.module_name(call.frame if call else None))

    def get(self, node: Node) -> list[Tensor]:
        """The planes of ``node`` in canonical labels, at most one for each set of dimensions, frozen ones left out."""
        if not node.planes:
            return []
        self.labels.settle()
        if node.known_at == self.labels.version and node.known is not None:
            return node.known
        planes = [plane for plane in map(self._canonical_of, node.planes) if plane is not None]
        if len(planes) > 1 and len({varying(plane) for plane in planes}) < len(planes):
            planes = self._one_per_dims(planes)
        node.known, node.known_at = planes, self.labels.version
        return planes

    def _canonical_of(self, raw: Tensor) -> Tensor | None:
        if self._canonical_at != self.labels.version:
            self._canonical, self._canonical_at = {}, self.labels.version
        found = self._canonical.get(id(raw))
        if found is None:
            plane = compress(self.labels.find(raw))
            found = self._canonical[id(raw)] = raw, plane if bool(plane.any()) else None  # FROZEN is 0
        return found[1]

    def look_at(self, nodes: Iterable[Node]) -> None:
        """Finds the canonical planes of many nodes at once, for :meth:`get` to find them known.

        A network has thousands of planes, most of them along one dimension: one by one they take several times as long.
        """
        self.labels.settle()
        if self._canonical_at != self.labels.version:
            self._canonical, self._canonical_at = {}, self.labels.version
        lines = {id(plane): plane for node in nodes for plane in node.planes if is_line(plane) and plane.numel()}
        lines = {key: plane for key, plane in lines.items() if key not in self._canonical}
        if not lines:
            return
        sizes = [plane.numel() for plane in lines.values()]
        roots = self.labels.find(torch.cat([plane.reshape(-1) for plane in lines.values()]))
        starts = np.cumsum([0, *sizes[:-1]])
        lowest = np.minimum.reduceat(roots.numpy(), starts).tolist()
        highest = np.maximum.reduceat(roots.numpy(), starts).tolist()
        for (key, raw), own, low, high in zip(lines.items(), roots.split(sizes), lowest, highest, strict=True):
            if high == FROZEN:
                self._canonical[key] = raw, None
            elif low == high:
                self._canonical[key] = raw, own[:1].view((1,) * raw.dim())
            else:
                self._canonical[key] = raw, own.view(raw.shape)

    def put(self, node: Node, planes: Iterable[Tensor]) -> None:
        """Gives ``node`` its planes."""
        kept = []
        node.known = None
        for plane in planes:
            plane = compress(plane)
            if plane.numel() == 1:
                # One label on the whole tensor: it would vanish when the unit does.
                if node.numel() and int(self.labels.find(plane)) != FROZEN:
                    self.freeze(plane, "a tensor would vanish with one unit")
                continue
            kept.append(plane)
        node.planes = kept

    def give_birth(self, node: Node, dims: Iterable[int] | None = None) -> list[Tensor]:
        """Planes of fresh labels along dimensions of a parameter or buffer, by default all that are longer than 1."""
        assert node.name is not None
        dims = [dim for dim, size in enumerate(node.shape) if size > 1] if dims is None else list(dims)
        sizes = [node.shape[dim] for dim in dims]
        first = len(self.labels)
        fresh = self.labels.fresh(sum(sizes), strong=node.source is node)
        for dim, size in zip(dims, sizes, strict=True):
            self.born.append((first, node.name, dim))
            first += size
        return [place(own, dim, node.ndim) for dim, own in zip(dims, fresh.split(sizes), strict=True)]

    def adopt(self, node: Node, dim: int, labels: Tensor) -> None:
        """Gives one dimension of a parameter or buffer that nobody has read the labels of what it meets.

        To join fresh ones with them comes to the same, but most positions of a network are in the classes of a few:
        statistics, scales and input channels have those of the channels they meet.
        """
        if node.ndim == 1:
            node.planes = [labels]
        else:
            others = [d for d, size in enumerate(node.shape) if size > 1 and d != dim]
            planes = dict(zip(others, self.give_birth(node, others), strict=True)) if others else {}
            planes[dim] = place(labels, dim, node.ndim)
            node.planes = [planes[d] for d in sorted(planes)]
        node.adopted = True
        if node.source is node:
            self.labels.strengthen(labels)

    def join_vector(self, labels: Tensor, node: Node, why: str) -> None:
        """Joins one-dimensional labels with those of a parameter or buffer with one plane, when somebody looks."""
        if node.unread is not None:
            self.adopt(node, 0, labels)
        else:
            self.union_later(labels, node.planes[0], why)

    def own_labels(self, node: Node) -> None:
        """Gives a parameter labels by which its dimensions can be told, if it has adopted those of others."""
        if node.adopted:
            adopted, node.adopted = node.planes, False
            node.planes = self.give_birth(node)
            for own, other in zip(node.planes, adopted, strict=True):
                self.union_later(own, other, "one parameter")

    def freeze(self, plane: Tensor, why: str) -> None:
        """Freezes every label of ``plane``."""
        self.labels.freeze(plane, self.reason(why))

    def only_plane(self, node: Node) -> Tensor | None:
        """The raw plane of a node that has just one, along one dimension; what most tensors of a network have.

        Rules that meet only such planes need no canonical labels: they join later what they join.
        """
        if len(node.planes) == 1:
            plane = node.planes[0]
            if is_line(plane):
                return plane
        return None

    def pass_on(self, node: Node, plane: Tensor) -> None:
        """Gives ``node`` a plane that is known to be compressed."""
        node.planes, node.known = [plane], None

    def union_later(self, a: Tensor, b: Tensor, why: str) -> None:
        """As :meth:`union`, for planes of one size, when somebody looks."""
        self.labels.union_later(a, b, self.reason(why))

    def freeze_later(self, plane: Tensor, why: str) -> None:
        """As :meth:`freeze`, when somebody looks."""
        self.labels.freeze_later(plane, self.reason(why))

    def freeze_node(self, node: Node, why: str) -> None:
        """Freezes every label on ``node``."""
        for plane in self.get(node):
            self.freeze(plane, why)

    def freeze_inner(self, node: Node, why: str) -> None:
        """Freezes positions inside heads on dimensions of ``node`` from which heads are removed, too."""
        if not self.labels.has_inner:
            return
        planes = self.get(node)
        for plane in planes:
            beside = any(other is not plane and varying(other) & varying(plane) for other in planes)
            if beside and self.is_inner(plane):
                self.freeze(plane, why)

    def union(self, a: Tensor, b: Tensor, why: str) -> bool:
        """Joins two planes position by position."""
        return self.labels.union(a, b, self.reason(why))

    def coarsen(self, plane: Tensor, away: Iterable[int], why: str) -> Tensor:
        """Ties the labels of ``plane`` along the dimensions ``away``, which then no longer vary."""
        first = plane
        for dim in away:
            first = first.narrow(dim, 0, 1)
        if first.shape == plane.shape:
            return plane
        self.union(plane, first, why)
        return self.labels.find(first)

    def coarsen_or_freeze(self, plane: Tensor, away: Iterable[int], why: str) -> Tensor:
        """Coarsens; where nothing is left to vary, freezes."""
        plane = self.coarsen(plane, away, why)
        if plane.numel() == 1:
            self.freeze(plane, why)
            plane = self.labels.find(plane)
        return plane

    def _one_per_dims(self, planes: list[Tensor]) -> list[Tensor]:
        """Leaves at most one plane on each set of dimensions, beside one of positions inside heads.

        Two different planes on the same dimensions (kernel and input positions of a flattened filter) would make a
        position's fate hang on two units; the one with fewer labels gives way.
        """
        by_dims: dict[tuple[frozenset[int], bool], Tensor] = {}
        for plane in planes:
            dims = varying(plane), self.is_inner(plane)
            other = by_dims.get(dims)
            if other is None:
                by_dims[dims] = plane
            elif not torch.equal(self.labels.find(other), self.labels.find(plane)):
                fewer, more = sorted((other, plane), key=lambda p: torch.unique(p).numel())
                self.freeze(fewer, "two kinds of units on one dimension")
                by_dims[dims] = more
        canonical = [compress(self.labels.find(plane)) for plane in by_dims.values()]
        return [plane for plane in canonical if bool((plane != FROZEN).any())]

    # ------------------------------------------------------------------ element-wise alignment

    def align(self, operands: Sequence[Operand], why: str) -> list[Tensor]:
        """Aligns planes of several operands by the dimensions on which they vary, and joins them.

        Equal sets of dimensions join position by position; overlapping sets are coarsened to their intersection
        first; a plane that has no counterpart survives only along dimensions on which the other operands broadcast.
        """
        same = self._align_alike(operands, why)
        if same is not None:
            return same
        planes = [list(operand) for operand, _ in operands]
        for _ in range(_MAX_ROUNDS):
            changed = False
            for i in range(len(operands)):
                for a in range(len(planes[i])):
                    if self._align_one(planes, operands, i, a, why):
                        changed = True
            if not changed:
                break
        return self._one_per_dims([p for operand in planes for p in operand if bool((p != FROZEN).any())])

    def _align_alike(self, operands: Sequence[Operand], why: str) -> list[Tensor] | None:
        """The common case at once: all planes vary along the same dimensions, where no operand lacks one."""
        planes = [plane for each, _ in operands for plane in each]
        if not planes:
            return []
        dims = varying(planes[0])
        if any(len(each) > 1 or (not each and real & dims) for each, real in operands):
            return None
        if any(plane.shape != planes[0].shape for plane in planes[1:]):
            return None
        if len(planes) == 1:
            return planes
        if not self.union(planes[0].expand(len(planes) - 1, *planes[0].shape), torch.stack(planes[1:]), why):
            return [planes[0]]
        plane = compress(self.labels.find(planes[0]))
        if varying(plane) != dims:
            return None  # tied by the union itself; the general way settles it
        return [plane] if bool(plane.any()) else []

    def _align_one(self, planes: list[list[Tensor]], operands: Sequence[Operand], i: int, a: int, why: str) -> bool:
        changed = False
        plane = compress(self.labels.find(planes[i][a]))
        for j, (_, real) in enumerate(operands):
            if j == i or not varying(plane) or not bool((plane != FROZEN).any()):
                continue
            met = False
            for b in range(len(planes[j])):
                other = compress(self.labels.find(planes[j][b]))
                common = varying(plane) & varying(other)
                if not common or not self._are_partners(plane, other, planes[i], planes[j]):
                    continue
                met = True
                if varying(plane) != common or varying(other) != common:
                    weak, other_weak = self._weak(plane), self._weak(other)
                    table, units = (plane, other) if weak else (other, plane)
                    if weak != other_weak and not (self.is_inner(units) and varying(table) == common):
                        # A buffer's labels never coarsen a parameter's: a rotary table must not tie heads away.
                        self.freeze(plane if weak else other, "a buffer that does not line up")
                        changed = True
                        plane = compress(self.labels.find(plane))
                        planes[j][b] = compress(self.labels.find(other))
                        met = weak
                        continue
                    plane = self.coarsen(plane, varying(plane) - common, why)
                    other = self.coarsen(other, varying(other) - common, why)
                    changed = True
                changed |= self.union(plane, other, why)
                plane = compress(self.labels.find(plane))
                planes[j][b] = compress(self.labels.find(other))
            lost = real & varying(plane)
            if not met and lost and bool((plane != FROZEN).any()):
                plane = self.coarsen_or_freeze(plane, lost, f"{why}: meets positions that cannot be removed")
                changed = True
        planes[i][a] = plane
        return changed

    def is_inner(self, plane: Tensor) -> bool:
        """Whether the labels of ``plane`` name positions inside heads."""
        return self.labels.has_inner and bool(self.labels.is_inner(self.labels.find(plane)).any())

    def _are_partners(self, plane: Tensor, other: Tensor, beside: Sequence[Tensor], across: Sequence[Tensor]) -> bool:
        """Whether two overlapping planes are about the same units, where a dimension has heads and what is inside them.

        They are not if one of them has a better partner among the other's neighbours: one on just its dimensions, or,
        on equal dimensions, one of its own kind.
        """
        if not self.labels.has_inner:
            return True

        def distance(a: Tensor, b: Tensor) -> int:
            if not varying(a) & varying(b):
                return 4
            if varying(a) == varying(b):
                return int(self.is_inner(a) != self.is_inner(b))
            # A table that every head shares is about what is inside them.
            return 2 + ((self.is_inner(a) or self._weak(a)) != (self.is_inner(b) or self._weak(b)))

        now = [compress(self.labels.find(each)) for each in (*beside, *across)]
        best = min(
            *(distance(each, other) for each in now[: len(beside)]),
            *(distance(plane, each) for each in now[len(beside) :]),
        )
        return distance(plane, other) <= best

    def _weak(self, plane: Tensor) -> bool:
        roots = self.labels.find(plane)
        roots = roots[roots != FROZEN]
        return roots.numel() > 0 and not bool(self.labels.is_strong(roots).any())

    def elementwise(self, nodes: Sequence[Node], ndim: int, why: str) -> list[Tensor]:
        """Planes of the result of an element-wise operation with broadcasting to ``ndim`` dimensions."""
        alike = self.elementwise_alike(nodes, ndim, why)
        if alike is not None:
            return alike
        if len(nodes) == 1:
            return [pad_to(plane, ndim) for plane in self.get(nodes[0])]
        return self.align([self.operand(node, ndim) for node in nodes], why)

    def elementwise_alike(self, nodes: Sequence[Node], ndim: int, why: str) -> list[Tensor] | None:
        """The common case: each operand has at most one plane, all along one dimension, and none lacks it there.

        Returns:
            The planes, already compressed; ``None`` where the general way must be taken.
        """
        first: Tensor | None = None
        for node in nodes:
            if not node.planes:
                continue
            plane = self.only_plane(node)
            if plane is None:
                return None
            plane = pad_to(plane, ndim)
            if first is None:
                first = plane
            elif plane.shape != first.shape:
                return None
            elif plane is not first:
                self.union_later(first, plane, why)
        if first is None:
            return []
        dim = max(range(ndim), key=first.shape.__getitem__)
        for node in nodes:
            at = dim - (ndim - node.ndim)
            if not node.planes and at >= 0 and node.shape[at] > 1 and at not in node.repeated:
                return None
        return [first]

    def operand(self, node: Node, ndim: int) -> Operand:
        """``node`` in the coordinates of an ``ndim``-dimensional result that it broadcasts to."""
        offset = ndim - node.ndim
        real = frozenset(
            dim + offset for dim, size in enumerate(node.shape) if size > 1 and dim not in node.repeated
        )
        return [pad_to(plane, ndim) for plane in self.get(node)], real

    # ------------------------------------------------------------------ contraction

    def contract(self, a: Node, b: Node, a_axes: str, b_axes: str, out_axes: str, why: str) -> list[Tensor]:
        """Planes of ``einsum(a_axes, b_axes -> out_axes)``; labels on a contracted axis join and end there."""
        summed = (set(a_axes) & set(b_axes)) - set(out_axes)
        self._note_heads(a, b, a_axes, b_axes, out_axes)
        a_free, a_ended = self._split_contracted(a, a_axes, summed, why)
        b_free, b_ended = self._split_contracted(b, b_axes, summed, why)
        self._end(a, b, a_axes, b_axes, a_ended, b_ended, why)
        return self.align(
            [self._moved(a, a_axes, out_axes, a_free), self._moved(b, b_axes, out_axes, b_free)], why
        )

    def _note_heads(self, a: Node, b: Node, a_axes: str, b_axes: str, out_axes: str) -> None:
        """What indexes a product of two activations as a batch does, is a head."""
        shared = set(a_axes) & set(b_axes) & set(out_axes)
        if a.depends and b.depends and shared:
            for plane in self.get(a):
                if self.is_inner(plane):
                    continue
                if varying(plane) and {a_axes[dim] for dim in varying(plane)} <= shared:
                    self.kinds.append(("head", plane))
                elif {a_axes[dim] for dim in varying(plane)} & shared:
                    within = [dim for dim in varying(plane) if a_axes[dim] not in shared]
                    first = plane
                    for dim in within:
                        first = first.narrow(dim, 0, 1)
                    self.kinds.append(("head", first))

    def _split_contracted(self, node: Node, axes: str, summed: set[str], why: str) -> tuple[list[Tensor], list[Tensor]]:
        free, ended = [], []
        for plane in self.get(node):
            inside = [dim for dim in varying(plane) if axes[dim] in summed]
            if not inside:
                free.append(plane)
            elif len(inside) < len(varying(plane)) and self.is_inner(plane):
                ended.append(self.coarsen(plane, varying(plane) - set(inside), why))
            elif len(inside) < len(varying(plane)):
                free.append(self.coarsen(plane, inside, why))
            else:
                ended.append(plane)
        return free, ended

    def _end(self, a: Node, b: Node, a_axes: str, b_axes: str,
             a_ended: list[Tensor], b_ended: list[Tensor], why: str) -> None:  # fmt: skip
        def axes_of(plane: Tensor, axes: str) -> frozenset[str]:
            return frozenset(axes[dim] for dim in varying(plane))

        met: set[int] = set()
        for plane in a_ended:
            partners = [other for other in b_ended if axes_of(other, b_axes) == axes_of(plane, a_axes)]
            partners = self._of_one_kind(plane, partners, a_ended)
            met |= {id(other) for other in partners}
            for other in partners:
                self.union(plane.flatten(), other.flatten(), why)
                self.consume((a, varying(plane)), (b, varying(other)))
            if not partners:
                self.freeze(plane, f"{why}: summed against positions that cannot be removed")
        for other in b_ended:
            if id(other) not in met:
                self.freeze(other, f"{why}: summed against positions that cannot be removed")

    def _of_one_kind(self, plane: Tensor, partners: list[Tensor], beside: list[Tensor]) -> list[Tensor]:
        """Of the planes on a contracted axis, those about the same units: heads, or positions inside them."""
        if not self.labels.has_inner:
            return partners
        own = [other for other in partners if self.is_inner(other) == self.is_inner(plane)]
        alone = len([each for each in beside if each.shape == plane.shape]) == 1
        return own or (partners if alone else [])

    def consume(self, *operands: tuple[Node, frozenset[int]]) -> None:
        """Notes that labels on these dimensions of these operands end in the operation being handled."""
        assert self.op is not None
        self.consumptions.append(Consumption(self.op, operands))

    def _moved(self, node: Node, axes: str, out_axes: str, planes: list[Tensor]) -> Operand:
        real = frozenset(
            out_axes.index(axis) for axis, size in zip(axes, node.shape, strict=True) if size > 1 and axis in out_axes
        )
        moved = []
        for plane in planes:
            # Summed axes no longer vary here; drop them, then order what is left as the output has it.
            kept = [dim for dim in range(plane.dim()) if axes[dim] in out_axes]
            for dim in reversed([d for d in range(plane.dim()) if d not in kept]):
                plane = plane.select(dim, 0)
            order = sorted(range(len(kept)), key=lambda i: out_axes.index(axes[kept[i]]))
            plane = plane.permute(order)
            sizes = {axes[kept[i]]: plane.shape[at] for at, i in enumerate(order)}
            moved.append(plane.reshape([sizes.get(axis, 1) for axis in out_axes]))
        return moved, real

    # ------------------------------------------------------------------ reduction

    def reduce(self, node: Node, dims: Sequence[int], why: str, *, keep: bool = False,
               maskable: bool = True) -> list[Tensor]:  # fmt: skip
        """Planes of a statistic of ``node`` over ``dims``, with the reduced dimensions kept at size 1.

        A plane that lives on reduced dimensions alone ends (or stays, with ``keep``, as for a softmax or a
        normalisation), and masked execution must take the statistic over kept positions only. A plane that also
        varies elsewhere is coarsened away from the reduced dimensions.

        Args:
            node: What is reduced.
            dims: The reduced dimensions, non-negative; empty means all.
            why: Said where labels are joined or frozen.
            keep: Whether the result still has the reduced positions.
            maskable: Whether a masked form of the statistic exists; otherwise such labels freeze.
        """
        reduced = set(dims) or set(range(node.ndim))
        if all(plane.shape[dim] == 1 for plane in node.planes for dim in reduced):
            return list(node.planes)
        planes = []
        for plane in self.get(node):
            inside = varying(plane) & reduced
            if not inside:
                planes.append(plane)
                continue
            if not varying(plane) <= reduced:
                if not self.is_inner(plane):
                    planes.append(self.coarsen(plane, inside, why))
                    continue
                # What is inside a head is the same in every head, so the other dimensions are tied.
                plane = self.coarsen(plane, varying(plane) - reduced, why)
            if not maskable:
                self.freeze(plane, why)
            else:
                assert self.op is not None
                self.reductions.append(Reduction(self.op, node, plane))
                if keep:
                    planes.append(plane)
        return planes

    def leave_spatial(self, node: Node, dims: Iterable[int], why: str) -> list[Tensor]:
        """Planes of ``node`` with labels tied (or frozen) along ``dims``, whose positions are mixed."""
        dims = list(dims)
        if all(plane.shape[dim] == 1 for plane in node.planes for dim in dims):
            return list(node.planes)
        planes = []
        for plane in self.get(node):
            mixed = [dim for dim in dims if plane.shape[dim] > 1]
            planes.append(self.coarsen_or_freeze(plane, mixed, why) if mixed else plane)
        return planes
