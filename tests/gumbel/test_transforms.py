"""What torch does to functions: compile, export, vmap, grad, autocast; and where the randomness comes from."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from prunegate.gumbel import Philox, gumbel_sigmoid, gumbel_softmax

SAMPLERS = [gumbel_softmax, gumbel_sigmoid]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_manual_seed_and_generators_repeat_a_draw(sampler, backend: str) -> None:
    logits = torch.randn(40, 30)
    for hard in (True, False):
        torch.manual_seed(3)
        first = sampler(logits, hard=hard, backend=backend)
        second = sampler(logits, hard=hard, backend=backend)
        torch.manual_seed(3)
        assert first.equal(sampler(logits, hard=hard, backend=backend))
        assert not first.equal(second)
        one, two = (torch.Generator().manual_seed(3) for _ in "ab")
        state = torch.get_rng_state()
        assert sampler(logits, hard=hard, generator=one, backend=backend).equal(
            sampler(logits, hard=hard, generator=two, backend=backend)
        )
        assert state.equal(torch.get_rng_state())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", [{}, {"tau_backward": 2.0}, {"estimator": "reinmax"}, {"rao_samples": 2}], ids=str)
def test_compiles_to_one_graph_that_temperature_does_not_break(sampler, kind: dict[str, object]) -> None:
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(logits: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return sampler(logits / 0.5, tau / 0.5, hard=True, **kind)

    logits, tau = torch.randn(9, 4, requires_grad=True), torch.tensor(1.0)
    for _ in range(3):
        sample = step(logits, tau)
        sample.sum().backward()
        assert ((sample == 0) | (sample == 1)).all()
        tau.mul_(0.9)
    assert counter.frame_count == 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_number_for_temperature_compiles_twice_at_most(sampler) -> None:
    counter = CompileCounter()
    step = torch.compile(lambda x, tau: sampler(x, tau, hard=True), fullgraph=True, backend=counter)
    for tau in (1.0, 0.9, 0.8, 0.7):
        step(torch.randn(9, 4), tau)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_compiled_gradients_are_those_of_the_oracle(sampler) -> None:
    # The counter-based generator gives eager code the same noise.
    def step(logits: torch.Tensor, generator: Philox) -> torch.Tensor:
        return sampler(logits, 0.7, hard=True, generator=generator)

    logits = torch.randn(9, 20, requires_grad=True)
    weight = torch.randn(9, 20)
    one, two = Philox(5), Philox(5)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        ours, oracle = compiled(logits, one), sampler(logits, 0.7, hard=True, generator=two, backend="reference")
        assert ours.equal(oracle)
        assert_close(torch.autograd.grad(ours, logits, weight), torch.autograd.grad(oracle, logits, weight))
    assert one.step == two.step == 2


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_compiles_with_inductor(sampler) -> None:
    logits = torch.zeros(40_000, 4, requires_grad=True)
    sample = torch.compile(lambda x: sampler(x, 0.7, hard=True), fullgraph=True)(logits)
    sample.sum().backward()
    expected = 0.25 if sampler is gumbel_softmax else 0.5
    assert_close(sample.mean(0), torch.full((4,), expected), atol=0.012, rtol=0)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


class Layer(torch.nn.Module):
    """A module that samples."""

    def __init__(self, sampler) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(6, 3))
        self.sampler = sampler

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.sampler(self.logits, hard=True)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exports_and_copies(sampler) -> None:
    layer = Layer(sampler)
    program = torch.export.export(layer, (torch.ones(6, 3),))
    sample = program.module()(torch.ones(6, 3))
    assert ((sample == 0) | (sample == 1)).all()
    twin = copy.deepcopy(layer)
    assert twin(torch.ones(6, 3)).shape == (6, 3)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("hard", [True, False])
def test_vmap_and_grad(sampler, hard: bool, backend: str) -> None:
    logits = torch.randn(5, 8, 20)

    def draw(x: torch.Tensor) -> torch.Tensor:
        return sampler(x, 0.7, hard, backend=backend)

    different = torch.func.vmap(draw, randomness="different")(logits[:1].expand(5, -1, -1))
    assert different.shape == (5, 8, 20)
    assert not different[0].equal(different[1])
    same = torch.func.vmap(draw, randomness="same")(logits[:1].expand(5, -1, -1))
    assert same[0].equal(same[1])
    if hard and sampler is gumbel_softmax:
        assert (different.sum(-1) == 1).all()
    torch.manual_seed(4)
    functional = torch.func.grad(lambda x: draw(x).square().sum())(logits[0])
    assert functional.isfinite().all()
    assert functional.abs().max() > 1e-3
    noisy = torch.func.vmap(torch.func.grad(lambda x: draw(x).square().sum()), randomness="different")(logits)
    assert noisy.shape == logits.shape


# torch compiles its own formulas for forward mode with a deprecated function, on first use.
@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_forward_mode_derivatives_agree_with_backward(sampler, backend: str) -> None:
    logits, tangent, weight = torch.randn(6, 20), torch.randn(6, 20), torch.randn(6, 20)

    def draw(x: torch.Tensor) -> torch.Tensor:
        return sampler(x, 0.7, True, generator=Philox(8), backend=backend)

    _, forward = torch.func.jvp(draw, (logits,), (tangent,))
    leaf = logits.clone().requires_grad_()
    (backward,) = torch.autograd.grad(draw(leaf), leaf, weight)
    assert_close((forward * weight).sum(), (backward * tangent).sum())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_halves_keep_the_dtype_of_the_logits(sampler, dtype: torch.dtype, backend: str) -> None:
    logits = torch.randn(30, 20).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample = sampler(logits, 0.5, hard=True, backend=backend)
    sample.sum().backward()
    assert sample.dtype == dtype
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


def test_halves_are_sampled_in_float32(backend: str) -> None:
    logits = torch.randn(64, 32).bfloat16()
    half = gumbel_softmax(logits, 0.7, generator=Philox(6), backend=backend)
    full = gumbel_softmax(logits.float(), 0.7, generator=Philox(6), backend=backend)
    assert half.equal(full.bfloat16())


def test_no_gradient_is_kept_where_none_is_asked(backend: str) -> None:
    with torch.no_grad():
        sample = gumbel_sigmoid(torch.zeros(5, requires_grad=True), hard=True, backend=backend)
    assert not sample.requires_grad
    assert not gumbel_softmax(torch.zeros(5), hard=True, backend=backend).requires_grad
