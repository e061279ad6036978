"""Seconds per GRPO step: this trainer, recording and not, against TRL's GRPOTrainer, paired in one process.

All three train the embedded base policy on the same task with the same batch, length limit, clipping and rewards. The
learning rate is too small to move the policy, so that responses keep their lengths. TRL runs its own loop; after each
of its steps, ours takes one step with recording and one without, in alternating order, so that all three see the
machine in the same state. "Without" computes no entropy and no sum of squared probabilities either. After-update values
and files are written every few steps only: figures are medians for each place in that cycle, averaged over the cycle.

Run with ``make bench``, which installs TRL into an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from analysis.trace import TraceWriter
from trainer.batch import PromptSource, collect_batch
from trainer.config import Config, load_config
from trainer.method import TokenBatch
from trainer.policy import Policy
from trainer.record import record_batch
from trainer.resources import find_base_policy
from trainer.run_folder import describe_run
from trainer.seeding import Stream
from trainer.shaping import shape
from trainer.tasks import Task, load_task
from trainer.token_stats import Softmax, TokenStats
from trainer.update import Learner

STILL = 1e-12
WARM_UP = 2


class Ours:
    """One GRPO step at a time, on a policy of its own."""

    def __init__(self, config: Config, task: Task, out: Path, records: bool) -> None:
        self.config, self.records, self.step = config, records, 0
        self.learner = Learner(config, Policy.load(config.policy))
        self.source = PromptSource(task)
        self.writer = TraceWriter.create(out, describe_run(config, out, {}), self.learner.policy.vocab())

    def take_step(self) -> tuple[float, int]:
        """Returns seconds and generated tokens."""
        started = time.perf_counter()
        self.step += 1
        config = self.config
        with nullcontext() if self.records else without_entropy():
            batch = collect_batch(config, self.learner.policy, self.source, self.step)
            samples = batch.samples
            context = TokenBatch.of(batch, config.seed, Stream.SHAPING, self.step)
            advantages = batch.advantages[:, None].expand(samples.tokens.shape)
            shaped, _ = shape(advantages, context, config.shaping, self.step, None)
            metrics = self.learner.update(batch, shaped, self.step)
        if self.records:
            after = self.learner.capture(batch, metrics) if config.record.captures(self.step) else None
            first = (self.step - 1) * len(batch.prompts)
            record_batch(self.writer, batch, shaped, after, step=self.step, first_rollout_id=first, temperature=1.0)
            if self.step % config.record.flush_every == 0:
                self.writer.flush(self.step)
        return time.perf_counter() - started, int(samples.lengths.sum())


@contextmanager
def without_entropy() -> Any:
    """Sampling that computes log-probabilities only."""

    def logprob_only(softmax: Softmax, targets: torch.Tensor) -> TokenStats:
        shares = (softmax.weights.gather(1, targets[:, None]) / softmax.weights.sum(-1, keepdim=True)).squeeze(1)
        return TokenStats(shares.log(), torch.zeros_like(shares), torch.zeros_like(shares))

    original = Softmax.stats
    Softmax.stats = logprob_only  # type: ignore[method-assign]
    try:
        yield
    finally:
        Softmax.stats = original  # type: ignore[method-assign]


class Pairing(TrainerCallback):
    """Times TRL's steps and runs ours between them."""

    def __init__(self, arms: dict[str, Ours]) -> None:
        self.arms = arms
        self.seconds: dict[str, list[float]] = {"trl": [], **{name: [] for name in arms}}
        self.tokens: dict[str, list[float]] = {name: [] for name in arms}
        self.started = 0.0

    def on_step_begin(self, *arguments: Any, **kwargs: Any) -> None:
        self.started = self.started or time.perf_counter()

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        self.seconds["trl"].append(time.perf_counter() - self.started)
        names = list(self.arms)
        for name in names if len(self.seconds["trl"]) % 2 else names[::-1]:
            seconds, tokens = self.arms[name].take_step()
            self.seconds[name].append(seconds)
            self.tokens[name].append(tokens)
        # TRL draws the next batch before it announces the step, so its clock runs on from here.
        self.started = time.perf_counter()


def make_trl(config: Config, task: Task, steps: int, out: Path, callback: TrainerCallback) -> GRPOTrainer:
    """TRL's trainer on the same job, at its fastest settings for this machine."""
    size = config.rollout.prompts_per_step
    rows = [task.train_prompt(i) for i in range(size * (steps + 1))]
    by_text = {row.text: row for row in rows}
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": row.text}]} for row in rows])

    def reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        texts = [(p[0]["content"], c[0]["content"]) for p, c in zip(prompts, completions, strict=True)]
        return [task.score(completion, by_text[prompt]).score for prompt, completion in texts]

    arguments = GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=size * config.rollout.group_size,
        num_generations=config.rollout.group_size,
        max_completion_length=config.rollout.max_response_tokens,
        max_steps=steps,
        learning_rate=STILL,
        temperature=config.rollout.temperature,
        epsilon=config.loss.clip_low,
        epsilon_high=config.loss.clip_high,
        beta=0.0,
        loss_type="dapo",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
    )
    folder = find_base_policy()
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=reward,
        args=arguments,
        train_dataset=dataset,
        callbacks=[callback],
    )


def typical(values: list[float], cycle: int) -> float:
    """Median over cycles of the steps at each place in the cycle, averaged over places."""
    return round(statistics.mean(statistics.median(values[place::cycle]) for place in range(cycle)), 3)


def main() -> None:
    """Prints medians and median paired ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=5, help="measured cycles of 10 steps of each (default 5)")
    parser.add_argument("--out", type=Path, help="file to write the result to as well")
    arguments = parser.parse_args()
    config = load_config("tiny", ["rollout.dynamic_sampling=false", f"optim.lr={STILL}"])
    cycle = math.lcm(config.record.flush_every, config.record.after_update_every)
    steps = cycle * arguments.cycles
    task = load_task(config.task, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        arms = {
            "recording": Ours(config, task, Path(folder, "recording"), records=True),
            "not_recording": Ours(config, task, Path(folder, "not-recording"), records=False),
        }
        pairing = Pairing(arms)
        trainer = make_trl(config, task, steps + WARM_UP, Path(folder, "trl"), pairing)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry]
    seconds = {name: values[WARM_UP:] for name, values in pairing.seconds.items()}
    ratio = {
        "recording / trl": [a / b for a, b in zip(seconds["recording"], seconds["trl"], strict=True)],
        "recording / not_recording": [
            a / b for a, b in zip(seconds["recording"], seconds["not_recording"], strict=True)
        ],
    }
    batch = config.rollout.prompts_per_step * config.rollout.group_size
    result = {
        "steps": steps,
        "steps_per_cycle": cycle,
        "responses_per_step": batch,
        "threads": torch.get_num_threads(),
        "median_seconds_per_step": {name: typical(values, cycle) for name, values in seconds.items()},
        "mean_tokens_per_response": {
            **{name: statistics.mean(values) / batch for name, values in pairing.tokens.items()},
            "trl": statistics.mean(float(entry["completions/mean_length"]) for entry in logs),
        },
        "median_paired_ratio": {name: typical(values, cycle) for name, values in ratio.items()},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
