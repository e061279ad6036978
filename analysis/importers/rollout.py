"""Define a checked rollout, and the columns of the temporary file of rollouts."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pyarrow as pa

# Who computed the recorded logprobs, as in rollouts.logprob_kind.
TRAINER, ENGINE, RESCORED = "trainer", "engine", "rescored"

FLOATS = pa.list_(pa.float64())
IDS = pa.list_(pa.int32())


@dataclass(frozen=True)
class Rollout:
    """One response with what the dump records of it; None is what the dump lacks.

    Values per token are aligned with ``response_ids``. ``loss_mask`` marks the tokens that the policy generated, and is
    None if it generated all. Other tokens, such as the output of a tool, are context.

    ``group_id`` and ``prompt_id`` follow the recorded group; ``shared_group_id`` and ``shared_prompt_id`` follow prompt
    and step, for dumps whose recorded groups hold one response each. ``has_text`` is False if prompt or completion are
    placeholders. ``advantage`` is that of the response, and ``advantages`` are those of its tokens.
    """

    place: str
    step: int
    group_id: int
    prompt_id: str
    shared_group_id: int
    shared_prompt_id: str
    prompt: str
    prompt_ids: list[int] | None
    completion: str
    has_text: bool
    response_ids: list[int]
    ids_given: bool
    loss_mask: list[bool] | None
    reward: float | None
    reward_components: list[tuple[str, float]] | None
    advantage: float | None
    advantages: list[float | None] | None
    is_correct: bool | None
    is_truncated: bool | None
    is_kept: bool | None
    answer: str | None
    has_answer: bool | None
    ground_truth: str | None
    task: str
    logprob: list[float | None] | None
    logprob_kind: str | None
    sampling_logprob: list[float | None] | None
    reference_logprob: list[float | None] | None
    entropy: list[float | None] | None
    entropy_mean: float | None
    temperature: float | None
    turn: list[int | None] | None
    policy_version: list[int | None] | None

    @property
    def is_generated(self) -> list[bool]:
        """Return which tokens of the response the policy generated."""
        return self.loss_mask or [True] * len(self.response_ids)


TYPES: dict[str, pa.DataType] = {
    **dict.fromkeys(("step",), pa.int32()),
    **dict.fromkeys(("group_id", "shared_group_id"), pa.int64()),
    **dict.fromkeys(("prompt_ids", "response_ids", "turn", "policy_version"), IDS),
    **dict.fromkeys(("has_text", "ids_given", "is_correct", "is_truncated", "is_kept", "has_answer"), pa.bool_()),
    **dict.fromkeys(("reward", "advantage", "entropy_mean", "temperature"), pa.float64()),
    **dict.fromkeys(("advantages", "logprob", "sampling_logprob", "reference_logprob", "entropy"), FLOATS),
    "loss_mask": pa.list_(pa.bool_()),
    "reward_components": pa.map_(pa.string(), pa.float64()),
}
SPILL = pa.schema([(field.name, TYPES.get(field.name, pa.string())) for field in fields(Rollout)])
