"""Masked equals slim, costs are exact, the mask does something; for the zoo and for timm networks."""

import pytest
import torch

import prunegate
from prunegate.labels.trace import call_model
from tests.models import FAST, SLOW, build, random_mask, randomise, relative_error
from tests.oracle import check_against_the_oracle
from tests.zoo import ZOO

EXACT = 1e-8


def check_cut(model: torch.nn.Module, example: object, seeds: range, least_effect: float = 0.05,
              own_class: bool = True) -> None:  # fmt: skip
    """A top-level forward that must itself be edited makes a subclass of the same name (``own_class=False``)."""
    gated = prunegate.attach(model, example).eval()
    with torch.no_grad():
        dense = call_model(model, example)
        assert relative_error(dense, call_model(gated, example)) == 0.0
        for seed in seeds:
            gated.mask = random_mask(gated, seed)
            masked = call_model(gated, example)
            slim = gated.export()
            assert type(slim).__name__ == type(model).__name__
            assert isinstance(slim, type(model))
            assert type(slim) is type(model) or not own_class
            assert relative_error(masked, call_model(slim, example)) <= EXACT
            assert relative_error(dense, masked) > least_effect
            assert gated.cost.params(gated.mask) == sum(p.numel() for p in slim.parameters())
            assert gated.cost.flops(gated.mask) == prunegate.count_flops(slim, example)
    assert gated.cost.flops() == prunegate.count_flops(model, example)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_zoo(name: str) -> None:
    torch.manual_seed(1)
    model = randomise(ZOO[name](), seed=2).eval()
    check_cut(model, model.example(), range(3), least_effect=1e-3, own_class=False)


@pytest.mark.parametrize("name", FAST)
def test_fast_networks(name: str) -> None:
    check_cut(build(name), torch.randn(1, 3, 224, 224, dtype=torch.float64), range(3))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_slow_networks(name: str) -> None:
    check_cut(build(name), torch.randn(1, 3, 224, 224, dtype=torch.float64), range(3))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_masked_forward_and_gradient_against_the_oracle(name: str, train: bool) -> None:
    torch.manual_seed(1)
    model = randomise(ZOO[name](), seed=2)
    check_against_the_oracle(model, model.example(), (train,))


# One of each kind: plain and grouped convolutions, standardised weights, norms over channels, heads of every layout,
# products of activations, token mixing, response norms, dense blocks.
TEN = (
    "test_resnet", "test_byobnet", "test_nfnet", "test_convnext", "test_vit", "test_efficientnet", "test_coatnet",
    "pvt_v2_b0", "densenet121", "mixer_s32_224",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", TEN)
def test_networks_against_the_oracle(name: str, train: bool) -> None:
    model = build(name)
    example = torch.randn(2, *model.pretrained_cfg["input_size"], dtype=torch.float64)
    check_against_the_oracle(model, example, (train,))
