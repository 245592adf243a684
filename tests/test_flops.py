"""FLOP counts against closed forms, against fvcore alone, and against the same table evaluated below autograd."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from prunegate.flops import Term, call_terms, count_flops, op_terms
from prunegate.labels.record import Node


def to_nodes(tree: Any) -> Any:
    return tree_map(lambda leaf: Node(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf, tree)


def evaluate(terms: list[Term]) -> int:
    return sum(coefficient * math.prod(node.shape[dim] for node, dim in sizes) for coefficient, sizes in terms)


class Below(TorchDispatchMode):
    """Adds up what the table says of every ATen operation."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts an operation."""
        given = to_nodes((args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.total += evaluate(op_terms(func._schema.name.rpartition("::")[2], *given, to_nodes(out)))
        return out


class Above(TorchFunctionMode):
    """Adds up what the table says of every Python-level call."""

    total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts a call."""
        given = to_nodes((args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.total += evaluate(call_terms(getattr(func, "__name__", ""), *given, to_nodes(out)))
        return out


def count_by_terms(model: nn.Module, *inputs: Tensor) -> int:
    below, above = Below(), Above()
    model.eval()
    with torch.no_grad(), below, above:
        model(*inputs)
    return below.total + above.total


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(a, b).relu()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _attend_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


OPERATIONS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], int]] = {
    "mm": (torch.mm, [(2, 3), (3, 5)], 2 * 3 * 5),
    "bmm": (torch.bmm, [(4, 2, 3), (4, 3, 5)], 4 * 2 * 3 * 5),
    "baddbmm": (torch.baddbmm, [(4, 2, 5), (4, 2, 3), (4, 3, 5)], 4 * 2 * 3 * 5),
    "addmm": (torch.addmm, [(5,), (2, 3), (3, 5)], 2 * 3 * 5),
    "addbmm": (torch.addbmm, [(2, 5), (4, 2, 3), (4, 3, 5)], 4 * 2 * 3 * 5),
    "addmv": (torch.addmv, [(2,), (2, 3), (3,)], 2 * 3),
    "mv": (torch.mv, [(2, 3), (3,)], 2 * 3),
    "dot": (torch.dot, [(7,), (7,)], 7),
    "matmul, broadcast": (torch.matmul, [(1, 6, 2, 3), (4, 1, 3, 5)], 4 * 6 * 2 * 3 * 5),
    "matmul, matrix first": (torch.matmul, [(2, 3), (4, 3, 5)], 4 * 2 * 3 * 5),
    "matmul, vector last": (torch.matmul, [(4, 2, 3), (3,)], 4 * 2 * 3),
    "matmul, vector first": (torch.matmul, [(3,), (4, 3, 5)], 4 * 3 * 5),
    "einsum, two operands": (lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b), [(2, 3, 4, 5), (2, 3, 6, 5)], 720),
    "einsum, three operands": (lambda a, b, c: torch.einsum("ij,jk,kl->il", a, b, c), [(2, 3), (3, 4), (4, 5)], 64),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 2), [(2, 3, 4), (3, 4, 5)], 2 * 3 * 4 * 5),
    "linear": (F.linear, [(2, 7, 3), (5, 3), (5,)], 2 * 7 * 3 * 5),
    "linear without bias": (F.linear, [(2, 7, 3), (5, 3)], 2 * 7 * 3 * 5),
    "linear of a vector": (F.linear, [(3,), (5, 3), (5,)], 15),
    "bilinear": (F.bilinear, [(2, 3), (2, 4), (5, 3, 4)], 2 * 3 * 4 * 5),
    "conv1d": (F.conv1d, [(2, 3, 9), (4, 3, 3)], 2 * 3 * 4 * 3 * 7),
    "conv2d": (F.conv2d, [(2, 3, 8, 8), (4, 3, 3, 3)], 2 * 3 * 4 * 9 * 36),
    "conv2d, no batch": (F.conv2d, [(3, 8, 8), (4, 3, 3, 3)], 3 * 4 * 9 * 36),
    "conv2d, same": (lambda x, w: F.conv2d(x, w, padding="same"), [(2, 3, 8, 8), (4, 3, 3, 3)], 2 * 3 * 4 * 9 * 64),
    "conv2d, grouped": (lambda x, w: F.conv2d(x, w, groups=2), [(2, 4, 8, 8), (6, 2, 3, 3)], 2 * 6 * 2 * 9 * 36),
    "conv2d, transposed": (F.conv_transpose2d, [(2, 3, 8, 8), (3, 4, 3, 3)], 2 * 3 * 4 * 9 * 64),
    "conv3d": (F.conv3d, [(1, 2, 4, 4, 4), (3, 2, 2, 2, 2)], 3 * 2 * 8 * 27),
    "attention": (_attend, [(2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8)], 2 * 3 * 4 * 5 * 16),
    "attention, wide values": (_attend, [(2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 6)], 2 * 3 * 4 * 5 * 14),
    "attention, grouped": (_attend_grouped, [(2, 4, 4, 8), (2, 2, 5, 8), (2, 2, 5, 8)], 2 * 4 * 4 * 5 * 16),
    "autograd function": (Product.apply, [(2, 3), (5, 3)], 2 * 3 * 5),
    "layer_norm": (lambda x: F.layer_norm(x, (6,)), [(2, 5, 6)], 4 * 60),
    "layer_norm, affine": (lambda x, w: F.layer_norm(x, (6,), w), [(2, 5, 6), (6,)], 5 * 60),
    "group_norm": (lambda x: F.group_norm(x, 2), [(2, 6, 5)], 4 * 60),
    "group_norm, affine": (lambda x, w: F.group_norm(x, 2, w), [(2, 6, 5), (6,)], 5 * 60),
    "batch_norm": (lambda x, m, v: F.batch_norm(x, m, v), [(2, 6, 5), (6,), (6,)], 60),
    "batch_norm, affine": (lambda x, m, v, w: F.batch_norm(x, m, v, w), [(2, 6, 5), (6,), (6,), (6,)], 120),
    "batch_norm of the batch": (lambda x: F.batch_norm(x, None, None, training=True), [(2, 6, 5)], 4 * 60),
    "instance_norm, affine": (lambda x, w: F.instance_norm(x, weight=w), [(2, 6, 5), (6,)], 5 * 60),
    "adaptive pool to one": (lambda x: F.adaptive_avg_pool2d(x, 1), [(2, 3, 8, 8)], 384),
    "adaptive pool": (lambda x: F.adaptive_avg_pool2d(x, 3), [(2, 3, 8, 8)], 384),
    "mean": (lambda x: x.mean((2, 3)), [(2, 3, 8, 8)], 0),
    "interpolate, area": (lambda x: F.interpolate(x, (2, 2), mode="area"), [(2, 3, 8, 8)], 384),
    "interpolate, bilinear": (lambda x: F.interpolate(x, (9, 9), mode="bilinear"), [(2, 3, 8, 8)], 4 * 6 * 81),
    "interpolate, nearest": (lambda x: F.interpolate(x, scale_factor=2), [(2, 3, 8, 8)], 6 * 256),
    "grid_sample": (lambda x, g: F.grid_sample(x, g, align_corners=False), [(1, 3, 8, 8), (1, 5, 5, 2)], 4 * 75),
    "elementwise": (lambda x: (x + 1).relu().softmax(-1), [(2, 3)], 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_costs_its_closed_form_at_both_levels(name: str) -> None:
    function, shapes, expected = OPERATIONS[name]
    inputs = tuple(torch.randn(shape) for shape in shapes)
    model = Apply(function)
    assert count_flops(model, inputs) == expected
    assert count_by_terms(model, *inputs) == expected


@pytest.mark.parametrize(
    ("layer", "per_step"),
    [
        (nn.LSTM(8, 6, num_layers=2, bidirectional=True), 2 * 4 * 6 * (8 + 6) + 2 * 4 * 6 * (12 + 6)),
        (nn.LSTM(8, 6, batch_first=True), 4 * 6 * (8 + 6)),
        (nn.GRU(8, 6), 3 * 6 * (8 + 6)),
        (nn.RNN(8, 6), 6 * (8 + 6)),
    ],
)
def test_recurrent_layers(layer: nn.Module, per_step: int) -> None:
    x = torch.randn(5, 3, 8)
    assert count_flops(layer, x) == 15 * per_step
    assert count_by_terms(layer, x) == 15 * per_step


@pytest.mark.parametrize("batch_first", [True, False])
def test_fused_attention_modules_do_not_hide_their_contractions(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    batch, tokens = (3, 5) if batch_first else (5, 3)
    x = torch.randn(3, 5, 8)
    attention = 4 * batch * tokens * 8 * 8 + 2 * batch * tokens * tokens * 8
    feed_forward = 2 * batch * tokens * 8 * 16
    norms = 2 * 5 * batch * tokens * 8
    fast = torch.backends.mha.get_fastpath_enabled()
    assert count_flops(layer, x) == attention + feed_forward + norms
    assert torch.backends.mha.get_fastpath_enabled() is fast


FVCORE_KNOWS = ["resnet18", "test_efficientnet", "test_convnext"]
FAST = [*FVCORE_KNOWS, "mobilenetv3_small_100", "vit_tiny_patch16_224", "convnext_atto", "mixer_s32_224",
        "test_vit3", "test_byobnet", "test_nfnet", "test_resnet"]  # fmt: skip
SLOW = ["swin_tiny_patch4_window7_224", "resnext50_32x4d", "densenet121", "sequencer2d_s", "ghostnet_050", "hrnet_w18",
        "volo_d1_224", "xcit_nano_12_p16_224", "cait_xxs24_224", "coat_lite_tiny", "levit_128s", "mobilevitv2_050",
        "edgenext_xx_small", "pvt_v2_b0", "twins_svt_small", "efficientformerv2_s0", "regnety_002", "gmixer_24_224",
        "eva02_tiny_patch14_224", "mvitv2_tiny", "halonet26t", "lambda_resnet26t", "res2net50_14w_8s",
        "visformer_tiny", "convit_tiny", "crossvit_tiny_240"]  # fmt: skip


def timm_model(name: str) -> tuple[nn.Module, Tensor]:
    model = timm.create_model(name).eval()
    return model, torch.randn(1, *model.pretrained_cfg["input_size"])


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_table_below_autograd_adds_up_to_the_traced_count(name: str) -> None:
    model, x = timm_model(name)
    counted = count_flops(model, x)
    assert counted > 10**6
    assert count_by_terms(model, x) == counted


@pytest.mark.parametrize("name", FVCORE_KNOWS)
def test_where_fvcore_knows_every_operation_the_count_is_its_own(name: str) -> None:
    model, x = timm_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        expected = analysis.total()
    assert count_flops(model, x) == expected


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, a: Tensor, *, b: Tensor | None = None, scale: float = 1.0) -> dict[str, Any]:
        return {"a": [self.left(a) * scale], "b": None if b is None else self.right(b)}


def test_inputs_may_be_a_tensor_a_tuple_or_keywords() -> None:
    model = Keywords()
    assert count_flops(model, torch.randn(2, 3)) == 24
    assert count_flops(model, (torch.randn(2, 3),)) == 24
    assert count_flops(model, {"a": torch.randn(2, 3), "b": torch.randn(2, 5), "scale": 2.0}) == 64


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model.train()
    model[1].eval()
    hook = model[0].register_forward_hook(lambda *_: None)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    count_flops(model, torch.randn(2, 3, 8, 8))
    with pytest.raises(RuntimeError):
        count_flops(model, torch.randn(2, 5, 8, 8))
    assert [module.training for module in model] == [True, False, True]
    assert model.training
    assert list(model[0]._forward_hooks) == [hook.id]
    assert not any(module._forward_pre_hooks for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_contraction_without_a_rule_is_never_dropped_silently() -> None:
    with pytest.warns(UserWarning, match="'fancy_matmul_forward' looks like a contraction"):
        assert op_terms("_fancy_matmul_forward", (), {}, None) == []
    assert op_terms("relu_", (), {}, None) == []
