"""The masked norms in torch's operations: they are torch's own norms of what stays."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from prunegate import masked
from prunegate.errors import SamplerError
from prunegate.gumbel import cpu
from prunegate.gumbel.norms import masked_layer_norm, masked_rms_norm
from prunegate.masked import MASKED_CALLS

KEEP = torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.float64)
KEPT = KEEP.bool()


def test_what_stays_is_normalised_as_if_the_rest_were_gone() -> None:
    x, weight, bias = torch.randn(3, 4, 7).double(), torch.randn(7).double(), torch.randn(7).double()
    count = int(KEEP.sum())
    layer = masked_layer_norm(x, KEEP, weight, bias, 1e-4)[..., KEPT]
    assert_close(layer, F.layer_norm(x[..., KEPT], [count], weight[KEPT], bias[KEPT], 1e-4))
    power = masked_rms_norm(x, KEEP, weight)[..., KEPT]
    assert_close(power, F.rms_norm(x[..., KEPT], [count], weight[KEPT]))
    assert_close(masked_layer_norm(x, torch.ones(7).double()), F.layer_norm(x, [7]))


@pytest.mark.parametrize("norm", [masked_layer_norm, masked_rms_norm])
def test_gradients_reach_the_mask(norm) -> None:
    x, keep = torch.randn(2, 7).double().requires_grad_(), KEEP.clone().requires_grad_()
    weight = torch.randn(7).double().requires_grad_()
    assert gradcheck(norm, (x, keep, weight))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("shape", [(7,), (1, 1, 7)], ids=str)
def test_a_masked_call_over_the_last_dimension_is_the_fused_norm(name: str, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(3, 4, 7, requires_grad=True), torch.randn(7)
    function = getattr(F, name)
    found = MASKED_CALLS[name](function, KEEP.float().reshape(shape), x, [7], weight, eps=1e-3)
    if cpu.load()[0] is not None:
        assert "MaskedNorm" in str(found.grad_fn)
    assert_close(found[..., KEPT], function(x[..., KEPT], [int(KEEP.sum())], weight[KEPT], eps=1e-3))


def test_a_masked_call_over_two_dimensions_is_not_taken_for_one() -> None:
    x, keep = torch.randn(3, 7, 7).double(), KEEP.reshape(7, 1)
    found = MASKED_CALLS["layer_norm"](F.layer_norm, keep, x, [7, 7])
    assert_close(found[:, KEPT], F.layer_norm(x[:, KEPT], [int(KEEP.sum()), 7]))
    # One dimension is normalised, and the mask is along another of the same length.
    assert masked._flat(keep, x, [7]) is None


def test_a_compiler_sees_torch_operations() -> None:
    x, keep = torch.randn(5, 7, requires_grad=True), KEEP.float().requires_grad_()
    compiled = torch.compile(lambda x, keep: masked_layer_norm(x, keep), fullgraph=True, backend="aot_eager")
    weight = torch.randn(5, 7)
    for found, expected in zip(
        torch.autograd.grad(compiled(x, keep), (x, keep), weight),
        torch.autograd.grad(masked_layer_norm(x, keep), (x, keep), weight),
        strict=True,
    ):
        assert_close(found, expected)
    batched = torch.func.vmap(masked_layer_norm)(x, keep.detach().expand(5, 7))
    assert_close(batched, masked_layer_norm(x, keep))


def test_halves_are_computed_in_float32() -> None:
    x = (torch.randn(5, 7) + 300).bfloat16()
    half, full = masked_layer_norm(x, KEEP.bfloat16()), masked_layer_norm(x.float(), KEEP.float())
    assert half.dtype == torch.bfloat16
    assert half.equal(full.bfloat16())


@pytest.mark.parametrize("keep", [torch.ones(6), torch.ones(1, 7)], ids=["short", "two dimensions"])
def test_a_mask_of_another_shape_is_refused(keep: torch.Tensor) -> None:
    with pytest.raises(SamplerError, match="one number for each position"):
        masked_layer_norm(torch.randn(2, 7), keep)
