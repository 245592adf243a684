"""The counter-based generator: published vectors, keyed places, steps that move on."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from prunegate.gumbel import Philox, gumbel_sigmoid, gumbel_softmax, philox, reference


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_words_are_those_of_the_paper(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    state = torch.tensor([signed(key[1] << 32 | key[0]), counter[2]])
    columns = torch.arange(4) + counter[0] * 4
    assert philox.words(state, torch.tensor(counter[1]), columns, counter[3]).tolist() == list(expected)


def test_extreme_words_give_finite_noise() -> None:
    words = torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF])
    for noise in (philox.gumbel(words), philox.logistic(words)):
        assert noise.isfinite().all()
        assert noise.abs().max() < 24
    # The word 0 is nearest to the uniform number 0, and 2**31 is nearest to 1.
    assert philox.gumbel(words)[0] < -3
    assert philox.gumbel(words)[3] > 22
    assert philox.logistic(words)[0] < -22
    assert philox.logistic(words)[3] > 22


def test_a_step_is_used_once() -> None:
    generator = Philox(2**63 + 5, 7)
    assert (generator.seed, generator.step) == (2**63 + 5, 7)
    first = generator.take()
    assert first.tolist() == [signed(2**63 + 5), 7]
    assert generator.step == 8
    assert repr(generator) == f"Philox(seed={2**63 + 5}, step=8, device='cpu')"


def test_the_same_seed_and_step_give_the_same_draw(backend: str) -> None:
    logits = torch.randn(50, 9)
    for sampler in (gumbel_softmax, gumbel_sigmoid):
        sample = sampler(logits, hard=True, generator=Philox(1, 5), backend=backend)
        assert sample.equal(sampler(logits, hard=True, generator=Philox(1, 5), backend="reference"))
        assert not sample.equal(sampler(logits, hard=True, generator=Philox(1, 6), backend=backend))
        assert not sample.equal(sampler(logits, hard=True, generator=Philox(2, 5), backend=backend))


def test_a_row_keeps_its_draw_when_others_change(backend: str) -> None:
    logits = torch.zeros(10, 6)
    whole = gumbel_softmax(logits, generator=Philox(3), backend=backend)
    assert whole[:4].equal(gumbel_softmax(logits[:4], generator=Philox(3), backend=backend))
    ragged = gumbel_softmax(logits.flatten()[:14], segments=[0, 6, 8, 14], generator=Philox(3), backend=backend)
    # The same noise; a row in a block of its own may be summed in another order.
    assert_close(ragged[:6], whole[0])
    assert_close(ragged[8:], whole[2])


def test_places_follow_the_dimension() -> None:
    row, column = reference.philox_places(torch.zeros(2, 3, 4), 1, None)
    assert column.equal(torch.arange(3)[None, :, None].expand(2, 3, 4))
    assert row.equal((torch.arange(2)[:, None] * 4 + torch.arange(4))[:, None].expand(2, 3, 4))
