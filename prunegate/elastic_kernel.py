"""One convolution whose kernel size is searched: smaller kernels are the centre of the largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from prunegate.choice import Choice
from prunegate.errors import AttachError

__all__ = ["Kernel"]

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Kernel(Choice):
    """A choice between sizes of one convolution's kernel, which share its weight.

    A kernel of size 3 is the centre of the kernel of size 5, and so on (Cai et al., "Once-for-All", arXiv 1908.09791),
    with the padding that leaves the output's shape alone. What ``export()`` returns has a plain convolution in its
    place. As it is made it runs the convolution that it was given.

    Args:
        conv: An ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` of the largest size; its kernel is as long in every
            dimension, and padded with zeros by a number of positions that the smaller sizes can follow.
        sizes: Odd sizes, two or more; the largest is that of ``conv``.
        key: As for a ``Choice``; kernels with one key have one size.

    Raises:
        AttachError: The convolution is of another kind, or the sizes do not fit it.

    Example:
        >>> import torch, prunegate
        >>> from torch import nn
        >>> kernel = prunegate.Kernel(nn.Conv2d(4, 4, 7, padding=3), sizes=(3, 5, 7))
        >>> net = nn.Sequential(kernel, nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> gated = prunegate.attach(net, torch.randn(1, 4, 8, 8))
        >>> gated.choose({"0": "3"})
        >>> gated.export()[0]
        Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    def __init__(self, conv: nn.Module, sizes: Sequence[int] = (3, 5, 7), key: str | None = None) -> None:
        if not isinstance(conv, _KINDS):
            raise AttachError(f"Kernel was given a {type(conv).__name__}; expected nn.Conv1d, nn.Conv2d or nn.Conv3d")
        given: Any = conv
        wanted = sorted({*sizes}, reverse=True)
        largest = given.kernel_size[0]
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % 2 == 0 for size in wanted):
            raise AttachError(f"Kernel was given sizes={tuple(sizes)}; expected odd whole numbers")
        if len(wanted) != len(sizes) or len(wanted) < 2:
            raise AttachError(f"Kernel was given sizes={tuple(sizes)}; expected two or more, all different")
        if set(given.kernel_size) != {wanted[0]}:
            raise AttachError(
                f"Kernel was given a convolution of size {tuple(given.kernel_size)} and sizes={tuple(sizes)}; the "
                f"convolution must have the largest size in every dimension"
            )
        if given.padding_mode != "zeros" or isinstance(given.padding, str):
            raise AttachError('Kernel needs a convolution with padding by numbers and padding_mode="zeros"')
        spare = [p - d * (largest - wanted[-1]) // 2 for p, d in zip(given.padding, given.dilation, strict=True)]
        if min(spare) < 0:
            raise AttachError(
                f"Kernel was given padding {tuple(given.padding)}: with size {wanted[-1]} it would have to be "
                f"{tuple(spare)}; pad by more, or leave out the smallest size"
            )
        nn.Module.__init__(self)
        self.conv = conv
        self.sizes = tuple(wanted)
        self._describe([str(size) for size in wanted], len(wanted), key)

    conv: Any

    def run(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The convolution with kernel ``index`` alone."""
        if not index:
            return self.conv(*args, **kwargs)
        return self._convolved(index, *args, **kwargs)

    def run_scaled(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], factor: Tensor) -> Any:
        """The convolution with weight and bias times a factor: its output need not be kept for that."""
        return self._scaled(index, factor, *args, **kwargs)

    def _scaled(self, index: int, factor: Tensor, input: Tensor) -> Any:
        return self._convolved(index, input, factor)

    def _convolved(self, index: int, input: Tensor, factor: Tensor | None = None) -> Any:
        cut = (self.sizes[0] - self.sizes[index]) // 2
        weight, bias = self.conv.weight, self.conv.bias
        if cut:
            weight = weight[(..., *(slice(cut, -cut) for _ in self.conv.kernel_size))]
        if factor is not None:
            weight = weight * factor.to(weight.dtype)
            bias = None if bias is None else bias * factor.to(bias.dtype)
        padding = self._padding(index)
        # The number of groups is read where it is used: a cut changes it, and looks for it there.
        if len(padding) == 1:
            return F.conv1d(input, weight, bias, self.conv.stride, padding, self.conv.dilation,
                            self.conv.groups)  # fmt: skip
        if len(padding) == 2:
            return F.conv2d(input, weight, bias, self.conv.stride, padding, self.conv.dilation,
                            self.conv.groups)  # fmt: skip
        return F.conv3d(input, weight, bias, self.conv.stride, padding, self.conv.dilation,
                        self.conv.groups)  # fmt: skip

    def _padding(self, index: int) -> tuple[int, ...]:
        cut = (self.sizes[0] - self.sizes[index]) // 2
        return tuple(p - d * cut for p, d in zip(self.conv.padding, self.conv.dilation, strict=True))

    def path_of(self, index: int) -> str:
        """The convolution, whatever its size."""
        return "conv"

    def index_below(self, name: str) -> int | None:
        """None: all sizes share the convolution."""
        return None

    def kept(self, index: int) -> Mapping[tuple[str, int], tuple[int, ...]]:
        """The centre of the weight."""
        cut = (self.sizes[0] - self.sizes[index]) // 2
        positions = tuple(range(cut, self.sizes[0] - cut))
        return {("conv.weight", 2 + dim): positions for dim in range(len(self.conv.kernel_size))}

    def attributes(self, index: int) -> Mapping[tuple[str, str], Any]:
        """The convolution's size and padding."""
        padding = self._padding(index)
        twice = tuple(p for p in reversed(padding) for _ in range(2))
        return {
            ("conv", "kernel_size"): (self.sizes[index],) * len(padding),
            ("conv", "padding"): padding,
            ("conv", "_reversed_padding_repeated_twice"): twice,
        }
