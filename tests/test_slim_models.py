"""Slim models are ordinary models: what people do with a timm model works on one."""

import copy
import sys

import pytest
import timm
import torch
from torch import nn

import prunegate
from tests.models import build, random_mask, relative_error

SMALL = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet")
NAMES = (*SMALL, "swin_s3_tiny_224", "resnetv2_18", "mvitv2_tiny")


def make_slim(name: str, seed: int = 0, **kwargs: object) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    model = build(name, **kwargs)
    gated = prunegate.attach(model)
    gated.eval().mask = random_mask(gated, seed)
    slim = gated.export()
    size = model.pretrained_cfg["input_size"]
    x = torch.randn(2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return gated, slim, x


@pytest.mark.parametrize("name", SMALL)
def test_another_batch_size_and_no_trace_of_gates(name: str) -> None:
    gated, slim, x = make_slim(name)
    x = torch.cat([x, x[:1]])
    with torch.no_grad():
        assert relative_error(gated(x), slim(x)) <= 1e-8
    assert set(slim.state_dict()) == set(gated.state_dict()) - {"prunegate.logits"}
    for module in slim.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not type(module).__module__.startswith("prunegate")


@pytest.mark.parametrize("name", SMALL)
def test_runs_where_prunegate_cannot_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, slim, x = make_slim(name)
    with torch.no_grad():
        before = slim(x)
        for module in [key for key in sys.modules if key == "prunegate" or key.startswith("prunegate.")]:
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError):
            __import__("prunegate")
        assert torch.equal(slim(x), before)


@pytest.mark.parametrize("name", SMALL)
def test_copies_moves_and_state_dicts(name: str) -> None:
    _, slim, x = make_slim(name)
    with torch.no_grad():
        before = slim(x)
        duplicate = copy.deepcopy(slim)
        assert torch.equal(duplicate(x), before)
        for parameter in duplicate.parameters():
            parameter.zero_()
        assert torch.equal(slim(x), before)
        duplicate.load_state_dict(slim.state_dict())
        assert torch.equal(duplicate(x), before)
        assert duplicate.float()(x.float()).dtype == torch.float32


@pytest.mark.parametrize("name", SMALL)
def test_trains(name: str) -> None:
    _, slim, x = make_slim(name)
    slim.train()
    optimizer = torch.optim.SGD(slim.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = slim(x).square().mean()
        loss.backward()
        assert all(parameter.grad is not None for parameter in slim.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_compiles(name: str) -> None:
    _, slim, x = make_slim(name)
    compiled = torch.compile(slim, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), slim(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_can_be_pruned_again(name: str) -> None:
    first, slim, x = make_slim(name)
    again = prunegate.attach(slim).eval()
    # One head that is left alone no longer ties its channels together, so units may become finer.
    assert again.logits.numel() >= int(first.mask.sum())
    assert name == "test_vit" or again.logits.numel() == int(first.mask.sum())
    again.mask = random_mask(again, seed=7)
    slimmer = again.export()
    with torch.no_grad():
        assert relative_error(again(x), slimmer(x)) <= 1e-8
    assert again.cost.flops(again.mask) == prunegate.count_flops(slimmer, again.example_input)
    assert again.cost.flops() == first.cost.flops(first.mask)


@pytest.mark.parametrize("name", NAMES)
def test_timms_conventions_still_serve(name: str) -> None:
    _, slim, x = make_slim(name)
    with torch.no_grad():
        features = slim.forward_features(x)
        assert relative_error(slim.forward_head(features), slim(x)) == 0.0
    classifier = slim.get_classifier()
    width = classifier.in_features if isinstance(classifier, nn.Linear) else classifier.in_channels
    assert slim.head_hidden_size == width
    channels = {features.shape[1], features.shape[-1]}
    assert slim.num_features in channels
    slim.reset_classifier(7)
    assert slim.double()(x).shape == (2, 7)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_feature_info_tells_the_widths_that_are(name: str) -> None:
    _, slim, x = make_slim(name)
    _, maps = slim.forward_intermediates(x)
    assert [each.shape[1] for each in maps] == [info["num_chs"] for info in slim.feature_info][-len(maps) :]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_another_resolution(name: str) -> None:
    gated, slim, _ = make_slim(name)
    x = torch.randn(1, 3, 192, 224, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(gated(x), slim(x)) <= 1e-8


def test_dynamic_image_size() -> None:
    gated, slim, _ = make_slim("test_vit", dynamic_img_size=True)
    x = torch.randn(1, 3, 192, 128, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(gated(x), slim(x)) <= 1e-8


def test_features_only_models_can_be_pruned() -> None:
    model = timm.create_model("test_resnet", features_only=True).double().eval()
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    gated = prunegate.attach(model, x)
    gated.mask = random_mask(gated, 0)
    slim = gated.export()
    with torch.no_grad():
        assert relative_error(gated(x), slim(x)) <= 1e-8
