"""Derive rows of tables ``rollouts`` and ``tokens`` for training and importing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from entrace.analysis.trace.defects import find_defects
from entrace.analysis.trace.groups import perplexity, place_in_group, ppl_z


@dataclass(frozen=True)
class ResponseRows:
    """Hold what the rows of B responses and of their tokens share.

    The responses belong to one step and form whole groups, which integers of at least 0 number. Lengths are in tokens
    and include context. A verdict is None if it is unknown. ``is_kept`` marks the responses that entered the update.
    """

    step: int
    rollout_ids: np.ndarray
    groups: np.ndarray
    prompt_ids: Sequence[str]
    lengths: np.ndarray
    is_correct: Sequence[bool | None]
    is_kept: np.ndarray

    def rollout_columns(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        has_answer: Sequence[bool | None],
        is_truncated: Sequence[bool | None],
    ) -> dict[str, Any]:
        """Return the columns of ``rollouts`` that need no values per token."""
        _, first, group = np.unique(self.groups, return_index=True, return_inverse=True)
        judged = zip(prompts, completions, has_answer, is_truncated, strict=True)
        return {
            "step": self.step,
            "prompt_id": self.prompt_ids,
            "rollout_id": self.rollout_ids,
            # The id of a group is that of its first response.
            "group_id": self.rollout_ids[first[group]],
            "sample_index": place_in_group(self.groups),
            "completion": completions,
            "is_correct": self.is_correct,
            "has_answer": has_answer,
            "defects": [
                find_defects(prompt, completion, has_answer=answered, is_truncated=truncated)
                for prompt, completion, answered, truncated in judged
            ],
            "response_length": self.lengths,
            "is_truncated": is_truncated,
            "is_kept": self.is_kept,
        }

    def generated_columns(
        self, generated_lengths: np.ndarray, entropy: np.ndarray, surprisal: np.ndarray, has_ppl_z: np.ndarray
    ) -> dict[str, pa.Array]:
        """Return the columns of ``rollouts`` that cover only generated tokens.

        Arguments are (B,). Mean entropy and surprisal are in nats, NaN if unknown; ``has_ppl_z`` marks the responses
        whose standardized perplexity is stored.
        """
        return {
            "generated_length": pa.array(generated_lengths, mask=generated_lengths == self.lengths),
            "entropy_mean": nullable(entropy),
            "surprisal_mean": nullable(surprisal),
            "ppl": nullable(perplexity(surprisal)),
            "ppl_z": pa.array(ppl_z(surprisal, self.groups), mask=~has_ppl_z),
        }

    def token_columns(self, rows: np.ndarray) -> dict[str, Any]:
        """Return the columns of ``tokens`` that follow from the responses.

        ``rows`` is the index of the response of each token, (N,), and has all tokens of the responses that occur.
        """
        places = pa.array(rows)
        return {
            "step": self.step,
            "prompt_id": pa.array(self.prompt_ids, pa.string()).take(places),
            "rollout_id": self.rollout_ids[rows],
            "position": place_in_group(rows),
            "response_length": self.lengths[rows],
            "is_correct": pa.array(self.is_correct, pa.bool_()).take(places),
            "is_kept": self.is_kept[rows],
        }


def nullable(values: np.ndarray) -> pa.Array:
    """Return numbers as Arrow stores them, null where they are NaN."""
    return pa.array(values, mask=np.isnan(values))
