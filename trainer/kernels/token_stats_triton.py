"""Sums and gradient of ``kernels.token_stats`` on a GPU; logits are read once.

Written in Triton, which ships with torch for GPUs. The sums are rescaled whenever the running maximum rises (online
softmax, arXiv 1805.02867), extended by the moment and the squares needed for entropy and sum of p².
"""
# Triton code has no types.
# pyright: reportOperatorIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns that a program sums in parallel, number of such groups per load, and warps.
LANES, DEPTH, NUM_WARPS = 1024, 4, 4
# Columns per program of the gradient kernel, and rows per program of the statistics kernel.
BLOCK = 4096
# Below all logits, including those of excluded tokens; its product with a probability of 0 is 0.
LOWEST = tl.constexpr(-3e38)


@triton.jit
def _sums(logits, targets, out, stride, num_rows, num_columns, first, factor, LANES: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    own_column = tl.load(targets + row) - first
    logits += row * stride
    peak = tl.full((), LOWEST, tl.float32)
    others = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    squares = tl.zeros([LANES], tl.float32)
    columns = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    following = tl.load(logits + columns, mask=columns < num_columns, other=0.0)
    for _ in range(0, num_columns, DEPTH * LANES):
        z = tl.where(columns < num_columns, following.to(tl.float32), LOWEST)
        # Prefetched while this block is processed.
        ahead = columns + DEPTH * LANES
        following = tl.load(logits + ahead, mask=ahead < num_columns, other=0.0)
        highest = tl.max(tl.max(z, 0), 0)
        if highest > peak:
            lower = tl.maximum(peak - highest, -1e30)
            scale = tl.exp2(lower * factor)
            moment = (moment + lower * others) * scale
            others *= scale
            squares *= scale * scale
            peak = highest
        x = z - peak
        e = tl.where(columns == own_column, 0.0, tl.exp2(x * factor))
        others += tl.sum(e, 0)
        moment += tl.sum(e * x, 0)
        squares += tl.sum(e * e, 0)
        columns = ahead
    is_here = (own_column >= 0) & (own_column < num_columns)
    own = tl.load(logits + own_column, mask=is_here, other=0.0).to(tl.float32) - peak
    tl.store(out + row, peak)
    tl.store(out + num_rows + row, tl.where(is_here, own, float("-inf")))
    tl.store(out + 2 * num_rows + row, tl.sum(others, 0))
    tl.store(out + 3 * num_rows + row, tl.sum(moment, 0))
    tl.store(out + 4 * num_rows + row, tl.sqrt(tl.sum(squares, 0)))


@triton.jit
def _stats(sums, out, num_rows, temperature, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = rows < num_rows
    own = tl.load(sums + num_rows + rows, mask=is_row, other=0.0)
    others = tl.load(sums + 2 * num_rows + rows, mask=is_row, other=0.0)
    moment = tl.load(sums + 3 * num_rows + rows, mask=is_row, other=0.0)
    norm = tl.load(sums + 4 * num_rows + rows, mask=is_row, other=0.0)
    weight = tl.exp(own / temperature)
    total = others + weight
    # log1p(rest) computed with log: the rounding error of 1 + rest cancels in the quotient.
    rest = others + (weight - 1)
    rounded = (1 + rest) - 1
    log_total = tl.where(rounded == 0, rest, tl.log(1 + rest) * (rest / tl.where(rounded == 0, 1.0, rounded)))
    logprob = own / temperature - log_total
    entropy = log_total - (moment + weight * own) / (total * temperature)
    norm /= total
    tl.store(out + rows, logprob, mask=is_row)
    tl.store(out + num_rows + rows, entropy, mask=is_row)
    tl.store(out + 2 * num_rows + rows, tl.exp(2 * logprob) + norm * norm, mask=is_row)


@triton.jit
def _gradient(logits, targets, peak, a, b, at_target, stride, num_columns, first, factor, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = logits + row * stride + columns
    is_column = columns < num_columns
    x = tl.load(places, mask=is_column, other=0.0).to(tl.float32) - tl.load(peak + row)
    found = -tl.exp2(x * factor) * (tl.load(a + row) + tl.load(b + row) * x)
    found = tl.where(columns == tl.load(targets + row) - first, tl.load(at_target + row), found)
    tl.store(places, found.to(logits.dtype.element_ty), mask=is_column)


def sums(logits: Tensor, targets: Tensor, first: int, temperature: float) -> tuple[Tensor, ...]:
    """Return the fields of ``kernels.token_stats.Sums``, each (N,).

    Args:
        logits: Logits of a block of vocabulary entries, (N, V), any floating dtype, contiguous.
        targets: Target entries, (N,), contiguous; targets outside the block are ignored.
        first: Vocabulary entry of the block's first column.
        temperature: Divides the logits.
    """
    count, width = logits.shape
    out = torch.empty(5, count, device=logits.device)
    if count:
        kernel: Any = _sums
        kernel[(count,)](
            logits,
            targets,
            out,
            logits.stride(0),
            count,
            width,
            first,
            _factor(temperature),
            LANES=LANES,
            DEPTH=DEPTH,
            num_warps=NUM_WARPS,
        )
    return out.unbind(0)


def stats(sums: Sequence[Tensor], temperature: float) -> tuple[Tensor, ...]:
    """Return the fields of ``TokenStats`` from those of ``Sums``, each (N,).

    The sums are over whole rows.
    """
    given = torch.stack(tuple(sums))
    count = given.shape[1]
    out = torch.empty(3, count, device=given.device)
    if count:
        kernel: Any = _stats
        kernel[(triton.cdiv(count, BLOCK),)](given, out, count, temperature, BLOCK=BLOCK)
    return out.unbind(0)


def to_gradient(
    logits: Tensor,
    first: int,
    temperature: float,
    peak: Tensor,
    targets: Tensor,
    a: Tensor,
    b: Tensor,
    at_target: Tensor,
) -> Tensor:
    """Overwrite logits with the gradient of ``LogitGrads``, and return it.

    ``kernels.token_stats.LogitGrads`` defines the gradient.

    Args:
        logits: As in ``sums``.
        first: As in ``sums``.
        temperature: Divides the logits.
        peak: Maximum of each whole row, (N,) float32.
        targets: As in ``sums``.
        a: As in ``LogitGrads``, (N,) float32.
        b: As in ``LogitGrads``, (N,) float32.
        at_target: As in ``LogitGrads``, (N,) float32.
    """
    count, width = logits.shape
    if count:
        kernel: Any = _gradient
        kernel[(count, triton.cdiv(width, BLOCK))](
            logits,
            targets,
            peak,
            a,
            b,
            at_target,
            logits.stride(0),
            width,
            first,
            _factor(temperature),
            BLOCK=BLOCK,
        )
    return logits


def _factor(temperature: float) -> float:
    return math.log2(math.e) / temperature
