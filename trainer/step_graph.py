"""A model's pass over one more token of each sequence, recorded once and run again without Python.

Of a small model's pass on a CPU, half the time is Python's. Torch records the operations that a pass runs
(``torch.jit.trace``), for sequences of any number and length, as long as none of the model's own decisions hangs on
values or sizes: of those torch warns, and nothing is recorded.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

if TYPE_CHECKING:
    from trainer.policy import Policy

# Takes tokens (B, 1), their positions (B, 1), an additive mask (B, 1, 1, S + 1) and keys and values of each layer,
# (B, heads, S, D), one after the other; returns the LM head's input, (B, H), and the keys and values that follow.
StepGraph = Callable[..., tuple[Tensor, ...]]


class _Step(nn.Module):
    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__()
        self.model, self._config = model, config

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        cache = DynamicCache(config=self._config)
        hold_states(cache, states)
        found = self.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return found.last_hidden_state[:, -1], *states_of(cache)


def states_of(cache: DynamicCache) -> list[Tensor]:
    """Keys and values of each layer, one after the other."""
    layers: list[Any] = cache.layers
    return [states for layer in layers for states in (layer.keys, layer.values)]


def hold_states(cache: DynamicCache, states: Sequence[Tensor]) -> None:
    """Puts in what ``states_of`` gave."""
    layers: list[Any] = cache.layers
    for layer, keys, values in zip(layers, states[::2], states[1::2], strict=True):
        layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
        layer.is_initialized = True


def record_step(policy: Policy, ids: Tensor, positions: Tensor, mask: Tensor, states: list[Tensor]) -> StepGraph | None:
    """Records a pass over such arguments; None if torch cannot, or warns that it would not hold for others."""
    # Its type stubs leave out what its documentation names.
    jit: Any = torch.jit
    step = _Step(policy.model.base_model, policy.model.config)
    with _quietly():
        warnings.simplefilter("error", jit.TracerWarning)
        try:
            return jit.trace(step, (ids, positions, mask, *states), check_trace=False)
        except Exception:
            return None


@contextmanager
def _quietly() -> Iterator[None]:
    """Recording asks a model for all of its properties, of which some warn; and is deprecated by torch.

    What is to follow it, torch.export, runs its graphs in Python again.
    """
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
