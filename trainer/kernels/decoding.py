"""Compute attention of one new token per response, reading each prompt once.

The keys and values of a shared prompt are stored and read once per group. A response attends to its prompt, to its own
earlier tokens, and to itself. The keys and values of prompts are one tensor, (P, key heads, S, D), and those of
responses another, (slots, key heads, T, D). ``decoding_triton`` reads each up to the length of its sequence. Here, two
products and a softmax read both up to the given number of places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entrace.trainer.kernels.token_stats import triton_kernels


@dataclass
class Rows:
    """Hold the responses that a decoding step extends, R rows.

    The tensors keep their memory addresses.

    Attributes:
        slots: Slot of each row, (R,) int64.
        tiles: Rows of one prompt that share its keys and values, (R, C) int64, -1 where there is none.
        prompts: Prompt of each slot, (slots,) int64.
        prompt_lengths: Tokens of each prompt, (P,) int64.
        lengths: Tokens drawn so far of each slot, at least 1 in a decoding step, (slots,) int64.
    """

    slots: Tensor
    tiles: Tensor
    prompts: Tensor
    prompt_lengths: Tensor
    lengths: Tensor


@dataclass
class LayerCache:
    """Hold the keys and values of one layer.

    Those of prompts are (P, key heads, S, D), and those of responses (slots, key heads, T, D).
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    own_keys: Tensor
    own_values: Tensor


def tile_size(group_heads: int) -> int:
    """Return the rows per tile, a power of 2.

    The query heads of a tile fill the 16 rows of a matrix unit.
    """
    return 1 << max(0, (16 // group_heads).bit_length() - 1)


def attend(qkv: Tensor, cos: Tensor, sin: Tensor, rows: Rows, cache: LayerCache, scale: float, places: int) -> Tensor:
    """Rotate queries and keys, add keys and values to the cache, and attend.

    Args:
        qkv: Queries, keys, and values of the rows, (R, (heads + 2 key heads) D).
        cos: Cosines of the rotary embedding, (positions, D) float32.
        sin: Sines, likewise.
        rows: The responses.
        cache: The layer's keys and values, extended in place.
        scale: Factor of the scores.
        places: Places of ``own_keys`` to read, at least the longest length; the Triton kernel reads only used ones.

    Returns:
        The output of each head, (R, heads D).
    """
    if triton_kernels(qkv.device):
        from entrace.trainer.kernels import decoding_triton

        return decoding_triton.attend(qkv, cos, sin, rows, cache, scale)
    _, key_heads, _, width = cache.own_keys.shape
    slots = rows.slots
    prompts, ends = rows.prompts[slots], rows.lengths[slots]
    positions = (rows.prompt_lengths[prompts] + ends - 1)[:, None]
    heads = qkv.view(len(qkv), -1, width)
    rotated, values = heads[:, :-key_heads], heads[:, -key_heads:]
    rotated = rotate(rotated, cos[positions], sin[positions])
    queries = rotated[:, :-key_heads].unflatten(1, (key_heads, -1))
    cache.own_keys[slots, :, ends - 1] = rotated[:, -key_heads:].to(cache.own_keys.dtype)
    cache.own_values[slots, :, ends - 1] = values.to(cache.own_values.dtype)
    keys, own_keys = cache.prompt_keys[prompts], cache.own_keys[slots, :, :places]
    is_hidden = torch.cat(
        (
            torch.arange(keys.shape[2], device=slots.device) >= rows.prompt_lengths[prompts, None],
            torch.arange(own_keys.shape[2], device=slots.device) >= ends[:, None],
        ),
        1,
    )
    scores = torch.cat((queries @ keys.mT, queries @ own_keys.mT), -1).float() * scale
    weights = scores.masked_fill(is_hidden[:, None, None], -torch.inf).softmax(-1).to(values.dtype)
    of_prompt, of_own = weights.split((keys.shape[2], own_keys.shape[2]), -1)
    output = of_prompt @ cache.prompt_values[prompts] + of_own @ cache.own_values[slots, :, :places]
    return output.flatten(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to heads (..., D), in float32.

    The result has the dtype of ``x``.
    """
    first, second = x.float().chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
