"""Multi-head attention whose heads need not fill the width of its input.

``torch.nn.functional.multi_head_attention_forward`` computes the width of a head from the width of the input and checks
that they fit, so it cannot run after a cut. Where it is called, a cut model calls this instead, with the widths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["multi_head_attention_forward"]


def multi_head_attention_forward(
    widths: tuple[int, int, int, int], query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int,
    num_heads: int, in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: Tensor | None,
    bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Tensor | None,
    training: bool = True, key_padding_mask: Tensor | None = None, need_weights: bool = True,
    attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None, static_k: Tensor | None = None,
    static_v: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Like torch's function of this name, behind a first argument.

    Args:
        widths: Number of heads, width of all queries (and of all keys), width of all values, and the width of one head
            whose inverse root is the scale.
        query: ``[L, B, E]``, or ``[L, E]`` without a batch.
        key: ``[S, B, E]`` or ``[S, E]``.
        value: ``[S, B, E]`` or ``[S, E]``.
        embed_dim_to_check: Not used; ``widths`` stands for it.
        num_heads: Not used; ``widths`` stands for it.
        in_proj_weight: ``[2 * width of queries + width of values, E]``, or ``None`` where there are three weights.
        in_proj_bias: For the rows of the three projections.
        bias_k: ``[1, 1, width of keys]``, added to the sequence of keys.
        bias_v: ``[1, 1, width of values]``, added to the sequence of values.
        add_zero_attn: Whether keys and values get one more position of zeros.
        dropout_p: Probability of dropout, acts in training.
        out_proj_weight: ``[E, width of values]``.
        out_proj_bias: ``[E]``.
        training: Whether dropout acts.
        key_padding_mask: ``[B, S]`` or ``[S]``; True, or minus infinity, where a key is padding.
        need_weights: Whether the attention weights are returned, too.
        attn_mask: ``[L, S]`` or ``[B * heads, L, S]``; True, or minus infinity, where nothing attends.
        use_separate_proj_weight: Not used; that ``in_proj_weight`` is ``None`` says it.
        q_proj_weight: Projection of queries where they are separate.
        k_proj_weight: Projection of keys where they are separate.
        v_proj_weight: Projection of values where they are separate.
        static_k: Not supported.
        static_v: Not supported.
        average_attn_weights: Whether the returned weights are averaged over heads.
        is_causal: Whether ``attn_mask`` is the causal one.

    Returns:
        The output, of the query's shape, and the attention weights, ``[B, L, S]`` or ``[B, heads, L, S]``, or ``None``.

    Raises:
        ValueError: ``static_k`` or ``static_v`` is given.
    """
    tensors = (query, key, value)
    if has_torch_function(tensors):
        output: tuple[Tensor, Tensor | None] = handle_torch_function(
            multi_head_attention_forward, tensors, widths, query, key, value, embed_dim_to_check, num_heads,
            in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias,
            training=training, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
            use_separate_proj_weight=use_separate_proj_weight, q_proj_weight=q_proj_weight,
            k_proj_weight=k_proj_weight, v_proj_weight=v_proj_weight, static_k=static_k, static_v=static_v,
            average_attn_weights=average_attn_weights, is_causal=is_causal,
        )  # fmt: skip
        return output
    if static_k is not None or static_v is not None:
        raise ValueError("static keys and values were given; a cut model projects its own")
    heads, qk_width, v_width, scale_width = widths
    batched = query.dim() == 3
    if not batched:
        query, key, value = (each.unsqueeze(1) for each in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    q, k, v = _projected(
        (query, key, value), (qk_width, qk_width, v_width), in_proj_weight,
        (q_proj_weight, k_proj_weight, v_proj_weight), in_proj_bias,
    )  # fmt: skip
    length, batch = query.shape[:2]
    extra = 0
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, bias_k.expand(1, batch, -1)]), torch.cat([v, bias_v.expand(1, batch, -1)])
        extra += 1
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
        extra += 1
    q, k, v = (each.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for each in (q, k, v))
    only_causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if only_causal else _mask(attn_mask, key_padding_mask, query.dtype, (batch, heads), extra)
    dropout_p = dropout_p if training else 0.0
    scale = scale_width**-0.5
    weights = None
    if need_weights:
        scores = (q * scale) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout_p) if dropout_p > 0 else weights
        x = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=only_causal, scale=scale)
    x = F.linear(x.permute(2, 0, 1, 3).reshape(length, batch, v_width), out_proj_weight, out_proj_bias)
    return (x if batched else x.squeeze(1)), weights


def _projected(inputs: tuple[Tensor, Tensor, Tensor], widths: tuple[int, int, int], packed: Tensor | None,
               separate: tuple[Tensor | None, ...], bias: Tensor | None) -> tuple[Tensor, ...]:  # fmt: skip
    """Queries, keys and values, ``[L or S, B, width]``."""
    query, key, value = inputs
    if packed is not None and query is key and key is value:
        return F.linear(query, packed, bias).split(widths, -1)
    weights = packed.split(widths) if packed is not None else separate
    biases = bias.split(widths) if bias is not None else (None, None, None)
    return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True) if w is not None)


def _mask(attention: Tensor | None, padding: Tensor | None, dtype: torch.dtype, sizes: tuple[int, int],
          extra: int) -> Tensor | None:  # fmt: skip
    """What is added to the scores, broadcasting to ``[B, heads, L, S]``."""

    def additive(mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
        return F.pad(mask, (0, extra)) if extra else mask

    total: Tensor | None = None
    if attention is not None:
        mask = additive(attention)
        total = mask if mask.dim() == 2 else mask.unflatten(0, sizes)
    if padding is not None:
        mask = additive(padding)[:, None, None]
        total = mask if total is None else total + mask
    return total
