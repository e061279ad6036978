"""Compute statistics of tokens from logits that are already in memory.

No part of training needs this.
"""

import torch
from torch import Tensor

from entrace.trainer.kernels.token_stats import Softmax, Sums, TokenStats, triton_kernels

# Logits per pass. More would not fit into a CPU's cache, or take too much of a GPU's memory.
LOGITS = {"cpu": 1 << 20, "cuda": 1 << 25}


def stats_of_logits(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenStats:
    """Return statistics of target tokens (N,), without gradient.

    The distribution is softmax(logits / temperature), with logits (N, V).
    """
    if kernels := triton_kernels(logits.device):
        return Sums(*kernels.sums(logits.contiguous(), targets.contiguous(), 0, temperature)).stats(temperature)
    tokens = max(1, LOGITS[logits.device.type] // logits.shape[1])
    buffer = torch.empty(2 * min(tokens, len(logits)) * logits.shape[1], device=logits.device)
    parts = [
        Softmax.of(rows, temperature, buffer).sums(own)
        for rows, own in zip(logits.split(tokens), targets.split(tokens), strict=True)
    ]
    return Sums.concatenate(parts).stats(temperature)
