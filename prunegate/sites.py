"""Where gates act: the consumers of units, and the statistics that must be taken over kept positions only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prunegate.blocks import Block
from prunegate.labels.algebra import Consumption, Reduction
from prunegate.labels.planes import varying
from prunegate.labels.record import Call, Node, Op, nodes_in
from prunegate.labels.trace import Trace
from prunegate.labels.unionfind import FROZEN, Reason
from prunegate.masked import MASKED_CALLS

__all__ = ["OperandSite", "ParameterSite", "Sites", "StatisticSite", "find_sites"]


@dataclass(frozen=True, eq=False)
class ParameterSite:
    """A parameter's input dimension, which the gate multiplies whenever its module reads it.

    Attributes:
        name: The parameter's qualified name in the module that reads it.
        dim: The gated dimension.
        plane: Labels, shaped to broadcast against the parameter.
    """

    name: str
    dim: int
    plane: Tensor


@dataclass(frozen=True, eq=False)
class OperandSite:
    """An operand of one Python-level contraction, gated inside that call.

    Attributes:
        call: The call.
        argument: Position of the operand among the call's tensors, in order.
        plane: Labels, shaped to broadcast against the operand.
    """

    call: Call
    argument: int
    plane: Tensor


@dataclass(frozen=True, eq=False)
class StatisticSite:
    """A Python-level reduction or normalisation, replaced by its masked form.

    Attributes:
        call: The call.
        plane: Labels, shaped to broadcast against the call's first tensor.
    """

    call: Call
    plane: Tensor


@dataclass(frozen=True, eq=False)
class Sites:
    """All the places where the gates of one model act."""

    parameters: tuple[ParameterSite, ...]
    operands: tuple[OperandSite, ...]
    statistics: tuple[StatisticSite, ...]

    @property
    def consumed(self) -> frozenset[tuple[str, int]]:
        """The (parameter, dimension) pairs that consume units."""
        return frozenset((site.name, site.dim) for site in self.parameters)


def with_blocks(sites: Sites, blocks: Sequence[Block]) -> Sites:
    """The sites, and the sums at which the gates of ``blocks`` act: there they multiply the branch."""
    sums = [
        OperandSite(block.call, block.branch, torch.full((1,) * block.call.out.ndim, block.label)) for block in blocks
    ]
    return replace(sites, operands=(*sites.operands, *sums))


Locate = Callable[[Call], Hashable | None]
"""Gives the place in the source of a module's method where a call is made; ``None`` where it cannot be edited."""


def find_sites(trace: Trace, locate: Locate) -> Sites:
    """Finds where each live label must act, and freezes the labels for which there is no such place.

    Args:
        trace: A labelling; labels may be frozen here.
        locate: Where a call stands in the source, if it can be edited there.

    Returns:
        The sites. Nothing that stays unfrozen lacks one.
    """
    while True:
        before = _live(trace)
        sites = _find_once(trace, locate)
        if _live(trace) == before:
            return sites


def _live(trace: Trace) -> int:
    return int((trace.labels.roots() != FROZEN).sum())


def _find_once(trace: Trace, locate: Locate) -> Sites:
    origins, uses = _Origins(trace), _Uses(trace)
    consumed = [node for event in trace.algebra.consumptions for node, _ in event.operands]
    trace.algebra.look_at([*consumed, *(node.source for node in consumed if node.source is not None)])
    parameters: dict[tuple[str, int, bool], ParameterSite] = {}
    operands: dict[Hashable, OperandSite] = {}
    statistics: dict[Hashable, StatisticSite] = {}
    for event in trace.algebra.consumptions:
        if not _is_live(trace, event):
            continue
        owned = list(_parameter_sites(trace, origins, event))
        # A parameter that is used in several ways is gated in this one alone, where its call can be edited.
        if owned and uses.differ(event) and _add_all(operands, _operand_sites(trace, event), locate):
            continue
        for site in owned:
            parameters[site.name, site.dim, trace.algebra.is_inner(site.plane)] = site
        if not owned and not _add_all(operands, _operand_sites(trace, event), locate):
            node, dims = event.operands[0]
            for plane in trace.algebra.get(node):
                if varying(plane) <= dims:
                    _freeze(trace, plane, event, "no place where its gate could act")
    for reduction in trace.algebra.reductions:
        plane = trace.labels.find(reduction.plane)
        if bool((plane != FROZEN).any()) and not _add(statistics, _statistic_site(trace, reduction), locate):
            _freeze(trace, plane, reduction, "this statistic has no masked form")
    return Sites(tuple(parameters.values()), tuple(operands.values()), tuple(statistics.values()))


def _add(found: dict[Hashable, Any], site: Any, locate: Locate) -> bool:
    """Files the site of one execution of a call, if its place in the source can be edited."""
    if site is None or locate(site.call) is None:
        return False
    # Heads and positions inside them may stand on one dimension; each has a gate there.
    argument = site.argument if isinstance(site, OperandSite) else 0
    found[id(site.call), argument, varying(site.plane), int(site.plane.max())] = site
    return True


def _add_all(found: dict[Hashable, Any], sites: Sequence[Any], locate: Locate) -> bool:
    return bool(sites) and all([_add(found, site, locate) for site in sites])


def _freeze(trace: Trace, plane: Tensor, event: Consumption | Reduction, why: str) -> None:
    trace.labels.freeze(plane, Reason(why, event.op.name, _module(trace, event.op)))


def _module(trace: Trace, op: Op) -> str:
    call = op.call
    return trace.algebra.module_name(call.frame if call else None)


def _is_live(trace: Trace, event: Consumption) -> bool:
    node, dims = event.operands[-1]
    return any(varying(plane) <= dims for plane in trace.algebra.get(node))


class _Origins:
    """For a rearranged parameter, which of the parameter's dimensions a dimension of the rearrangement came from.

    A rearranged parameter keeps the raw labels that its dimensions were born with, so a label tells its origin.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    @functools.cached_property
    def _born(self) -> Tensor:
        """The first of the labels that each (parameter, dimension) was born with, in increasing order."""
        return torch.tensor([first for first, _, _ in self._trace.algebra.born])

    def of(self, node: Node, dims: frozenset[int]) -> list[int]:
        """Dimensions of ``node.source`` that the contracted dimensions ``dims`` of ``node`` came from."""
        assert node.source is not None
        found: set[int] = set()
        for plane in node.planes:
            own_dims = varying(plane)
            if own_dims and own_dims <= dims:
                if node is node.source:
                    found |= own_dims
                    continue
                owners = torch.unique(torch.bucketize(plane[plane > FROZEN], self._born, right=True) - 1).tolist()
                born = [self._trace.algebra.born[at] for at in owners]
                found |= {own for _, name, own in born if name == node.source.name}
        return sorted(found)


class _Uses:
    """In how many ways each parameter is used: consumed along which dimensions, or not consumed at all."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        consumed = {
            (id(event.op), node.uid): dims for event in trace.algebra.consumptions for node, dims in event.operands
        }
        self._ways: dict[tuple[str, ...], set[tuple[str, frozenset[int] | None]]] = {}
        for op in trace.ops:
            for node in op.inputs:
                if node.source is None or node.source.name is None:
                    continue  # not a parameter
                if any(made.source is node.source for made in op.outputs):
                    continue  # a rearranged one, whose own uses count
                dims = consumed.get((id(op), node.uid))
                # In two layouts of one matrix the same dimension has two numbers: the raw labels tell.
                own = None if dims is None else frozenset(_first_labels(node, dims))
                self._ways.setdefault(self._key(node, op), set()).add((node.source.name, own))

    def _key(self, node: Node, op: Op) -> tuple[str, ...]:
        assert node.source is not None
        assert node.source.name is not None
        return tuple(_readers(self._trace, node.source.name, op))

    def differ(self, event: Consumption) -> bool:
        """Whether the parameter that ``event`` consumes is used in other ways, too, where it has the same name."""
        for node, _ in reversed(event.operands):
            if node.source is not None and node.source.name is not None:
                return len(self._ways.get(self._key(node, event.op), ())) > 1
        return False


def _first_labels(node: Node, dims: frozenset[int]) -> Iterator[int]:
    for plane in node.planes:
        if varying(plane) and varying(plane) <= dims:
            yield int(plane.flatten()[0])


def _parameter_sites(trace: Trace, origins: _Origins, event: Consumption) -> Iterator[ParameterSite]:
    for node, dims in reversed(event.operands):
        if node.source is None or node.source.name is None:
            continue
        for dim in origins.of(node, dims):
            for plane in trace.planes_along(node.source, dim):
                for name in _readers(trace, node.source.name, event.op):
                    yield ParameterSite(name, dim, plane)
        return


def _readers(trace: Trace, name: str, op: Op) -> list[str]:
    """The names by which a (perhaps tied) parameter is read in this operation."""
    names = [name, *(alias for alias, first in trace.aliases.items() if first == name)]
    if len(names) == 1:
        return names
    module = _module(trace, op)
    own = [each for each in names if each.rpartition(".")[0] == module]
    return own or names


# For each Python-level contraction: (position among its tensors, contracted dimension) of the operands to gate.
_CONTRACTED: dict[str, tuple[tuple[int, int], ...]] = {
    **dict.fromkeys(("matmul", "__matmul__", "bmm", "mm"), ((0, -1), (1, -2))),
    "linear": ((0, -1), (1, -1)),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), ((0, 1), (1, 1))),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), ((0, 1), (1, 0))),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), ((1, -1), (2, -2))),
    "scaled_dot_product_attention": ((0, -1), (1, -1)),
}


def _operand_sites(trace: Trace, event: Consumption) -> list[OperandSite]:
    """The smallest operand of the call, with each plane on its contracted dimension."""
    call = event.op.call
    if call is None:
        return []
    tensors = list(nodes_in((call.args, call.kwargs)))
    candidates = _einsum_operands(call, tensors) if call.name == "einsum" else _CONTRACTED.get(call.name, ())
    best: list[OperandSite] = []
    for argument, dim in candidates:
        node = tensors[argument]
        if node.ndim == 1:
            dim = -1
        found = [OperandSite(call, argument, plane) for plane in trace.planes_along(node, dim % node.ndim)]
        if found and (not best or node.numel() < tensors[best[0].argument].numel()):
            best = found
    return best


def _einsum_operands(call: Call, tensors: Sequence[Node]) -> tuple[tuple[int, int], ...]:
    equation = call.args[0]
    if not isinstance(equation, str) or "..." in equation or "->" not in equation:
        return ()
    left, _, right = equation.replace(" ", "").partition("->")
    return tuple(
        (at, dim)
        for at, letters in enumerate(left.split(",")[: len(tensors)])
        for dim, letter in enumerate(letters)
        if letter not in right
    )


def _statistic_site(trace: Trace, event: Reduction) -> StatisticSite | None:
    call = event.op.call
    if call is None or call.name not in MASKED_CALLS:
        return None
    node = next(nodes_in((call.args, call.kwargs)), None)
    wanted = torch.unique(trace.labels.find(event.plane))
    found = [
        plane
        for plane in (trace.algebra.get(node) if node is not None else [])
        if len(varying(plane)) == 1 and torch.equal(torch.unique(plane), wanted)
    ]
    # Units may stand on two dimensions of one tensor, as the channels of a head do in a product with themselves.
    found.sort(key=lambda plane: varying(plane) != varying(trace.labels.find(event.plane)))
    return StatisticSite(call, found[0]) if found else None
