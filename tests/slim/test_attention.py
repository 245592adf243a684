"""Attention with widths of its own: torch's where nothing is cut, and the masked model's where something is."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunegate
from prunegate.slim.attention import multi_head_attention_forward
from tests.models import random_mask, relative_error

B, L, S, E, H = 2, 5, 7, 12, 3


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head"])
@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("kind", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 4, "vdim": 6},
                                  {"bias": False}])  # fmt: skip
def test_equals_torchs_where_nothing_is_cut(
    batched: bool, need_weights: bool, mask: str, padding: bool, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.MultiheadAttention(E, H, **kind).double()
    query = torch.randn(L, B, E, dtype=torch.float64)
    key = torch.randn(S, B, kind.get("kdim", E), dtype=torch.float64)
    value = torch.randn(S, B, kind.get("vdim", E), dtype=torch.float64)
    masks: dict[str, Tensor | None] = {
        "none": None,
        "bool": torch.rand(L, S) < 0.3,
        "float": torch.randn(L, S, dtype=torch.float64),
        "per head": torch.randn(B * H if batched else H, L, S, dtype=torch.float64),
    }
    hidden = torch.zeros(B, S, dtype=torch.bool)
    hidden[:, -2:] = True
    hidden = hidden if mask in ("none", "bool") else torch.zeros(B, S, dtype=torch.float64).masked_fill(hidden, -9.0)
    arguments = {"key_padding_mask": hidden if padding else None, "need_weights": need_weights,
                 "attn_mask": masks[mask], "average_attn_weights": False}  # fmt: skip
    inputs = [query, key, value]
    if not batched:
        inputs = [each[:, 0] for each in inputs]
        arguments["key_padding_mask"] = hidden[0] if padding else None
    expected = module(*inputs, **arguments)
    original = F.multi_head_attention_forward
    monkeypatch.setattr(
        F, "multi_head_attention_forward",
        lambda *args, **kwargs: multi_head_attention_forward((H, E, E, E // H), *args, **kwargs),
    )  # fmt: skip
    got = module(*inputs, **arguments)
    monkeypatch.setattr(F, "multi_head_attention_forward", original)
    torch.testing.assert_close(got, expected)


def test_causal_hint_and_self_attention() -> None:
    module = nn.MultiheadAttention(E, H, batch_first=True).double()
    x = torch.randn(B, L, E, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    expected, _ = module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    y = x.transpose(0, 1)
    got, _ = multi_head_attention_forward(
        (H, E, E, E // H), y, y, y, E, H, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
        module.out_proj.weight, module.out_proj.bias, attn_mask=mask, is_causal=True, need_weights=False,
    )  # fmt: skip
    torch.testing.assert_close(got.transpose(0, 1), expected)


class Encoder(nn.Module):
    """Torch's encoder layer, which has fused kernels of its own."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, heads, 16, batch_first=True, norm_first=i == 1) for i in range(2)
        )
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, 6] to [B, N, 3]."""
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


class Cross(nn.Module):
    """Keys and values from elsewhere."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(6, 8), nn.Linear(6, 10)
        self.attention = nn.MultiheadAttention(8, heads, kdim=10, vdim=10, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, 6] to [B, N, 3]."""
        kv = self.kv(x)
        return self.out(self.attention(self.q(x), kv, kv, need_weights=False)[0])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("cls", [Encoder, Cross])
def test_slim_equals_masked(cls: type[nn.Module], heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = cls(heads).double().eval()
    gated = prunegate.attach(model, torch.randn(2, 5, 6, dtype=torch.float64)).eval()
    gated.mask = random_mask(gated, seed)
    slim = prunegate.apply_plan(model, gated.plan()).eval()
    x = torch.randn(3, 9, 6, dtype=torch.float64)
    assert relative_error(gated(x), slim(x)) < 1e-12
    expected = slim(x).detach()
    with torch.no_grad():  # where torch would take its fused kernels
        assert relative_error(expected, slim(x)) < 1e-12
    again = prunegate.attach(slim, x[:1]).eval()
    again.mask = random_mask(again, seed + 7)
    twice = prunegate.apply_plan(slim, again.plan()).eval()
    assert relative_error(again(x), twice(x)) < 1e-12
