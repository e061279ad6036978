"""Reading prompts and continuing them token by token, with a cache of keys and values."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from trainer import attention
from trainer.step_graph import StepGraph, hold_states, record_step, states_of

if TYPE_CHECKING:
    from trainer.policy import Policy


class Decoder:
    """Sequences that grow by a token at a time and branch, prompts padded on the left.

    Attributes:
        hidden: The LM head's input at the last token of each sequence, (B, H).
    """

    def __init__(self, policy: Policy, prompts: list[list[int]]) -> None:
        """Begins with the prompts."""
        self._policy, device = policy, policy.device
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        places = torch.arange(width, device=device)
        self._mask = places >= (width - lengths)[:, None]
        self._lengths = lengths
        self._cache = DynamicCache(config=policy.model.config)
        self._is_plain = all(type(layer) is DynamicLayer for layer in self._cache.layers)
        # A mask of four dimensions is used as it is; one of two would be expanded by the model at every step. But that
        # is known of these only, and layers that look back a limited way need one of their own.
        is_fused = policy.model.config._attn_implementation in ("sdpa", attention.NAME)
        self._takes_mask_as_is = is_fused and not any(self._cache.is_sliding)
        self._takes_positions = "position_ids" in inspect.signature(policy.model.base_model.forward).parameters
        self.hidden = self._forward(ids, (places - (width - lengths)[:, None]).clamp(min=0))

    def append(self, tokens: Tensor, parents: Tensor) -> None:
        """Goes on with other sequences.

        Args:
            tokens: Last token of each, (C,).
            parents: Which of the present sequences stands before it, (C,).
        """
        tokens, parents = tokens.to(self._policy.device), parents.to(self._policy.device)
        if not torch.equal(parents, torch.arange(len(self.hidden), device=parents.device)):
            self._select(parents)
        self._mask = torch.cat((self._mask, self._mask.new_ones(len(tokens), 1)), dim=1)
        self.hidden = self._forward(tokens[:, None], self._lengths[:, None])
        self._lengths = self._lengths + 1

    def record_step(self) -> StepGraph | None:
        """Records the pass over a further token, for these and other sequences; None where that cannot be."""
        is_ours = attention.is_ours(self._policy.model) and self._takes_mask_as_is
        if not (is_ours and self._is_plain and self._takes_positions):
            return None
        mask = torch.cat((self._mask, self._mask[:, :1]), dim=1)
        ids, mask = torch.zeros_like(self._lengths[:, None]), attention.additive(mask[:, None, None, :], torch.float32)
        return record_step(self._policy, ids, self._lengths[:, None], mask, states_of(self._cache))

    def _select(self, rows: Tensor) -> None:
        self._mask, self._lengths = self._mask[rows], self._lengths[rows]
        if self._is_plain:
            # What the library's own method does takes several times as long on a CPU.
            hold_states(self._cache, [states.index_select(0, rows) for states in states_of(self._cache)])
        else:
            self._cache.batch_select_indices(rows)

    # Spares every operation what autograd would keep account of.
    @torch.inference_mode()
    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        is_step, policy = ids.shape[1] == 1, self._policy
        graph = policy.step_graph if is_step and self._mask.shape[1] <= attention.MAX_KEYS else None
        mask = None if self._mask.all() and graph is None else self._mask
        if mask is not None and is_step and self._takes_mask_as_is:
            # Once for all layers.
            mask = attention.additive(mask[:, None, None, :], policy.dtype)
        if graph is not None:
            hidden, *states = graph(ids, positions, mask, *states_of(self._cache))
            hold_states(self._cache, states)
            return hidden
        inputs = {"position_ids": positions} if self._takes_positions else {}
        hidden = policy.hidden_states(ids, attention_mask=mask, past_key_values=self._cache, use_cache=True, **inputs)
        return hidden[:, -1]
