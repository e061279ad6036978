"""Reading prompts and continuing them token by token, with a cache of keys and values."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from entrace.trainer.kernels import attention
from entrace.trainer.sampling.cuda_graph import Replay
from entrace.trainer.sampling.jit_step import StepGraph, states_of, step_cache, trace_step

if TYPE_CHECKING:
    from entrace.trainer.model.policy import Policy

# Tokens that room is made for at once. What lies far apart in memory takes longer to read; but on a GPU, the pass is
# recorded anew each time.
GROWTH = {"cpu": 16, "cuda": 256}


class Decoder:
    """Sequences that grow by a token at a time and branch, prompts padded on the left.

    Each stands in a slot of memory. One that goes on stays there, and nothing of it is copied; one that branches off
    another moves into a slot that is free, as the last ones do where others have ended, so that there are no gaps.

    Attributes:
        hidden: The LM head's input at the last token of each sequence, (B, H).
    """

    @torch.inference_mode()
    def __init__(
        self,
        policy: Policy,
        prompts: list[list[int]],
        num_slots: int,
        graph: StepGraph | None = None,
        *,
        max_tokens: int = sys.maxsize,
        replays: bool = False,
    ) -> None:
        """Begins with the prompts.

        Args:
            policy: The model.
            prompts: Token ids of each.
            num_slots: Most sequences at any time, at least as many as prompts.
            graph: What was recorded of the policy, for sequences that are short enough.
            max_tokens: Most tokens that each may grow by.
            replays: Read further tokens in all slots at once, whether in use or not, and up to all places that there is
                room for, so that on a GPU the pass can be recorded and replayed.

        Raises:
            ValueError: the model cannot be read so.
        """
        self._policy, self._num_slots, self._graph, self._replays = policy, num_slots, graph, replays
        device, config = policy.device, policy.model.config
        cache = DynamicCache(config=config)
        is_plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        # A mask of four dimensions is used as it is; one of two would be expanded by the model at every step. But that
        # is known of these only, and layers that look back a limited way need one of their own.
        is_fused = config._attn_implementation in ("sdpa", attention.NAME)
        self._takes_mask_as_is = is_fused and not any(cache.is_sliding)
        self._takes_positions = "position_ids" in inspect.signature(policy.model.base_model.forward).parameters
        self._width = width = max(len(prompt) for prompt in prompts)
        self._max_width = width + max_tokens
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        places = torch.arange(width, device=device) - (width - self._lengths)[:, None]
        self._mask = places >= 0
        self._is_padded = not bool(self._mask.all())
        self.hidden = self._forward(ids, places.clamp(min=0), self._mask if self._is_padded else None, cache)
        self._slots = np.arange(len(prompts))
        # Layers that keep something else than the keys and values of all tokens see to it themselves.
        self._states = states_of(cache) if is_plain else []
        self._cache = None if is_plain else cache
        if replays and not self._is_replayable:
            raise ValueError("a pass over further tokens cannot be replayed")
        self._step: Replay | None = None

    @torch.inference_mode()
    def append(self, tokens: Tensor, parents: Tensor) -> None:
        """Goes on with other sequences.

        Args:
            tokens: Last token of each, (C,).
            parents: Which of the present sequences stands before it, (C,), in ascending order.
        """
        before, count, device = len(self._slots), len(tokens), self._policy.device
        if self._width == self._mask.shape[1] or count > len(self._mask):
            self._grow(count)
        self._slots, sources, targets = _assign(self._slots, parents.numpy())
        if len(targets) or count < before:
            self._move(torch.from_numpy(sources).to(device), torch.from_numpy(targets).to(device), count)
        slots = torch.from_numpy(self._slots)
        ids = torch.empty_like(tokens).index_copy_(0, slots, tokens).to(device)
        self.hidden = self._read(ids[:, None]).index_select(0, slots.to(device))
        self._width += 1
        self._lengths[:count] += 1

    @torch.inference_mode()
    def trace_step(self) -> StepGraph:
        """Trace the pass over one further token, for these and other sequences.

        Raises:
            ValueError: the model does not use packed attention, or keeps more than keys and values.
            RuntimeError, TracerWarning: torch cannot trace the pass, or the trace would not hold for other sequences.
        """
        if not (attention.is_ours(self._policy.model) and self._is_replayable):
            raise ValueError("needs packed attention and a plain KV cache")
        self._grow(len(self._slots))
        positions, mask, *states = self._held(len(self._slots))
        mask = attention.additive(mask[:, None, None, :], torch.float32)
        return trace_step(self._policy, torch.zeros_like(positions), positions, mask, states)

    @property
    def _is_replayable(self) -> bool:
        return bool(self._states) and self._takes_mask_as_is and self._takes_positions

    def _grow(self, count: int) -> None:
        """Makes room for twice ``count`` sequences, of those that there may be, and for some more tokens of each.

        Not for all that may follow: what lies far apart in memory takes longer to read.
        """
        used, width, device = len(self._slots), self._width, self._policy.device
        rows = min(self._num_slots, 2 * max(used, count))
        places = min(self._max_width, width + GROWTH[device.type])
        self._mask = pad(self._mask[:used, :width], (0, places - width, 0, rows - used), value=True)
        self._lengths = pad(self._lengths[:used], (0, rows - used))
        for i, states in enumerate(self._states):
            _, heads, _, size = states.shape
            # Places that are read before anything is written there may not hold what is no number.
            new = states.new_zeros if self._replays else states.new_empty
            dtype = self._policy.dtype if self._replays else states.dtype
            self._states[i] = new((rows, heads, places, size), dtype=dtype)
            self._states[i][:used, :, :width] = states[:used, :, :width]
        if self._replays:
            self._ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
            self._place = torch.zeros(1, dtype=torch.int64, device=device)
            self._step = Replay()

    def _move(self, sources: Tensor, targets: Tensor, count: int) -> None:
        """Copies what stands in some slots to others; ``count`` are in use then."""
        if self._cache is not None:
            order = torch.arange(count, device=targets.device).index_copy_(0, targets, sources)
            self._cache.batch_select_indices(order)
        used = [states[:, :, : self._width] for states in self._states]
        for tensor in (self._mask, self._lengths, *used):
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))

    def _held(self, count: int) -> list[Tensor]:
        """Positions (B, 1), mask (B, S + 1) and keys and values of the first slots, with a place for the next token."""
        places = self._width + 1
        states = [states[:count, :, :places] for states in self._states]
        return [self._lengths[:count, None], self._mask[:count, :places], *states]

    def _read(self, ids: Tensor) -> Tensor:
        """Reads a token (B, 1) in each of the first slots."""
        if self._step is not None:
            self._ids[: len(ids)] = ids
            self._place.fill_(self._width)
            return self._step(self._read_all_slots)
        policy = self._policy
        positions, mask, *states = self._held(len(ids))
        graph = self._graph if mask.shape[1] <= attention.MAX_KEYS else None
        if graph is None and not self._is_padded:
            mask = None
        elif self._takes_mask_as_is:
            # Once for all layers.
            mask = attention.additive(mask[:, None, None, :], policy.dtype)
        if graph is not None:
            return graph(ids, positions, mask, *states)
        return self._forward(ids, positions, mask, step_cache(states) if self._cache is None else self._cache)

    def _read_all_slots(self) -> Tensor:
        """Reads ``_ids`` (rows, 1) at ``_place``, with nothing that hangs on how many there are, or how long."""
        is_seen = self._mask & (torch.arange(self._mask.shape[1], device=self._mask.device) <= self._place)
        mask = attention.additive(is_seen[:, None, None, :], self._policy.dtype)
        return self._forward(self._ids, self._lengths[:, None], mask, step_cache(self._states, self._place))

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        inputs = {"position_ids": positions} if self._takes_positions else {}
        hidden = self._policy.hidden_states(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **inputs)
        return hidden[:, -1]


def _assign(slots: np.ndarray, parents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slots (C,) of sequences that go on from others, of which ``slots`` (B,) says where they stand.

    Also what has to be copied: from which slots, and to which. None of the latter is among the former.
    """
    came_from = slots[parents]
    stays = came_from < len(parents)
    stays[1:] &= parents[1:] != parents[:-1]
    is_free = np.ones(len(parents), dtype=bool)
    is_free[came_from[stays]] = False
    targets = np.flatnonzero(is_free)
    assigned = came_from.copy()
    assigned[~stays] = targets
    return assigned, came_from[~stays], targets
