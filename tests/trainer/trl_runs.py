"""Small runs of TRL on the embedded policy, and a witness.

``Witness`` keeps the facts that the trace must agree with.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import polars as pl
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from entrace.trainer.resources import find_base_policy
from entrace.trl import Traced

POLICY = str(find_base_policy())
SUMS = [(a, b, c) for a in range(4) for b in range(3) for c in range(3)]
TEXT = "State the final answer to the following arithmetic problem: {} + {} - {} ="


def dataset(count: int = 12) -> Dataset:
    rows = [
        {
            "prompt": [{"role": "user", "content": TEXT.format(a, b, c)}],
            "solution": str(a + b - c),
        }
        for a, b, c in SUMS[:count]
    ]
    return Dataset.from_list(rows)


def is_right(completions, solution, **kwargs):
    return [float(f">{wanted}<" in text[0]["content"]) for text, wanted in zip(completions, solution, strict=True)]


def is_short(completions, **kwargs):
    """Return a score per response, or None if its length is a multiple of 3.

    Every response has a score of some function.
    """
    return [None if len(text[0]["content"]) % 3 == 0 else 1 / (1 + len(text[0]["content"])) for text in completions]


def config(out: Path, kind: type = GRPOConfig, **changed):
    settings = {
        "output_dir": str(out),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 40,
        "max_steps": 3,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
    }
    return kind(**{**settings, **changed})


def build(cls, out: Path, *, rewards=(is_right,), peft=None, eval_dataset=None, policy=POLICY, traced=None, **changed):
    # TRL 1.14 draws the adapter before it sets its seed.
    torch.manual_seed(0)
    kind = RLOOConfig if issubclass(cls, RLOOTrainer) else GRPOConfig
    return cls(
        model=policy,
        reward_funcs=list(rewards),
        args=config(out, kind, **changed),
        train_dataset=dataset(),
        eval_dataset=eval_dataset,
        peft_config=peft,
        **(traced or {}),
    )


def weights(trainer) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().clone()
        for name, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
    }


class Witness:
    """Keep every generation batch, its sampling weights, and the loss's inputs."""

    def __init__(self, *args, **kwargs):
        self.batches, self.losses, self.weights_at = [], [], {}
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        sampled_by = weights(self) if self.model.training else None
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.batches.append(
                {
                    "weights": sampled_by,
                    "global_step": self.state.global_step,
                    "prompt_ids": [
                        row[mask.bool()].tolist()
                        for row, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)
                    ],
                    "advantages": output["advantages"].clone(),
                    "raw": getattr(self, "raw", None),
                    **self._rewarded,
                }
            )
        return output

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewarded = {
            "prompts": [prompt[0]["content"] for prompt in prompts],
            "completions": [completion[0]["content"] for completion in completions],
            "ids": copy.deepcopy(completion_ids_list),
            "rewards": rewards.clone(),
        }
        return rewards

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.model.training:
            seen = {name: inputs[name].clone() for name in ("completion_ids", "completion_mask", "advantages")}
            self.losses.append({**seen, "batch": len(self.batches) - 1})
        return loss

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self.weights_at[self.state.global_step] = weights(self)
        super()._maybe_log_save_evaluate(*args, **kwargs)


class WitnessGRPO(Witness, GRPOTrainer):
    pass


class WitnessRLOO(Witness, RLOOTrainer):
    pass


class TracedWitnessGRPO(Traced, WitnessGRPO):
    pass


class TracedWitnessRLOO(Traced, WitnessRLOO):
    pass


def table(folder: Path, name: str) -> pl.DataFrame:
    keys = ("step", "rollout_id", "position", "benchmark", "prompt_id", "sample_index")
    frame = pl.read_parquet(folder / name / "*.parquet")
    return frame.sort([key for key in keys if key in frame.columns])


def manifest(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


@torch.no_grad()
def teacher_forced(model, prompt_ids, ids, temperature) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities and entropies of one response in float64.

    The response is alone and without padding. Values are in float64 from the logits on.
    """
    logits = model(torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 : -1].double() / temperature
    logp = logits.log_softmax(-1)
    return logp[torch.arange(len(ids)), torch.tensor(ids)].numpy(), -(logp.exp() * logp).sum(-1).numpy()


def bare_policy(trainer):
    """Return a model in evaluation mode with the trainer's weights and adapters."""
    model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # TRL and the trace patch the forward pass of the instance.
    vars(inner).pop("forward", None)
    return model.eval()


def load_policy():
    return AutoModelForCausalLM.from_pretrained(POLICY)
