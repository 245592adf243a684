"""The C kernels: every instruction set against the oracle given their own noise, threads, and stepping aside."""

from __future__ import annotations

import logging
import subprocess
import sys
import types

import pytest
import torch
from torch.testing import assert_close

from prunegate.errors import SamplerError
from prunegate.gumbel import Philox, backends, cpu, gumbel_sigmoid, gumbel_softmax, masked_layer_norm, norms, reference
from prunegate.gumbel.arguments import make_options

pytestmark = pytest.mark.skipif(cpu.load()[0] is None, reason=cpu.availability())

SEED, STEP = 0xFEDCBA9876543210, 3
SHAPES = [
    *[(1, 1), (37, 5), (33, 128), (3, 129), (5, 1024), (2, 50_257), (2, 191)],
    *[(40, 4), (39, 4), (21, 8), (5, 16), (3, 32), (17, 32), (9, 64), (16, 64)],
]


def extensions() -> list[cpu.Extension]:
    found = cpu.load()[0]
    return [] if found is None else [cpu.Extension(found.module, level) for level in range(found.level + 1)]


@pytest.fixture(params=extensions(), ids=lambda extension: cpu._LEVELS[extension.level])
def extension(request: pytest.FixtureRequest) -> cpu.Extension:
    return request.param


@pytest.fixture
def state() -> torch.Tensor:
    return Philox(SEED, STEP).take()


def noise(extension: cpu.Extension, rows: int, columns: int, binary: bool) -> torch.Tensor:
    out = torch.empty(rows, columns)
    extension.module.noise(extension.level, out.data_ptr(), rows, columns, SEED, STEP, binary)
    return out


def test_noise_is_that_of_the_counter(extension: cpu.Extension, state: torch.Tensor) -> None:
    like = torch.empty(9, 1000)
    assert_close(noise(extension, 9, 1000, False), reference.philox_gumbel(state, like, -1, None), atol=4e-6, rtol=0)
    assert_close(noise(extension, 1, 9000, True), reference.philox_logistic(state, like).view(1, -1), atol=4e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_rows_equal_the_oracle_given_the_noise(
    extension: cpu.Extension, state: torch.Tensor, shape: tuple[int, int], tau: float
) -> None:
    logits, gradient = torch.randn(shape), torch.randn(shape)
    drawn = noise(extension, *shape, False)
    hard, soft = torch.empty(shape), torch.empty(shape)
    cpu._softmax_forward(extension, logits, hard, soft, None, state, tau)
    assert hard.equal(reference.softmax(logits, drawn, make_options(tau, None, True, "st", 0), -1))
    # In float64, because the oracle's own rounding at a low temperature is as large as what is looked for.
    exact = logits.double().requires_grad_()
    relaxed = reference.softmax(exact, drawn.double(), make_options(tau, None, False, "st", 0), -1)
    assert_close(soft.double(), relaxed.detach(), atol=1e-6, rtol=1e-6)
    (expected,) = torch.autograd.grad(relaxed, exact, gradient.double())
    found = cpu._softmax_backward(extension, gradient, soft, torch.empty_like(soft), None, tau)
    # In place, as where nothing else needs the relaxed rows.
    assert cpu._softmax_backward(extension, gradient, soft, soft, None, tau).equal(found)
    assert_close(found.double() * tau, expected * tau, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 15, 63, 64, 65, 1000])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_gates_equal_the_oracle_given_the_noise(
    extension: cpu.Extension, state: torch.Tensor, count: int, tau: float
) -> None:
    logits = torch.randn(count)
    drawn = noise(extension, 1, count, True)[0]
    hard, slope, soft = torch.empty(count), torch.empty(count), torch.empty(count)
    cpu._sigmoid_forward(extension, logits, hard, slope, state, tau)
    assert hard.equal(reference.sigmoid(logits, drawn, make_options(tau, None, True, "st", 0)))
    cpu._sigmoid_forward(extension, logits, None, soft, state, tau)
    exact = logits.double().requires_grad_()
    relaxed = torch.sigmoid((exact + drawn.double()) / tau)
    assert_close(soft.double(), relaxed.detach(), atol=1e-6, rtol=1e-6)
    (expected,) = torch.autograd.grad(relaxed, exact, torch.ones_like(relaxed))
    assert_close(slope.double() * tau, expected * tau, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("draws", [1, 5, -1])
@pytest.mark.parametrize("tau", [0.4, 1.0])
def test_slopes_of_estimators_equal_the_oracle(
    extension: cpu.Extension, state: torch.Tensor, draws: int, tau: float
) -> None:
    logits = torch.cat([torch.randn(130), torch.tensor([-1e4, -40.0, 40.0, 1e4, torch.inf, -torch.inf])])
    hard, slope = torch.empty_like(logits), torch.empty_like(logits)
    cpu._sigmoid_forward(extension, logits, hard, slope, state, tau, draws)
    estimator = ("reinmax", 0) if draws < 0 else ("st", draws)
    options = make_options(1.0, tau, True, *estimator)
    exact = logits.double().requires_grad_()
    noises = [reference.philox_logistic(state, exact.detach(), draw) for draw in range(1 + max(draws, 0))]
    sample = reference.sigmoid(exact, noises[0], options, noises[1:])
    assert hard.double().equal(sample.detach())
    (expected,) = torch.autograd.grad(sample, exact, torch.ones_like(sample))
    assert_close(slope.double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind", [{"rao_samples": 3}, {"estimator": "reinmax"}], ids=str)
def test_estimated_gates_have_second_derivatives(kind: dict[str, object]) -> None:
    logits, weight, probe = torch.randn(7, 9).T.requires_grad_(), torch.randn(9, 7), torch.randn(9, 7)
    derivatives = []
    for name in ("cpu", "reference"):
        sample = gumbel_sigmoid(logits, 0.8, True, generator=Philox(2), backend=name, **kind)
        (first,) = torch.autograd.grad(sample, logits, weight, create_graph=True)
        derivatives.append([first.detach(), *torch.autograd.grad(first, logits, probe)])
    assert_close(*derivatives, atol=1e-6, rtol=1e-5)


def test_every_instruction_set_masks_ties_and_refuses_alike(extension: cpu.Extension, state: torch.Tensor) -> None:
    for columns in (7, 200):
        logits = torch.full((20, columns), 2.0**30)
        logits[3] = torch.nan
        logits[4, :-1] = -torch.inf
        hard, soft = torch.empty_like(logits), torch.empty_like(logits)
        cpu._softmax_forward(extension, logits, hard, soft, None, state, 0.5)
        assert hard[3].isnan().all()
        assert soft[3].isnan().all()
        assert (hard.sum(-1).nan_to_num(1) == 1).all()
        assert hard[4, -1] == soft[4, -1] == 1
        logits[3], logits[17] = 0.0, -torch.inf
        with pytest.raises(SamplerError, match="1 of 20 rows"):
            cpu._softmax_forward(extension, logits, hard, soft, None, state, 0.5)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (4, 3, 32), (9, 384), (3, 1000), (400, 200)], ids=str)
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_masked_norms_equal_the_oracle(
    extension: cpu.Extension, shape: tuple[int, ...], centre: bool, affine: bool
) -> None:
    torch.set_num_threads(2)
    columns = shape[-1]
    x, gradient = torch.randn(shape) + 2.0, torch.randn(shape)
    keep = (torch.arange(columns) % 3 != 1).float()
    weight, bias = (torch.randn(columns) if affine else None for _ in "ab")
    bias = bias if centre else None
    rows = x.numel() // columns
    out, to_x, means, scales = torch.empty_like(x), torch.empty_like(x), torch.empty(rows), torch.empty(rows)
    # Epsilon is large enough that a mistake in its place shows.
    cpu._norm_forward(extension, x, keep, weight, bias, out, means, scales, 0.3, centre)
    found = cpu._norm_backward(extension, gradient, x, keep, weight, means, scales, to_x, 0.3, centre)
    wide = [None if tensor is None else tensor.double().requires_grad_() for tensor in (x, keep, weight, bias)]
    expected = norms.plain_norm(*wide, 0.3, centre)
    assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    inputs = [tensor for tensor in wide if tensor is not None]
    exact = iter(torch.autograd.grad(expected, inputs, gradient.double()))
    for tensor, ours in zip(wide, (to_x, *found), strict=True):
        if tensor is not None:
            theirs = next(exact)
            assert_close(ours.double(), theirs, atol=2e-6 * max(1.0, float(theirs.abs().max())), rtol=1e-5)


def test_masked_norms_have_second_derivatives_and_need_no_mask_that_learns() -> None:
    x, keep = torch.randn(6, 20, requires_grad=True), (torch.arange(20) % 3 != 1).float().requires_grad_()
    weight, probe = torch.randn(6, 20), torch.randn(6, 20)
    derivatives = []
    for norm in (masked_layer_norm, lambda *inputs: norms.plain_norm(*inputs, None, None, 1e-5, True)):
        (first,) = torch.autograd.grad(norm(x, keep), x, weight, create_graph=True)
        derivatives.append([first.detach(), *torch.autograd.grad(first, (x, keep), probe)])
    assert_close(*derivatives, atol=1e-5, rtol=1e-4)
    ours = masked_layer_norm(x, keep.detach())
    assert "MaskedNorm" in str(ours.grad_fn)
    assert_close(torch.autograd.grad(ours, x, weight)[0], derivatives[1][0])
    turned = masked_layer_norm(x.T.contiguous().T, keep)
    assert turned.equal(ours)


def test_instruction_sets_draw_the_same_gates_up_to_near_ties(state: torch.Tensor) -> None:
    logits = torch.randn(2000, 30)
    drawn = []
    for extension in extensions():
        hard, soft = torch.empty_like(logits), torch.empty_like(logits)
        cpu._softmax_forward(extension, logits, hard, soft, None, state, 1.0)
        drawn.append(hard)
    top = (logits + reference.philox_gumbel(state, logits, -1, None)).topk(2).values
    clear = top[:, 0] - top[:, 1] > 1e-5
    assert clear.sum() > 1900
    for hard in drawn[1:]:
        assert hard[clear].equal(drawn[0][clear])


@pytest.mark.parametrize("shape", [(3000, 100), (1500, 200), (300_000,)], ids=str)
def test_threads_do_not_change_the_draw(shape: tuple[int, ...]) -> None:
    logits, weight = torch.randn(shape, requires_grad=True), torch.randn(shape)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for sampler in (gumbel_softmax, gumbel_sigmoid):
            sample = sampler(logits, 0.7, True, generator=Philox(1), backend="cpu")
            found += [sample.detach(), torch.autograd.grad(sample, logits, weight)[0]]
    for first, second, third in zip(found[:4], found[4:8], found[8:], strict=True):
        assert first.equal(second)
        assert first.equal(third)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("kind", [{}, {"estimator": "reinmax"}, {"rao_samples": 2}], ids=str)
def test_a_graph_can_be_walked_twice(hard: bool, kind: dict[str, object]) -> None:
    # The first walk puts the gradient where the relaxed sample was; the second has to make it again.
    if kind and not hard:
        return
    logits, weight = torch.randn(40, 30, requires_grad=True), torch.randn(40, 30)
    for sampler in (gumbel_sigmoid, gumbel_softmax):
        sample = sampler(logits, 0.7, hard, backend="cpu", **kind)
        first = torch.autograd.grad(sample, logits, weight, retain_graph=True)[0]
        kept, second = first.clone(), torch.autograd.grad(sample, logits, weight, retain_graph=True)[0]
        assert second.equal(first)
        assert first.equal(kept)
        assert_close(torch.autograd.grad(sample, logits, 2 * weight)[0], 2 * kept)


def test_ragged_rows_have_second_derivatives() -> None:
    logits, weight, probe = torch.randn(50, requires_grad=True), torch.randn(50), torch.randn(50)
    derivatives = []
    for name in ("cpu", "reference"):
        sample = gumbel_softmax(logits, 0.8, True, segments=[0, 5, 6, 50], generator=Philox(2), backend=name)
        (first,) = torch.autograd.grad((sample * weight).sum(), logits, create_graph=True)
        derivatives.append([first.detach(), *torch.autograd.grad((first * probe).sum(), logits)])
    assert_close(*derivatives)


def test_denormal_numbers_still_exist() -> None:
    # Linking with relaxed floating-point rules would flush them to zero in the whole process.
    assert cpu.load()[0] is not None
    assert torch.tensor([1e-40]).double().item() > 0
    assert (torch.tensor([1e-38]) * 0.01).item() > 0


@pytest.mark.parametrize("fault", ["gradient", "version"])
def test_a_wrong_extension_steps_aside(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    extension = cpu.load()[0]
    assert extension is not None
    real = extension.module
    wrong = types.SimpleNamespace(**{name: getattr(real, name) for name in dir(real) if not name.startswith("_")})
    if fault == "gradient":
        # Frequencies would be right, gradients would not.
        wrong.softmax_backward = lambda *a: real.softmax_backward(*a[:7], 1.02 * a[7], a[8])
    else:
        del wrong.sigmoid_forward
    monkeypatch.setattr(cpu.importlib, "import_module", lambda name: wrong)
    cpu.load.cache_clear()
    try:
        with caplog.at_level(logging.DEBUG, logger="prunegate.gumbel.cpu"):
            assert cpu.load()[0] is None
            assert "fails its self-test" in backends()["cpu"]
            count = len(caplog.records)
            assert gumbel_softmax(torch.zeros(3, 4), hard=True).sum() == 3
            assert len(caplog.records) == count > 0
        with pytest.raises(SamplerError, match="not available here"):
            gumbel_sigmoid(torch.zeros(3), backend="cpu")
    finally:
        monkeypatch.undo()
        cpu.load.cache_clear()


def test_without_the_extension_torch_samples() -> None:
    program = (
        "import sys; sys.modules['prunegate.gumbel._cpu'] = None\n"
        "import torch; from prunegate.gumbel import backends, gumbel_sigmoid\n"
        "assert 'not built' in backends()['cpu'], backends()\n"
        "assert gumbel_sigmoid(torch.full((5,), 50.0), hard=True).sum() == 5\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)
