"""Read the batches that TRL builds: responses, rewards, verdicts, and masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from entrace.trainer.live.arguments import choose_correct
from entrace.trainer.live.generation import Generation
from entrace.trainer.live.messages import first_of, identify, number_repeats, text_of

GROUND_TRUTH = ("ground_truth", "solution", "answer")
TASK = ("task", "data_source")


@dataclass
class Scored:
    """Hold the inputs, rewards, and output of one batch while TRL builds it."""

    output: Any = None
    inputs: Any = None
    prompts: Any = None
    completions: Any = None
    ids: Any = None
    rewards: Any = None
    reward_s: float = 0.0


class BatchReader:
    """Read batches of a trainer.

    Attributes:
        reward_names: Names of the reward functions, each once.
        correct: Rule that decides correctness; see ``choose_correct``.
        correct_note: That rule in words.
    """

    def __init__(self, trainer: Any, correct: str | float | None) -> None:
        """Choose the rule that decides correctness.

        Raises:
            InputError: ``correct`` names no reward function, or is not a number.
        """
        self._trainer = trainer
        self.reward_names = number_repeats(trainer.reward_func_names)
        self.correct, self.correct_note = choose_correct(correct, self.reward_names)

    def begin(self, scored: Scored, *, step: int, policy_step: int) -> Generation:
        """Return the batch that TRL has built, before its statistics are known."""
        trainer, output = self._trainer, scored.output
        count = len(scored.ids)
        width = output["completion_ids"].shape[1]
        lengths = torch.tensor([len(ids) for ids in scored.ids])
        loss_mask = torch.arange(width) < lengths[:, None]
        described = self.describe(scored)
        is_truncated = np.array(described["response"]["is_truncated"])
        is_masked = is_truncated & bool(trainer.mask_truncated_completions)
        if "tool_mask" in output:
            # TRL clears the mask of truncated responses, so that their context is unknown.
            tool_mask = output["tool_mask"].cpu().bool()
            loss_mask &= tool_mask | torch.from_numpy(is_masked)[:, None]
        token = {}
        for name, key in (
            ("sampling_logprob", "sampling_per_token_logps"),
            ("reference_logprob", "ref_per_token_logps"),
        ):
            if output.get(key) is not None:
                token[name] = output[key].detach().float().cpu()
        group = (trainer.accelerator.process_index * count + np.arange(count)) // trainer.num_generations
        kept = ("prompt_ids", "prompt_mask", "completion_ids")
        return Generation(
            step=step,
            policy_step=policy_step,
            policy_version=trainer.state.global_step,
            responses=described["response"],
            ids=scored.ids,
            group=group,
            rewards=described["reward"],
            is_correct=described["is_correct"],
            loss_mask=loss_mask,
            is_masked=is_masked,
            advantage=output["advantages"].detach().float().cpu(),
            tensors={name: output[name] for name in kept},
            slices=trainer.args.steps_per_generation * trainer.num_iterations,
            temperature=trainer.temperature,
            can_score="pixel_values" not in output,
            token=token,
        )

    def describe(self, scored: Scored) -> dict[str, Any]:
        """Return values per response that do not depend on the policy's probabilities."""
        trainer = self._trainer
        ends = {*eos_ids(trainer), trainer._tokenizer.pad_token_id}
        start = trainer.accelerator.process_index * len(scored.ids)
        scores = scored.rewards[start : start + len(scored.ids)]
        weighted = (scores * trainer.reward_weights.to(scores.device)).nansum(1)
        weighted[scores.isnan().all(1)] = torch.nan
        components = [
            {name: score for name, score in zip(self.reward_names, row, strict=True) if score == score}
            for row in scores.tolist()
        ]
        response = {
            "prompt": [text_of(prompt) for prompt in scored.prompts],
            "prompt_id": [identify(prompt) for prompt in scored.prompts],
            "completion": [text_of(completion) for completion in scored.completions],
            "is_truncated": [not ids or ids[-1] not in ends for ids in scored.ids],
            "reward_components": components,
            "ground_truth": [first_of(row, GROUND_TRUTH) for row in scored.inputs],
            "task": [first_of(row, TASK) or " + ".join(self.reward_names) for row in scored.inputs],
        }
        return {
            "response": response,
            "reward": weighted.double().numpy(),
            "is_correct": [self._judge(*pair) for pair in zip(components, weighted.tolist(), strict=True)],
            "response_length": [len(ids) for ids in scored.ids],
            "entropy_mean": [None] * len(scored.ids),
        }

    def _judge(self, components: Mapping[str, float], reward: float) -> bool | None:
        if self.correct is None:
            return None
        if isinstance(self.correct, str):
            score = components.get(self.correct)
            return None if score is None else score >= 1
        return None if reward != reward else reward >= self.correct


def eos_ids(trainer: Any) -> list[int]:
    """Return the token ids that end a response."""
    return list(getattr(trainer, "eos_token_ids", None) or [trainer._tokenizer.eos_token_id])
