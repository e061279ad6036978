"""Attention by plain matrix products, for short sequences on a CPU.

Torch's fused CPU kernel is made for long sequences; below some hundred keys two matrix products and a softmax take half
its time in training and a fifth in decoding. Everything else goes to the fused kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "entrace_short"
MAX_KEYS = 256
UNUSUAL = ("softcap", "position_bias", "cache")


def short_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T scaling + mask) v with grouped key and value heads, as transformers calls it.

    Args:
        module: The attention layer.
        query: (B, heads, L, D).
        key: (B, key heads, S, D).
        value: (B, key heads, S, E).
        attention_mask: (B, 1, L, S), bool (True = attend) or additive; None for causal or full attention.
        dropout: Anything above 0 goes to the fused kernel.
        scaling: Of the scores; 1 / sqrt(D) if None.
        is_causal: Whether a missing mask means causal attention; the layer's own property if None.
        kwargs: Passed on to the fused kernel.

    Returns:
        (B, L, heads, E), and None for the weights.
    """
    batch, heads, length, width = query.shape
    key_heads, keys = key.shape[1:3]
    is_plain = not dropout and all(kwargs.get(name) is None for name in UNUSUAL)
    has_shared_mask = attention_mask is None or attention_mask.shape[1] == 1
    if keys > MAX_KEYS or not is_plain or not has_shared_mask:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    # The heads that share a key head stand one after another, as if they were more queries.
    packed = query.reshape(batch, key_heads, -1, width)
    scores = packed @ key.transpose(-1, -2) * (width**-0.5 if scaling is None else scaling)
    scores = scores.view(batch, heads, length, keys)
    if (
        attention_mask is None
        and length > 1
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    ):
        attention_mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    if attention_mask is not None:
        # The lowest number, not -inf: a padded query that sees nothing must stay finite.
        lowest = torch.finfo(scores.dtype).min
        is_bool = attention_mask.dtype == torch.bool
        scores = torch.where(attention_mask, scores, lowest) if is_bool else scores + attention_mask
    weights = scores.softmax(-1).view(batch, key_heads, -1, keys)
    return (weights @ value).view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, short_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
