"""Checks of the Triton kernels, for the interpreter or a GPU; `test_triton.py` runs this file in a process of its own.

Triton decides when it is imported whether it interprets, so these cannot run beside tests that must not.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from prunegate.gumbel import Philox, backends, gumbel_sigmoid, gumbel_softmax, norms, triton
from prunegate.gumbel.arguments import make_options

DEVICE = "cpu" if triton.interpreting() else "cuda"
SHAPES = [(1, 1), (5, 3), (7, 4), (3, 100), (2, 1024), (1, 4096), (2, 5000)]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE)


def both(sampler, logits: torch.Tensor, weight: torch.Tensor, tau, hard: bool, **kind):
    """Sample and gradient of the kernels and of the oracle on the same words."""
    found = []
    for name in ("triton", "reference"):
        sample = sampler(logits, tau, hard, generator=Philox(9, 2, DEVICE), backend=name, **kind)
        found.append((sample.detach(), torch.autograd.grad(sample, logits, weight)[0]))
    return found


def agree(ours, theirs) -> None:
    assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    assert_close(ours[1], theirs[1], atol=2e-5, rtol=1e-4)


def test_the_backend_is_there() -> None:
    assert backends()["triton"].startswith("available")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("hard", [True, False])
def test_rows_equal_the_oracle(shape: tuple[int, int], hard: bool) -> None:
    assert (triton.plan_rows(shape[1]).parts == 1) == (shape[1] <= triton.WHOLE_ROW)
    logits, weight = random(*shape).requires_grad_(), random(*shape)
    for tau in (1.0, torch.tensor(0.4, device=DEVICE)):
        ours, theirs = both(gumbel_softmax, logits, weight, tau, hard)
        agree(ours, theirs)
        if hard:
            assert ours[0].equal(theirs[0])


@pytest.mark.parametrize("count", [1, 2047, 2049])
@pytest.mark.parametrize("hard", [True, False])
def test_gates_equal_the_oracle(count: int, hard: bool) -> None:
    logits, weight = random(count).requires_grad_(), random(count)
    for tau in (1.0, torch.tensor(0.4, device=DEVICE)):
        agree(*both(gumbel_sigmoid, logits, weight, tau, hard))


@pytest.mark.parametrize(
    "kind",
    [
        {"rao_samples": 3},
        {"rao_samples": 2, "tau_backward": 0.4},
        {"estimator": "reinmax"},
        {"estimator": "reinmax", "tau_backward": 1.7},
        {"tau_backward": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(9, 3), (3, 100), (1, 5000)], ids=str)
def test_estimators_equal_the_oracle(kind: dict[str, object], shape: tuple[int, int]) -> None:
    logits, weight = random(*shape).requires_grad_(), random(*shape)
    agree(*both(gumbel_softmax, logits, weight, 0.7, True, **kind))
    agree(*both(gumbel_sigmoid, logits, weight, 0.7, True, **kind))


@pytest.mark.parametrize("kind", [{"rao_samples": 3}, {"estimator": "reinmax"}], ids=str)
def test_estimators_stay_finite_at_the_edges(kind: dict[str, object]) -> None:
    rows = random(40, 20) * 1e4
    rows[:, ::3] = -math.inf
    for sampler in (gumbel_softmax, gumbel_sigmoid):
        logits = rows.clone().requires_grad_()
        sample = sampler(logits, 0.5, True, backend="triton", **kind)
        (gradient,) = torch.autograd.grad(sample, logits, torch.ones_like(sample).cumsum(-1))
        assert gradient.isfinite().all()


@pytest.mark.parametrize("hard", [True, False])
def test_ragged_rows_equal_the_oracle(hard: bool) -> None:
    logits, weight = random(3000).requires_grad_(), random(3000)
    segments = torch.tensor([0, 3, 3, 4, 10, 600, 3000], device=DEVICE)
    agree(*both(gumbel_softmax, logits, weight, 0.7, hard, segments=segments))


def test_a_row_keeps_its_draw_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random(6, 300)
    whole = gumbel_softmax(logits, generator=Philox(3, 0, DEVICE), backend="triton")
    monkeypatch.setattr(triton, "WHOLE_ROW", 64)
    monkeypatch.setattr(triton, "ELEMENTS", 256)
    shared = gumbel_softmax(logits, generator=Philox(3, 0, DEVICE), backend="triton")
    assert_close(whole, shared)
    hard = gumbel_softmax(logits, hard=True, generator=Philox(3, 0, DEVICE), backend="triton")
    assert hard.argmax(-1).equal(whole.argmax(-1))


@pytest.mark.parametrize(("most", "parts"), [(64, 5), (128, 3), (256, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_row_is_the_same_however_many_programs_share_it(
    most: int, parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "WHOLE_ROW", most)
    assert triton.plan_rows(300).parts == parts
    logits, weight = random(6, 300).to(dtype).requires_grad_(), random(6, 300).to(dtype)
    with torch.no_grad():
        logits[0, 3] = math.nan
        logits[1, :299] = -math.inf
        logits[2] = 2.0**30
        logits[3, 290] = math.inf
    for hard in (True, False):
        ours, theirs = both(gumbel_softmax, logits, weight, 0.7, hard)
        if hard:
            assert ours[0][[0, 3]].isnan().all()
            assert ours[0][[1, 2, 4, 5]].equal(theirs[0][[1, 2, 4, 5]])
        if dtype == torch.float32:
            agree([part[[1, 2, 4, 5]] for part in ours], [part[[1, 2, 4, 5]] for part in theirs])
        else:
            for mine, other in zip(ours, theirs, strict=True):
                assert_close(mine[[1, 2, 4, 5]], other[[1, 2, 4, 5]], atol=1e-4, rtol=2e-2)
        assert ours[1][[0, 3]].isnan().any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hard", [True, False])
def test_ragged_rows_of_one_program_need_not_be_of_one_length(dtype: torch.dtype, hard: bool) -> None:
    lengths = torch.tensor([50] * 11 + [1, 299, 0, 0, 33, 70])
    segments = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    plan = triton.plan_rows(int(lengths.sum()) // len(lengths))
    assert (4 * plan.quarter, plan.rows) == (64, 32)
    logits, weight = (random(int(lengths.sum())).to(dtype) for _ in "ab")
    logits[60] = math.nan
    logits[555:600] = -math.inf
    logits.requires_grad_()
    ours, theirs = both(gumbel_softmax, logits, weight, 0.7, hard, segments=segments)
    assert ours[0][50:100].isnan().all()
    assert ours[1][50:100].isnan().all()
    fine = torch.ones(len(logits), dtype=torch.bool)
    fine[50:100] = False
    if hard:
        assert ours[0][fine].equal(theirs[0][fine])
    near = {} if dtype == torch.float32 else {"atol": 1e-4, "rtol": 2e-2}
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine[fine], other[fine], **(near or {"atol": 2e-5, "rtol": 1e-4}))


def test_the_cpu_draws_the_same_gates() -> None:
    if not backends()["cpu"].startswith("available"):
        pytest.skip(backends()["cpu"])
    logits = torch.randn(3000)
    gates = gumbel_sigmoid(logits, hard=True, generator=Philox(4), backend="cpu")
    assert gates.equal(
        gumbel_sigmoid(logits.to(DEVICE), hard=True, generator=Philox(4, 0, DEVICE), backend="triton").cpu()
    )
    rows = torch.randn(40, 30)
    sample = gumbel_softmax(rows, hard=True, generator=Philox(4), backend="cpu")
    assert sample.equal(
        gumbel_softmax(rows.to(DEVICE), hard=True, generator=Philox(4, 0, DEVICE), backend="triton").cpu()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits = random(20, 30).to(dtype).requires_grad_()
    for sampler in (gumbel_softmax, gumbel_sigmoid):
        half = sampler(logits, 0.7, generator=Philox(6, 0, DEVICE), backend="triton")
        full = sampler(logits.float(), 0.7, generator=Philox(6, 0, DEVICE), backend="triton")
        assert half.dtype == dtype
        assert_close(half.float(), full.to(dtype).float(), atol=0, rtol=torch.finfo(dtype).eps)
        (gradient,) = torch.autograd.grad(half, logits, torch.ones_like(half))
        assert gradient.dtype == dtype


@pytest.mark.parametrize("columns", [7, 5000])
def test_ties_masks_and_nan(columns: int) -> None:
    logits = torch.full((4, columns), 2.0**30, device=DEVICE)
    logits[1, :-1] = -math.inf
    logits[2] = -1e4
    logits[3, 2] = math.nan
    logits.requires_grad_()
    sample = gumbel_softmax(logits, 0.5, True, backend="triton")
    assert sample[3].isnan().all()
    assert (sample[:3].sum(-1) == 1).all()
    assert sample[1, -1] == 1
    soft = gumbel_softmax(logits, 0.5, backend="triton")
    assert soft[3].isnan().all()
    assert soft[:3].isfinite().all()
    (gradient,) = torch.autograd.grad(sample, logits, torch.ones_like(sample).cumsum(-1))
    assert gradient[:3].isfinite().all()
    assert gradient[3].isnan().all()
    gates = gumbel_sigmoid(logits, hard=True, backend="triton")
    assert gates.isnan().equal(logits.isnan())


@pytest.mark.parametrize("columns", [4, 4500])
def test_frequencies(columns: int) -> None:
    rows = 4000 if columns == 4 else 40
    sample = gumbel_softmax(torch.linspace(-1, 1, columns).expand(rows, -1).to(DEVICE), hard=True, backend="triton")
    assert (sample.sum(-1) == 1).all()
    if columns == 4:
        expected = torch.linspace(-1, 1, 4).double().softmax(0) * rows
        assert stats.chisquare(sample.sum(0).double().cpu().numpy(), expected.numpy()).pvalue > 1e-4
    gates = gumbel_sigmoid(torch.full((6000,), 0.7, device=DEVICE), hard=True, backend="triton")
    assert stats.binomtest(int(gates.sum()), 6000, torch.tensor(0.7).double().sigmoid().item()).pvalue > 1e-4


@pytest.mark.parametrize("sampler", [gumbel_softmax, gumbel_sigmoid])
@pytest.mark.parametrize("segments", [None, [0, 10, 11, 60]], ids=["rows", "ragged"])
@pytest.mark.parametrize("kind", [{}, {"rao_samples": 2}], ids=str)
def test_second_derivatives(sampler, segments: list[int] | None, kind: dict[str, int]) -> None:
    logits, weight, probe = random(60).requires_grad_(), random(60), random(60)
    derivatives = []
    for name in ("triton", "reference"):
        sample = sampler(logits, 0.8, True, segments=segments, generator=Philox(2, 0, DEVICE), backend=name, **kind)
        (first,) = torch.autograd.grad((sample * weight).sum(), logits, create_graph=True)
        derivatives.append([first.detach(), *torch.autograd.grad((first * probe).sum(), logits)])
    assert_close(*derivatives, atol=1e-5, rtol=1e-4)


def test_any_dimension_and_seed() -> None:
    logits = random(3, 6, 5)
    for dim in (0, 1, 2):
        ours, theirs = (
            gumbel_softmax(logits, dim=dim, hard=True, generator=Philox(5, 0, DEVICE), backend=name)
            for name in ("triton", "reference")
        )
        assert ours.equal(theirs)
        assert ours.is_contiguous()
    torch.manual_seed(3)
    first = gumbel_sigmoid(logits, hard=True, backend="triton")
    torch.manual_seed(3)
    assert first.equal(gumbel_sigmoid(logits, hard=True, backend="triton"))
    assert gumbel_softmax(logits.sum(), hard=True, backend="triton") == 1


def test_a_transform_is_given_plain_operations() -> None:
    draw = torch.func.vmap(lambda x: gumbel_softmax(x, hard=True, backend="triton"), randomness="different")
    assert (draw(random(3, 4, 5)).sum(-1) == 1).all()
    learned = torch.ones((), device=DEVICE, requires_grad=True)
    assert not triton.takes(random(3), make_options(learned, None, True, "st", 0), True)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_cuda_graph_draws_anew_on_replay() -> None:
    logits = torch.zeros(2500, 4, device="cuda")
    for sampler in (gumbel_sigmoid, gumbel_softmax):
        for generator in (None, Philox(3, 0, "cuda")):
            sampler(logits, hard=True, generator=generator)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                sample = sampler(logits, hard=True, generator=generator)
            draws = []
            for _ in range(2):
                graph.replay()
                draws.append(sample.clone())
            # Half of all gates differ; three quarters of all rows do, in two places each.
            assert 3000 < int((draws[0] != draws[1]).sum()) < 6000


@pytest.mark.parametrize("shape", [(5, 1), (3, 4, 37), (2, 1024)], ids=str)
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_masked_norms_equal_the_oracle(
    shape: tuple[int, ...], centre: bool, affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fewer programs than rows, so that each adds up several.
    monkeypatch.setattr(norms, "SHARES", 3)
    columns = shape[-1]
    x = random(*shape).add(1.5).requires_grad_()
    keep = (torch.arange(columns, device=DEVICE) % 3 != 1).float().requires_grad_()
    weight = random(columns).requires_grad_() if affine else None
    bias = random(columns).requires_grad_() if affine and centre else None
    gradient = random(*shape)
    inputs = [tensor for tensor in (x, keep, weight, bias) if tensor is not None]
    # Large enough that a mistake in its place shows.
    eps = 0.3
    ours = (
        norms.masked_layer_norm(x, keep, weight, bias, eps) if centre else norms.masked_rms_norm(x, keep, weight, eps)
    )
    assert "MaskedNorm" in str(ours.grad_fn)
    wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in (x, keep, weight, bias)]
    theirs = norms.plain_norm(*wide, eps, centre)
    assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(ours, inputs, gradient, retain_graph=True)
    expected = torch.autograd.grad(theirs, [tensor for tensor in wide if tensor is not None], gradient.double())
    for one, other in zip(found, expected, strict=True):
        assert_close(one.double(), other, atol=2e-5 * max(1.0, float(other.abs().max())), rtol=1e-4)
    (first,) = torch.autograd.grad(ours, x, gradient, create_graph=True)
    assert first.requires_grad
