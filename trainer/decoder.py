"""Reading prompts and continuing them token by token, with a cache of keys and values."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from trainer import attention

if TYPE_CHECKING:
    from trainer.policy import Policy


class Decoder:
    """Sequences that grow by a token at a time, prompts padded on the left.

    Attributes:
        hidden: The LM head's input at the last token of each sequence, (B, H).
    """

    def __init__(self, policy: Policy, prompts: list[list[int]], num_samples: int = 1) -> None:
        """Reads each prompt once and shares its cache out to ``num_samples`` sequences, which stand side by side."""
        self._policy, device = policy, policy.device
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        places = torch.arange(width, device=device)
        self._mask = places >= (width - lengths)[:, None]
        self._lengths = lengths
        self._cache = DynamicCache(config=policy.model.config)
        # A mask of four dimensions is used as it is; one of two would be expanded by the model at every step. But that
        # is known of these only, and layers that look back a limited way need one of their own.
        is_plain = policy.model.config._attn_implementation in ("sdpa", attention.NAME)
        self._takes_mask_as_is = is_plain and not any(self._cache.is_sliding)
        self._takes_positions = "position_ids" in inspect.signature(policy.model.base_model.forward).parameters
        self.hidden = self._forward(ids, (places - (width - lengths)[:, None]).clamp(min=0))
        if num_samples > 1:
            self._cache.batch_repeat_interleave(num_samples)
            self._mask, self._lengths, self.hidden = (
                values.repeat_interleave(num_samples, dim=0) for values in (self._mask, self._lengths, self.hidden)
            )

    def keep(self, rows: Tensor) -> None:
        """Goes on with these sequences only."""
        rows = rows.to(self._policy.device)
        self._cache.batch_select_indices(rows)
        self._mask, self._lengths, self.hidden = self._mask[rows], self._lengths[rows], self.hidden[rows]

    def append(self, tokens: Tensor) -> None:
        """Adds a token (B,) to each sequence."""
        self._mask = torch.cat((self._mask, self._mask.new_ones(len(tokens), 1)), dim=1)
        self.hidden = self._forward(tokens[:, None].to(self._policy.device), self._lengths[:, None])
        self._lengths = self._lengths + 1

    # Spares every operation what autograd would keep account of.
    @torch.inference_mode()
    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        inputs = {"position_ids": positions} if self._takes_positions else {}
        mask = None if self._mask.all() else self._mask
        if mask is not None and ids.shape[1] == 1 and self._takes_mask_as_is:
            # Once for all layers.
            mask = attention.additive(mask[:, None, None, :], self._policy.dtype)
        return self._policy.hidden_states(
            ids, attention_mask=mask, past_key_values=self._cache, use_cache=True, **inputs
        )[:, -1]
