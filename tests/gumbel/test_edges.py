"""Extreme, tied, masked, empty and oddly laid out inputs."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from prunegate.errors import SamplerError
from prunegate.gumbel import Philox, backends, gumbel_sigmoid, gumbel_softmax

TAUS = [1e-3, 0.5, 1.0, 100.0]


def is_one_hot(sample: torch.Tensor, dim: int = -1) -> bool:
    return bool(((sample == 0) | (sample == 1)).all() and (sample.sum(dim) == 1).all())


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("hard", [False, True])
def test_extreme_logits_and_temperatures_stay_finite(backend: str, tau: float, scale: float, hard: bool) -> None:
    logits = (torch.randn(64, 33) * scale).clamp(-1e4, 1e4).requires_grad_()
    sample = gumbel_softmax(logits, tau=tau, hard=hard, backend=backend)
    sample.mul(torch.randn_like(sample)).sum().backward()
    assert sample.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert_close(sample.sum(-1), torch.ones(64))
    assert is_one_hot(sample) or not hard


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("hard", [False, True])
def test_extreme_gates_stay_finite(backend: str, tau: float, hard: bool) -> None:
    logits = torch.tensor([-math.inf, -1e4, -30.0, 0.0, 30.0, 1e4, math.inf], requires_grad=True)
    gates = gumbel_sigmoid(logits, tau=tau, hard=hard, backend=backend)
    gates.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert gates[0] == 0
    assert gates[-1] == 1
    if hard:
        assert gates[[1, 2]].tolist() == [0, 0]
        assert gates[[4, 5]].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [3, 32, 50_257])
def test_ties_leave_exactly_one(backend: str, columns: int, dtype: torch.dtype) -> None:
    sample = gumbel_softmax(torch.zeros(max(1, 200_000 // columns), columns, dtype=dtype), hard=True, backend=backend)
    assert sample.dtype == dtype
    assert is_one_hot(sample.float())


def test_shared_best_scores_leave_exactly_one(backend: str) -> None:
    # At this size an ulp is 16, noise vanishes, and all scores of a row are equal.
    logits = torch.full((7, 21), 2.0**28)
    sample = gumbel_softmax(logits, hard=True, backend=backend)
    assert is_one_hot(sample)
    assert is_one_hot(gumbel_softmax(logits[:, :4], hard=True, backend=backend))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("columns", [6, 70])
def test_masked_categories_never_win(backend: str, hard: bool, columns: int) -> None:
    logits = torch.randn(500, columns)
    logits[:, ::2] = -math.inf
    logits.requires_grad_()
    sample = gumbel_softmax(logits, hard=hard, backend=backend)
    assert (sample[:, ::2] == 0).all()
    sample.square().sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, ::2] == 0).all()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("columns", [1, 5, 80])
def test_rows_without_a_category_are_refused(backend: str, hard: bool, columns: int) -> None:
    logits = torch.randn(9, columns)
    logits[4] = -math.inf
    with pytest.raises(SamplerError, match="1 of 9 rows have no possible category"):
        gumbel_softmax(logits, hard=hard, backend=backend)
    with pytest.raises(SamplerError, match="1 of 3 rows have no possible category"):
        gumbel_softmax(
            logits[3:6].flatten(), hard=hard, segments=[0, columns, 2 * columns, 3 * columns], backend=backend
        )


@pytest.mark.parametrize("columns", [5, 80])
@pytest.mark.parametrize("hard", [False, True])
def test_nan_logits_show(backend: str, columns: int, hard: bool) -> None:
    logits = torch.randn(9, columns)
    logits[4, 2] = math.nan
    assert gumbel_softmax(logits, hard=hard, backend=backend).isnan().all(-1).tolist() == [i == 4 for i in range(9)]
    assert gumbel_sigmoid(logits, hard=hard, backend=backend).isnan().equal(logits.isnan())


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
@pytest.mark.parametrize("hard", [False, True])
def test_empty_inputs_are_as_in_torch(backend: str, shape: tuple[int, ...], hard: bool) -> None:
    for dim in range(len(shape)):
        logits = torch.zeros(shape, requires_grad=True)
        try:
            expected = F.gumbel_softmax(logits, hard=hard, dim=dim)
        except IndexError:
            # torch's hard path cannot take the largest of no categories; ours returns the empty sample.
            expected = torch.zeros(shape)
        sample = gumbel_softmax(logits, hard=hard, dim=dim, backend=backend)
        assert sample.shape == expected.shape
        sample.sum().backward()
        assert logits.grad is not None
        assert logits.grad.shape == shape
    gates = gumbel_sigmoid(torch.zeros(shape, requires_grad=True), hard=hard, backend=backend)
    gates.sum().backward()
    assert gates.shape == shape


def test_one_number_is_one_category(backend: str) -> None:
    assert gumbel_softmax(torch.tensor(0.3), hard=True, backend=backend) == F.gumbel_softmax(
        torch.tensor(0.3), hard=True
    )
    assert gumbel_softmax(torch.tensor(0.3), backend=backend).shape == ()
    assert gumbel_sigmoid(torch.tensor(50.0), hard=True, backend=backend) == 1


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_any_dimension_and_strides(backend: str, dim: int) -> None:
    # With one favourite far above the rest, the draw is known whatever the noise.
    base = torch.zeros(6, 20, 5)
    favourite = torch.randint(base.shape[dim], base.amax(dim, keepdim=True).shape)
    logits = base.scatter(dim, favourite, 1e4)
    expected = base.scatter(dim, favourite, 1.0)
    wide = torch.zeros(12, 40, 5)
    wide[::2, ::2] = logits
    for layout in (logits, logits.transpose(0, 2).contiguous().transpose(0, 2), wide[::2, ::2]):
        layout = layout.detach().requires_grad_()
        sample = gumbel_softmax(layout, hard=True, dim=dim, backend=backend)
        assert sample.is_contiguous()
        assert_close(sample, expected, atol=0, rtol=0)
        (gradient,) = torch.autograd.grad(
            sample, layout, torch.ones_like(sample).transpose(0, 2).contiguous().transpose(0, 2)
        )
        assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_strides_do_not_change_the_draw(backend: str) -> None:
    logits = torch.randn(8, 24)
    turned = logits.T.contiguous().T
    for sample in (gumbel_softmax, gumbel_sigmoid):
        first, second = (sample(x, hard=True, generator=Philox(4), backend=backend) for x in (logits, turned))
        assert first.equal(second)


def test_wrong_arguments_are_explained() -> None:
    logits = torch.zeros(4, 3)
    for arguments, words in [
        ({"tau": 0.0}, "tau must be a finite number above 0"),
        ({"tau": math.nan}, "tau must be"),
        ({"tau": torch.tensor(-1.0)}, "tau must be"),
        ({"tau": torch.ones(2)}, "one number"),
        ({"tau_backward": -1.0}, "tau_backward must be"),
        ({"estimator": "exact"}, "estimator must be one of"),
        ({"hard": False, "rao_samples": 2}, "hard=True"),
        ({"hard": False, "estimator": "reinmax"}, "hard=True"),
        ({"rao_samples": -1}, "0 or more"),
        ({"rao_samples": 2, "estimator": "reinmax"}, "draws nothing more"),
        ({"backend": "fortran"}, "backend must be"),
    ]:
        for sample in (gumbel_softmax, gumbel_sigmoid):
            with pytest.raises(SamplerError, match=words):
                sample(logits, **{"hard": True, **arguments})
    with pytest.raises(SamplerError, match="floating point"):
        gumbel_softmax(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(SamplerError, match="must be a tensor"):
        gumbel_sigmoid([0.0])
    with pytest.raises(SamplerError, match="dim must be from -2 to 1"):
        gumbel_softmax(logits, dim=2)
    with pytest.warns(UserWarning, match="no effect"):
        gumbel_softmax(logits, eps=1e-6)


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ([0, 3], "go from 0 to 3"),
        ([1, 4], "from 1 to 4"),
        ([0, 3, 2, 4], "fall"),
        ([0.0, 4.0], "integer"),
        ([], "flat"),
    ],
)
def test_wrong_segments_are_explained(segments: list[float], words: str) -> None:
    for sample in (gumbel_softmax, gumbel_sigmoid):
        with pytest.raises(SamplerError, match=words):
            sample(torch.zeros(4), segments=segments)
        with pytest.raises(SamplerError, match="flat logits"):
            sample(torch.zeros(2, 2), segments=[0, 4])
    with pytest.raises(SamplerError, match="dim must be from -1 to 0"):
        gumbel_softmax(torch.zeros(4), segments=[0, 4], dim=1)


def test_empty_segments_are_skipped(backend: str) -> None:
    logits = torch.zeros(5, requires_grad=True)
    sample = gumbel_softmax(logits, hard=True, segments=[0, 0, 2, 2, 5, 5], backend=backend)
    sample.sum().backward()
    assert [float(part.sum()) for part in sample.detach().split([2, 3])] == [1, 1]
    assert gumbel_softmax(torch.zeros(0), hard=True, segments=[0], backend=backend).shape == (0,)
    assert gumbel_softmax(torch.zeros(0), hard=True, segments=[0, 0, 0], backend=backend).shape == (0,)


def test_backends_are_listed_with_reasons() -> None:
    listed = backends()
    assert listed["reference"] == listed["aten"] == "available"
    assert all(isinstance(reason, str) and reason for reason in listed.values())


def test_the_default_call_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gumbel_softmax(torch.zeros(3))
