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
from transformers import Cache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from entrace.trainer.model.policy import Policy

# Takes tokens (B, 1), their positions (B, 1), an additive mask (B, 1, 1, S), and keys and values of each layer,
# one after the other, (B, heads, S, D), whose last place it fills in. Returns the LM head's input, (B, H).
StepGraph = Callable[..., Tensor]


class StepLayer(DynamicLayer):
    """Keys and values with a place for the token that is read: ``update`` fills that in, where others copy them all."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor | None = None) -> None:
        """Both (B, heads, S, D), to be filled in at ``place``, (1,), or the last one."""
        super().__init__()
        self.keys, self.values, self.dtype, self.device = keys, values, keys.dtype, keys.device
        self.is_initialized = True
        self._place = place

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes the keys and values of the token, (B, heads, 1, D); returns those of all."""
        keys: Any = self.keys
        values: Any = self.values
        if self._place is None:
            keys[:, :, -1:], values[:, :, -1:] = key_states, value_states
        else:
            keys.index_copy_(2, self._place, key_states.to(keys.dtype))
            values.index_copy_(2, self._place, value_states.to(values.dtype))
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens before the one that is read."""
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
    """Keys and values of each layer, one after the other."""
    layers: list[Any] = cache.layers
    return [states for layer in layers for states in (layer.keys, layer.values)]


def step_cache(states: Sequence[Tensor], place: Tensor | None = None) -> Cache:
    """A cache of such keys and values as ``states_of`` gives, each with a place for the token that is read: the last.

    Args:
        states: (B, heads, S, D) each.
        place: Another place, (1,) int64; what is read sees the later ones too, unless a mask hides them.
    """
    return Cache(layers=[StepLayer(*pair, place) for pair in zip(states[::2], states[1::2], strict=True)])


def trace_step(policy: Policy, ids: Tensor, positions: Tensor, mask: Tensor, states: list[Tensor]) -> StepGraph:
    """Trace a pass over such arguments.

    Raises:
        Exception: torch cannot trace it, or warns that the trace would not hold for other arguments.
    """
    # Its type stubs leave out what its documentation names.
    jit: Any = torch.jit
    with _quietly(), _without_padding_index(policy.model):
        warnings.simplefilter("error", jit.TracerWarning)
        return jit.trace(_Step(policy.model.base_model), (ids, positions, mask, *states), check_trace=False)


@contextmanager
def _without_padding_index(model: nn.Module) -> Iterator[None]:
    """Within, embeddings do not compare their padding index with their size; it says what has no gradient, no more."""
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
