"""Plans that are derived: each way of writing a size once, checked against the masked model at two batch sizes."""

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunegate
from prunegate.plan import PerExecution, Plan, Ratio
from tests.models import random_mask, relative_error


def heads_of(x: Tensor, heads: int) -> Tensor:
    """A free function with a size among its parameters: [B, N, C] to [B, heads, N, C / heads]."""
    b, n, _ = x.shape
    return x.reshape(b, n, heads, -1).transpose(1, 2)


def doubled(x: Tensor) -> Tensor:
    """A free function with a size of its own."""
    return x.reshape(x.shape[0], x.shape[1], 12) * 2


class Attention(nn.Module):
    """Attention of which the tests' modules differ in how sizes are written."""

    heads, width = 4, 3

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 12)
        self.qkv = nn.Linear(12, 36)
        self.proj = nn.Linear(12, 5)
        self.num_heads = self.heads
        self.head_dim = self.width
        self.sizes = [self.heads, self.width]

    def split(self, x: Tensor) -> Tensor:
        """[B, N, 12] to [3, B, H, N, D]."""
        b, n, _ = x.shape
        return self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)

    def merge(self, x: Tensor) -> Tensor:
        """[B, H, N, D] to [B, N, 12]."""
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], self.num_heads * self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, 5] to [B, N, 5]."""
        q, k, v = self.split(self.stem(x)).unbind(0)
        return self.proj(self.merge(F.scaled_dot_product_attention(q, k, v)))


class WidthOfInput(Attention):
    """The output takes the width that the input had, which is not that of the heads after a cut."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        return self.proj(x)


class BatchInside(Attention):
    """A size is the product of the batch and the heads."""

    def merge(self, x: Tensor) -> Tensor:
        h = 4
        b, _, n, _ = x.shape
        x = x.reshape(b * h, n, self.head_dim) * 2
        return x.reshape(b, self.num_heads, n, self.head_dim).transpose(1, 2).flatten(2)


class Twice(BatchInside):
    """A module runs twice in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = BatchInside()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x).tanh())


class FreeFunction(Attention):
    """A free function is given the heads by an attribute."""

    def split(self, x: Tensor) -> Tensor:
        return torch.stack([heads_of(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1)])


class FreeConstant(Attention):
    """A free function has a size written in it."""

    def merge(self, x: Tensor) -> Tensor:
        return doubled(super().merge(x))


class Sequence(Attention):
    """Sizes come from a list that the module keeps, behind starred ones."""

    def split(self, x: Tensor) -> Tensor:
        return self.qkv(x).view(*x.shape[:-1], 3, *self.sizes).permute(2, 0, 3, 1, 4)

    def merge(self, x: Tensor) -> Tensor:
        sizes = (x.shape[0], x.shape[2], 12)
        return x.transpose(1, 2).reshape(sizes)


class Slices(nn.Module):
    """Parts taken by slices with bounds of every kind, chunk, split and narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 12)
        self.last = nn.Linear(12, 3)
        self.half = 6

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] to [B, 3]."""
        x = self.first(x)
        a, b = x[:, : self.half], x[..., self.half :]
        c, d, e = torch.cat([a.relu(), b], 1).chunk(3, dim=1)
        f, g = torch.cat([c, d, e.tanh()], 1).split([3, 9], dim=1)
        x = torch.cat([f, g.sigmoid()], 1)
        return self.last(torch.cat([x.narrow(1, 0, 5), x[:, 5:-2].abs(), x[:, -2:]], 1))


class Loop(nn.Module):
    """One line runs several times, with other sizes each time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(4, 6) for _ in range(3))
        self.last = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """First and last layers."""
        return list(zip(self.first, self.last, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] to [B, 3]."""
        total = 0
        for first, last in self.pairs():
            total = total + last(first(x).reshape(len(x), 6))
        return total + sum([last(first(x).reshape(len(x), 6).relu()) for first, last in self.pairs()])


class Scale(nn.Module):
    """A scale is computed from a width that is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 8) for _ in range(3))
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, 4] to [B, N, 2]."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        a = (q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)
        b = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return self.out(a.softmax(-1) @ v + b)


class Grouped(nn.Module):
    """Convolution and norm in groups, by attributes and by a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 1)
        self.second = nn.Conv2d(12, 24, 3, groups=12, padding=1)
        self.norm = nn.GroupNorm(6, 24)
        self.weight = nn.Parameter(torch.randn(24, 1, 3, 3))
        self.last = nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, 2, H, W]."""
        x = self.norm(self.second(self.first(x)))
        return self.last(F.conv2d(x, self.weight, padding=1, groups=24))


class Table(nn.Module):
    """Computes a table once and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, 4] to [B, N, 3]."""
        if self.table is None:
            self.table = torch.arange(x.shape[1]).view(1, -1, 1) + torch.zeros(1)
        return self.last(self.first(x).relu().reshape(len(x), -1, 6) + self.table)


SEQUENCES = [Attention, WidthOfInput, BatchInside, Twice, FreeFunction, FreeConstant, Sequence, Scale, Table]
SHAPES = {**{cls: (2, 7, 5 if issubclass(cls, Attention) else 4) for cls in SEQUENCES}, Slices: (2, 4), Loop: (2, 4),
          Grouped: (2, 3, 5, 5)}  # fmt: skip


def cut(cls: type[nn.Module], seed: int = 0, warm: bool = False) -> tuple[nn.Module, nn.Module, Plan, Tensor]:
    """A gated model with a random mask, its slim model, the plan, and an input of another batch size."""
    model = cls().double().eval()
    example = torch.randn(SHAPES[cls], dtype=torch.float64)
    if warm:
        model(example)
    gated = prunegate.attach(model, example).eval()
    gated.mask = random_mask(gated, seed)
    plan = gated.plan()
    return gated, prunegate.apply_plan(model, plan).eval(), plan, torch.randn(5, *SHAPES[cls][1:], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cls", SHAPES, ids=lambda cls: cls.__name__)
def test_slim_equals_masked_at_another_batch_size(cls: type[nn.Module], seed: int) -> None:
    gated, slim, plan, x = cut(cls, seed)
    assert plan.kept
    assert isinstance(slim, cls)
    with torch.no_grad():
        assert relative_error(gated(x), slim(x)) < 1e-12
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("warm", [False, True])
def test_what_a_module_keeps_from_a_run_does_not_matter(warm: bool) -> None:
    gated, slim, _, x = cut(Table, warm=warm)
    with torch.no_grad():
        assert relative_error(gated(x), slim(x)) < 1e-12


def test_attributes_are_preferred_to_edits() -> None:
    _, slim, plan, _ = cut(Attention)
    assert {(edit.module, edit.name) for edit in plan.attributes} == {("", "num_heads")}
    assert plan.calls == ()
    assert type(slim) is Attention
    _, slim, plan, _ = cut(FreeFunction)
    assert ("", "num_heads") in {(edit.module, edit.name) for edit in plan.attributes}
    assert all(edit.site.call == "chunk" for edit in plan.calls)
    _, slim, plan, _ = cut(Grouped)
    assert {(edit.module, edit.name) for edit in plan.attributes} == {("second", "groups"), ("norm", "num_groups")}
    assert [edit.site.call for edit in plan.calls] == ["conv2d"]
    _, slim, plan, _ = cut(Sequence)
    assert slim.sizes[0] < 4 or slim.sizes == [4, 3]


def test_batch_is_never_baked_in() -> None:
    _, slim, plan, _ = cut(BatchInside)
    (edit,) = plan.calls
    assert isinstance(edit.changes[0].value, Ratio)
    assert "b * h" in inspect.getsource(type(slim).merge)


def test_values_for_each_execution() -> None:
    _, slim, plan, _ = cut(Loop)
    values = [change.value for edit in plan.calls for change in edit.changes]
    assert len(values) == 2
    assert all(isinstance(value, PerExecution) and len(value.values) == 3 for value in values)
    widths = tuple(linear.out_features for linear in slim.first)
    assert all(value.values == widths for value in values)


def test_free_function_is_left_alone_for_others() -> None:
    before = inspect.getsource(doubled)
    _, _, plan, _ = cut(FreeConstant)
    (edit,) = plan.calls
    assert [step.call for step in edit.site.via] == ["doubled"]
    assert inspect.getsource(doubled) == before
    assert doubled(torch.zeros(1, 2, 12)).shape == (1, 2, 12)


def test_pruned_again() -> None:
    for cls in (WidthOfInput, Slices, FreeConstant, Loop, BatchInside):
        _, slim, _, x = cut(cls)
        gated = prunegate.attach(slim, x[:2]).eval()
        gated.mask = random_mask(gated, 1)
        twice = prunegate.apply_plan(slim, gated.plan()).eval()
        with torch.no_grad():
            assert relative_error(gated(x), twice(x)) < 1e-12


class Refuses(nn.Module):
    """Asserts a width that it keeps nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] to [B, 3]."""
        x = self.first(x)
        if x.shape[1] != 6:
            raise ValueError("not six")
        return self.last(x)


def test_what_cannot_follow_names_the_tensors_in_the_way() -> None:
    from prunegate.labels.planes import varying
    from prunegate.labels.trace import trace
    from prunegate.slim.derive import derive_plan
    from prunegate.slim.replay import UnrepairableError

    model, x = Refuses(), torch.randn(2, 4)
    traced = trace(model, x)
    stays = torch.tensor([True, False, True, True, False, True])

    def kept(node: object, dim: int) -> Tensor | None:
        planes = [plane for plane in traced.algebra.get(node) if varying(plane) == {dim}]
        return stays if planes else None

    tensors = {("first.weight", 0): stays, ("first.bias", 0): stays, ("last.weight", 1): stays}
    with pytest.raises(UnrepairableError, match="not six") as caught:
        derive_plan(model, traced.calls, kept, tensors, lambda slim: slim(x))
    assert any(node.shape == (2, 6) for node in caught.value.nodes)
    assert model.first.out_features == 6


class Checked(nn.Module):
    """Refuses inputs of another width than it was made for, in every way that is usual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.config = width, nn.Identity()
        self.config.width = width
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, width] to the same."""
        _, channels = x.shape
        if channels != self.width:
            raise ValueError(f"expected {self.width} channels, {channels} were given")
        return self.linear(x)


class Asserting(Checked):
    def forward(self, x: Tensor) -> Tensor:
        assert self.width == x.shape[-1], "of another width"
        return self.linear(x)


class TorchAsserting(Checked):
    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.size(-1) == self.config.width, "of another width")
        return self.linear(x)


class Two(Checked):
    """Two numbers in one condition; only one of them is wrong after a cut."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.size()[1] != self.width:
            raise ValueError("of another width")
        return self.linear(x)


@pytest.mark.parametrize("check", [Checked, Asserting, TorchAsserting, Two])
def test_checks_of_sizes_are_passed(check: type[Checked]) -> None:
    """Many in a row, each by a number of its own; the cut model checks, too."""
    torch.manual_seed(0)
    blocks = [layer for _ in range(20) for layer in (check(6), nn.ReLU())]
    model = nn.Sequential(nn.Linear(3, 6), *blocks, nn.Linear(6, 2)).double().eval()
    x = torch.randn(4, 3).double()
    gated = prunegate.attach(model, x).eval()
    assert len(gated.groups) == 21
    gated.mask = random_mask(gated, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slim = gated.export()
    torch.testing.assert_close(slim(x), gated(x))
    kept = int(gated.mask[gated.groups[0].slice].sum())
    assert slim[1].linear.in_features == kept < 6
    with pytest.raises((ValueError, AssertionError), match=r"expected|another width"):
        slim[1](torch.zeros(1, 6).double())


class ForAnotherReason(Checked):
    """What it is refused for is no size."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < self.width:
            raise ValueError("too narrow")
        return self.linear(x)


def test_other_checks_keep_what_they_check() -> None:
    model = nn.Sequential(nn.Linear(3, 6), ForAnotherReason(6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    x = torch.randn(4, 3).double()
    gated = prunegate.attach(model, x).eval()
    gated.mask = random_mask(gated, 1)
    with pytest.warns(UserWarning, match="too narrow"):
        slim = gated.export()
    assert slim[0].out_features == 6
    torch.testing.assert_close(slim(x), gated(x))
