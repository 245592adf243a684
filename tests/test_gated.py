"""The gated model as an ``nn.Module`` among others: names, modes, copies, precision, checkpointing, bad input."""

import copy
import gc

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

import prunegate
from prunegate import AttachError, MaskError
from tests.models import random_mask, relative_error


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def test_attach_leaves_the_model_as_it_was(model: nn.Module, x: torch.Tensor) -> None:
    model.train()
    model.blocks[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    gated = prunegate.attach(model)
    gated.mask = random_mask(gated, 0)
    gated(x)
    assert classes == [type(module) for module in model.modules()]
    assert attributes == [set(module.__dict__) for module in model.modules()]
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(hasattr(tensor, "_prunegate_node") for tensor in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("enabled", [True, False])
def test_attach_leaves_the_collection_of_garbage_as_it_was(enabled: bool, model: nn.Module, x: torch.Tensor) -> None:
    (gc.enable if enabled else gc.disable)()
    try:
        prunegate.attach(model, x)
        assert gc.isenabled() is enabled
        with pytest.raises(AttachError):
            prunegate.attach(model, x[:, :1])
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_parameters_are_shared_under_the_users_names(model: nn.Module) -> None:
    gated = prunegate.attach(model)
    assert set(gated.state_dict()) == {*model.state_dict(), "prunegate.logits"}
    own = dict(gated.named_parameters())
    assert all(own[name] is parameter for name, parameter in model.named_parameters())
    assert own["prunegate.logits"] is gated.logits
    assert gated.logits.shape == (sum(group.size for group in gated.groups),)


@pytest.mark.parametrize("train", [False, True])
def test_open_until_a_budget_starts(model: nn.Module, x: torch.Tensor, train: bool) -> None:
    gated = prunegate.attach(model)
    model.train(train)
    gated.train(train)
    assert torch.equal(gated(x), model(x))
    assert bool(gated.mask.all())


def test_train_mode_samples_once_a_forward_and_eval_mode_is_hard(model: nn.Module, x: torch.Tensor) -> None:
    gated = prunegate.attach(model)
    gated.prunegate.phase = "search"
    gated.prunegate.selector = lambda: torch.ones_like(gated.prunegate.fixed_mask)
    gated.train()
    torch.manual_seed(0)
    first, second = gated(x), gated(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(gated(x), first)
    gated.eval()
    assert torch.equal(gated(x), gated(x))
    drawn = torch.cat([piece.flatten() for piece in gated.prunegate.sample.pieces])
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}


def test_the_users_optimizer_never_sees_the_logits(model: nn.Module, x: torch.Tensor) -> None:
    gated = prunegate.attach(model)
    gated.mask = random_mask(gated, 0)
    optimizer = torch.optim.AdamW(gated.parameters(), lr=1e-3, weight_decay=0.05)
    before = gated.logits.detach().clone().normal_()
    gated.logits.data.copy_(before)
    for _ in range(2):
        gated(x).square().mean().backward()
        assert gated.logits.grad is None
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(gated.logits, before)
    gathered = gated.prunegate.take_gradient()
    assert gathered is not None
    assert bool((gathered != 0).any())
    assert gated.prunegate.take_gradient() is None
    (direct,) = torch.autograd.grad(gated(x).square().mean(), gated.logits)
    assert bool((direct != 0).any())
    assert gated.prunegate.take_gradient() is None


def test_mask_can_be_assigned_and_released(model: nn.Module, x: torch.Tensor) -> None:
    gated = prunegate.attach(model).eval()
    dense = gated(x)
    mask = random_mask(gated, 0)
    gated.mask = mask
    assert torch.equal(gated.mask, mask)
    masked = gated(x)
    assert not torch.allclose(masked, dense)
    gated.train()
    assert torch.equal(gated(x), masked)  # no dropout in this model
    gated.eval().mask = None
    assert torch.equal(gated(x), dense)


def test_bad_masks_change_nothing(model: nn.Module) -> None:
    gated = prunegate.attach(model)
    n = gated.logits.numel()
    with pytest.raises(MaskError, match=rf"expected \({n},\)"):
        gated.mask = torch.ones(n - 1, dtype=torch.bool)
    with pytest.raises(MaskError, match=r"torch\.float32"):
        gated.mask = torch.ones(n)
    empty = torch.ones(n, dtype=torch.bool)
    group = gated.groups[0]
    empty[group.slice] = False
    with pytest.raises(MaskError, match=group.name):
        gated.mask = empty
    assert bool(gated.mask.all())


def test_bad_input_to_attach(model: nn.Module) -> None:
    with pytest.raises(AttachError, match="does not run on its example input"):
        prunegate.attach(model, torch.randn(1, 4, 160, 160))
    with pytest.raises(AttachError, match=r"expected a torch\.nn\.Module"):
        prunegate.attach(lambda x: x)
    with pytest.raises(AttachError, match="gated already"):
        prunegate.attach(prunegate.attach(model))
    with pytest.raises(AttachError, match="no unit that can be pruned"):
        prunegate.attach(nn.Linear(3, 2), torch.randn(1, 3))
    with pytest.raises(AttachError, match="pass example_input="):
        prunegate.attach(nn.Linear(3, 2))
    with pytest.raises(AttachError, match="expected one or more of"):
        prunegate.attach(model, units=("neuron",))
    with pytest.raises(AttachError, match="matches no module"):
        prunegate.attach(model, ignore=("blokcs.*",))


def test_units_and_ignore_choose_what_gets_gates(model: nn.Module) -> None:
    everything = prunegate.attach(model)
    heads = prunegate.attach(model, units=("head",))
    channels = prunegate.attach(model, units=("channel",))
    assert {group.kind for group in heads.groups} == {"head"}
    assert {group.kind for group in channels.groups} == {"channel"}
    assert heads.logits.numel() + channels.logits.numel() == everything.logits.numel()
    without = prunegate.attach(model, ignore=("blocks.1.mlp",))
    names = {group.name for group in everything.groups} - {group.name for group in without.groups}
    assert "blocks.1.mlp.fc1" in names
    assert any(item.why == "ignored on request" for item in without.frozen)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_example_input_may_be_positional_or_by_keyword(kind: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.out((self.a(left) * self.b(right)).relu())

    left, right = torch.randn(2, 3), torch.randn(2, 4)
    inputs = (left, right) if kind == "tuple" else {"left": left, "right": right}
    gated = prunegate.attach(Two(), inputs)
    assert [group.size for group in gated.groups] == [6]
    gated.mask = torch.tensor([True, False, True, True, False, False])
    assert gated.export().a.out_features == 3


def test_copies_are_independent(model: nn.Module, x: torch.Tensor) -> None:
    gated = prunegate.attach(model).eval()
    gated.mask = random_mask(gated, 0)
    before = gated(x)
    duplicate = copy.deepcopy(gated)
    assert torch.equal(duplicate(x), before)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.mul_(1.1)
    duplicate.mask = random_mask(duplicate, 1)
    assert torch.equal(gated(x), before)
    assert torch.equal(gated.mask, random_mask(gated, 0))
    slim = duplicate.export()
    torch.testing.assert_close(slim(x), duplicate(x), rtol=1e-4, atol=1e-5)
    duplicate(x).mean().backward()
    assert duplicate.logits.grad is None
    assert duplicate.prunegate.take_gradient() is not None


def test_timms_tools_work_on_it(model: nn.Module, x: torch.Tensor) -> None:
    gated = prunegate.attach(model)
    optimizer = create_optimizer_v2(gated, opt="adamw", lr=1e-3, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert id(model.pos_embed) not in decayed  # no_weight_decay() of the model was heard
    ema = ModelEmaV3(gated, decay=0.5)
    gated.mask = random_mask(gated, 0)
    gated(x).mean().backward()
    optimizer.step()
    ema.update(gated)
    assert ema.module(x).shape == (2, 5)
    assert gated.pretrained_cfg["input_size"] == model.pretrained_cfg["input_size"]
    assert gated.forward_features(x).shape[-1] == model.num_features


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_activation_checkpointing_sees_the_same_gates(name: str, x: torch.Tensor) -> None:
    torch.manual_seed(0)
    gated = prunegate.attach(timm.create_model(name, num_classes=5)).train()
    gated.prunegate.phase = "search"

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        gated.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        gated.zero_grad()
        gated(x).square().mean().backward()
        logits = gated.prunegate.take_gradient()
        assert logits is not None
        return [logits, *(p.grad.clone() for p in gated.parameters() if p.grad is not None)]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_masked_and_slim_agree_in_lower_precision(name: str, x: torch.Tensor) -> None:
    torch.manual_seed(0)
    gated = prunegate.attach(timm.create_model(name, num_classes=5)).eval()
    gated.mask = random_mask(gated, 0)
    slim = gated.export()
    with torch.no_grad():
        assert relative_error(gated(x), slim(x)) < 1e-5
        with torch.autocast("cpu", dtype=torch.bfloat16):
            masked, cut = gated(x), slim(x)
        assert relative_error(masked.float(), cut.float()) < 5e-2
        gated.to(torch.bfloat16)
        assert gated.logits.dtype == torch.float32
        assert gated(x.bfloat16()).dtype == torch.bfloat16


def test_compiled_without_graph_breaks(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    gated = prunegate.attach(timm.create_model("test_vit", num_classes=5)).train()
    gated.prunegate.phase = "search"
    compiled = torch.compile(gated, fullgraph=True, backend="aot_eager")
    compiled(x).mean().backward()
    assert gated.logits.grad is None
    gated.eval().mask = random_mask(gated, 0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), gated(x), rtol=1e-4, atol=1e-5)


def test_printing_shows_groups(model: nn.Module) -> None:
    text = str(prunegate.attach(model))
    assert "blocks.0.mlp.fc1" in text
    assert "head" in text
    assert "FLOPs" in text


@pytest.mark.parametrize("grad", [False, True])
def test_torchs_own_transformer_layer(grad: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    net = nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 3)).double().eval()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    gated = prunegate.attach(net, x).eval()
    assert {group.kind for group in gated.groups} == {"channel", "head"}
    gated.mask = random_mask(gated, 1)
    slim = gated.export()
    with torch.set_grad_enabled(grad):
        assert relative_error(gated(x), slim(x)) <= 1e-8
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_cannot_follow_a_cut_is_kept() -> None:
    """A width that Python code checks against a number of its own has no argument that could be corrected."""

    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x).relu()
            x = torch.cumsum(x, 0) if x.shape[-1] == 8 else torch.flip(x, (0,))
            return self.c(self.b(x).relu())

    net = Stubborn().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    gated = prunegate.attach(net, x).eval()
    mask = torch.ones(14, dtype=torch.bool)
    mask[[0, 1, 9, 10]] = False
    gated.mask = mask
    with pytest.warns(UserWarning, match="2 units that the mask removes there are kept"):
        slim = gated.export()
    assert slim.a.out_features == 8
    assert slim.b.out_features == 4
    assert relative_error(gated(x), slim(x)) <= 1e-8


class Keeps(nn.Module):
    """Keeps what it computed from its own weights in an attribute, a buffer, a list and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.make = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 6)
        self.a, self.out = nn.Linear(5, 6), nn.Linear(6, 2)
        self.attribute: torch.Tensor | None = None
        self.register_buffer("buffer", None, persistent=False)
        self.several: list[torch.Tensor] = []
        self.named: dict[str, tuple[torch.Tensor]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.attribute is None:
            self.attribute = self.make(self.table).mean(0)
            self.buffer = self.make(self.table).amax(0)
            self.several.append(self.make(self.table).sum(0))
            self.named["first"] = (self.make(self.table).amin(0),)
        kept = self.attribute + self.buffer * self.several[0] - self.named["first"][0]
        return self.out((self.a(x) * kept).relu())


@torch.no_grad()
def test_what_a_forward_keeps_is_neither_left_in_the_model_nor_carried_into_the_cut() -> None:
    """Tracing computes no products: what it leaves in a model would be wrong from then on."""
    torch.manual_seed(0)
    model, x = Keeps().double().eval(), torch.randn(2, 5, dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    gated = prunegate.attach(model, x).eval()
    assert model.attribute is None
    assert model.buffer is None
    assert not model.several
    assert not model.named
    torch.testing.assert_close(gated(x), expected)
    torch.testing.assert_close(model(x), expected)
    gated.mask = torch.tensor([True, False, True, True, False, False])
    slim = gated.export()
    torch.testing.assert_close(slim(x), gated(x))
    assert slim.attribute.shape == slim.named["first"][0].shape == (3,)
