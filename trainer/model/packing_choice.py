"""Choose between padded and packed updates by measurement.

On a GPU, neither is always faster.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from entrace.trainer.model.policy import Policy

log = logging.getLogger("entrace")

# Groups that share a prompt, responses per group, and most tokens of a prompt and of a response: 4,096 with padding.
GROUPS, SAMPLES, TOKENS = 4, 4, 128
ROUNDS = 3


def why_padded(policy: Policy) -> str:
    """Time updates padded and packed; return why padding is used, or "".

    Both passes of an update are timed on the same tokens.

    Args:
        policy: The model, which can pack; its gradients are discarded.
    """
    try:
        padded, packed = (min(seconds) for seconds in zip(*(_time_round(policy) for _ in range(ROUNDS)), strict=True))
    except torch.OutOfMemoryError:
        return "memory ran out while packing was compared with padding"
    finally:
        policy.model.zero_grad(set_to_none=True)
    log.info("updates: %.3g s padded, %.3g s packed", padded, packed)
    return "" if packed < padded else f"padding is faster, {padded:.3g} s against {packed:.3g} s"


def _time_round(policy: Policy) -> tuple[float, float]:
    """Return the seconds of a padded and of a packed update, each after a warm-up."""
    size = policy.vocab_size
    most_positions = getattr(policy.model.config, "max_position_embeddings", None) or 2 * TOKENS
    longest = min(TOKENS, most_positions // 2)
    prompts = [[(7 * group + i) % size for i in range(longest)] for group in range(GROUPS) for _ in range(SAMPLES)]
    # Lengths as they occur: from a quarter of the longest to the longest.
    lengths = [longest * (1 + row % SAMPLES) // SAMPLES for row in range(len(prompts))]
    responses = [torch.arange(row, row + length) % size for row, length in enumerate(lengths)]
    padded, packed = (replace(policy, why_unpacked=reason) for reason in ("compared with packing", ""))
    seconds = []
    # The first of each pair warms up.
    for chosen in (padded, padded, packed, packed):
        started = time.perf_counter()
        chosen.token_stats(prompts, responses, 1.0).logprob.mean().backward()
        if policy.device.type == "cuda":
            torch.cuda.synchronize(policy.device)
        seconds.append(time.perf_counter() - started)
    return seconds[1], seconds[3]
