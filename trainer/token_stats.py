"""Log-probability, entropy and sum of squared probabilities of tokens, in one pass that never holds all logits.

For logits z, temperature T, p = softmax(z / T), target o, all in nats and float32::

    x_v     = z_v - max(z),  e_v = exp(x_v / T),  s = sum_v e_v
    logprob = x_o / T - ln s
    entropy = -sum_v p_v ln p_v = ln s - sum_v e_v x_v / (T s)
    sum_p2  = sum_v p_v^2 = sum_v e_v^2 / s^2

Neither difference cancels, since x <= 0 <= ln s. The target's e_o is added to s last, so that the logarithm sees s - 1
unrounded where the target is all but certain: there, too, ln s and what follows from it are exact to some 1e-6 of
themselves, where a sum that passes through 1 would know them to 1e-7 only.

Gradients, used by the backward pass::

    d logprob / d z_v = ([v = o] - p_v) / T
    d entropy / d z_v = -p_v (ln p_v + entropy) / T

Where sampling leaves out tokens (top-k, top-p), e_v of those left out is 0, and p the distribution that is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

# Logits worked on at once: few enough to stay in a CPU's cache, enough to fill a GPU.
PART_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 25}
# Rows of logits made by one matrix product: with fewer, reading the head's weight takes longer than multiplying by it.
MIN_ROWS = 256
# Logit of tokens left out. Its exponential is 0 and, unlike that of -inf, so is its product with a probability of 0.
LEFT_OUT = -1e30


@dataclass
class TokenStats:
    """Statistics of the distribution that each token was, or would be, sampled from; all of one shape, float32."""

    logprob: Tensor
    entropy: Tensor
    sum_p2: Tensor


@dataclass(frozen=True)
class LMHead:
    """The last linear map of a language model: ``weight`` (V, H), ``bias`` (V,) or None."""

    weight: Tensor
    bias: Tensor | None

    def in_dtype_of(self, hidden: Tensor) -> LMHead:
        """The head as it is multiplied with ``hidden``: in its dtype on a GPU, in float32 on a CPU.

        CPUs without instructions for it multiply in 16 bits ten to a hundred times more slowly.
        """
        dtype = torch.float32 if hidden.device.type == "cpu" else hidden.dtype
        return LMHead(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (N, V) of hidden states (N, H)."""
        head = self.in_dtype_of(hidden)
        return torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()


@dataclass(frozen=True)
class Truncation:
    """Which tokens can be drawn: the ``top_k`` likeliest, and of these the fewest that add up to ``top_p``."""

    top_p: float = 1.0
    top_k: int | None = None

    def apply(self, logits: Tensor, temperature: float, targets: Tensor | None = None) -> Tensor:
        """Logits (N, V) with those of all other tokens at ``LEFT_OUT``.

        Args:
            logits: Before the temperature.
            temperature: Divides them.
            targets: Tokens (N,) that were drawn under other weights, and stay in whatever the present ones say: a
                probability of 0 would have neither a ratio nor a gradient.
        """
        kept = logits
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept = kept.masked_fill(kept < kept.topk(self.top_k).values[:, -1:], LEFT_OUT)
        if self.top_p < 1:
            ordered, order = kept.sort(descending=True)
            p = (ordered / temperature).softmax(-1)
            is_rest = torch.zeros_like(kept, dtype=torch.bool).scatter(1, order, p.cumsum(-1) - p >= self.top_p)
            kept = kept.masked_fill(is_rest, LEFT_OUT)
        if targets is None or kept is logits:
            return kept
        return kept.scatter(1, targets[:, None], logits.gather(1, targets[:, None]))


WHOLE = Truncation()


@dataclass
class Softmax:
    """softmax(z / T) of rows of logits, taken apart.

    Attributes:
        shifted: z - max(z), (N, V).
        weights: exp(shifted / T), (N, V); the probabilities, but for their sum.
        temperature: T.
    """

    shifted: Tensor
    weights: Tensor
    temperature: float

    @classmethod
    def of(cls, logits: Tensor, temperature: float = 1.0) -> Softmax:
        """Of logits (N, V), those of tokens left out being ``LEFT_OUT``."""
        shifted = logits - logits.amax(-1, keepdim=True)
        # On a CPU, powers of 2 take half the time of powers of e.
        return cls(shifted, (shifted * (math.log2(math.e) / temperature)).exp2_(), temperature)

    def stats(self, targets: Tensor) -> TokenStats:
        """Statistics of target tokens (N,), each (N,). Uses up both tensors."""
        own, own_shifted, rest, log_total = self._set_apart(targets)
        total = own + rest
        logprob = own_shifted / self.temperature - log_total
        others_p2 = (torch.linalg.vector_norm(self.weights, dim=-1) / total).square()
        mean_shifted = (self.shifted.mul_(self.weights).sum(-1) + own * own_shifted) / total
        return TokenStats(logprob, log_total - mean_shifted / self.temperature, (2 * logprob).exp() + others_p2)

    def grad_logits(self, targets: Tensor, entropy: Tensor, grad_logprob: Tensor, grad_entropy: Tensor) -> Tensor:
        """Gradient at the logits, (N, V), from those at log-probability and entropy, (N,). Uses up both tensors."""
        own, own_shifted, rest, log_total = self._set_apart(targets)
        scale = 1 / (self.temperature * (own + rest))
        # Through the entropy: -e_v (a + b x_v), a and b of each row.
        a = scale * grad_entropy * (entropy - log_total)
        b = scale * grad_entropy / self.temperature
        at_target = scale * grad_logprob * rest - own * (a + b * own_shifted)
        a = a + scale * grad_logprob
        grad = torch.addcmul(-a[:, None], -b[:, None], self.shifted, out=self.shifted).mul_(self.weights)
        return grad.scatter_(1, targets[:, None], at_target[:, None])

    def _set_apart(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The targets' e_o, which become 0 in ``weights``, and x_o; the sum of all other e; ln s; each (N,)."""
        at_targets = targets[:, None]
        own, own_shifted = (values.gather(1, at_targets).squeeze(1) for values in (self.weights, self.shifted))
        rest = self.weights.scatter_(1, at_targets, 0.0).sum(-1)
        return own, own_shifted, rest, torch.log1p(rest + (own - 1))


def compute_stats(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenStats:
    """Statistics of target tokens (N,) under softmax(logits / temperature), logits (N, V); without gradient."""
    parts = _parts(logits, logits.shape[1])
    return _join([Softmax.of(logits[rows].float(), temperature).stats(targets[rows]) for rows in parts])


def compute_token_stats(
    hidden: Tensor, head: LMHead, targets: Tensor, temperature: float = 1.0, truncation: Truncation = WHOLE
) -> TokenStats:
    """Statistics of target tokens under ``softmax(head(hidden) / temperature)``, truncated.

    Differentiable with respect to ``hidden``, ``head.weight`` and ``head.bias`` through ``logprob`` and ``entropy``;
    ``sum_p2`` carries no gradient. The backward pass computes the logits once more, chunk by chunk, so that memory over
    that of the arguments and their gradients does not depend on the number of tokens: it is that of some ``MIN_ROWS``
    rows of logits, and of the head where it is multiplied in another dtype than its own.

    Args:
        hidden: Hidden states that predict the targets, (N, H).
        head: The LM head.
        targets: Token ids, (N,).
        temperature: Divides the logits.
        truncation: As in sampling; which tokens it leaves out is a constant to the gradient.

    Returns:
        ``TokenStats`` of shape (N,); empty for N = 0.
    """
    return TokenStats(*_ChunkedStats.apply(hidden, head.weight, head.bias, targets, temperature, truncation))


class _ChunkedStats(torch.autograd.Function):
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
        head = LMHead(weight, bias).in_dtype_of(hidden)
        chunks = []
        for rows in _parts(hidden, len(weight), MIN_ROWS):
            logits = truncation.apply(head.logits(hidden[rows]), temperature, targets[rows])
            chunks.append(compute_stats(logits, targets[rows], temperature))
        stats = _join(chunks)
        ctx.save_for_backward(hidden, weight, bias, targets, stats.entropy)
        ctx.temperature, ctx.truncation = temperature, truncation
        ctx.mark_non_differentiable(stats.sum_p2)
        return stats.logprob, stats.entropy, stats.sum_p2

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        per_token = (targets, entropy, *grad_outputs[:2])
        head = LMHead(weight, bias).in_dtype_of(hidden)
        grad_hidden = torch.empty_like(hidden)
        # A frozen head, as under LoRA, spares the dearest of the products. Sums over tokens are in float32.
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for rows in _parts(hidden, len(weight), MIN_ROWS):
            logits = ctx.truncation.apply(head.logits(hidden[rows]), ctx.temperature, targets[rows])
            for part in _parts(logits, len(weight)):
                rows_of_part = (values[rows][part] for values in per_token)
                logits[part] = Softmax.of(logits[part], ctx.temperature).grad_logits(*rows_of_part)
            grad = logits.to(head.weight.dtype)
            grad_hidden[rows] = grad @ head.weight
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, hidden[rows].to(grad.dtype))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        in_dtype = (None if grad is None else grad.to(weight.dtype) for grad in (grad_weight, grad_bias))
        return grad_hidden, *in_dtype, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds ``left @ right`` to ``total`` in float32, without a copy of it where their dtype allows that."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _parts(rows: Tensor, vocab_size: int, least: int = 1) -> list[slice]:
    """Cuts rows into parts of some ``PART_LOGITS`` logits, at least ``least`` rows; one empty part of no rows."""
    size = max(least, PART_LOGITS[rows.device.type] // vocab_size)
    return [slice(start, start + size) for start in range(0, max(len(rows), 1), size)]


def _join(parts: list[TokenStats]) -> TokenStats:
    return TokenStats(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(TokenStats)))


def lm_head_grad_norm(
    advantage: Tensor, logprob: Tensor, sum_p2: Tensor, hidden_norm: Tensor, temperature: float
) -> Tensor:
    """Frobenius norm of each token's policy gradient at the LM head, in closed form; all arguments of one shape.

    With G = A / T (onehot(o) - p) h^T, as d(A logprob)/dW: |G| = |A| sqrt(1 - 2 p_o + sum_v p_v^2) |h| / T
    (arXiv 2508.02260, with the temperature made explicit). On-policy: the ratio is 1, nothing is clipped.
    """
    # 1 - 2 p_o + sum p^2 = (1 - p_o)^2 + the sum of the others' squares, which is at most the square of their sum.
    missing = torch.expm1(logprob).square()
    others = (sum_p2 - (2 * logprob).exp()).clamp(min=0).minimum(missing)
    return advantage.abs() * (missing + others).sqrt() * hidden_norm / temperature
