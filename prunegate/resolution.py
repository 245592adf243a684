"""One module whose input's resolution is searched: the same weights, fewer positions."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from prunegate.choice import Choice
from prunegate.errors import AttachError

__all__ = ["Resolution"]

_MODES = ("nearest", "linear", "bilinear", "bicubic", "trilinear", "area", "nearest-exact")


class Resolution(Choice):
    """A choice between resolutions at which one module runs.

    The input is resized to the chosen size, then the module runs; its weights serve every size. What ``export()``
    returns has a plain ``nn.Sequential`` of an ``nn.Upsample`` of that size and the module in its place. As it is made
    it runs at the largest size.

    The module's output must have one shape at all sizes: a classifier that pools has, and so has
    ``nn.Sequential(module, nn.Upsample(size))``, which brings a map back to a fixed size. Channels and choices inside
    are searched together with the resolution. A batch norm inside sees all sizes that are drawn in a search; its
    statistics settle while the mask stands.

    Args:
        module: Takes one tensor ``[N, C, *positions]``.
        sizes: Two or more different sizes of the positions: a whole number for all of their dimensions, or one for
            each in a tuple.
        mode: How ``nn.Upsample`` resizes: ``"bilinear"`` for pictures, ``"linear"`` for sequences, ``"trilinear"`` for
            volumes, ``"area"`` for means, or another of its modes.
        key: As for a ``Choice``; resolutions with one key are chosen together.

    Raises:
        AttachError: The module is none, sizes are malformed, or the mode is unknown.

    Example:
        >>> import torch, prunegate
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> gated = prunegate.attach(prunegate.Resolution(net, sizes=(32, 24, 16)), torch.randn(1, 3, 32, 32))
        >>> gated.choose({"": "24"})
        >>> gated.export().resize
        Upsample(size=24, mode='bilinear')
    """

    def __init__(self, module: nn.Module, sizes: Sequence[int | Sequence[int]] = (224, 192, 160),
                 mode: str = "bilinear", key: str | None = None) -> None:  # fmt: skip
        if not isinstance(module, nn.Module):
            raise AttachError(f"Resolution was given a {type(module).__name__}; expected a torch.nn.Module")
        if mode not in _MODES:
            raise AttachError(f"Resolution was given mode={mode!r}; expected one of {_MODES}")
        wanted = _checked(sizes)
        nn.Module.__init__(self)
        self.sizes = tuple(sorted(wanted, key=lambda size: -math.prod(_tuple(size))))
        self.resized = nn.Sequential(OrderedDict(resize=nn.Upsample(self.sizes[0], mode=mode), module=module))
        self.mode = mode
        self._describe(["x".join(map(str, _tuple(size))) for size in self.sizes], len(self.sizes), key)

    resized: Any

    def run(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module gives at size ``index``."""
        return self._at(index, *args, **kwargs)

    def _at(self, index: int, input: Tensor) -> Any:
        return self.resized.module(F.interpolate(input, self.sizes[index], mode=self.mode))

    def path_of(self, index: int) -> str:
        """What resizes and the module, whatever the size."""
        return "resized"

    def index_below(self, name: str) -> int | None:
        """None: all sizes share the module."""
        return None

    def attributes(self, index: int) -> Mapping[tuple[str, str], Any]:
        """The size."""
        return {("resized.resize", "size"): self.sizes[index]}


def _tuple(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else size


def _checked(sizes: Any) -> list[int | tuple[int, ...]]:
    """The sizes, each a whole number or a tuple of them."""
    given = sizes if isinstance(sizes, (tuple, list)) else ()
    found = [tuple(size) if isinstance(size, (tuple, list)) else size for size in given]
    numbers = [number for size in found for number in (size if isinstance(size, tuple) else (size,))]
    kinds = {len(size) if isinstance(size, tuple) else 0 for size in found}
    if len(kinds) != 1 or () in found or any(type(number) is not int or number < 1 for number in numbers):
        raise AttachError(
            f"Resolution was given sizes={sizes!r}; expected a list of whole numbers of at least 1, or of tuples of "
            "them, one for each dimension"
        )
    if len(found) < 2 or len({*found}) != len(found):
        raise AttachError(f"Resolution was given sizes={sizes!r}; expected two or more, all different")
    return found
