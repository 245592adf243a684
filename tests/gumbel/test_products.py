"""Products with gates equal torch's, forward and backward, however the tensors lie in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from prunegate.gumbel import cpu, gated_product
from prunegate.gumbel.products import _rows_of

fused = pytest.mark.skipif(cpu.load()[0] is None, reason=cpu.availability())

# (shape, shape of the gate): weights of matrices and kernels, tokens, maps; lengths that fill no vector; one channel.
CASES = [
    ((37, 48), (1, 48)), ((5, 7), (7,)), ((24, 19, 3, 3), (1, 19, 1, 1)), ((4, 16, 7, 7), (16, 1, 1)),
    ((3, 5, 11, 13), (1, 5, 1, 1)), ((2, 9, 33), (33,)), ((6, 4), (6, 1)), ((1, 3), (1, 3)), ((130, 64), (1, 64)),
]  # fmt: skip


def operands(shape: tuple[int, ...], gate: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    z = (torch.rand(gate) > 0.4).float()
    return torch.randn(shape, requires_grad=True), z.requires_grad_(), torch.randn(shape)


def check(x: Tensor, z: Tensor, gradient: Tensor) -> None:
    found, expected = gated_product(x, z), x * z
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    to_x, to_z = torch.autograd.grad(found, (x, z), gradient)
    by_x, by_z = torch.autograd.grad(expected, (x, z), gradient)
    assert torch.equal(to_x, by_x)
    assert_close(to_z, by_z, rtol=1e-5, atol=1e-5)
    assert to_z.shape == z.shape


@pytest.mark.parametrize(("shape", "gate"), CASES, ids=str)
def test_value_and_gradients_are_those_of_a_product(shape: tuple[int, ...], gate: tuple[int, ...]) -> None:
    check(*operands(shape, gate))


@fused
@pytest.mark.parametrize(("shape", "gate"), CASES, ids=str)
@pytest.mark.parametrize("level", range(3))
def test_every_instruction_set(level: int, shape: tuple[int, ...], gate: tuple[int, ...],
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    extension = cpu.load()[0]
    assert extension is not None
    if level > extension.level:
        pytest.skip("this processor does not have it")
    monkeypatch.setattr(cpu, "_extension", lambda: cpu.Extension(extension.module, level))
    check(*operands(shape, gate))


@fused
def test_threads_share_the_sum() -> None:
    torch.set_num_threads(3)
    x, z, gradient = operands((4099, 96), (1, 96))
    to_x, to_z = torch.autograd.grad(gated_product(x, z), (x, z), gradient)
    assert torch.equal(to_x, gradient * z.detach())
    assert_close(to_z, (gradient.double() * x.double()).sum(0, keepdim=True).float(), rtol=1e-4, atol=1e-4)


@fused
def test_channels_last_and_gradients_that_lie_otherwise() -> None:
    x, z, gradient = operands((2, 12, 5, 6), (1, 12, 1, 1))
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert _rows_of(last.shape, last.stride(), z.shape) == (60, 12, 1)
    check(last, z, gradient.contiguous(memory_format=torch.channels_last))
    check(last, z, gradient)
    check(x, z, gradient.contiguous(memory_format=torch.channels_last))
    check(x, z, gradient[:1, :, :, :1].expand_as(x))


def test_what_is_not_dense_or_varies_along_two_dimensions_is_left_to_torch() -> None:
    x, z, gradient = operands((8, 10), (1, 5))
    assert _rows_of(torch.Size([8, 5]), (10, 1), z.shape) is None
    sliced = x.detach()[:, ::2].requires_grad_()
    check(sliced, z, gradient[:, :5].contiguous())
    assert _rows_of(x.shape, x.stride(), torch.Size([8, 10])) is None
    assert torch.equal(gated_product(x, gradient), x * gradient)


@fused
def test_only_the_gradients_that_are_wanted() -> None:
    x, z, gradient = operands((24, 19, 3, 3), (1, 19, 1, 1))
    (alone,) = torch.autograd.grad(gated_product(x, z.detach()), x, gradient)
    assert torch.equal(alone, gradient * z.detach())
    (alone,) = torch.autograd.grad(gated_product(x.detach(), z), z, gradient)
    assert_close(alone, (gradient * x.detach()).sum((0, 2, 3), keepdim=True), rtol=1e-5, atol=1e-5)


def test_gates_take_the_type_of_what_they_multiply() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert gated_product(torch.ones(2, 3, dtype=dtype), torch.tensor([1.0, 0.0, 1.0])).dtype == dtype


def test_second_derivatives() -> None:
    x, z, _ = operands((4, 6), (1, 6))
    (first,) = torch.autograd.grad(gated_product(x, z).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    assert_close(second, (4 * x * z).sum(0, keepdim=True))
    double = (x.detach().double().requires_grad_(), z.detach().double().requires_grad_())
    assert gradcheck(gated_product, double)
    assert gradgradcheck(gated_product, double)


def test_a_compiler_and_transforms_see_torch_operations() -> None:
    x, z, gradient = operands((4, 6), (1, 6))
    compiled = torch.compile(gated_product, fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(x, z), (x, z), gradient), torch.autograd.grad(x * z, (x, z), gradient))
    batched = torch.func.vmap(gated_product, in_dims=(0, None))(x.detach(), z.detach()[0])
    assert torch.equal(batched, (x * z).detach())
