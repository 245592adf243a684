"""Channels that a forward rolls, turns, shuffles or picks by their numbers: the numbers follow the cut."""

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunegate
from tests.models import random_mask, randomise

ORDER = [4, 0, 3, 1, 2, 7, 6, 5]


class Moving(nn.Module):
    """Eight channels go through ``move`` between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)
        self.register_buffer("permutation", torch.tensor(ORDER))
        self.order = list(ORDER)

    def move(self, x: Tensor) -> Tensor:
        """[N, 8, H, W] to the same."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, 2]."""
        return self.head(self.b(self.move(self.a(x).relu())).mean((2, 3)))


class Rolled(Moving):
    def move(self, x: Tensor) -> Tensor:
        return torch.roll(x.roll(-3, 1), shifts=(2, 1), dims=(1, 2)) + x.roll(11, 1)


class Selected(Moving):
    def move(self, x: Tensor) -> Tensor:
        x = x.index_select(1, torch.tensor(ORDER)) + torch.index_select(x, dim=1, index=self.permutation)
        return x.index_select(-3, self.permutation)


class Subscripted(Moving):
    def move(self, x: Tensor) -> Tensor:
        x = x[:, self.permutation] + x[:, self.order] + x[:, torch.tensor(ORDER)] + x[:, [3, -1, 0, 1, 2, 4, 5, 6]]
        return x.transpose(0, 1)[self.permutation].transpose(0, 1)


class Stepped(Moving):
    def move(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, ::2], x[:, 1::2]], 1)


class OneByOne(Moving):
    """Channels that stay, each picked by its number."""

    def move(self, x: Tensor) -> Tensor:
        return x * x.select(1, 5)[:, None] + torch.select(x, dim=1, index=-2)[:, None] + x[:, 3][:, None]


class Pairs(Moving):
    """Two channels are a complex number, which is turned."""

    def move(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(1, (-1, 2)).movedim(2, -1).contiguous())
        turn = torch.polar(torch.ones(4, 1, 1, dtype=x.dtype), torch.arange(4, dtype=x.dtype)[:, None, None])
        return torch.view_as_real(pairs * turn[:1]).movedim(-1, 2).flatten(1, 2)


class Filled(Moving):
    """Tensors of the channels' number, made on the way in every form of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8

    def move(self, x: Tensor) -> Tensor:
        y = torch.zeros(x.shape[0], self.width, *x.shape[2:], dtype=x.dtype) + x.new_ones(8, 1, 1)
        y = y + torch.full((1, 8, 1, 1), 0.5) + x.new_full(size=(1, self.width, 1, 1), fill_value=2.0)
        return x * (y + torch.ones([self.width, 1, 1], dtype=x.dtype) + torch.ones(size=(8, 1, 1)))


def passing_on(implementation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A decorator whose wrapper takes the name of what it wraps."""

    @functools.wraps(implementation)
    def wrapper(x: Tensor, weight: Tensor) -> Tensor:
        return implementation(x, weight=weight).relu()

    return wrapper


@passing_on
def flattened(x: Tensor, weight: Tensor) -> Tensor:
    x = x.reshape(x.shape[0], 8, 64).view(x.shape[0], 8, 8, 8)
    return F.conv2d(input=x, weight=weight[:, None, None, None], groups=8)


class Decorated(Moving):
    """The numbers are in a function behind a decorator, and given by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))

    def move(self, x: Tensor) -> Tensor:
        return flattened(x, self.scale)


class Repeatedly(Moving):
    def move(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x[:, self.permutation].index_select(1, self.permutation) * 1.5
        return x


class LowerTriangle(Moving):
    def move(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).tril(2).permute(0, 3, 1, 2)


class UpperTriangle(Moving):
    def move(self, x: Tensor) -> Tensor:
        return torch.triu(x.permute(0, 2, 3, 1), diagonal=-4).permute(0, 3, 1, 2)


class Shuffled(Moving):
    def move(self, x: Tensor) -> Tensor:
        return torch.channel_shuffle(x, 2)


MOVES = (Rolled, Selected, Subscripted, Stepped, OneByOne, Pairs, Filled, Decorated, Repeatedly, LowerTriangle,
         UpperTriangle, Shuffled)  # fmt: skip


def cut(model: nn.Module, x: Tensor, seed: int) -> nn.Module:
    """The model without some units, equal to the masked one."""
    gated = prunegate.attach(model, x).eval()
    gated.mask = random_mask(gated, seed)
    slim = gated.export()
    assert prunegate.count_flops(slim, x) == gated.cost.flops(gated.mask)
    with torch.no_grad():
        masked = gated(x)
        torch.testing.assert_close(slim(x), masked, rtol=0, atol=1e-12 * float(masked.abs().max()))
        assert not torch.allclose(masked, model(x), rtol=1e-3)
    return slim


@pytest.mark.parametrize("model_class", MOVES)
@pytest.mark.parametrize("seed", range(4))
def test_numbers_follow(model_class: type[Moving], seed: int, tmp_path: Path) -> None:
    """Once, and when what was cut is cut again; nothing that the mask removes is kept, which would be warned of."""
    model, x = randomise(model_class().double(), seed=seed).eval(), torch.randn(2, 3, 8, 8).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slim = cut(model, x, seed)
        assert slim.a.out_channels < 8
        again = cut(slim, x, seed + 100)
    prunegate.save(again, tmp_path / "slim.safetensors", builder=model_class)
    loaded = prunegate.load(tmp_path / "slim.safetensors", allow=("tests.slim.test_moves",)).double()
    assert torch.equal(loaded.eval()(x), again(x))


class WrittenInto(Moving):
    """A view of every second channel is written into: a list of their numbers would pick a copy."""

    def move(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, ::2].mul_(2)
        return x


class ByMask(Moving):
    def move(self, x: Tensor) -> Tensor:
        odd = torch.tensor([False, True] * 4)
        return torch.cat([x[:, odd], x[:, ~odd]], 1)


class ByContent(Moving):
    """Which channels go where depends on the input."""

    def move(self, x: Tensor) -> Tensor:
        return x[:, x.mean((0, 2, 3)).argsort()]


class SizedByAnother(Moving):
    """The size in a view, whose source is not known, is that of another tensor than the one that is viewed."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(8, 8))
        namespace = {"torch": torch}
        exec("def move(mix, x):\n  return (mix @ x.flatten(2)).view(x.shape)", namespace)
        self.mixed = namespace["move"]

    def move(self, x: Tensor) -> Tensor:
        return self.mixed(self.mix, x)


def test_a_size_that_comes_from_elsewhere_keeps_what_it_is_the_size_of() -> None:
    model, x = randomise(SizedByAnother().double(), seed=0).eval(), torch.randn(2, 3, 8, 8).double()
    gated = prunegate.attach(model, x).eval()
    gated.mask = torch.arange(len(gated.mask)) % 3 != 1
    with pytest.warns(UserWarning, match="no source"):
        slim = gated.export()
    assert slim.a.out_channels == 8
    assert slim.b.out_channels < 8
    with torch.no_grad():
        torch.testing.assert_close(slim(x), gated(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("model_class", "why"), [
    (WrittenInto, "written into"), (ByMask, "no list of numbers"),
])  # fmt: skip
def test_what_cannot_follow_is_kept_and_said(model_class: type[Moving], why: str) -> None:
    model, x = randomise(model_class().double(), seed=0).eval(), torch.randn(2, 3, 8, 8).double()
    gated = prunegate.attach(model, x).eval()
    gated.mask = torch.arange(len(gated.mask)) % 3 != 1
    with pytest.warns(UserWarning, match=why):
        slim = gated.export()
    assert slim.a.out_channels == 8
    with torch.no_grad():
        torch.testing.assert_close(slim(x), gated(x), rtol=1e-12, atol=1e-12)


class Diagonal(Moving):
    """What is on a diagonal has a row and a column, whose units need not be the same."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.randn(8, 8))

    def move(self, x: Tensor) -> Tensor:
        x = torch.einsum("nchw,dc->ndhw", x, self.square).relu()
        return x * self.square.diagonal()[:, None, None]


def test_rows_and_columns_that_meet_on_a_diagonal_are_no_units() -> None:
    model, x = randomise(Diagonal().double(), seed=0).eval(), torch.randn(2, 3, 8, 8).double()
    gated = prunegate.attach(model, x)
    assert {group.name for group in gated.groups} == {"b"}
    assert any("diagonal" in frozen.why for frozen in gated.frozen if frozen.tensor == "square")


def test_a_search_does_not_end_by_what_cannot_be_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Rolled().double().eval(), torch.randn(2, 3, 8, 8).double()
    gated = prunegate.attach(model, x)
    budget = prunegate.Budget(gated, flops=0.5, steps=1)

    def plan(mask: Tensor) -> None:
        raise prunegate.ExportError("it does not run")

    monkeypatch.setattr(gated.planner, "plan", plan)
    budget.finish()
    assert gated.cost.flops(gated.mask) <= 0.5 * gated.cost.flops()
    with pytest.raises(prunegate.ExportError, match="does not run"):
        gated.export()


class Noisy(Moving):
    """Draws numbers in eval mode, too."""

    def move(self, x: Tensor) -> Tensor:
        return x + torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype)


def test_what_is_drawn_in_eval_mode_is_drawn_alike_by_what_is_compared() -> None:
    model, x = randomise(Noisy().double(), seed=0).eval(), torch.randn(2, 3, 8, 8).double()
    gated = prunegate.attach(model, x).eval()
    gated.mask = random_mask(gated, 0)
    slim = gated.export()
    torch.manual_seed(5)
    drawn = slim(x)
    torch.manual_seed(5)
    torch.testing.assert_close(gated(x), drawn)


class Remembers(Moving):
    """Keeps what it computed of its weights in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(8, 1, 1))
        self.cache: dict[str, Tensor] = {}
        self._last: Tensor | None = None

    def move(self, x: Tensor) -> Tensor:
        if self.training:
            self.cache.clear()
        elif not self.cache:
            self.cache["bias"] = self.bias.exp()
        self._last = x * self.cache.get("bias", self.bias.exp())
        return self._last


def test_a_model_that_ran_with_gradients_before() -> None:
    """What is left of such a forward has a history, which torch does not copy."""
    model, x = randomise(Remembers().double(), seed=0).eval(), torch.randn(2, 3, 8, 8).double()
    dense = model(x)
    assert model._last.grad_fn is not None
    gated = copy.deepcopy(prunegate.attach(model, x).eval())
    torch.testing.assert_close(gated(x), dense)
    gated.mask = random_mask(gated, 0)
    gated(x)
    slim = copy.deepcopy(gated).export()
    torch.testing.assert_close(slim(x), gated(x))
    assert torch.equal(model(x), dense)


def test_positions_that_the_input_chooses_are_no_units() -> None:
    model, x = randomise(ByContent().double(), seed=0).eval(), torch.randn(2, 3, 8, 8).double()
    gated = prunegate.attach(model, x)
    assert {group.name for group in gated.groups} == {"b"}


def test_a_budget_is_met_beside_what_cannot_follow() -> None:
    """The groups are held whole from the start, and the rest pays for them."""
    model, x = randomise(ByMask().double(), seed=0).eval(), torch.randn(2, 3, 8, 8).double()
    gated = prunegate.attach(model, x)
    with pytest.warns(UserWarning, match="the groups a stay whole.*no list of numbers"):
        budget = prunegate.Budget(gated, flops=0.7, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        budget.finish()
        slim = gated.export()
        prunegate.Budget(prunegate.attach(model, x), flops=0.7, steps=1, ignore=["a"]).finish()
    assert slim.a.out_channels == 8
    assert prunegate.count_flops(slim, x) <= 0.7 * prunegate.count_flops(model, x)


class SecondHalf(Moving):
    """A cut can follow as long as the first half of the channels keeps as many as the second."""

    def move(self, x: Tensor) -> Tensor:
        namespace = {"torch": torch}
        exec("def move(x):\n  return torch.cat([x[:, :4].relu(), x[:, 4:]], 1)", namespace)
        return namespace["move"](x)


def follows_by_chance(gated: prunegate.GatedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the trial before a search close units that may go."""

    def start(*arguments: object) -> Tensor:
        return gated.gate_map.start()

    monkeypatch.setattr("prunegate.budget.following._half", start)


@pytest.mark.parametrize(("share", "met"), [(0.9, True), (0.3, False)])
def test_what_the_trial_did_not_find_is_found_at_the_end(share: float, met: bool,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    torch.manual_seed(3)
    model, x = randomise(SecondHalf().double(), seed=0).eval(), torch.randn(2, 3, 8, 8).double()
    gated = prunegate.attach(model, x)
    follows_by_chance(gated, monkeypatch)
    gated.logits.data = torch.linspace(-1, 1, len(gated.logits))
    budget = prunegate.Budget(gated, flops=share, steps=1)
    with pytest.warns(UserWarning, match="stay whole" if met else "the budget cannot be met"):
        budget.finish()
    if met:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            slim = gated.export()
        assert prunegate.count_flops(slim, x) <= share * prunegate.count_flops(model, x)
    else:
        with pytest.warns(UserWarning, match="costs more than the mask says"):
            gated.export()
