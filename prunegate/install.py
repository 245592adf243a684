"""Puts gates into a copy of a model's modules, at the places that ``sites`` found.

Gates act inside each consumer's own call and read the sample of the step, so a recomputed forward (activation
checkpointing) sees the same gates, and compilers and distributed wrappers see plain code.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from prunegate.gates import Gates, Sample
from prunegate.groups import GateMap
from prunegate.masked import MASKED_CALLS
from prunegate.sites import OperandSite, ParameterSite, Sites, StatisticSite
from prunegate.slim.edits import wrap_calls
from prunegate.slim.locate import locate
from prunegate.tensors import named_tensors

__all__ = ["install", "running_copy"]


def running_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree over the same parameters and buffers.

    Modules are new objects, so classes and attributes can change; the dictionaries of parameters and buffers are the
    model's own, so training, moving and loading act on both.
    """
    memo: dict[int, Any] = {id(tensor): tensor for _, tensor, _ in named_tensors(model)}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            memo[id(store)] = store
    return copy.deepcopy(model, memo)


def install(running: nn.Module, sites: Sites, gate_map: GateMap, modules: Mapping[int, str]) -> Gates:
    """Installs every site into ``running`` and returns the gates that drive them.

    Args:
        running: A running copy of the traced model.
        sites: Where gates act.
        gate_map: From labels to gates.
        modules: Qualified name of every module of the traced model, by identity.
    """
    every: list[ParameterSite | OperandSite | StatisticSite] = [*sites.parameters, *sites.operands, *sites.statistics]
    planes = [gate_map.of_label[site.plane] for site in every]
    gates = Gates(gate_map.n_gates, planes, [plane.shape for plane in planes])
    at_of = {id(site): at for at, site in enumerate(every)}
    for parameter in sites.parameters:
        owner, _, name = parameter.name.rpartition(".")
        _gate_parameter(running.get_submodule(owner), name, at_of[id(parameter)], gates.sample)
    wraps: dict[Any, OperandGate | StatisticGate] = {}
    for operand in sites.operands:
        gate = wraps.setdefault(locate(operand.call.frame, operand.call.name, modules), OperandGate(gates.sample))
        assert isinstance(gate, OperandGate)
        gate.pieces.append((operand.argument, at_of[id(operand)]))
    for statistic in sites.statistics:
        place = locate(statistic.call.frame, statistic.call.name, modules)
        masked = wraps.setdefault(place, StatisticGate(gates.sample, statistic.call.name))
        assert isinstance(masked, StatisticGate)
        masked.pieces.append(at_of[id(statistic)])
    wrap_calls(running, wraps)
    return gates


class OperandGate:
    """Multiplies operands of one call by their gates.

    Attributes:
        pieces: (position among the call's tensors, site) pairs.
    """

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.pieces: list[tuple[int, int]] = []

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls ``function`` with gated operands."""
        gates = self.sample.pieces
        if gates is None:
            return function(*args, **kwargs)
        positional = list(args)
        tensors = [at for at, value in enumerate(positional) if isinstance(value, Tensor)]
        for argument, site in self.pieces:
            if argument < len(tensors):
                at = tensors[argument]
                positional[at] = positional[at] * gates[site].to(positional[at].dtype)
            else:
                keys = [key for key, value in kwargs.items() if isinstance(value, Tensor)]
                key = keys[argument - len(tensors)]
                kwargs[key] = kwargs[key] * gates[site].to(kwargs[key].dtype)
        return function(*positional, **kwargs)


class StatisticGate:
    """Takes the statistic of one call over kept positions only.

    Attributes:
        pieces: The sites whose gates multiply.
    """

    def __init__(self, sample: Sample, name: str) -> None:
        self.sample = sample
        self.name = name
        self.pieces: list[int] = []

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the masked form of ``function``."""
        gates = self.sample.pieces
        if gates is None:
            return function(*args, **kwargs)
        keep = gates[self.pieces[0]]
        for site in self.pieces[1:]:
            keep = keep * gates[site]
        first = args[0] if args else kwargs["input"]
        return MASKED_CALLS[self.name](function, keep.to(first.dtype), *args, **kwargs)


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
    base = type(module)
    known: tuple[str, ...] = ()
    if "_prunegate_base" in base.__dict__:
        base, known = base._prunegate_base, base._prunegate_lists  # type: ignore[attr-defined]
    module.__class__ = _gated_class(base, tuple(sorted(gated)), tuple(sorted({*known, *lists})))


@functools.cache
def _gated_class(base: type[nn.Module], names: tuple[str, ...], lists: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of ``base`` whose parameters ``names`` (and lists of them) read as themselves times their gates."""
    namespace: dict[str, Any] = {name: property(functools.partial(_read, name=name)) for name in names}
    for key in lists:
        namespace[key] = property(functools.partial(_read_list, key=key), functools.partial(_write, key=key))
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
        value = value * gates[site].to(value.dtype)
    return value


def _read_list(module: nn.Module, key: str) -> list[Tensor | None]:
    names = {id(parameter): name for name, parameter in module._parameters.items()}
    gated = module.__dict__["_prunegate_gated"]
    return [
        _read(module, names[id(item)]) if names.get(id(item)) in gated else item for item in module.__dict__[key]
    ]


def _write(module: nn.Module, value: Any, key: str) -> None:
    module.__dict__[key] = value
