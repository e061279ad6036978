"""Compute token statistics from hidden states without holding all logits.

Logits are computed block by block. See ``kernels.token_stats`` for definitions and closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from entrace.trainer.kernels import token_stats
from entrace.trainer.kernels.token_stats import (
    WHOLE,
    LMHead,
    LogitGrads,
    Softmax,
    SquareSums,
    Sums,
    TokenStats,
    Truncation,
    VocabularySums,
)

# Tokens and vocabulary entries per block of logits. On a CPU, a block fits into the cache and never reaches memory; it
# has enough tokens that reading the head's weight takes no longer than multiplying by it.
BLOCK = {"cpu": (256, 1024), "cuda": (2048, 16384)}


def compute_token_stats(
    hidden: Tensor, head: LMHead, targets: Tensor, temperature: float = 1.0, truncation: Truncation = WHOLE
) -> TokenStats:
    """Return statistics of targets under ``softmax(head(hidden) / temperature)``.

    ``truncation`` restricts the distribution. ``logprob`` and ``entropy`` are differentiable with respect to
    ``hidden``, ``head.weight``, and ``head.bias``; ``sum_p2`` carries no gradient. The backward pass recomputes the
    logits block by block. Memory beyond the arguments and their gradients does not depend on N: it is one block of
    logits (with truncation, of all vocabulary entries) and a copy of the head if products use another dtype.

    Args:
        hidden: Hidden states that predict the targets, (N, H).
        head: The LM head.
        targets: Token ids, (N,).
        temperature: Divides the logits.
        truncation: As in sampling. The gradient treats the set of excluded tokens as constant.

    Returns:
        ``TokenStats`` of shape (N,); empty for N = 0.
    """
    targets = targets.contiguous()
    return TokenStats(*_BlockedStats.apply(hidden, head.weight, head.bias, targets, temperature, truncation))


@torch.no_grad()
def compute_vocabulary_sums(
    hidden: Tensor, head: LMHead, targets: Tensor, temperature: float = 1.0, truncation: Truncation = WHOLE
) -> VocabularySums:
    """Return sums over the vocabulary, without gradient.

    The distribution is ``softmax(head(hidden) / temperature)``, truncated. Memory is bounded as in
    ``compute_token_stats``, whose arguments these are. Devices with Triton compute in plain torch, too.

    Returns:
        ``VocabularySums`` of shape (N,); empty for N = 0.
    """
    blocks = _Blocks(hidden, head, targets.contiguous(), temperature, truncation)
    parts = []
    for rows in blocks.rows:
        found = [blocks.square_sums(rows, entries, logits) for entries, logits in blocks.logits(rows)]
        parts.append(SquareSums.join(found, temperature).divide(temperature))
    names = [field.name for field in fields(VocabularySums)]
    return VocabularySums(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


class _BlockedStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        truncation: Truncation,
    ) -> tuple[Tensor, Tensor, Tensor]:
        blocks = _Blocks(hidden, LMHead(weight, bias), targets, temperature, truncation)
        parts = []
        for rows in blocks.rows:
            found = [blocks.sums(rows, entries, logits) for entries, logits in blocks.logits(rows)]
            parts.append(Sums.join(found, temperature))
        sums = Sums.concatenate(parts)
        ctx.save_for_backward(hidden, weight, bias, targets, *vars(sums).values())
        ctx.temperature, ctx.truncation = temperature, truncation
        stats = sums.stats(temperature)
        ctx.mark_non_differentiable(stats.sum_p2)
        return stats.logprob, stats.entropy, stats.sum_p2

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, *saved = ctx.saved_tensors
        sums = Sums(*saved)
        grads = LogitGrads.of(targets, sums, ctx.temperature, *grad_outputs[:2])
        blocks = _Blocks(hidden, LMHead(weight, bias), targets, ctx.temperature, ctx.truncation)
        grad_hidden = torch.empty_like(hidden)
        # A frozen head, as under LoRA, skips the most expensive product. All sums are in float32.
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for rows in blocks.rows:
            of_rows = LogitGrads(*(values[rows] for values in vars(grads).values()))
            own = hidden[rows].to(blocks.head.weight.dtype)
            grad_own = torch.zeros_like(own, dtype=torch.float32)
            for entries, logits in blocks.logits(rows):
                grad = blocks.grad_logits(of_rows, sums.peak[rows], entries, logits)
                _add_product(grad_own, grad, blocks.head.weight[entries])
                if grad_weight is not None:
                    _add_product(grad_weight[entries], grad.T, own)
                if grad_bias is not None:
                    grad_bias[entries] += grad.sum(0)
            grad_hidden[rows] = grad_own
        in_dtype = (None if grad is None else grad.to(weight.dtype) for grad in (grad_weight, grad_bias))
        return grad_hidden, *in_dtype, None, None, None


class _Blocks:
    """Compute the logits of tokens block by block, in reused memory."""

    def __init__(
        self, hidden: Tensor, head: LMHead, targets: Tensor, temperature: float, truncation: Truncation
    ) -> None:
        self.head = head.for_hidden(hidden.dtype)
        self._hidden, self._targets, self._temperature, self._truncation = hidden, targets, temperature, truncation
        tokens, entries = BLOCK[hidden.device.type]
        vocab_size = len(head.weight)
        # Truncation must see all vocabulary entries at once.
        entries = vocab_size if truncation != WHOLE else min(entries, vocab_size)
        # With a small vocabulary, a block holds more tokens.
        tokens = min(max(tokens, math.prod(BLOCK[hidden.device.type]) // entries), max(1, len(hidden)))
        self.rows, self._entries = _cut(len(hidden), tokens), _cut(vocab_size, entries)
        self._product = torch.empty(tokens * entries, device=hidden.device, dtype=self.head.weight.dtype)
        self._triton = token_stats.triton_kernels(hidden.device)
        self._buffer = None if self._triton else torch.empty(2 * tokens * entries, device=hidden.device)

    def logits(self, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """Yield each block of vocabulary entries with its logits.

        Logits are valid until the next block.
        """
        hidden = self._hidden[rows].to(self.head.weight.dtype)
        for entries in self._entries:
            head = self.head.of(entries)
            logits = self._product[: len(hidden) * len(head.weight)].view(len(hidden), len(head.weight))
            torch.mm(hidden, head.weight.T, out=logits)
            if head.bias is not None:
                logits += head.bias
            yield entries, self._truncation.apply(logits, self._temperature, self._targets[rows])

    def sums(self, rows: slice, entries: slice, logits: Tensor) -> Sums:
        """Return the sums over one block of logits."""
        targets = self._targets[rows]
        if self._triton:
            return Sums(*self._triton.sums(logits, targets, entries.start, self._temperature))
        return Softmax.of(logits, self._temperature, self._buffer).sums_of_block(targets, entries.start)

    def square_sums(self, rows: slice, entries: slice, logits: Tensor) -> SquareSums:
        """Return the sums of squares over one block of logits."""
        softmax = Softmax.of(logits, self._temperature, self._buffer)
        return softmax.square_sums_of_block(self._targets[rows], entries.start)

    def grad_logits(self, grads: LogitGrads, peak: Tensor, entries: slice, logits: Tensor) -> Tensor:
        """Return the gradient at one block of logits, which may be overwritten.

        ``peak`` is that of whole rows, (n,).
        """
        if self._triton:
            return self._triton.to_gradient(logits, entries.start, self._temperature, peak, **vars(grads))
        softmax = Softmax.of(logits, self._temperature, self._buffer, peak[:, None])
        return softmax.grad_logits(grads, entries.start).to(logits.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total`` in place, in float32.

    No temporary is allocated if the dtypes agree.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _cut(length: int, size: int) -> list[slice]:
    """Split ``length`` into slices of at most ``size``; 0 gives one empty slice."""
    return [slice(start, min(start + size, length)) for start in range(0, max(length, 1), size)]
