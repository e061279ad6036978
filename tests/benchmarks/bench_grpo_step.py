"""Time GRPO steps of entrace and of TRL's GRPOTrainer, paired.

entrace runs with and without recording. All three train the same policy on the same task with the same batch, length
limit, clipping, and rewards. The policy is the embedded one at the start, and after training to the plateau, where
responses to a prompt diverge late and most groups have no advantage. The learning rate is too small to change response
lengths. TRL runs its own loop in a separate process, so that memory states do not interact. After each of its steps,
entrace takes one step with recording and one without, in alternating order, so that all three run under the same load.
Without recording, entropy and sum of squared probabilities are not computed either. After-update values and files are
written every few steps; a measured value is therefore the mean over one cycle of steps.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from entrace.analysis.trace import TraceWriter
from entrace.trainer.algorithm.advantages import group_relative_advantage
from entrace.trainer.algorithm.shaping import shape
from entrace.trainer.config import Config, load_config
from entrace.trainer.kernels.token_stats import Softmax, Sums
from entrace.trainer.learner import Learner, make_objectives
from entrace.trainer.model.loading import load_pretrained
from entrace.trainer.model.policy import Policy
from entrace.trainer.rollouts import PromptSource, collect_batch, view_rollouts
from entrace.trainer.runs.record import record_batch, sample_tokens
from entrace.trainer.runs.run_folder import describe_run
from entrace.trainer.seeding import Stream
from entrace.trainer.tasks import Task, load_task
from entrace.trainer.train import train
from tests.benchmarks.measurements import AT_MOST, HAS_TRL, Measurement, quotients

PART = "GRPO step of the embedded policy, 256 responses, {policy}"
START, PLATEAU = "at the start", "on the plateau"
STILL = 1e-12
WARM_UP = 2
PLATEAU_STEPS = 80
CYCLES = {START: 6, PLATEAU: 3}
MAX_OF_TRL, MAX_OF_NOT_RECORDING = 1 / 3, 1.02


class Ours:
    """Take single GRPO steps on a separate policy.

    Attributes:
        phases: Seconds of each phase, one entry per step.
        num_tokens: Generated tokens, one entry per step.
    """

    def __init__(self, config: Config, task: Task, out: Path, records: bool) -> None:
        self.config, self.records, self.step = config, records, 0
        self.learner = Learner(config, Policy.load(config.policy))
        self.source = PromptSource(task)
        self.writer = TraceWriter.create(out, describe_run(config, out, {}), self.learner.policy.vocab())
        self.phases: dict[str, list[float]] = {"rollout": [], "reward": [], "update": [], "record": []}
        self.num_tokens: list[int] = []

    def take_step(self) -> float:
        """Take one step and return its seconds."""
        started = time.perf_counter()
        self.step += 1
        config = self.config
        with nullcontext() if self.records else without_entropy():
            batch = collect_batch(config, self.learner.policy, self.source, self.step)
            rollouts = batch.rollouts
            context = view_rollouts(batch, config.seed, Stream.SHAPING, self.step)
            advantages = group_relative_advantage(
                batch.total_rewards, batch.group_ids, config.loss.normalize_std, batch.has_verdict
            )
            per_token = advantages[:, None].expand(rollouts.response_ids.shape)
            shaped, _ = shape(per_token, context, config.shaping, self.step, None)
            before = time.perf_counter()
            metrics = self.learner.update(batch, make_objectives(config, batch, shaped, self.step), self.step)
        if self.learner.policy.device.type == "cuda":
            torch.cuda.synchronize()
        updated = time.perf_counter()
        if self.records:
            first = (self.step - 1) * len(batch.prompts)
            captured = sample_tokens(config, config.record.token_sampling, batch, self.step, first).captured
            after = self.learner.capture(batch, metrics, captured) if config.record.captures(self.step) else None
            place = {"step": self.step, "first_rollout_id": first}
            record_batch(self.writer, batch, advantages, shaped, after, **place, temperature=1.0)
            if self.step % config.record.flush_every == 0:
                self.writer.flush(self.step)
        ended = time.perf_counter()
        seconds = (batch.rollout_s, batch.reward_s, updated - before, ended - updated)
        for values, value in zip(self.phases.values(), seconds, strict=True):
            values.append(value)
        self.num_tokens.append(int(rollouts.lengths.sum()))
        return ended - started


@contextmanager
def without_entropy() -> Any:
    """Make sampling inside the block compute log-probabilities only."""

    def target_and_total(softmax: Softmax, targets: torch.Tensor) -> Sums:
        own = softmax.shifted.gather(1, targets[:, None])
        others = softmax.weights.scatter_(1, targets[:, None], 0.0).sum(-1)
        nothing = torch.zeros_like(others)
        return Sums(softmax.peak.squeeze(1), own.squeeze(1), others, nothing, nothing)

    original = Softmax.sums
    Softmax.sums = target_and_total  # type: ignore[method-assign]
    try:
        yield
    finally:
        Softmax.sums = original  # type: ignore[method-assign]


class Pairing:
    """Take one step of each of our arms, in alternating order."""

    def __init__(self, arms: dict[str, Ours]) -> None:
        self.arms = arms
        self.seconds: dict[str, list[float]] = {name: [] for name in arms}

    def take_steps(self) -> None:
        names = list(self.arms)
        for name in names if len(self.seconds[names[0]]) % 2 else names[::-1]:
            self.seconds[name].append(self.arms[name].take_step())


def run_trl(
    config: Config,
    task: Task,
    steps: int,
    between: Callable[[], None],
    generation: dict[str, Any] | None = None,
    num_micro_batches: int = 1,
) -> tuple[list[float], float]:
    """Run TRL's trainer on the same task, with its fastest settings here.

    ``between`` is called after each of its steps.

    Args:
        config: The run.
        task: Source of prompts and rewards.
        steps: Number of steps.
        between: Called after each step, outside the measured time.
        generation: Passed to ``generate`` of transformers.
        num_micro_batches: Micro-batches of an update; all responses are generated at once.

    Returns:
        Seconds of each step, and the mean response length in tokens.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []
    on_gpu = config.policy.device == "cuda"

    class Timer(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *arguments: Any, **kwargs: Any) -> None:
            self.started = self.started or time.perf_counter()

        def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)
            between()
            # TRL draws the next batch before on_step_begin, so timing restarts here.
            self.started = time.perf_counter()

    model, tokenizer, _ = load_pretrained(config.policy)
    size, rollout = config.rollout.prompts_per_step, config.rollout
    rows = [task.train_prompt(i) for i in range(size * (steps + 1))]
    template = config.policy.template
    texts = [template.replace("{question}", row.text) if template else row.text for row in rows]
    by_text = dict(zip(texts, rows, strict=True))
    prompts = texts if template else [[{"role": "user", "content": text}] for text in texts]

    def text_of(message: Any) -> str:
        return message if isinstance(message, str) else message[0]["content"]

    def reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        pairs = zip(map(text_of, prompts), map(text_of, completions), strict=True)
        return [task.score(completion, by_text[prompt]).score for prompt, completion in pairs]

    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=size * rollout.group_size // num_micro_batches,
            gradient_accumulation_steps=num_micro_batches,
            num_generations=rollout.group_size,
            max_completion_length=rollout.max_response_tokens,
            max_steps=steps,
            learning_rate=STILL,
            temperature=rollout.temperature,
            generation_kwargs=generation,
            epsilon=config.loss.clip_low,
            epsilon_high=config.loss.clip_high,
            beta=0.0,
            loss_type="dapo",
            use_cpu=not on_gpu,
            bf16=on_gpu,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
        )
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            callbacks=[Timer()],
        )
        trainer.train()
    lengths = [float(entry["completions/mean_length"]) for entry in trainer.state.log_history[:-1]]
    return seconds, statistics.mean(lengths)


def _answer_with_trl(peer: Connection, name: str, overrides: list[str], steps: int) -> None:
    """Run TRL in this process: report each finished step, and wait before the next."""

    def between() -> None:
        peer.send("stepped")
        peer.recv()

    config = load_config(name, overrides)
    peer.send(run_trl(config, load_task(config.task, config.seed), steps, between))


def run_trl_apart(
    name: str, overrides: list[str], steps: int, between: Callable[[], None]
) -> tuple[list[float], float]:
    """Call ``run_trl`` in a new process.

    The process waits while ``between`` runs in this one.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer_with_trl, args=(there, name, overrides, steps), daemon=True)
    process.start()
    there.close()
    while (answer := here.recv()) == "stepped":
        between()
        here.send("continue")
    process.join()
    return answer


def measure(quick: bool) -> list[Measurement]:
    """Return all measurements; one cycle of small steps without TRL if ``quick``."""
    small = ["rollout.prompts_per_step=2", "record.flush_every=2", "record.after_update_every=2"] if quick else []
    steps = 2 if quick else PLATEAU_STEPS
    alone = [f"steps={steps}", f"record.checkpoint_every={steps}", f"eval.every={steps}", "task.num_heldout=8"]
    measurements = []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        train(load_config("tiny", ["policy.device=cpu", *small, *alone]), run, {})
        trained = f"policy.path={run / 'checkpoints' / f'step-{steps:06d}' / 'policy'}"
        for policy, where in ((START, []), (PLATEAU, [trained])):
            measurements += _measure(policy, [*small, *where], 1 if quick else CYCLES[policy], HAS_TRL and not quick)
    return measurements


def _measure(policy: str, more: list[str], cycles: int, with_trl: bool) -> list[Measurement]:
    part = PART.format(policy=policy)
    overrides = ["policy.device=cpu", "rollout.dynamic_sampling=false", f"optim.lr={STILL}", *more]
    config = load_config("tiny", overrides)
    cycle = math.lcm(config.record.flush_every, config.record.after_update_every)
    steps = WARM_UP + cycle * cycles
    task = load_task(config.task, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        arms = {
            name: Ours(config, task, Path(folder, name), records=name == "recording")
            for name in ("recording", "not recording")
        }
        pairing = Pairing(arms)
        seconds = pairing.seconds
        lengths = {}
        if with_trl:
            seconds["trl"], lengths["trl"] = run_trl_apart("tiny", overrides, steps, pairing.take_steps)
        else:
            for _ in range(steps):
                pairing.take_steps()
    batch = config.rollout.prompts_per_step * config.rollout.group_size
    lengths["recording"] = statistics.mean(arms["recording"].num_tokens) / batch
    # No target on the plateau: recording costs about the same per step, but steps are short, with few groups to update.
    targets = {"trl": (AT_MOST, MAX_OF_TRL), "not recording": (AT_MOST, MAX_OF_NOT_RECORDING)}
    measurements = []
    for peer in [name for name in ("trl", "not recording") if name in seconds]:
        ratios = quotients(*(by_cycle(seconds[name], cycle) for name in ("recording", peer)))
        target = targets[peer] if peer == "trl" or policy == START else ()
        measurements.append(Measurement.of(part, f"recording / {peer}", "ratio", ratios, *target))
    measurements += [
        Measurement.of(part, name, "s per step", by_cycle(values, cycle)) for name, values in seconds.items()
    ]
    phases = arms["recording"].phases
    measurements += [
        Measurement.of(part, f"{name} phase", "s per step", by_cycle(v, cycle)) for name, v in phases.items()
    ]
    return measurements + [
        Measurement.of(part, f"{name}: length", "tokens per response", [v]) for name, v in lengths.items()
    ]


def by_cycle(values: list[float], cycle: int) -> list[float]:
    """Return means over cycles, without the warm-up steps."""
    kept = values[WARM_UP:]
    return [statistics.mean(kept[start : start + cycle]) for start in range(0, len(kept), cycle)]
