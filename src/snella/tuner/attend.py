"""What `nn.MultiheadAttention` does between its projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(
    attention: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    need_weights: bool,
    average_attn_weights: bool,
    is_batched: bool,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention over the heads of `attention`, with its masks, extra tokens and dropout.

        w = softmax(q kᵀ / √d + mask),   output = dropout(w) v          for each head of width d

    Args:
        attention: Where heads, dropout, `bias_k`, `bias_v` and `add_zero_attn` are taken from.
        query: Projected queries, `[N, L, E]`.
        key: Projected keys, `[N, S, E]`.
        value: Projected values, `[N, S, E]`.
        key_padding_mask: `[N, S]` (`[S]` without a batch); true, or minus infinity, where a key is not to be seen.
        attn_mask: `[L, S]` or `[N·heads, L, S]`, likewise.
        is_causal: Whether `attn_mask` is the causal one, which may then be computed instead of read.
        need_weights: Whether `w` is returned too.
        average_attn_weights: Whether its heads are averaged.
        is_batched: Whether the caller's tensors had a batch axis.

    Returns:
        `[N, L, E]`, and the weights `[N, L, S]`, `[N, heads, L, S]` or without `N`, or `None`.

    Raises:
        ValueError: `is_causal` without the mask that it speaks of.
    """
    if is_causal and attn_mask is None:
        raise ValueError("is_causal=True needs attn_mask, of which it says that it is causal; got attn_mask=None")
    heads = attention.num_heads
    batch, length = query.shape[:2]
    only_causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if only_causal else _joined_mask(attn_mask, key_padding_mask, batch, heads, query.dtype)
    if attention.bias_k is not None and attention.bias_v is not None:
        key = torch.cat([key, attention.bias_k.to(key.dtype).expand(batch, 1, -1)], dim=1)
        value = torch.cat([value, attention.bias_v.to(value.dtype).expand(batch, 1, -1)], dim=1)
        mask = mask if mask is None else F.pad(mask, (0, 1))
    if attention.add_zero_attn:
        key, value = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
        mask = mask if mask is None else F.pad(mask, (0, 1))
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    dropout = attention.dropout if attention.training else 0.0
    if not need_weights:
        output = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=only_causal)
        return output.transpose(1, 2).flatten(2), None
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    output = (weights @ value).transpose(1, 2).reshape(batch, length, -1)
    weights = weights.mean(1) if average_attn_weights else weights
    return output, weights if is_batched else weights[0]


def _joined_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one that is added to the scores, `[N or 1, heads or 1, L or 1, S]`."""
    masks = []
    if attn_mask is not None:
        mask = _additive(attn_mask, dtype)
        masks.append(mask[None, None] if mask.dim() == 2 else mask.view(batch, heads, *mask.shape[1:]))
    if key_padding_mask is not None:
        masks.append(_additive(key_padding_mask, dtype).view(batch, 1, 1, -1))
    return sum(masks[1:], start=masks[0]) if masks else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Minus infinity where a boolean mask is true; a mask of numbers as it is."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)


__all__ = ["attend"]
