"""Compute attention as matrix products, for short or packed sequences.

Short sequences are computed this way on a CPU. Torch's fused CPU kernel targets long sequences. Below a few hundred
keys, two matrix products and a softmax take half its time in training and a fifth in decoding. All other inputs go to
the fused kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from entrace.trainer.kernels.packing import take_rows

NAME = "entrace_short"
MAX_KEYS = 256
UNUSUAL = ("softcap", "position_bias", "cache")
# Token positions of packed sequences per part. Sequences are sorted by length, so parts contain little padding, and the
# attention scores of a part stay in the cache.
PART_PLACES = {"cpu": 1 << 12, "cuda": 1 << 16}


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
    """Compute softmax(q k^T scaling + mask) v with grouped key and value heads.

    The signature is that of transformers.

    Args:
        module: The attention layer.
        query: (B, heads, L, D).
        key: (B, key heads, S, D).
        value: (B, key heads, S, E).
        attention_mask: (B, 1, L, S), bool (True = attend) or additive; None for causal or full attention; or the
            ``layout`` of a ``kernels.packing.Packing``, int64, with B = 1.
        dropout: Values above 0 select the fused kernel.
        scaling: Factor of the scores; 1 / sqrt(D) if None.
        is_causal: Apply causal attention when the mask is None; the layer's ``is_causal`` if None.
        kwargs: Passed to the fused kernel.

    Returns:
        Output (B, L, heads, E), and None in place of attention weights.
    """
    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        return _attend_packed(module, query, key, value, attention_mask, options), None
    batch, heads, length, width = query.shape
    key_heads, keys = key.shape[1:3]
    is_plain = not dropout and all(kwargs.get(name) is None for name in UNUSUAL)
    if is_plain and query.device.type == "cuda" and length == 1 and attention_mask is not None:
        # A decoding step; with a mask, transformers would repeat the key and value heads in memory.
        grouped = {"scale": scaling, "enable_gqa": heads != key_heads}
        attended = scaled_dot_product_attention(query, key, value, attention_mask, **grouped)
        return attended.transpose(1, 2).contiguous(), None
    is_plain = is_plain and query.device.type == "cpu"
    # The traced decoding step runs on short sequences only, and its trace must not depend on sizes.
    is_short = _is_tracing() or (keys <= MAX_KEYS and (attention_mask is None or attention_mask.shape[1] == 1))
    if not (is_plain and is_short):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and length > 1 and is_causal:
        attention_mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = additive(attention_mask, query.dtype)
    # Query heads that share a key head are adjacent, and are treated as further queries of that head.
    packed = (query * (width**-0.5 if scaling is None else scaling)).reshape(batch, key_heads, -1, width)
    scores = (packed @ key.transpose(-1, -2)).view(batch, heads, length, keys)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1).view(batch, key_heads, -1, keys)
    return (weights @ value).view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


def is_ours(model: PreTrainedModel) -> bool:
    """Return whether a model's attention is ``short_attention``."""
    return model.config._attn_implementation == NAME


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a bool mask (True = attend) to an additive mask of ``dtype``."""
    # The lowest finite number instead of -inf: the output of a padded query that attends to nothing must be finite.
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


@dataclass(frozen=True)
class _Plan:
    """Map packed sequences to padded batches, one per part, for attention.

    Attributes:
        sizes: Per part: number of sequences, longest run of queries, longest sequence.
        before: Per part, the number of leading tokens of each sequence that are shared and computed elsewhere; None if
            all are 0.
        queries: Index among the M tokens of each query position, all parts concatenated; arbitrary at padding.
        keys: Index among the M tokens of each key position, likewise.
        is_query: Indices into ``queries`` of positions that hold a token.
    """

    sizes: list[tuple[int, int, int]]
    before: list[Tensor | None]
    queries: Tensor
    keys: Tensor
    is_query: Tensor


# All layers of a model share one plan.
@lru_cache(maxsize=1)
def _plan_of(layout: Tensor) -> _Plan:
    """Build the plan of a ``Packing.layout``."""
    slots, own_slots = layout[0]
    size = max(1, PART_PLACES[slots.device.type] // slots.shape[1])
    sizes, before, all_queries, all_keys = [], [], [], []
    for keys, queries in zip(slots.split(size), own_slots.split(size), strict=True):
        keys, queries = (index[:, (index >= 0).any(0)] for index in (keys, queries))
        elsewhere = (keys >= 0).sum(1) - (queries >= 0).sum(1)
        before.append(elsewhere if elsewhere.any() else None)
        sizes.append((*queries.shape, keys.shape[1]))
        all_queries.append(queries.flatten())
        all_keys.append(keys.flatten())
    queries, keys = torch.cat(all_queries), torch.cat(all_keys)
    return _Plan(sizes, before, queries.clamp(min=0), keys.clamp(min=0), torch.nonzero(queries >= 0).squeeze(1))


def _attend_packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Tensor, options: dict[str, Any]
) -> Tensor:
    """Compute causal attention within each sequence of ``layout``.

    Tensors are (1, heads, M, ...).
    """
    plan = _plan_of(layout)
    # Gathered once for all parts: gathering per part would create a gradient of full size for each.
    queries, keys, values = (
        take_rows(x[0].transpose(0, 1), index).split([count * size[which] for count, *size in plan.sizes])
        for x, index, which in ((query, plan.queries, 0), (key, plan.keys, 1), (value, plan.keys, 1))
    )
    attended = []
    for q, k, v, (count, length, num_keys), before in zip(queries, keys, values, plan.sizes, plan.before, strict=True):
        # Without a mask, attention is causal and skips masked scores.
        mask = None
        if before is not None:
            places = torch.arange(num_keys, device=before.device)
            mask = (places <= before[:, None, None] + places[:length, None])[:, None]
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
        part, _ = short_attention(module, q, k, v, mask, **options)
        attended.append(part.flatten(0, 1))
    return take_rows(torch.cat(attended), plan.is_query)[None]


def _is_tracing() -> bool:
    # The documented function is missing from torch's type stubs.
    jit: Any = torch.jit
    return jit.is_tracing()


AttentionInterface.register(NAME, short_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
