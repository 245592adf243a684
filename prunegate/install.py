"""Puts gates into a copy of a model's modules, at the places that ``sites`` found.

Gates act inside each consumer's own call and read the sample of the step, so a recomputed forward (activation
checkpointing) sees the same gates, and compilers and distributed wrappers see plain code.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunegate.gates import Gates, Sample
from prunegate.groups import GateMap
from prunegate.gumbel import gated_product
from prunegate.labels.endings import endings
from prunegate.labels.record import Call
from prunegate.labels.trace import Trace
from prunegate.masked import MASKED_CALLS
from prunegate.operators import OperatorSampler, route_choices
from prunegate.plan import CallSite
from prunegate.sites import OperandSite, Sites, StatisticSite
from prunegate.slim.edits import wrap_calls
from prunegate.slim.locate import locate
from prunegate.tensors import computed_tensors, modules_of

__all__ = ["install", "running_copy"]


def running_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree over the same parameters and buffers.

    Modules are new objects, so classes and attributes can change; the dictionaries of parameters and buffers are the
    model's own, so training, moving and loading act on both.
    """
    modules = [module for _, module in modules_of(model)]
    memo: dict[int, Any] = {id(module): type(module).__new__(type(module)) for module in modules}
    memo.update(computed_tensors(model))
    for module in modules:
        for store in (module._parameters, module._buffers):
            memo[id(store)] = store
            memo.update({id(tensor): tensor for tensor in store.values() if tensor is not None})
    # As copy.deepcopy would, but a module's dozens of plain values and empty dictionaries of hooks are not worth a
    # recursive call each: they would take most of the time.
    left: list[tuple[nn.Module, str, Any]] = []
    for module in modules:
        attributes = dict(module.__dict__)
        for key, value in attributes.items():
            kind = type(value)
            if kind in _PLAIN or (kind is tuple and all(type(item) in _PLAIN for item in value)):
                continue
            if kind in _CONTAINERS and not value:
                attributes[key] = memo[id(value)] if id(value) in memo else kind()
            elif key == "_modules":
                attributes[key] = kind((name, memo.get(id(child))) for name, child in value.items())
            elif isinstance(value, Tensor):
                memo[id(value)] = value
            elif id(value) not in memo or kind not in _DICTIONARIES:
                left.append((memo[id(module)], key, value))
        memo[id(module)].__dict__.update(attributes)
    for copied, key, value in left:  # now that everything they may refer to is known
        copied.__dict__[key] = copy.deepcopy(value, memo)
    running: nn.Module = memo[id(model)]
    return running


_PLAIN = frozenset([bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device])
_DICTIONARIES = frozenset([dict, OrderedDict])
_CONTAINERS = _DICTIONARIES | {set}


def install(running: nn.Module, sites: Sites, gate_map: GateMap, trace: Trace,
            operators: OperatorSampler | None = None) -> Gates:  # fmt: skip
    """Installs every site into ``running`` and returns the gates that drive them.

    Args:
        running: A running copy of the traced model.
        sites: Where gates act.
        gate_map: From labels to gates.
        trace: The labelling that the sites were found in.
        operators: Draws the operators of the model's choices, if it has any.
    """
    pieces = _Pieces(gate_map)
    sample = Sample()
    for parameter in sites.parameters:
        owner, _, name = parameter.name.rpartition(".")
        _gate_parameter(running.get_submodule(owner), name, pieces.of(parameter.plane), sample)
    places: dict[CallSite, dict[int, list[OperandSite | StatisticSite]]] = {}
    acting: list[OperandSite | StatisticSite] = [*sites.operands, *sites.statistics]
    for site in acting:
        place = locate(site.call.frame, site.call.name, trace.modules)
        assert place is not None
        places.setdefault(place, {}).setdefault(id(site.call), []).append(site)
    executions = _executions(trace, [site.call for site in acting])
    wraps: dict[CallSite, GatedCall] = {}
    for place, by_call in places.items():
        some = next(iter(by_call.values()))[0]
        turns = []
        for call in executions[_instruction(some.call)]:
            if locate(call.frame, call.name, trace.modules) == place:
                own = by_call.get(id(call), [])
                turns.append(tuple((_argument(site), pieces.of(site.plane)) for site in own))
        masked = some.call.name if isinstance(some, StatisticSite) else None
        # A line that always does the same needs no count of its executions.
        wraps[place] = GatedCall(sample, turns[:1] if len(set(turns)) == 1 else turns, masked)
    wrap_calls(running, wraps)
    if operators is not None:
        acting_at = endings(trace)
        route_choices(running, trace, sample, acting_at)
        for run in trace.runs:
            for index, ending in enumerate(acting_at[run.site]):
                for full in ending.parameters:
                    owner, _, name = full.rpartition(".")
                    gate = torch.tensor([gate_map.choices[run.name].start + index])
                    _gate_parameter(running.get_submodule(owner), name, pieces.at(gate), sample)
    return Gates(gate_map.n_gates, pieces.gates, sample, gate_map.start(), operators)


_STATISTIC = -1


def _argument(site: OperandSite | StatisticSite) -> int:
    return site.argument if isinstance(site, OperandSite) else _STATISTIC


def _instruction(call: Call) -> tuple[int, int]:
    assert call.frame is not None
    return id(call.frame.code), call.frame.lasti


def _executions(trace: Trace, calls: Sequence[Call]) -> dict[tuple[int, int], list[Call]]:
    """All recorded executions of the instructions that made ``calls``, in order."""
    found: dict[tuple[int, int], list[Call]] = {_instruction(call): [] for call in calls}
    for call in trace.calls:
        if call.frame is not None and _instruction(call) in found:
            found[_instruction(call)].append(call)
    return found


class _Pieces:
    """Collects the distinct (gates, shape) that sites multiply by; equal ones share a piece of the sample."""

    def __init__(self, gate_map: GateMap) -> None:
        self._of_label = gate_map.of_label
        self._at: dict[tuple[tuple[int, ...], bytes], int] = {}
        self.gates: list[Tensor] = []

    def of(self, plane: Tensor) -> int:
        """The piece for a plane of labels."""
        return self.at(self._of_label[plane])

    def at(self, gates: Tensor) -> int:
        """The piece for gates."""
        key = (tuple(gates.shape), gates.numpy().tobytes())
        if key not in self._at:
            self._at[key] = len(self.gates)
            self.gates.append(gates)
        return self._at[key]


class GatedCall:
    """What a call in a model's source goes through: operands are gated, statistics taken over kept positions only.

    Attributes:
        sample: The gates of this step.
        turns: For each execution of the line in one run of its method, in order, the (position among the call's
            tensors, piece of the sample) pairs to multiply; one entry where all executions are alike. For a statistic
            the position is not used.
        masked: Name of the masked form, for a statistic.
    """

    def __init__(self, sample: Sample, turns: Sequence[tuple[tuple[int, int], ...]], masked: str | None) -> None:
        self.sample = sample
        self.turns = list(turns)
        self.masked = masked
        self._turn = 0

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls ``function`` with this step's gates."""
        pieces = self.turns[self._turn]
        if len(self.turns) > 1:
            self._turn = (self._turn + 1) % len(self.turns)
        gates = self.sample.pieces
        if gates is None or not pieces:
            return function(*args, **kwargs)
        if self.masked is not None:
            keep = gates[pieces[0][1]]
            for _, piece in pieces[1:]:
                keep = keep * gates[piece]
            first = args[0] if args else kwargs["input"]
            return MASKED_CALLS[self.masked](function, keep.to(first.dtype), *args, **kwargs)
        return function(*_multiplied(args, kwargs, pieces, gates), **kwargs)


def _multiplied(args: Sequence[Any], kwargs: dict[str, Any], pieces: Sequence[tuple[int, int]],
                gates: Sequence[Tensor]) -> list[Any]:  # fmt: skip
    """The positional arguments with gated operands; those given by keyword are replaced in ``kwargs``."""
    positional = list(args)
    tensors = [at for at, value in enumerate(positional) if isinstance(value, Tensor)]
    named = [key for key, value in kwargs.items() if isinstance(value, Tensor)]
    for argument, piece in pieces:
        if argument < len(tensors):
            at = tensors[argument]
            positional[at] = gated_product(positional[at], gates[piece])
        else:
            key = named[argument - len(tensors)]
            kwargs[key] = gated_product(kwargs[key], gates[piece])
    return positional


# ---------------------------------------------------------------------- gated parameters


def _gate_parameter(module: nn.Module, name: str, site: int, sample: Sample) -> None:
    gated: dict[str, tuple[int, ...]] = dict(module.__dict__.get("_prunegate_gated", {}))
    gated[name] = (*gated.get(name, ()), site)
    module.__dict__["_prunegate_gated"] = gated
    module.__dict__["_prunegate_sample"] = sample
    # Recurrent layers read their parameters from a list that they keep beside them.
    lists = tuple(
        key
        for key, value in module.__dict__.items()
        if isinstance(value, list) and any(item is module._parameters[name] for item in value)
    )
    base: Any = type(module)
    known: tuple[str, ...] = ()
    if "_prunegate_base" in base.__dict__:
        base, known = base._prunegate_base, base._prunegate_lists
    module.__class__ = _gated_class(base, tuple(sorted(gated)), tuple(sorted({*known, *lists})))


@functools.cache
def _gated_class(base: Any, names: tuple[str, ...], lists: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of ``base``, a class, whose parameters ``names`` (and ``lists`` of them) read as gated."""
    namespace: dict[str, Any] = {name: property(functools.partial(_read, name=name)) for name in names}
    for key in lists:
        namespace[key] = property(functools.partial(_read_list, key=key), functools.partial(_write, key=key))
    if "weight" in names and base.forward in _CONTRACTIONS:
        namespace["forward"] = _contracted
    namespace |= {
        "_prunegate_base": base,
        "_prunegate_lists": lists,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    return type(base.__name__, (base,), namespace)


def _read(module: nn.Module, name: str) -> Tensor | None:
    parameter = module._parameters[name]
    gates = module.__dict__["_prunegate_sample"].pieces
    if gates is None or parameter is None:
        return parameter
    value: Tensor = parameter
    for site in module.__dict__["_prunegate_gated"][name]:
        value = gated_product(value, gates[site])
    return value


def _linear(module: Any, input: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(input, weight, module.bias)


def _convolution(module: Any, input: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = module._conv_forward(input, weight, module.bias)
    return result


# Forwards that do nothing but contract their input's channels with the weight: the same, for a weight given to them.
_CONTRACTIONS: dict[Any, Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.Linear.forward: _linear,
    nn.Conv1d.forward: _convolution,
    nn.Conv2d.forward: _convolution,
    nn.Conv3d.forward: _convolution,
}


def _contracted(module: Any, input: Tensor) -> Tensor:
    """The forward of such a module. Gates on the weight's input channels may as well stand on the input.

    They go to the smaller of the two: late in a convolutional network at few images that is the input, by far.
    """
    base, weight = type(module)._prunegate_base, module._parameters["weight"]
    gates = module.__dict__["_prunegate_sample"].pieces
    if gates is not None and input.numel() < weight.numel() and getattr(module, "groups", 1) == 1:
        pieces = [gates[site] for site in module.__dict__["_prunegate_gated"]["weight"]]
        if all(piece.shape[0] == 1 for piece in pieces):
            for piece in pieces:
                input = gated_product(input, piece.squeeze(0))
            return _CONTRACTIONS[base.forward](module, input, weight)
    result: Tensor = base.forward(module, input)
    return result


def _read_list(module: nn.Module, key: str) -> list[Tensor | None]:
    names = {id(parameter): name for name, parameter in module._parameters.items()}
    gated = module.__dict__["_prunegate_gated"]
    return [
        _read(module, names[id(item)]) if names.get(id(item)) in gated else item for item in module.__dict__[key]
    ]


def _write(module: nn.Module, value: Any, key: str) -> None:
    module.__dict__[key] = value
