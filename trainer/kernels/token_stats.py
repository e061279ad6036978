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
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Tokens and vocabulary entries whose logits are made and worked on at once: few enough to stay in a CPU's cache, where
# they never reach memory, and enough tokens that reading the head's weight takes no longer than multiplying by it.
BLOCK = {"cpu": (256, 1024), "cuda": (2048, 16384)}
# Of logits that are in memory already, so many at once.
GIVEN_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 25}
# Logit of tokens left out. Its exponential is 0 and, unlike that of -inf, so is its product with a probability of 0.
LEFT_OUT = -1e30


@dataclass
class TokenStats:
    """Statistics of the distribution that each token was, or would be, sampled from; all of one shape, float32."""

    logprob: Tensor
    entropy: Tensor
    sum_p2: Tensor

    def take(self, index: Tensor) -> TokenStats:
        """Some of them, each as often as it is named; of statistics (N,)."""
        return TokenStats(*(values.index_select(0, index) for values in vars(self).values()))


@dataclass(frozen=True)
class LMHead:
    """The last linear map of a language model: ``weight`` (V, H), ``bias`` (V,) or None."""

    weight: Tensor
    bias: Tensor | None

    def for_hidden(self, dtype: torch.dtype) -> LMHead:
        """The head as it is multiplied with hidden states of a dtype: in that on a GPU, in float32 on a CPU.

        CPUs without instructions for it multiply in 16 bits ten to a hundred times more slowly.
        """
        dtype = torch.float32 if self.weight.device.type == "cpu" else dtype
        return LMHead(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (N, V) of hidden states (N, H)."""
        with torch.autocast(hidden.device.type, enabled=False):
            head = self.for_hidden(hidden.dtype)
            return torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()

    def of(self, entries: slice) -> LMHead:
        """The head of some vocabulary entries only."""
        return LMHead(self.weight[entries], None if self.bias is None else self.bias[entries])


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
        left_out = max(LEFT_OUT, torch.finfo(logits.dtype).min)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept = kept.masked_fill(kept < kept.topk(self.top_k).values[:, -1:], left_out)
        if self.top_p < 1:
            ordered, order = kept.sort(descending=True)
            p = (ordered / temperature).softmax(-1)
            is_rest = torch.zeros_like(kept, dtype=torch.bool).scatter(1, order, p.cumsum(-1) - p >= self.top_p)
            kept = kept.masked_fill(is_rest, left_out)
        if targets is None or kept is logits:
            return kept
        return kept.scatter(1, targets[:, None], logits.gather(1, targets[:, None]))


WHOLE = Truncation()


@dataclass
class Softmax:
    """softmax(z / T) of rows of logits, or of a block of their columns, taken apart.

    Attributes:
        peak: max(z) of each row, (N, 1).
        shifted: z - peak, (N, V).
        weights: exp(shifted / T), (N, V); the probabilities, but for their sum.
        temperature: T.
    """

    peak: Tensor
    shifted: Tensor
    weights: Tensor
    temperature: float

    @classmethod
    def of(
        cls, logits: Tensor, temperature: float = 1.0, room: Tensor | None = None, peak: Tensor | None = None
    ) -> Softmax:
        """Of logits (N, V), those of tokens left out being ``LEFT_OUT``.

        Args:
            logits: Of any floating dtype.
            temperature: Divides them.
            room: Memory for both tensors, float32, at least 2 N V numbers; taken anew each time, it would cost more
                time than what is computed in it.
            peak: Something else than the maximum to subtract, (N, 1).
        """
        if room is None:
            room = torch.empty(2 * logits.numel(), device=logits.device)
        shifted, weights = room[: 2 * logits.numel()].view(2, *logits.shape)
        # Widened once: operations of mixed dtypes do it each for themselves.
        wide = logits if logits.dtype == torch.float32 else shifted.copy_(logits)
        if peak is None:
            peak = wide.amax(-1, keepdim=True)
        torch.sub(wide, peak, out=shifted)
        # On a CPU, powers of 2 take half the time of powers of e.
        return cls(peak, shifted, torch.mul(shifted, math.log2(math.e) / temperature, out=weights).exp2_(), temperature)

    def take(self, rows: Tensor) -> Softmax:
        """Some of the rows, each as often as it is named."""
        peak, shifted, weights = (x.index_select(0, rows) for x in (self.peak, self.shifted, self.weights))
        return Softmax(peak, shifted, weights, self.temperature)

    def sums(self, targets: Tensor) -> Sums:
        """What the statistics of target tokens (N,) need, if this is of whole rows. Uses up both tensors."""
        columns = targets[:, None]
        own = self.shifted.gather(1, columns)
        self.weights.scatter_(1, columns, 0.0)
        return self._add_up(own)

    def sums_of_block(self, targets: Tensor, first: int) -> Sums:
        """The same of columns of which the first is entry ``first``."""
        is_here, columns = _columns(targets, first, self.shifted.shape[1])
        own = torch.where(is_here, self.shifted.gather(1, columns), -math.inf)
        self.weights.scatter_(1, columns, self.weights.gather(1, columns).masked_fill_(is_here, 0.0))
        return self._add_up(own)

    def _add_up(self, own: Tensor) -> Sums:
        others, norm = self.weights.sum(-1), torch.linalg.vector_norm(self.weights, dim=-1)
        moment = self.shifted.mul_(self.weights).sum(-1)
        return Sums(self.peak.squeeze(1), own.squeeze(1), others, moment, norm)

    def grad_logits(self, grads: LogitGrads, first: int) -> Tensor:
        """Gradient at these logits, (N, V), if ``peak`` is that of whole rows. Uses up both tensors."""
        is_here, columns = _columns(grads.targets, first, self.shifted.shape[1])
        others = torch.addcmul(-grads.a[:, None], -grads.b[:, None], self.shifted, out=self.shifted)
        gradient = others.mul_(self.weights)
        own = torch.where(is_here, grads.at_target[:, None], gradient.gather(1, columns))
        return gradient.scatter_(1, columns, own)


def _columns(targets: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Whether targets (N,) are among ``count`` entries from ``first`` on, and at which place, both (N, 1)."""
    columns = (targets - first)[:, None]
    return (columns >= 0) & (columns < count), columns.clamp(0, count - 1)


@dataclass
class Sums:
    """What the statistics of tokens need of logits z, each (N,); o is the target, x = z - peak, e = exp(x / T).

    Attributes:
        peak: max(z).
        own: x_o; minus infinity if o is elsewhere.
        others: Sum of e without e_o.
        moment: Sum of e x without e_o x_o.
        norm: Square root of the sum of e^2 without e_o^2.
    """

    peak: Tensor
    own: Tensor
    others: Tensor
    moment: Tensor
    norm: Tensor

    @classmethod
    def concatenate(cls, parts: list[Sums]) -> Sums:
        """Those of tokens end to end."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @classmethod
    def join(cls, blocks: list[Sums], temperature: float) -> Sums:
        """Those of all columns from those of blocks of columns."""
        peaks, own, others, moment, norm = (torch.stack([getattr(b, f.name) for b in blocks]) for f in fields(cls))
        peak = peaks.amax(0)
        lower = peaks - peak
        scale = (lower / temperature).exp()
        return cls(
            peak,
            (own + lower).amax(0),
            (others * scale).sum(0),
            ((moment + lower * others) * scale).sum(0),
            torch.linalg.vector_norm(norm * scale, dim=0),
        )

    def log_total(self, temperature: float) -> Tensor:
        """Logarithm of the sum of all e."""
        return torch.log1p(self.others + torch.expm1(self.own / temperature))

    def stats(self, temperature: float) -> TokenStats:
        """The statistics."""
        if fused := _fused(self.own.device):
            return TokenStats(*fused.stats(tuple(vars(self).values()), temperature))
        log_total = self.log_total(temperature)
        total = log_total.exp()
        logprob = self.own / temperature - log_total
        mean_shifted = (self.moment + (self.own / temperature).exp() * self.own) / total
        entropy = log_total - mean_shifted / temperature
        return TokenStats(logprob, entropy, (2 * logprob).exp() + (self.norm / total).square())


@dataclass
class LogitGrads:
    """The gradient at logits z, relative to their peak: -e_v (a + b x_v), but for the target's; each (N,)."""

    targets: Tensor
    a: Tensor
    b: Tensor
    at_target: Tensor

    @classmethod
    def of(
        cls, targets: Tensor, sums: Sums, temperature: float, grad_logprob: Tensor, grad_entropy: Tensor
    ) -> LogitGrads:
        """From the gradients at log-probability and entropy."""
        log_total = sums.log_total(temperature)
        own = (sums.own / temperature).exp()
        scale = 1 / (temperature * log_total.exp())
        through_entropy = scale * grad_entropy * (sums.stats(temperature).entropy - log_total)
        b = scale * grad_entropy / temperature
        at_target = scale * grad_logprob * sums.others - own * (through_entropy + b * sums.own)
        return cls(targets, through_entropy + scale * grad_logprob, b, at_target)


def compute_stats(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenStats:
    """Statistics of target tokens (N,) under softmax(logits / temperature), logits (N, V); without gradient."""
    if fused := _fused(logits.device):
        return Sums(*fused.sums(logits.contiguous(), targets.contiguous(), 0, temperature)).stats(temperature)
    tokens = max(1, GIVEN_LOGITS[logits.device.type] // logits.shape[1])
    room = torch.empty(2 * min(tokens, len(logits)) * logits.shape[1], device=logits.device)
    parts = [Softmax.of(logits[rows], temperature, room).sums(targets[rows]) for rows in _cut(len(logits), tokens)]
    return Sums.concatenate(parts).stats(temperature)


def compute_token_stats(
    hidden: Tensor, head: LMHead, targets: Tensor, temperature: float = 1.0, truncation: Truncation = WHOLE
) -> TokenStats:
    """Statistics of target tokens under ``softmax(head(hidden) / temperature)``, truncated.

    Differentiable with respect to ``hidden``, ``head.weight`` and ``head.bias`` through ``logprob`` and ``entropy``;
    ``sum_p2`` carries no gradient. The backward pass computes the logits once more, block by block, so that memory over
    that of the arguments and their gradients does not depend on the number of tokens: it is that of a block of logits
    (of all entries of its tokens if some are left out), and of the head where it is multiplied in another dtype.

    Args:
        hidden: Hidden states that predict the targets, (N, H).
        head: The LM head.
        targets: Token ids, (N,).
        temperature: Divides the logits.
        truncation: As in sampling; which tokens it leaves out is a constant to the gradient.

    Returns:
        ``TokenStats`` of shape (N,); empty for N = 0.
    """
    targets = targets.contiguous()
    return TokenStats(*_BlockedStats.apply(hidden, head.weight, head.bias, targets, temperature, truncation))


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
        # A frozen head, as under LoRA, spares the dearest of the products. All sums are in float32.
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
    """The logits of tokens, block by block, in memory that each uses again."""

    def __init__(
        self, hidden: Tensor, head: LMHead, targets: Tensor, temperature: float, truncation: Truncation
    ) -> None:
        self.head = head.for_hidden(hidden.dtype)
        self._hidden, self._targets, self._temperature, self._truncation = hidden, targets, temperature, truncation
        tokens, entries = BLOCK[hidden.device.type]
        vocab_size = len(head.weight)
        # Which tokens are left out is seen from all entries alone.
        entries = vocab_size if truncation != WHOLE else min(entries, vocab_size)
        # A small vocabulary leaves room for more tokens.
        tokens = min(max(tokens, math.prod(BLOCK[hidden.device.type]) // entries), max(1, len(hidden)))
        self.rows, self._entries = _cut(len(hidden), tokens), _cut(vocab_size, entries)
        self._product = torch.empty(tokens * entries, device=hidden.device, dtype=self.head.weight.dtype)
        self._fused = _fused(hidden.device)
        self._room = None if self._fused else torch.empty(2 * tokens * entries, device=hidden.device)

    def logits(self, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """Of these tokens, block by block, with the entries of each; good until the next."""
        hidden = self._hidden[rows].to(self.head.weight.dtype)
        for entries in self._entries:
            head = self.head.of(entries)
            logits = self._product[: len(hidden) * len(head.weight)].view(len(hidden), len(head.weight))
            torch.mm(hidden, head.weight.T, out=logits)
            if head.bias is not None:
                logits += head.bias
            yield entries, self._truncation.apply(logits, self._temperature, self._targets[rows])

    def sums(self, rows: slice, entries: slice, logits: Tensor) -> Sums:
        """Of one of these blocks."""
        targets = self._targets[rows]
        if self._fused:
            return Sums(*self._fused.sums(logits, targets, entries.start, self._temperature))
        return Softmax.of(logits, self._temperature, self._room).sums_of_block(targets, entries.start)

    def grad_logits(self, grads: LogitGrads, peak: Tensor, entries: slice, logits: Tensor) -> Tensor:
        """Gradient at one of these blocks, whose memory it may use; ``peak`` (n,) is that of whole rows."""
        if self._fused:
            return self._fused.to_gradient(logits, entries.start, self._temperature, peak, **vars(grads))
        softmax = Softmax.of(logits, self._temperature, self._room, peak[:, None])
        return softmax.grad_logits(grads, entries.start).to(logits.dtype)


def uses_triton(device: torch.device) -> bool:
    """Return whether the statistics are computed by Triton kernels on a device."""
    return device.type == "cuda" and find_spec("triton") is not None


@cache
def _fused(device: torch.device) -> ModuleType | None:
    """The kernels for a device, if there are any."""
    if not uses_triton(device):
        return None
    from entrace.trainer.kernels import token_stats_triton as fused_stats

    return fused_stats


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds ``left @ right`` to ``total`` in float32, without a copy of it where their dtype allows that."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _cut(length: int, size: int) -> list[slice]:
    """Parts of at most ``size``; one empty part of nothing."""
    return [slice(start, min(start + size, length)) for start in range(0, max(length, 1), size)]


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
