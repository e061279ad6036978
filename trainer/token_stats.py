"""Log-probability, entropy and sum of squared probabilities of tokens, in one pass that never holds all logits.

For logits z (divided by the temperature), p = softmax(z), target o, all in nats and float32::

    logprob = z_o - logsumexp(z)
    entropy = -sum_v p_v ln p_v = logsumexp(z) - sum_v p_v z_v
    sum_p2  = sum_v p_v^2

Gradients, used by the backward pass::

    d logprob / d z_v = [v = o] - p_v
    d entropy / d z_v = -p_v (ln p_v + entropy)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Logits alive at once. On a CPU a chunk that stays in cache is fastest; a GPU wants large matrix products.
CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 27}


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

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (N, V) of hidden states (N, H), multiplied in the dtype of ``hidden``."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return torch.nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias).float()


def distribution_stats(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-probabilities (N, V), entropy (N,) and sum p² (N,) of logits (N, V); tokens of probability 0 count 0.

    Logits of -inf (tokens excluded by top-p) are allowed.
    """
    logp = torch.log_softmax(logits, dim=-1)
    p = logp.exp()
    entropy = -(p * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)
    return logp, entropy, p.square().sum(-1)


def compute_token_stats(hidden: Tensor, head: LMHead, targets: Tensor, temperature: float = 1.0) -> TokenStats:
    """Statistics of target tokens under ``softmax(head(hidden) / temperature)``.

    Differentiable with respect to ``hidden``, ``head.weight`` and ``head.bias`` through ``logprob`` and ``entropy``;
    ``sum_p2`` carries no gradient. The backward pass recomputes the logits chunk by chunk, so that peak memory
    depends on neither the number of tokens nor, times it, the vocabulary.

    Args:
        hidden: Hidden states that predict the targets, (N, H).
        head: The LM head.
        targets: Token ids, (N,).
        temperature: Divides the logits.

    Returns:
        ``TokenStats`` of shape (N,); empty for N = 0.
    """
    return TokenStats(*_ChunkedStats.apply(hidden, head.weight, head.bias, targets, temperature))


class _ChunkedStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = LMHead(weight, bias)
        logprob, entropy, sum_p2 = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        for rows in _chunks(hidden, weight):
            logp, entropy[rows], sum_p2[rows] = distribution_stats(head.logits(hidden[rows]) / temperature)
            logprob[rows] = logp.gather(1, targets[rows, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(sum_p2)
        return logprob, entropy, sum_p2

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprob, grad_entropy, _ = grad_outputs
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        head = LMHead(weight, bias)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for rows in _chunks(hidden, weight):
            logp = torch.log_softmax(head.logits(hidden[rows]) / ctx.temperature, dim=-1)
            p = logp.exp()
            grad = p * -(grad_entropy[rows, None] * (logp + entropy[rows, None]) + grad_logprob[rows, None])
            grad.scatter_add_(1, targets[rows, None], grad_logprob[rows, None])
            grad = (grad / ctx.temperature).to(hidden.dtype)
            grad_hidden[rows] = grad @ weight.to(hidden.dtype)
            grad_weight += (grad.T @ hidden[rows]).to(weight.dtype)
            if grad_bias is not None:
                grad_bias += grad.sum(0).to(grad_bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_LOGITS[hidden.device.type] // len(weight))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def lm_head_grad_norm(
    advantage: Tensor, logprob: Tensor, sum_p2: Tensor, hidden_norm: Tensor, temperature: float
) -> Tensor:
    """Frobenius norm of each token's policy gradient at the LM head, in closed form; all arguments of one shape.

    With G = A / T (onehot(o) - p) h^T, as d(A logprob)/dW: |G| = |A| sqrt(1 - 2 p_o + sum_v p_v^2) |h| / T
    (arXiv 2508.02260, with the temperature made explicit). On-policy: the ratio is 1, nothing is clipped.
    """
    # Rounding can take the square a little below 0 where p_o is close to 1.
    distance = (1 - 2 * logprob.exp() + sum_p2).clamp(min=0).sqrt()
    return advantage.abs() * distance * hidden_norm / temperature
