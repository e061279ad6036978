"""Read prompts and extend them token by token, with a KV cache."""

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
from entrace.trainer.sampling.cuda_graph import CudaGraph
from entrace.trainer.sampling.jit_step import StepGraph, states_of, step_cache, trace_step

if TYPE_CHECKING:
    from entrace.trainer.model.policy import Policy

# Token positions by which the cache grows. Unused positions spread the cache over memory, which slows reading; on a
# GPU, each growth needs a new capture.
GROWTH = {"cpu": 16, "cuda": 256}


class Decoder:
    """Hold sequences that grow token by token and branch; prompts are left-padded.

    Each sequence has a slot of the KV cache. The first continuation of a sequence keeps the slot without copying; each
    further branch is copied into a free slot. When sequences end, the last ones move into their slots, which leaves no
    gaps.

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
        uses_cuda_graph: bool = False,
    ) -> None:
        """Read the prompts.

        Args:
            policy: The model.
            prompts: Token ids of each prompt.
            num_slots: Most sequences at any time, at least the number of prompts.
            graph: Traced decoding step of the policy, used up to ``attention.MAX_KEYS`` positions.
            max_tokens: Most tokens by which a sequence grows.
            uses_cuda_graph: Compute every step for all slots and all allocated positions, used or not, so that shapes
                stay fixed and a GPU can capture the step in a CUDA graph.

        Raises:
            ValueError: ``uses_cuda_graph`` is set, but the model does not allow it.
        """
        self._policy, self._num_slots, self._graph = policy, num_slots, graph
        self._uses_cuda_graph = uses_cuda_graph
        device, config = policy.device, policy.model.config
        cache = DynamicCache(config=config)
        is_plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        # These implementations take a four-dimensional mask as it is; the model would expand a two-dimensional one at
        # every step. Sliding-window layers need a mask of their own.
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
        # Layers that store anything except the keys and values of all tokens manage their own memory.
        self._states = states_of(cache) if is_plain else []
        self._cache = None if is_plain else cache
        if uses_cuda_graph and not self._has_fixed_step:
            raise ValueError("needs a plain KV cache, fused attention, and position_ids")
        self._step: CudaGraph | None = None

    @torch.inference_mode()
    def append(self, tokens: Tensor, parents: Tensor) -> None:
        """Replace the sequences by continuations of them.

        Args:
            tokens: Next token of each continuation, (C,).
            parents: Index of the sequence that each one continues, (C,), ascending.
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
        """Trace the decoding step for any sequences, with the current ones as example.

        Raises:
            ValueError: the model does not use packed attention, or caches anything except keys and values.
            RuntimeError, TracerWarning: torch cannot trace the step, or the trace would not hold for other sequences.
        """
        if not (attention.is_ours(self._policy.model) and self._has_fixed_step):
            raise ValueError("needs packed attention, a plain KV cache, and position_ids")
        self._grow(len(self._slots))
        positions, mask, *states = self._held(len(self._slots))
        mask = attention.additive(mask[:, None, None, :], torch.float32)
        return trace_step(self._policy, torch.zeros_like(positions), positions, mask, states)

    @property
    def _has_fixed_step(self) -> bool:
        """Return True if a decoding step depends on its tensor arguments only.

        The arguments are tokens, positions, mask, keys, and values.
        """
        return bool(self._states) and self._takes_mask_as_is and self._takes_positions

    def _grow(self, count: int) -> None:
        """Allocate slots for more sequences, and positions for more tokens.

        There is room for up to twice ``count`` sequences and ``GROWTH`` more tokens of each. Not for all tokens at
        once: a cache that is spread over memory takes longer to read.
        """
        used, width, device = len(self._slots), self._width, self._policy.device
        rows = min(self._num_slots, 2 * max(used, count))
        places = min(self._max_width, width + GROWTH[device.type])
        self._mask = pad(self._mask[:used, :width], (0, places - width, 0, rows - used), value=True)
        self._lengths = pad(self._lengths[:used], (0, rows - used))
        for i, states in enumerate(self._states):
            _, heads, _, size = states.shape
            # Steps of fixed shape read unwritten positions, which must not be NaN.
            new = states.new_zeros if self._uses_cuda_graph else states.new_empty
            dtype = self._policy.dtype if self._uses_cuda_graph else states.dtype
            self._states[i] = new((rows, heads, places, size), dtype=dtype)
            self._states[i][:used, :, :width] = states[:used, :, :width]
        if self._uses_cuda_graph:
            self._ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
            self._place = torch.zeros(1, dtype=torch.int64, device=device)
            self._step = CudaGraph()

    def _move(self, sources: Tensor, targets: Tensor, count: int) -> None:
        """Copy sequences between slots, after which ``count`` slots are in use."""
        if self._cache is not None:
            order = torch.arange(count, device=targets.device).index_copy_(0, targets, sources)
            self._cache.batch_select_indices(order)
        used = [states[:, :, : self._width] for states in self._states]
        for tensor in (self._mask, self._lengths, *used):
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))

    def _held(self, count: int) -> list[Tensor]:
        """Return positions, mask, keys, and values of the first slots.

        Positions have shape (B, 1), the mask (B, S + 1). The next token is included.
        """
        places = self._width + 1
        states = [states[:count, :, :places] for states in self._states]
        return [self._lengths[:count, None], self._mask[:count, :places], *states]

    def _read(self, ids: Tensor) -> Tensor:
        """Compute the step for one token in each of the first slots, (B, 1).

        Returns the LM head's inputs, (B, H).
        """
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
            # Converted once for all layers.
            mask = attention.additive(mask[:, None, None, :], policy.dtype)
        if graph is not None:
            return graph(ids, positions, mask, *states)
        return self._forward(ids, positions, mask, step_cache(states) if self._cache is None else self._cache)

    def _read_all_slots(self) -> Tensor:
        """Compute the step for ``_ids`` at ``_place``, with fixed shapes.

        ``_ids`` has shape (rows, 1). All shapes depend on allocated memory only.
        """
        is_seen = self._mask & (torch.arange(self._mask.shape[1], device=self._mask.device) <= self._place)
        mask = attention.additive(is_seen[:, None, None, :], self._policy.dtype)
        return self._forward(self._ids, self._lengths[:, None], mask, step_cache(self._states, self._place))

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        inputs = {"position_ids": positions} if self._takes_positions else {}
        hidden = self._policy.hidden_states(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **inputs)
        return hidden[:, -1]


def _assign(slots: np.ndarray, parents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Assign the first C slots to continuations of sequences in ``slots`` (B,).

    Returns:
        The slot of each continuation, (C,); the slots to copy from; and the slots to copy to, disjoint from the former.
    """
    parent_slots = slots[parents]
    stays = parent_slots < len(parents)
    stays[1:] &= parents[1:] != parents[:-1]
    is_free = np.ones(len(parents), dtype=bool)
    is_free[parent_slots[stays]] = False
    targets = np.flatnonzero(is_free)
    assigned = parent_slots.copy()
    assigned[~stays] = targets
    return assigned, parent_slots[~stays], targets
