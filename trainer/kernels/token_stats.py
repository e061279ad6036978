"""Define log-probability, entropy, and sum of squared probabilities of tokens.

For logits z, temperature T, p = softmax(z / T), and target o, all in nats and float32::

    x_v     = z_v - max(z),  e_v = exp(x_v / T),  s = sum_v e_v
    logprob = x_o / T - ln s
    entropy = -sum_v p_v ln p_v = ln s - sum_v e_v x_v / (T s)
    sum_p2  = sum_v p_v^2 = sum_v e_v^2 / s^2

Neither difference cancels, since x <= 0 <= ln s. The target's e_o is added to s last, so that the logarithm receives
s - 1 unrounded when the target is almost certain. The relative error of ln s is then about 1e-6; a sum that passes
through 1 would have an absolute error of 1e-7.

Gradients used by the backward pass::

    d logprob / d z_v = ([v = o] - p_v) / T
    d entropy / d z_v = -p_v (ln p_v + entropy) / T

Two further sums, recorded on request, determine what a gradient step on the token's own logits does to the entropy.
They leave the target out: for a nearly certain token, sums over all entries would be dominated by rounding::

    sum_p2_others      = sum_{v != o} p_v^2        = sum_{v != o} e_v^2 / s^2
    sum_p2_logp_others = sum_{v != o} p_v^2 ln p_v = sum_{v != o} e_v^2 x_v / (T s^2) - ln s sum_p2_others

If sampling excludes tokens (top-k, top-p), their e_v is 0 and p is renormalized over the remaining tokens.
``kernels.blocked_stats`` computes the same values from hidden states without holding all logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

# Logit of excluded tokens. Its exponential is 0 and, unlike with -inf, its product with a probability of 0 is 0.
LEFT_OUT = -1e30


@dataclass
class TokenStats:
    """Statistics of the distribution that each token was, or would be, drawn from.

    All have one shape and are float32.

    Attributes:
        logprob: Log-probability of the token, nats.
        entropy: Entropy of the distribution, nats.
        sum_p2: Sum of squared probabilities.
    """

    logprob: Tensor
    entropy: Tensor
    sum_p2: Tensor

    def take(self, index: Tensor) -> TokenStats:
        """Select entries of statistics (N,) by index; an index may repeat."""
        return TokenStats(*(values.index_select(0, index) for values in vars(self).values()))


@dataclass
class VocabularySums:
    """Sums over all vocabulary entries except the token, each (N,) float32.

    The module defines the sums.

    Attributes:
        sum_p2_others: Sum of p^2.
        sum_p2_logp_others: Sum of p^2 ln p, nats.
    """

    sum_p2_others: Tensor
    sum_p2_logp_others: Tensor

    def take(self, index: Tensor) -> VocabularySums:
        """Select entries by index; an index may repeat."""
        return VocabularySums(*(values.index_select(0, index) for values in vars(self).values()))


@dataclass(frozen=True)
class LMHead:
    """Hold the LM head, a linear map: ``weight`` (V, H), ``bias`` (V,) or None."""

    weight: Tensor
    bias: Tensor | None

    def for_hidden(self, dtype: torch.dtype) -> LMHead:
        """Cast the head for products with hidden states.

        The dtype is ``dtype`` on a GPU, and float32 on a CPU. CPUs without 16-bit instructions multiply in 16 bits 10
        to 100 times slower.
        """
        dtype = torch.float32 if self.weight.device.type == "cpu" else dtype
        return LMHead(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits (N, V) of hidden states (N, H)."""
        with torch.autocast(hidden.device.type, enabled=False):
            head = self.for_hidden(hidden.dtype)
            return torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()

    def of(self, entries: slice) -> LMHead:
        """Return the head restricted to a slice of vocabulary entries."""
        return LMHead(self.weight[entries], None if self.bias is None else self.bias[entries])


@dataclass(frozen=True)
class Truncation:
    """Restrict sampling to the ``top_k`` likeliest tokens, then to ``top_p``.

    ``top_p`` keeps the fewest of these whose total probability reaches it.
    """

    top_p: float = 1.0
    top_k: int | None = None

    def apply(self, logits: Tensor, temperature: float, targets: Tensor | None = None) -> Tensor:
        """Return logits (N, V) with those of excluded tokens set to ``LEFT_OUT``.

        Args:
            logits: Before division by the temperature.
            temperature: Divides the logits.
            targets: Tokens (N,) that are never excluded. They were sampled under other weights, and a probability of 0
                under the current ones would have neither a ratio nor a gradient.
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
    """Hold the parts of softmax(z / T) over rows of logits, or a block of columns.

    Attributes:
        peak: max(z) of each row, (N, 1).
        shifted: z - peak, (N, V).
        weights: exp(shifted / T), (N, V); unnormalized probabilities.
        temperature: T.
    """

    peak: Tensor
    shifted: Tensor
    weights: Tensor
    temperature: float

    @classmethod
    def of(
        cls, logits: Tensor, temperature: float = 1.0, buffer: Tensor | None = None, peak: Tensor | None = None
    ) -> Softmax:
        """Compute the parts for logits (N, V).

        Logits of excluded tokens are ``LEFT_OUT``.

        Args:
            logits: Any floating dtype.
            temperature: Divides the logits.
            buffer: Float32 memory of at least 2 N V numbers for ``shifted`` and ``weights``. Allocating it per call
                would take longer than the computation.
            peak: Subtracted instead of the maximum, (N, 1).
        """
        if buffer is None:
            buffer = torch.empty(2 * logits.numel(), device=logits.device)
        shifted, weights = buffer[: 2 * logits.numel()].view(2, *logits.shape)
        # Converted once: each operation on mixed dtypes would convert again.
        wide = logits if logits.dtype == torch.float32 else shifted.copy_(logits)
        if peak is None:
            peak = wide.amax(-1, keepdim=True)
        torch.sub(wide, peak, out=shifted)
        # On a CPU, exp2 takes half the time of exp.
        return cls(peak, shifted, torch.mul(shifted, math.log2(math.e) / temperature, out=weights).exp2_(), temperature)

    def take(self, rows: Tensor) -> Softmax:
        """Select rows by index; an index may repeat."""
        peak, shifted, weights = (x.index_select(0, rows) for x in (self.peak, self.shifted, self.weights))
        return Softmax(peak, shifted, weights, self.temperature)

    def sums(self, targets: Tensor) -> Sums:
        """Return the sums for target tokens (N,) over whole rows.

        Overwrites ``shifted`` and ``weights``.
        """
        columns = targets[:, None]
        own = self.shifted.gather(1, columns)
        self.weights.scatter_(1, columns, 0.0)
        return self._add_up(own)

    def sums_of_block(self, targets: Tensor, first: int) -> Sums:
        """Return the sums over a block of columns that starts at entry ``first``.

        See ``sums``.
        """
        is_here, columns = _columns(targets, first, self.shifted.shape[1])
        own = torch.where(is_here, self.shifted.gather(1, columns), -math.inf)
        self.weights.scatter_(1, columns, self.weights.gather(1, columns).masked_fill_(is_here, 0.0))
        return self._add_up(own)

    def square_sums_of_block(self, targets: Tensor, first: int) -> SquareSums:
        """Return the sums of squares over a block of columns from entry ``first`` on.

        Overwrites ``shifted`` and ``weights``.
        """
        is_here, columns = _columns(targets, first, self.shifted.shape[1])
        highest = self.shifted.argmax(-1, keepdim=True)
        rest = self.weights.scatter(1, highest, 0.0).sum(-1)
        self.weights.scatter_(1, columns, self.weights.gather(1, columns).masked_fill_(is_here, 0.0))
        squares = self.weights.square_()
        return SquareSums(self.peak.squeeze(1), rest, squares.sum(-1), self.shifted.mul_(squares).sum(-1))

    def _add_up(self, own: Tensor) -> Sums:
        others, norm = self.weights.sum(-1), torch.linalg.vector_norm(self.weights, dim=-1)
        moment = self.shifted.mul_(self.weights).sum(-1)
        return Sums(self.peak.squeeze(1), own.squeeze(1), others, moment, norm)

    def grad_logits(self, grads: LogitGrads, first: int) -> Tensor:
        """Return the gradient at these logits, (N, V).

        ``peak`` must be that of whole rows. Overwrites ``shifted`` and ``weights``.
        """
        is_here, columns = _columns(grads.targets, first, self.shifted.shape[1])
        others = torch.addcmul(-grads.a[:, None], -grads.b[:, None], self.shifted, out=self.shifted)
        gradient = others.mul_(self.weights)
        own = torch.where(is_here, grads.at_target[:, None], gradient.gather(1, columns))
        return gradient.scatter_(1, columns, own)


def _columns(targets: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Locate targets (N,) among ``count`` entries from ``first`` on.

    Return a mask of the targets inside, and their columns, each (N, 1).
    """
    columns = (targets - first)[:, None]
    return (columns >= 0) & (columns < count), columns.clamp(0, count - 1)


@dataclass
class Sums:
    """Sums over logits z that determine the statistics of tokens, each (N,).

    With target o, x = z - peak, and e = exp(x / T).

    Attributes:
        peak: max(z).
        own: x_o; minus infinity if o lies outside the block.
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
        """Concatenate the sums of consecutive tokens."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @classmethod
    def join(cls, blocks: list[Sums], temperature: float) -> Sums:
        """Combine the sums over blocks of columns into the sums over all columns."""
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
        """Return the logarithm of the sum of all e, (N,)."""
        return torch.log1p(self.others + torch.expm1(self.own / temperature))

    def stats(self, temperature: float) -> TokenStats:
        """Return the statistics, (N,), from sums over whole rows."""
        if kernels := triton_kernels(self.own.device):
            return TokenStats(*kernels.stats(tuple(vars(self).values()), temperature))
        log_total = self.log_total(temperature)
        total = log_total.exp()
        logprob = self.own / temperature - log_total
        mean_shifted = (self.moment + (self.own / temperature).exp() * self.own) / total
        entropy = log_total - mean_shifted / temperature
        return TokenStats(logprob, entropy, (2 * logprob).exp() + (self.norm / total).square())


@dataclass
class SquareSums:
    """Sums over logits z that determine ``VocabularySums``, each (N,).

    With target o, x = z - peak, and e = exp(x / T).

    Attributes:
        peak: max(z).
        rest: Sum of e without one e of 1, that of the peak. The logarithm of the sum of all e receives it unrounded.
        squares: Sum of e^2 without e_o^2.
        moment: Sum of e^2 x without e_o^2 x_o.
    """

    peak: Tensor
    rest: Tensor
    squares: Tensor
    moment: Tensor

    @classmethod
    def join(cls, blocks: list[SquareSums], temperature: float) -> SquareSums:
        """Combine the sums over blocks of columns into the sums over all columns."""
        peaks, rest, squares, moment = (torch.stack([getattr(b, f.name) for b in blocks]) for f in fields(cls))
        peak, highest = peaks.max(0, keepdim=True)
        lower = peaks - peak
        scale = (lower / temperature).exp()
        others = ((1 + rest) * scale).scatter(0, highest, rest.gather(0, highest))
        moment = (moment + lower * squares) * scale.square()
        return cls(peak.squeeze(0), others.sum(0), (squares * scale.square()).sum(0), moment.sum(0))

    def divide(self, temperature: float) -> VocabularySums:
        """Return the sums over probabilities, (N,), from sums over whole rows."""
        norm = (1 + self.rest).square()
        squares = self.squares / norm
        return VocabularySums(squares, self.moment / (temperature * norm) - self.rest.log1p() * squares)


@dataclass
class LogitGrads:
    """Hold the gradient at logits z in closed form; each (N,).

    The gradient is -e_v (a + b x_v) at every entry except the target, where it is ``at_target``.
    """

    targets: Tensor
    a: Tensor
    b: Tensor
    at_target: Tensor

    @classmethod
    def of(
        cls, targets: Tensor, sums: Sums, temperature: float, grad_logprob: Tensor, grad_entropy: Tensor
    ) -> LogitGrads:
        """Derive the coefficients from gradients at log-probability and entropy, (N,)."""
        log_total = sums.log_total(temperature)
        own = (sums.own / temperature).exp()
        scale = 1 / (temperature * log_total.exp())
        through_entropy = scale * grad_entropy * (sums.stats(temperature).entropy - log_total)
        b = scale * grad_entropy / temperature
        at_target = scale * grad_logprob * sums.others - own * (through_entropy + b * sums.own)
        return cls(targets, through_entropy + scale * grad_logprob, b, at_target)


def lm_head_grad_norm(
    advantage: Tensor, logprob: Tensor, sum_p2: Tensor, hidden_norm: Tensor, temperature: float
) -> Tensor:
    """Return the Frobenius norm of each token's policy gradient at the LM head.

    With G = d(A logprob) / dW = A / T (onehot(o) - p) h^T, the norm is
    |G| = |A| sqrt(1 - 2 p_o + sum_v p_v^2) |h| / T (arXiv 2508.02260, with the temperature made explicit).
    This is the on-policy norm: the ratio is 1 and nothing is clipped. All arguments have one shape.
    """
    # 1 - 2 p_o + sum p^2 = (1 - p_o)^2 + the sum of the others' squares, which is at most the square of their sum.
    missing = torch.expm1(logprob).square()
    others = (sum_p2 - (2 * logprob).exp()).clamp(min=0).minimum(missing)
    return advantage.abs() * (missing + others).sqrt() * hidden_norm / temperature


def uses_triton(device: torch.device) -> bool:
    """Return True if Triton kernels compute the statistics on a device.

    The device must be CUDA, and Triton installed.
    """
    return device.type == "cuda" and find_spec("triton") is not None


@cache
def triton_kernels(device: torch.device) -> ModuleType | None:
    """Return ``kernels.token_stats_triton`` if ``uses_triton`` holds, None otherwise."""
    if not uses_triton(device):
        return None
    from entrace.trainer.kernels import token_stats_triton

    return token_stats_triton
