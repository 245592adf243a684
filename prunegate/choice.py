"""One of several operators: the module that stands in a network where a search is to choose.

Nothing here knows gates. Whoever runs a choice in another way than through its chosen operator (the tracer, a gated
copy of the network) says so from outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunegate.errors import AttachError

__all__ = ["Choice", "Conductor", "conducted"]


class Conductor(Protocol):
    """Runs choices in another way than through their chosen operator."""

    def __call__(self, choice: Choice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of ``choice`` for these arguments."""


_CONDUCTOR: ContextVar[Conductor | None] = ContextVar("conductor", default=None)
_ROUTE = "_prunegate_route"


@contextmanager
def conducted(conductor: Conductor) -> Iterator[None]:
    """Inside, every choice that runs is run by ``conductor``."""
    token = _CONDUCTOR.set(conductor)
    try:
        yield
    finally:
        _CONDUCTOR.reset(token)


class Choice(nn.Module):
    """Stands for one of several operators; a search finds out which.

    As it is made it runs its first operator. ``prunegate.attach`` finds it wherever it stands in a network (in lists
    and dictionaries, inside another choice) and gives it a categorical gate, whose logits are part of
    ``gated.logits``; what ``export()`` returns has the chosen operator in its place.

    All operators take the same arguments and give outputs of the same shape. ``nn.Identity()`` is one:
    ``Choice([block, nn.Identity()])`` is a block that may vanish. An operator that gives nothing computes ``x * 0``, so
    that its output has the channels that ``x`` keeps. Operators must not change their input in place where several of
    them run (``paths="topk"`` or ``"all"``).

    Args:
        operators: Two or more modules.
        names: Their names in plans and tables; their numbers if left out.
        key: Choices with the same key choose together, by one gate; they need the same names.

    Attributes:
        operators: The operators.
        names: Their names.
        key: The key, or ``None``.
        chosen: Number of the operator that runs as long as there is no gate.

    Raises:
        AttachError: There are fewer than two operators, one of them is not a module or comes twice, or names are
            missing or not unique.

    Example:
        >>> import torch, prunegate
        >>> from torch import nn
        >>> choice = prunegate.Choice([nn.Linear(4, 4), nn.Identity()], names=["linear", "skip"])
        >>> net = nn.Sequential(choice, nn.Linear(4, 2))
        >>> gated = prunegate.attach(net, torch.randn(1, 4), units=())
        >>> gated.choose({"0": "skip"})
        >>> gated.export()[0]
        Identity()
    """

    def __init__(self, operators: Sequence[nn.Module], names: Sequence[str] | None = None,
                 key: str | None = None) -> None:  # fmt: skip
        super().__init__()
        given = list(operators)
        odd = [type(each).__name__ for each in given if not isinstance(each, nn.Module)]
        if odd:
            raise AttachError(f"Choice was given a {odd[0]} as an operator; expected torch.nn.Module objects")
        if len({id(each) for each in given}) != len(given):
            raise AttachError("Choice was given one module twice; an operator must be a module of its own")
        self.operators = nn.ModuleList(given)
        self._describe([str(at) for at in range(len(given))] if names is None else names, len(given), key)

    def _describe(self, names: Sequence[str], count: int, key: str | None) -> None:
        if count < 2:
            raise AttachError(f"Choice was given {count} operator{'s' * (count != 1)}; expected two or more to choose "
                              "from (nn.Identity() is one)")  # fmt: skip
        self.names = tuple(names)
        if isinstance(names, str) or any(not isinstance(name, str) or not name for name in self.names):
            raise AttachError(f"Choice was given names={names!r}; expected a list of names, one for each operator")
        if len(self.names) != count:
            raise AttachError(f"Choice was given {len(self.names)} names for {count} operators")
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise AttachError(f"Choice was given the name {twice[0]!r} twice; names must tell the operators apart")
        if key is not None and (not isinstance(key, str) or not key):
            raise AttachError(f"Choice was given key={key!r}; expected a name that choices share, or None")
        self.key = key
        self.chosen = 0

    def __len__(self) -> int:
        """Number of operators."""
        return len(self.names)

    def run(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of operator ``index`` alone."""
        return self.operators[index](*args, **kwargs)

    def run_scaled(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], factor: Tensor) -> Any:
        """The output of operator ``index`` alone, times a factor, a tensor of no dimensions."""
        return tree_map(partial(_scaled, factor=factor), self.run(index, args, kwargs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the chosen operator; in a gated copy, what its gate says."""
        conductor = _CONDUCTOR.get() or self.__dict__.get(_ROUTE)
        return self.run(self.chosen, args, kwargs) if conductor is None else conductor(self, args, kwargs)

    def set_route(self, conductor: Conductor) -> None:
        """From now on ``conductor`` runs this choice."""
        self.__dict__[_ROUTE] = conductor

    def path_of(self, index: int) -> str:
        """Name, below this module, of the module that stands in its place when ``index`` is chosen."""
        return f"operators.{index}"

    def index_below(self, name: str) -> int | None:
        """Which operator a module or tensor called ``name`` below this module is part of; ``None`` for all."""
        steps = name.split(".")
        return int(steps[1]) if steps[0] == "operators" and len(steps) > 1 else None

    def kept(self, index: int) -> Mapping[tuple[str, int], tuple[int, ...]]:
        """Positions that stay of tensors that operators share, by name below this module and dimension."""
        return {}

    def attributes(self, index: int) -> Mapping[tuple[str, str], Any]:
        """Attributes that change when ``index`` is chosen: new values by names of a module below this and attribute."""
        return {}

    def extra_repr(self) -> str:
        """What is shown of the choice."""
        return f"names={list(self.names)}" + ("" if self.key is None else f", key={self.key!r}")


def _scaled(leaf: Any, factor: Tensor) -> Any:
    return leaf * factor.to(leaf.dtype) if isinstance(leaf, Tensor) else leaf
