"""Trace a decoding step once with ``torch.jit.trace``, and run it without Python.

Python takes half the time of a small model's step on a CPU. The trace holds for any number and length of sequences if
the model's control flow depends on neither values nor sizes. Otherwise torch warns, and the trace is rejected.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from entrace.trainer.model.policy import Policy

# Takes tokens (B, 1), their positions (B, 1), an additive mask (B, 1, 1, S), and the keys and values of each layer in
# turn, (B, heads, S, D), whose last position it fills in. Returns the LM head's input, (B, H).
StepGraph = Callable[..., Tensor]


class StepLayer(DynamicLayer):
    """Hold keys and values with a free position for the new token.

    ``update`` fills in the position without copying.
    """

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor | None = None) -> None:
        """Wrap keys and values (B, heads, S, D) to be filled in at one position.

        The position is ``place``, (1,), or the last one if None.
        """
        super().__init__()
        self.keys, self.values, self.dtype, self.device = keys, values, keys.dtype, keys.device
        self.is_initialized = True
        self._place = place

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values of the new token; return those of all tokens.

        Stored shape: (B, heads, 1, D).
        """
        keys: Any = self.keys
        values: Any = self.values
        if self._place is None:
            keys[:, :, -1:], values[:, :, -1:] = key_states, value_states
        else:
            keys.index_copy_(2, self._place, key_states.to(keys.dtype))
            values.index_copy_(2, self._place, value_states.to(values.dtype))
        return keys, values

    def get_seq_length(self) -> int:
        """Return the number of tokens before the new one."""
        keys: Any = self.keys
        return keys.shape[-2] - 1


class _Step(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, *states: Tensor) -> Tensor:
        cache = step_cache(states)
        found = self.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return found.last_hidden_state[:, -1]


def states_of(cache: Cache) -> list[Tensor]:
    """Return the keys and values of each layer in turn."""
    layers: list[Any] = cache.layers
    return [states for layer in layers for states in (layer.keys, layer.values)]


def step_cache(states: Sequence[Tensor], place: Tensor | None = None) -> Cache:
    """Build a cache with a free position for the new token.

    Keys and values are in the order of ``states_of``.

    Args:
        states: Keys and values, (B, heads, S, D) each.
        place: The free position, (1,) int64; the last one if None. A mask must hide later positions.
    """
    return Cache(layers=[StepLayer(*pair, place) for pair in zip(states[::2], states[1::2], strict=True)])


def trace_step(policy: Policy, ids: Tensor, positions: Tensor, mask: Tensor, states: list[Tensor]) -> StepGraph:
    """Trace a decoding step with example arguments of a ``StepGraph``.

    Raises:
        RuntimeError, TracerWarning: torch cannot trace the step, or the trace would not hold for other arguments.
    """
    # The documented functions are missing from torch's type stubs.
    jit: Any = torch.jit
    with _quietly(), _without_padding_index(policy.model):
        warnings.simplefilter("error", jit.TracerWarning)
        return jit.trace(_Step(policy.model.base_model), (ids, positions, mask, *states), check_trace=False)


@contextmanager
def _without_padding_index(model: nn.Module) -> Iterator[None]:
    """Unset padding indices of embeddings in the block.

    The check of an index depends on sizes. Padding indices only affect gradients.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    indices = [module.padding_idx for module in embeddings]
    try:
        for module in embeddings:
            module.padding_idx = None
        yield
    finally:
        for module, index in zip(embeddings, indices, strict=True):
            module.padding_idx = index


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress warnings during tracing.

    Tracing reads all properties of a model, some of which warn, and torch deprecates tracing. The successor,
    torch.export, runs its graphs in Python.
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
