"""Gates of choices: groups of which exactly one unit stays, behind all other gates in the one vector of logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from prunegate.again import carry
from prunegate.choice import Choice
from prunegate.errors import AttachError
from prunegate.groups import GateMap, Group
from prunegate.gumbel import gumbel_softmax
from prunegate.gumbel.philox import Philox
from prunegate.gumbel.reference import gumbel_noise, philox_gumbel
from prunegate.labels.endings import Ending
from prunegate.labels.paths import Path, paths_of_modules
from prunegate.labels.trace import Trace

__all__ = ["ONE_OF", "PATHS", "OperatorSampler", "PathLengths", "add_choices", "chosen_by", "route_choices"]

ONE_OF = "choice"
"""Kind of a group of which exactly one unit stays."""

PATHS = ("single", "topk", "all")
"""Which operators of a choice run in a step of a search; see ``prunegate.attach``."""


def add_choices(trace: Trace, groups: Sequence[Group], gate_map: GateMap) -> tuple[tuple[Group, ...], GateMap]:
    """Gates for the choices of a traced model, behind those of its units.

    Raises:
        AttachError: A key is the name of a group of units.
    """
    taken = {group.name for group in groups}
    found: list[Group] = []
    at = gate_map.n_gates
    for name, record in trace.choices.items():
        if name in taken:
            raise AttachError(f"the key {name!r} of a choice is the name of a group of units too; give it another")
        found.append(Group(name, ONE_OF, slice(at, at + len(record.options)), ()))
        at += len(record.options)
    choices = {group.name: group.slice for group in found}
    return (*groups, *found), replace(gate_map, n_gates=at, choices=choices)


def chosen_by(gate_map: GateMap, mask: Tensor) -> dict[str, int]:
    """Number of the operator that a mask leaves of each choice."""
    return {name: int(mask[own].to(torch.uint8).argmax()) for name, own in gate_map.choices.items()}


# ---------------------------------------------------------------------- running


@dataclass(eq=False)
class Route:
    """Which operators of one choice run in this step.

    Attributes:
        running: Their numbers; the first is the one that was drawn.
        weights: ``[n]``, what their outputs are multiplied by; ``None`` where one runs as it is.
    """

    running: tuple[int, ...]
    weights: Tensor | None


class OperatorSampler:
    """Draws the operators of a step, all choices by one call of the sampler.

    Args:
        choices: Where the gates of each choice stand.
        paths: ``"single"``: the operator that is drawn runs, times a factor 1 that carries the gradient of the relaxed
            sample (Dong and Yang, arXiv 1910.04465). ``"topk"``: others run beside it with the factor 0, so that the
            gradient can compare them. ``"all"``: all run, weighted by the relaxed sample (Xie et al., arXiv
            1812.09926).
        top_k: How many run for ``"topk"``.
    """

    def __init__(self, choices: Mapping[str, slice], paths: str, top_k: int) -> None:
        self.names = list(choices)
        self.paths = paths
        self.top_k = top_k
        self.sizes = [own.stop - own.start for own in choices.values()]
        self.first = next(iter(choices.values())).start
        ends = torch.tensor(self.sizes).cumsum(0)
        self.offsets = torch.cat([ends.new_zeros(1), ends])

    def probabilities(self, logits: Tensor) -> Tensor:
        """The chance of every gate, ``[n_gates]``: those of units on their own, those of a choice add up to 1."""
        units, own = logits[: self.first], logits[self.first :]
        return torch.cat([torch.sigmoid(units), *(torch.softmax(part, 0) for part in own.split(self.sizes))])

    def fixed(self, mask: Tensor) -> dict[str, Route]:
        """Routes through the operators that a mask leaves."""
        parts = mask[self.first :].to(torch.uint8).cpu().split(self.sizes)
        return {name: Route((int(part.argmax()),), None) for name, part in zip(self.names, parts, strict=True)}

    def put(self, gates: Tensor, routes: Mapping[str, Route]) -> Tensor:
        """The sample of all gates, ``[n_gates]``, with the operators' weights where their gates stand."""
        own = [weights for weights in (routes[name].weights for name in self.names) if weights is not None]
        return torch.cat([gates[: self.first], *(own or [gates[self.first :].detach()])])

    def draw(self, logits: Tensor, tau: Tensor, generator: Philox | None = None) -> dict[str, Route]:
        """A random route through each choice.

        Args:
            logits: ``[n_gates]``, already divided by the noise.
            tau: Temperature of the relaxed sample, divided likewise.
            generator: Where the noise comes from; torch's own generator if left out.
        """
        own = logits[self.first :]
        sample = gumbel_softmax(own, tau, hard=self.paths != "all", segments=self.offsets, generator=generator)
        order = sample.detach()
        if self.paths == "topk":
            # Gumbel-top-k: the companions are drawn without replacement; the one that was drawn comes first.
            gumbel = gumbel_noise(order, None) if generator is None else philox_gumbel(generator.take(), order, 0, None)
            order = order * 1e4 + (own.detach() + gumbel).clamp(-1e3, 1e3)
        # One read for all choices, so that an accelerator waits once a step.
        ranked = [part.argsort(descending=True).tolist() for part in order.cpu().split(self.sizes)]
        count = {"single": 1, "topk": self.top_k}.get(self.paths)
        return {
            name: Route(tuple(numbers[:count]), weights)
            for name, numbers, weights in zip(self.names, ranked, sample.split(self.sizes), strict=True)
        }


class Conductor:
    """Runs one gated choice as this step's sample says.

    Args:
        sample: Has the routes of the step.
        name: Name of the choice's gates.
        kinds: Where the gate of each operator acts, see :mod:`prunegate.labels.endings`; on its output if left out.
    """

    def __init__(self, sample: Any, name: str, kinds: Sequence[str] = ()) -> None:
        self.sample = sample
        self.name = name
        self.kinds = tuple(kinds)

    def __call__(self, choice: Choice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The weighted sum of the outputs of the operators that run."""
        if self.sample.routes is None:
            return choice.run(choice.chosen, args, kwargs)
        route: Route = self.sample.routes[self.name]
        if route.weights is None:
            return choice.run(route.running[0], args, kwargs)
        total, weights = None, route.weights
        versions = _versions(args, kwargs)
        for index in sorted(route.running):
            output = self._weighted(choice, index, weights[index], args, kwargs, alone=len(route.running) == 1)
            total = output if total is None else tree_map(_added, total, output)
            if len(route.running) > 1 and _versions(args, kwargs) != versions:
                raise AttachError(
                    f"the operator {choice.names[index]!r} of the choice {self.name!r} changes its input in place, "
                    'which others read too; make it not do so (inplace=False), or attach with paths="single"'
                )
        return total

    def _weighted(self, choice: Choice, index: int, weight: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any],
                  alone: bool) -> Any:  # fmt: skip
        """What one operator gives, times its weight, which is 1 where the operator runs alone."""
        kind = self.kinds[index] if self.kinds else "output"
        if kind == "input" and alone:
            args, kwargs = tree_map(partial(_carried, weight=weight), (args, kwargs))
        elif kind in ("input", "output"):
            return choice.run_scaled(index, args, kwargs, weight)
        return choice.run(index, args, kwargs)


def _carried(leaf: Any, weight: Tensor) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return carry(leaf, weight) if weight.requires_grad else leaf


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    return [leaf._version for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _added(a: Any, b: Any) -> Any:
    return a + b if isinstance(a, Tensor) else a


def route_choices(running: Any, trace: Trace, sample: Any, kinds: Mapping[str, Sequence[Ending]]) -> None:
    """Lets the gates' sample run the choices of a running copy.

    Args:
        running: A running copy of the traced model.
        trace: The labelling.
        sample: Has the routes of a step.
        kinds: How the gates of each site act.
    """
    for name, record in trace.choices.items():
        for site in record.sites:
            own = [ending.kind for ending in kinds.get(site, ())]
            running.get_submodule(site).set_route(Conductor(sample, name, own))


# ---------------------------------------------------------------------- what paths cost


class PathLengths:
    """The gates that decide whether what stands on a path is there, as lengths of 0 or 1.

    Args:
        trace: A labelling.
        gate_map: Where the gates of choices stand.
    """

    def __init__(self, trace: Trace, gate_map: GateMap) -> None:
        self._trace = trace
        self._first = {name: own.start for name, own in gate_map.choices.items()}
        self._gates: dict[tuple[str, int], Tensor] = {}
        self._modules = paths_of_modules(trace.model, trace.choices) if trace.choices else {}
        self._paths: dict[int, set[Path]] = {}
        for name, path in self._modules.items():
            module = trace.model.get_submodule(name)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                self._paths.setdefault(id(tensor), set()).add(path)

    def of(self, path: Path) -> list[Tensor]:
        """Factors of what is there only on ``path``; what adds up outputs is free, so it has none of its own."""
        return [self._gate(step) for step in dict.fromkeys(path) if step[1] >= 0]

    def _gate(self, step: tuple[str, int]) -> Tensor:
        if step not in self._gates:
            self._gates[step] = torch.tensor([self._first[step[0]] + step[1]])
        return self._gates[step]

    def of_tensor(self, name: str) -> Iterator[tuple[int, list[Tensor]]]:
        """Terms (coefficient, factors) that add up to 1 where a weight or buffer is there and to 0 where it is not.

        A tensor that several operators hold is there when any of them is chosen: inclusion and exclusion.
        """
        owner, _, key = name.rpartition(".")
        tensor = getattr(self._trace.model.get_submodule(owner), key, None) if self._modules else None
        paths = self._paths.get(id(tensor), {self._modules.get(owner, ())})
        if () in paths:
            yield 1, []
            return
        for count in range(1, len(paths) + 1):
            for some in combinations(sorted(paths), count):
                together = dict.fromkeys(step for path in some for step in path)
                if len({choice for choice, _ in together}) == len(together):
                    yield (-1) ** (count + 1), [self._gate(step) for step in together]

    def shared_positions(self, name: str) -> tuple[set[int], list[Tensor]]:
        """The dimensions of a parameter of which operators keep different shares, and one factor for them all."""
        dims: set[int] = set()
        found: list[Tensor] = []
        for group, record in self._trace.choices.items():
            for site, choice in record.sites.items():
                below = name.removeprefix(f"{site}.") if site else name
                if site and not name.startswith(f"{site}."):
                    continue
                for index in range(len(choice)):
                    sizes = {dim: len(at) for (tensor, dim), at in choice.kept(index).items() if tensor == below}
                    dims |= sizes.keys()
                    if sizes:
                        found.append(self._gate((group, index)).expand(math.prod(sizes.values())))
        return dims, [torch.cat(found)] if found else []
