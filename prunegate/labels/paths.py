"""Which operator of which choice a traced operation belongs to: a trace runs them all and adds up what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from prunegate.choice import Choice
from prunegate.errors import AttachError
from prunegate.tensors import modules_of

__all__ = ["ALL", "ChoiceRecord", "Path", "Paths", "Run", "find_choices", "is_active", "paths_of_modules"]

ALL = -1
"""In a path, stands for what adds up the operators' outputs; no cut model does that."""

Path = tuple[tuple[str, int], ...]
"""From the outermost choice in, pairs of a choice's name and the number of one of its operators."""


@dataclass(eq=False)
class ChoiceRecord:
    """What is decided at once: one choice, or all with one key.

    Attributes:
        name: The key, or the qualified name of the module.
        options: Names of the operators.
        sites: The modules, by qualified name.
    """

    name: str
    options: tuple[str, ...]
    sites: dict[str, Choice] = field(default_factory=dict)


@dataclass(eq=False)
class Run:
    """One run of a choice in a trace.

    Attributes:
        name: The key or name of the choice.
        site: Qualified name of the module.
        path: Where it stands.
        inputs: Its positional and keyword arguments.
        outputs: What each operator gave.
        total: Their sum, which the rest of the model saw.
    """

    name: str
    site: str
    path: Path
    inputs: Any
    outputs: list[Any]
    total: Any


def find_choices(model: nn.Module, ignore: Callable[[str], bool] = lambda name: False) -> dict[str, ChoiceRecord]:
    """The choices of a model, by name, in the order of its modules.

    Args:
        model: The model.
        ignore: Says of a module's qualified name whether it keeps its first operator.

    Raises:
        AttachError: Choices with one key have different names for their operators.
    """
    found: dict[str, ChoiceRecord] = {}
    for site, module in modules_of(model):
        if not isinstance(module, Choice) or ignore(site):
            continue
        name = site if module.key is None else module.key
        record = found.setdefault(name, ChoiceRecord(name, module.names))
        if record.options != module.names:
            first = next(iter(record.sites))
            raise AttachError(
                f"choices with the key {name!r} must have the same names: {first!r} has {list(record.options)}, "
                f"{site!r} has {list(module.names)}"
            )
        record.sites[site] = module
    return found


class Paths:
    """Runs every operator of every choice, and says on which path one is.

    Args:
        choices: The choices that are gated; any other runs its chosen operator.

    Attributes:
        current: Where the forward is.
        runs: The choices that were run, in order.
    """

    def __init__(self, choices: Mapping[str, ChoiceRecord]) -> None:
        self.current: Path = ()
        self.runs: list[Run] = []
        self._names = {id(module): (record.name, site)
                       for record in choices.values() for site, module in record.sites.items()}  # fmt: skip

    @contextmanager
    def _on(self, name: str, index: int) -> Iterator[None]:
        outer = self.current
        self.current = (*outer, (name, index))
        try:
            yield
        finally:
            self.current = outer

    def __call__(self, choice: Choice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The sum of the outputs of all operators."""
        if id(choice) not in self._names:
            return choice.run(choice.chosen, args, kwargs)
        name, site = self._names[id(choice)]
        decided = dict(self.current).get(name)
        if decided is not None:  # inside an operator of a choice with the same key
            return choice.run(decided, args, kwargs)
        outputs = []
        for index in range(len(choice)):
            with self._on(name, index):
                outputs.append(_run(choice, site, index, args, kwargs))
        with self._on(name, ALL):
            total = _sum(outputs, choice, site)
        self.runs.append(Run(name, site, self.current, (args, kwargs), outputs, total))
        return total


def _run(choice: Choice, site: str, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return choice.run(index, args, kwargs)
    except AttachError:
        raise
    except Exception as error:
        given = _shapes(tree_flatten((args, kwargs))[0])
        raise AttachError(
            f"the operator {choice.names[index]!r} of the choice {site!r} does not run on what the choice is given "
            f"({given}): {type(error).__name__}: {error}"
        ) from error


def _sum(outputs: list[Any], choice: Choice, site: str) -> Any:
    leaves, tree = tree_flatten(outputs[0])
    totals = list(leaves)
    for index, output in enumerate(outputs[1:], start=1):
        others, other_tree = tree_flatten(output)
        if other_tree != tree or _shapes(others) != _shapes(leaves):
            raise AttachError(
                f"the operators of the choice {site!r} do not give the same shape: {choice.names[0]!r} gives "
                f"{_shapes(leaves)}, {choice.names[index]!r} gives {_shapes(others)}"
            )
        totals = [a + b if isinstance(a, Tensor) else a for a, b in zip(totals, others, strict=True)]
    return tree_unflatten(totals, tree)


def _shapes(leaves: Iterable[Any]) -> str:
    return ", ".join(str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves)


def is_active(path: Path, chosen: Mapping[str, int]) -> bool:
    """Whether what is on ``path`` runs where the operators ``chosen`` stand in place of their choices."""
    return all(chosen.get(name) == index for name, index in path)


def paths_of_modules(model: nn.Module, choices: Mapping[str, ChoiceRecord]) -> dict[str, Path]:
    """The path on which each module stands, by every name that it has."""
    group_of = {site: (record.name, module) for record in choices.values() for site, module in record.sites.items()}
    # A module under several names is a choice under each of them.
    by_identity = {id(module): name for name, module in group_of.values()}
    found: dict[str, Path] = {}
    for name, _ in model.named_modules(remove_duplicate=False):
        parent, _, _ = name.rpartition(".")
        path = found.get(parent, ()) if name else ()
        grandparent = parent.rpartition(".")[0]
        outer: Any = model.get_submodule(grandparent) if parent else None
        if isinstance(outer, Choice) and id(outer) in by_identity:
            below = name.removeprefix(f"{grandparent}.") if grandparent else name
            index = outer.index_below(below)
            if index is not None:
                path = (*path, (by_identity[id(outer)], index))
        found[name] = path
    return found
