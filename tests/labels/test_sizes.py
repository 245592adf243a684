"""Neither batch nor resolution costs labels anything, and what is not computed looks as if it had been."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import prunegate
from prunegate.labels.rules import _move, _reshaped
from prunegate.labels.shapes import Blanks, _is_blank, plain_name
from prunegate.labels.trace import trace
from tests.labels.test_units import as_set, found_units
from tests.zoo import ZOO

aten = torch.ops.aten


def bytes_of_labels(model: torch.nn.Module, example: torch.Tensor) -> int:
    stores = {plane.untyped_storage().data_ptr(): plane.untyped_storage().nbytes()
              for node in trace(model, example).nodes for plane in node.planes}  # fmt: skip
    return sum(stores.values())


@pytest.mark.parametrize("name", ["WindowShift", "SplitAttention"])
def test_batch(name: str) -> None:
    torch.manual_seed(0)
    model = ZOO[name]().double()
    example = model.example()
    larger = example.repeat(64 // len(example), *[1] * (example.dim() - 1))
    assert as_set(found_units(model, larger)) == as_set(found_units(model, example))
    assert bytes_of_labels(model, larger) < 1.1 * bytes_of_labels(model, example)


def test_resolution() -> None:
    torch.manual_seed(0)
    model = ZOO["WindowShift"]().double()
    small = model.example()
    assert bytes_of_labels(model, small.repeat(1, 1, 8, 8)) < 1.1 * bytes_of_labels(model, small)


@st.composite
def views(draw: st.DrawFn) -> tuple[list[int], list[int], list[bool]]:
    """A shape, another of as many elements, and along which dimensions of the first a plane varies."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=6))

    def joined() -> list[int]:
        cuts = sorted(draw(st.sets(st.integers(1, len(factors) - 1), max_size=4))) if len(factors) > 1 else []
        return [math.prod(factors[a:b]) for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True)]

    before, after = joined(), joined()
    return before, after, draw(st.lists(st.booleans(), min_size=len(before), max_size=len(before)))


@given(views())
def test_a_plane_is_viewed_as_the_tensor_is(case: tuple[list[int], list[int], list[bool]]) -> None:
    before, after, varies = case
    sizes = [size if v else 1 for size, v in zip(before, varies, strict=True)]
    plane = torch.arange(1, math.prod(sizes) + 1).reshape(sizes)
    got = _reshaped(plane, before, after)
    assert torch.equal(got.expand(after), plane.expand(before).reshape(after))
    if not any(size > 1 for size in sizes):
        assert got.numel() == 1


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 0, 3)])
def test_views_of_nothing(shape: tuple[int, ...]) -> None:
    assert _reshaped(torch.zeros([1] * len(shape), dtype=torch.int64), shape, (0,)).shape == (0,)


@pytest.mark.parametrize("varies", [(1,), (2,), (1, 2), (0,), (0, 1, 2)])
@pytest.mark.parametrize(("func", "args"), [
    (aten.roll.default, ([1], [1])), (aten.roll.default, ([1, 2], [1, -1])), (aten.roll.default, ([5],)),
    (aten.roll.default, ([5], [])),
    (aten.flip.default, ([1],)), (aten.flip.default, ([-1, 0],)),
    (aten.index_select.default, (1, torch.tensor([2, 0, 0]))),
])  # fmt: skip
def test_a_plane_moves_as_the_tensor_does(func: Any, args: tuple[Any, ...], varies: tuple[int, ...]) -> None:
    shape = (2, 3, 4)
    sizes = [size if dim in varies else 1 for dim, size in enumerate(shape)]
    plane = torch.arange(1, math.prod(sizes) + 1).reshape(sizes)
    op = SimpleNamespace(name=plain_name(func), func=func, args=(None, *args), kwargs={})
    expected = func(plane.expand(shape), *args)
    (got,) = _move(op, plane, shape)
    assert torch.equal(got.expand(expected.shape), expected)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="says how much memory a process holds on Linux")
def test_a_blank_takes_no_memory() -> None:
    blanks, before = Blanks(), resident()
    blank = blanks.make((2**8, 2**20), torch.empty(0))  # 1 GiB
    assert resident() - before < 2**26
    assert float(blank[-1, -1]) == 0


@pytest.mark.parametrize("call", [
    lambda x, turned: (aten.roll.default, (x, [3, 1], [2, 3]), {}),
    lambda x, turned: (aten.max_pool2d_with_indices.default, (x, [3, 3], [2, 2], [1, 1]), {}),
    lambda x, turned: (aten.clone.default, (turned,), {"memory_format": torch.contiguous_format}),
    lambda x, turned: (aten.argmax.default, (x, 1), {}),
    lambda x, turned: (aten.var_mean.correction, (x, [2, 3]), {"correction": 0, "keepdim": True}),
    lambda x, turned: (aten.gt.Scalar, (x, 0.0), {}),
    lambda x, turned: (aten.sum.dim_IntList, (turned, [3]), {}),
    lambda x, turned: (aten.add_.Scalar, (x, 1.0), {}),
    lambda x, turned: (aten.unbind.int, (x, 1), {}),
], ids=lambda call: str(call(None, None)[0]))  # fmt: skip
def test_what_is_not_computed_looks_computed(call: Callable) -> None:
    blanks, order = Blanks(), [0, 2, 3, 1]
    source, real = blanks.make((2, 3, 128, 128), torch.empty(0)), torch.randn(2, 3, 128, 128)
    func, args, kwargs = call(source, blanks.run(aten.permute.default, "permute", (source, order), {}))
    got = blanks.run(func, plain_name(func), args, kwargs)
    func, args, kwargs = call(real, real.permute(order))
    for ours, theirs in zip(tree_leaves(got), tree_leaves(func(*args, **kwargs)), strict=True):
        assert (ours.shape, ours.stride(), ours.dtype, ours.device) == (
            theirs.shape, theirs.stride(), theirs.dtype, theirs.device)  # fmt: skip
        assert _is_blank(ours)


def test_what_needs_values_is_computed() -> None:
    blanks = Blanks()
    source = blanks.make((1000, 1000), torch.empty(0))
    assert blanks.run(aten.nonzero.default, "nonzero", (source,), {}).shape == (0, 2)
    with pytest.raises(RuntimeError):
        blanks.run(aten.mm.default, "mm", (source, torch.zeros(3, 3)), {})


class LargeTurned(nn.Module):
    """A tensor that is too large to be computed while it is traced gets another shape in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 6), nn.Conv1d(6, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, 5] to [N, 2]."""
        x = self.a(x)
        return self.head(self.b(x.transpose_(1, 2)).mean(-1))


def test_large_tensors_may_turn_in_place() -> None:
    gated = prunegate.attach(LargeTurned(), torch.randn(2, 20_000, 5))
    assert [(group.name, group.size) for group in gated.groups] == [("a", 6), ("b", 4)]
    gated.mask = torch.tensor([True, False] * 5)
    assert gated.export().b.in_channels == 3
