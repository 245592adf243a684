"""Timm's ways of using a model still serve after a cut: features, heads, new classifiers."""

import pytest
import timm
import torch
from torch import nn

import prunegate
from tests.models import random_mask

MODELS = ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "test_byobnet"]


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = timm.create_model(request.param).eval()
    gated = prunegate.attach(model, torch.randn(1, 3, 160, 160)).eval()
    gated.mask = random_mask(gated, 0)
    return model, gated.export().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 160, 160)


def test_widths_are_those_of_the_tensors(pair: tuple[nn.Module, nn.Module], x: torch.Tensor) -> None:
    dense, slim = pair
    with torch.no_grad():
        features, before = slim.forward_features(x), dense.forward_features(x)
    (dim,) = [dim for dim, size in enumerate(before.shape) if size == dense.num_features]
    assert slim.num_features == features.shape[dim] < dense.num_features
    assert slim.head_hidden_size == slim.get_classifier().in_features
    if hasattr(dense, "embed_dim"):
        assert slim.embed_dim == slim.cls_token.shape[-1]


def test_parts_of_the_forward(pair: tuple[nn.Module, nn.Module], x: torch.Tensor) -> None:
    _, slim = pair
    with torch.no_grad():
        torch.testing.assert_close(slim.forward_head(slim.forward_features(x)), slim(x))
        assert slim.forward_head(slim.forward_features(x), pre_logits=True).shape == (2, slim.head_hidden_size)


def test_feature_info(pair: tuple[nn.Module, nn.Module], x: torch.Tensor) -> None:
    dense, slim = pair
    with torch.no_grad():
        _, maps = slim.forward_intermediates(x, output_fmt="NCHW")
    told = [entry["num_chs"] for entry in slim.feature_info]
    assert [feature.shape[1] for feature in maps] == told
    assert told != [entry["num_chs"] for entry in dense.feature_info]


def test_new_classifier(pair: tuple[nn.Module, nn.Module], x: torch.Tensor) -> None:
    _, slim = pair
    own = prunegate.apply_plan(timm.create_model(slim.pretrained_cfg["architecture"]), slim._prunegate_plan).eval()
    own.reset_classifier(7)
    with torch.no_grad():
        assert own(x).shape == (2, 7)
    own.reset_classifier(0)
    with torch.no_grad():
        assert own(x).shape == (2, slim.head_hidden_size)
