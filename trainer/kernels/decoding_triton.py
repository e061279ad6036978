"""Decode on a GPU in three kernels: attention, sums over logits, and the draw.

The attention kernel computes one layer; the draw selects one token. Attention: a program handles one key head of a
tile, which is up to C responses to one prompt. Their query heads are the rows of one matrix product per block of keys,
with an online softmax (arXiv 2205.14135) that starts with the new token itself. Keys and values of the prompt are read
once per tile.

Drawing: logits are read once in blocks, whose sums locate the block of the drawn token; only that block is read again.
"""
# Triton code has no types.
# pyright: reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from entrace.trainer.kernels.decoding import LayerCache, Rows
    from entrace.trainer.sampling.draws import Draws

# Keys per product, and logits per block.
KEYS, LOGITS = 64, 4096
LEAST_ROWS, LEAST_WIDTH = 16, 16
# Below all logits, including those of excluded tokens; finite, so that differences are numbers.
LOWEST = tl.constexpr(-3e38)


@triton.jit
def _add_keys(peak, total, state, q, keys, values, offsets, is_here, is_seen, scale, PRECISION: tl.constexpr):
    """Add a block of keys and values to the online softmax.

    ``is_seen`` marks the keys that each query sees.
    """
    block = tl.load(keys + offsets, mask=is_here, other=0.0)
    scores = tl.dot(q, tl.trans(block), input_precision=PRECISION) * scale
    scores = tl.where(is_seen, scores, float("-inf"))
    highest = tl.maximum(peak, tl.max(scores, 1))
    weights, shrink = tl.exp2(scores - highest[:, None]), tl.exp2(peak - highest)
    block = tl.load(values + offsets, mask=is_here, other=0.0)
    added = tl.dot(weights.to(block.dtype), block, input_precision=PRECISION)
    return highest, total * shrink + tl.sum(weights, 1), state * shrink[:, None] + added


@triton.jit
def _attend(
    qkv,
    cos,
    sin,
    out,
    slots,
    tiles,
    prompts,
    prompt_lengths,
    lengths,
    prompt_keys,
    prompt_values,
    own_keys,
    own_values,
    prompt_places,
    own_places,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    m = tl.arange(0, ROWS)
    member, query = m // GROUP, m % GROUP
    row = tl.load(tiles + tile * TILE + member, mask=member < TILE, other=-1)
    is_row = row >= 0
    slot = tl.load(slots + row, mask=is_row, other=0)
    place = tl.load(lengths + slot, mask=is_row, other=1) - 1
    first = tl.load(tiles + tile * TILE)
    prompt = tl.load(prompts + tl.load(slots + first, mask=first >= 0, other=0))
    # A tile without rows reads no keys.
    num_prompt = tl.where(first >= 0, tl.load(prompt_lengths + prompt), 0)

    d = tl.arange(0, COLUMNS)
    is_value = is_row[:, None] & (d < WIDTH)[None, :]
    half = (d + WIDTH // 2) % WIDTH
    sign = tl.where(d < WIDTH // 2, -1.0, 1.0)
    angles = (num_prompt + place)[:, None] * WIDTH + d[None, :]
    c = tl.load(cos + angles, mask=is_value, other=0.0)
    s = tl.load(sin + angles, mask=is_value, other=0.0) * sign[None, :]
    base = qkv + row[:, None] * ((GROUP + 2) * HEADS * WIDTH)
    own = base + (head * GROUP + query)[:, None] * WIDTH
    q = tl.load(own + d[None, :], mask=is_value, other=0.0).to(tl.float32) * c
    q += tl.load(own + half[None, :], mask=is_value, other=0.0).to(tl.float32) * s
    own = base + (HEADS * GROUP + head) * WIDTH
    k = tl.load(own + d[None, :], mask=is_value, other=0.0).to(tl.float32) * c
    k += tl.load(own + half[None, :], mask=is_value, other=0.0).to(tl.float32) * s
    v = tl.load(own + HEADS * WIDTH + d[None, :], mask=is_value, other=0.0)
    q, k = q.to(qkv.dtype.element_ty), k.to(qkv.dtype.element_ty)
    target = ((slot * HEADS + head) * own_places + place)[:, None] * WIDTH + d[None, :]
    is_stored = is_value & (query == 0)[:, None]
    tl.store(own_keys + target, k, mask=is_stored)
    tl.store(own_values + target, v, mask=is_stored)

    # The new token is the first key of the online softmax, which is therefore never empty.
    peak = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
    total = tl.full([ROWS], 1.0, tl.float32)
    state = v.to(tl.float32)
    n = tl.arange(0, KEYS)
    keys = prompt_keys + (prompt * HEADS + head) * prompt_places * WIDTH
    values = prompt_values + (prompt * HEADS + head) * prompt_places * WIDTH
    for start in range(0, num_prompt, KEYS):
        is_key = start + n < num_prompt
        offsets = (start + n)[:, None] * WIDTH + d[None, :]
        is_here = is_key[:, None] & (d < WIDTH)[None, :]
        peak, total, state = _add_keys(
            peak, total, state, q, keys, values, offsets, is_here, is_key[None, :], scale, PRECISION
        )
    for i in tl.static_range(TILE):
        other = tl.load(tiles + tile * TILE + i)
        other_slot = tl.load(slots + other, mask=other >= 0, other=0)
        count = tl.where(other >= 0, tl.load(lengths + other_slot) - 1, 0)
        keys = own_keys + (other_slot * HEADS + head) * own_places * WIDTH
        values = own_values + (other_slot * HEADS + head) * own_places * WIDTH
        for start in range(0, count, KEYS):
            is_key = start + n < count
            offsets = (start + n)[:, None] * WIDTH + d[None, :]
            is_here = is_key[:, None] & (d < WIDTH)[None, :]
            # Each response sees its own tokens only.
            is_seen = is_key[None, :] & (member == i)[:, None]
            peak, total, state = _add_keys(
                peak, total, state, q, keys, values, offsets, is_here, is_seen, scale, PRECISION
            )
    result = (state / total[:, None]).to(out.dtype.element_ty)
    place_out = (row * HEADS * GROUP + head * GROUP + query)[:, None] * WIDTH + d[None, :]
    tl.store(out + place_out, result, mask=is_value)


@triton.jit
def _sums(logits, out, num_columns, factor, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < num_columns
    z = tl.load(logits + row * num_columns + columns, mask=is_column, other=0.0).to(tl.float32)
    peak = tl.max(tl.where(is_column, z, LOWEST), 0)
    x = tl.where(is_column, z - peak, 0.0)
    e = tl.where(is_column, tl.exp2(x * factor), 0.0)
    out += (row * tl.num_programs(1) + block) * 4
    tl.store(out, peak)
    tl.store(out + 1, tl.sum(e, 0))
    tl.store(out + 2, tl.sum(e * x, 0))
    tl.store(out + 3, tl.sum(e * e, 0))


@triton.jit
def _draw(
    logits,
    sums,
    norms,
    slots,
    uniforms,
    limits,
    stop_ids,
    tokens,
    lengths,
    is_open,
    has_stopped,
    ids,
    stats,
    num_columns,
    num_blocks,
    num_slots,
    num_places,
    num_stop,
    factor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    STOPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    place = tl.load(lengths + slot)
    is_drawn = tl.load(is_open + slot) != 0
    uniform = tl.load(uniforms + slot * num_places + place, mask=is_drawn, other=0.0)

    b = tl.arange(0, BLOCKS)
    is_block = b < num_blocks
    given = sums + (row * num_blocks + b) * 4
    peaks = tl.load(given, mask=is_block, other=LOWEST)
    totals = tl.load(given + 1, mask=is_block, other=0.0)
    moments = tl.load(given + 2, mask=is_block, other=0.0)
    squares = tl.load(given + 3, mask=is_block, other=0.0)
    peak = tl.max(peaks, 0)
    lower = tl.maximum(peaks - peak, -1e30)
    scale = tl.exp2(lower * factor)
    weights = totals * scale
    # A sum in parallel is not quite monotonic; the least block or token that exceeds the target is taken, and if
    # rounding leaves none, the last one with a probability above 0.
    target = uniform * tl.sum(weights, 0)
    is_above = (tl.cumsum(weights, 0) > target) & (weights > 0)
    chosen = tl.min(tl.where(is_above, b, BLOCKS), 0)
    chosen = tl.where(chosen < BLOCKS, chosen, tl.max(tl.where(weights > 0, b, 0), 0))
    rest = target - tl.sum(tl.where(b < chosen, weights, 0.0), 0)

    i = tl.arange(0, BLOCK)
    columns = chosen * BLOCK + i
    is_column = columns < num_columns
    z = tl.load(logits + row * num_columns + columns, mask=is_column, other=0.0).to(tl.float32)
    x = tl.where(is_column, z - peak, 0.0)
    e = tl.where(is_column, tl.exp2(x * factor), 0.0)
    is_above = (tl.cumsum(e, 0) > rest) & (e > 0)
    index = tl.min(tl.where(is_above, i, BLOCK), 0)
    index = tl.where(index < BLOCK, index, tl.max(tl.where(e > 0, i, 0), 0))
    token = (chosen * BLOCK + index).to(tl.int64)

    # The sums of ``token_stats.Sums``, without the drawn token, so that no difference cancels.
    is_own = i == index
    e = tl.where(is_own, 0.0, e)
    is_rest = is_block & (b != chosen)
    others = tl.sum(tl.where(is_rest, weights, 0.0), 0) + tl.sum(e, 0)
    moment = tl.sum(tl.where(is_rest, (moments + lower * totals) * scale, 0.0), 0) + tl.sum(e * x, 0)
    square = tl.sum(tl.where(is_rest, squares * scale * scale, 0.0), 0) + tl.sum(e * e, 0)
    own = tl.sum(tl.where(is_own, x, 0.0), 0)

    here = slot * num_places + place
    plane = num_slots * num_places
    tl.store(ids + here, token, mask=is_drawn)
    tl.store(stats + here, peak, mask=is_drawn)
    tl.store(stats + plane + here, own, mask=is_drawn)
    tl.store(stats + 2 * plane + here, others, mask=is_drawn)
    tl.store(stats + 3 * plane + here, moment, mask=is_drawn)
    tl.store(stats + 4 * plane + here, tl.sqrt(square), mask=is_drawn)
    tl.store(stats + 5 * plane + here, tl.load(norms + row), mask=is_drawn)
    stops = tl.load(stop_ids + tl.arange(0, STOPS), mask=tl.arange(0, STOPS) < num_stop, other=-1)
    is_end = tl.max((stops == token).to(tl.int32), 0) != 0
    goes_on = (place + 1 < tl.load(limits + slot)) & (is_end == 0)
    tl.store(tokens + slot, token, mask=is_drawn)
    tl.store(lengths + slot, place + 1, mask=is_drawn)
    tl.store(is_open + slot, goes_on.to(tl.int8), mask=is_drawn)
    tl.store(has_stopped + slot, is_end.to(tl.int8), mask=is_drawn)


def attend(qkv: Tensor, cos: Tensor, sin: Tensor, rows: Rows, cache: LayerCache, scale: float) -> Tensor:
    """Compute ``kernels.decoding.attend``; rows without a tile get no output."""
    _, heads, own_places, width = cache.own_keys.shape
    group = qkv.shape[1] // width // heads - 2
    size = rows.tiles.shape[1]
    out = torch.empty(len(qkv), heads * group * width, dtype=qkv.dtype, device=qkv.device)
    kernel: Any = _attend
    kernel[(len(rows.tiles), heads)](
        qkv,
        cos,
        sin,
        out,
        rows.slots,
        rows.tiles,
        rows.prompts,
        rows.prompt_lengths,
        rows.lengths,
        cache.prompt_keys,
        cache.prompt_values,
        cache.own_keys,
        cache.own_values,
        cache.prompt_keys.shape[2],
        own_places,
        scale * math.log2(math.e),
        HEADS=heads,
        GROUP=group,
        WIDTH=width,
        TILE=size,
        ROWS=max(LEAST_ROWS, triton.next_power_of_2(size * group)),
        COLUMNS=max(LEAST_WIDTH, triton.next_power_of_2(width)),
        KEYS=KEYS,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
    )
    return out


def draw(logits: Tensor, norms: Tensor, slots: Tensor, draws: Draws, temperature: float) -> None:
    """Compute ``Draws.draw`` for logits (R, V) and input norms (R,).

    Logits of excluded tokens are ``LEFT_OUT``.
    """
    count, num_columns = logits.shape
    num_blocks = triton.cdiv(num_columns, LOGITS)
    sums = torch.empty(count, num_blocks, 4, device=logits.device)
    factor = math.log2(math.e) / temperature
    sum_up: Any = _sums
    sum_up[(count, num_blocks)](logits, sums, num_columns, factor, BLOCK=LOGITS)
    num_slots, num_places = draws.ids.shape
    kernel: Any = _draw
    kernel[(count,)](
        logits,
        sums,
        norms,
        slots,
        draws.uniforms,
        draws.limits,
        draws.stop_ids,
        draws.tokens,
        draws.lengths,
        draws.is_open,
        draws.has_stopped,
        draws.ids,
        draws.stats,
        num_columns,
        num_blocks,
        num_slots,
        num_places,
        len(draws.stop_ids),
        factor,
        BLOCK=LOGITS,
        BLOCKS=triton.next_power_of_2(num_blocks),
        STOPS=triton.next_power_of_2(max(1, len(draws.stop_ids))),
    )
