"""Seconds per GRPO step: this trainer, recording and not, against TRL's GRPOTrainer, paired.

All three train the same policy on the same task with the same batch, length limit, clipping and rewards: the policy
that ships, and what a run has made of it on the plateau, where responses to a prompt part late and most groups have no
advantage. The learning rate is too small to move it, so that responses keep their lengths. TRL runs its own loop, in a
process of its own, so that neither sees what the other did to memory; after each of its steps, ours takes one step with
recording and one without, in alternating order, so that all three see the machine in the same state. "Without" computes
no entropy and no sum of squared probabilities either. After-update values and files are written every few steps only: a
measured value is the mean over one cycle of steps.
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
from entrace.trainer.algorithm.shaping import shape
from entrace.trainer.config import Config, load_config
from entrace.trainer.kernels.token_stats import Softmax, Sums
from entrace.trainer.learner import Learner
from entrace.trainer.model.loading import load_pretrained
from entrace.trainer.model.policy import Policy
from entrace.trainer.rollouts import PromptSource, collect_batch, view_rollouts
from entrace.trainer.runs.record import record_batch
from entrace.trainer.runs.run_folder import describe_run
from entrace.trainer.seeding import Stream
from entrace.trainer.tasks import Task, load_task
from entrace.trainer.train import train
from tests.benchmarks.figures import AT_MOST, HAS_TRL, Figure, quotients

PART = "GRPO step of the embedded policy, 256 responses, {policy}"
START, PLATEAU = "at the start", "on the plateau"
STILL = 1e-12
WARM_UP = 2
PLATEAU_STEPS = 80
CYCLES = {START: 6, PLATEAU: 3}
MAX_OF_TRL, MAX_OF_NOT_RECORDING = 1 / 3, 1.02


class Ours:
    """One GRPO step at a time, on a policy of its own.

    Attributes:
        phases: Seconds of each phase, a list with one entry a step.
        num_tokens: Generated tokens of each step.
    """

    def __init__(self, config: Config, task: Task, out: Path, records: bool) -> None:
        self.config, self.records, self.step = config, records, 0
        self.learner = Learner(config, Policy.load(config.policy))
        self.source = PromptSource(task)
        self.writer = TraceWriter.create(out, describe_run(config, out, {}), self.learner.policy.vocab())
        self.phases: dict[str, list[float]] = {"rollout": [], "reward": [], "update": [], "record": []}
        self.num_tokens: list[int] = []

    def take_step(self) -> float:
        """Returns its seconds."""
        started = time.perf_counter()
        self.step += 1
        config = self.config
        with nullcontext() if self.records else without_entropy():
            batch = collect_batch(config, self.learner.policy, self.source, self.step)
            samples = batch.rollouts
            context = view_rollouts(batch, config.seed, Stream.SHAPING, self.step)
            advantages = batch.advantages[:, None].expand(samples.response_ids.shape)
            shaped, _ = shape(advantages, context, config.shaping, self.step, None)
            before = time.perf_counter()
            metrics = self.learner.update(batch, shaped, self.step)
        if self.learner.policy.device.type == "cuda":
            torch.cuda.synchronize()
        updated = time.perf_counter()
        if self.records:
            after = self.learner.capture(batch, metrics, self.step) if config.record.captures(self.step) else None
            first = (self.step - 1) * len(batch.prompts)
            record_batch(self.writer, batch, shaped, after, step=self.step, first_rollout_id=first, temperature=1.0)
            if self.step % config.record.flush_every == 0:
                self.writer.flush(self.step)
        ended = time.perf_counter()
        seconds = (batch.rollout_s, batch.reward_s, updated - before, ended - updated)
        for values, value in zip(self.phases.values(), seconds, strict=True):
            values.append(value)
        self.num_tokens.append(int(samples.lengths.sum()))
        return ended - started


@contextmanager
def without_entropy() -> Any:
    """Sampling that computes log-probabilities only."""

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
    """Takes steps of ours in turn, between those of another trainer if there is one."""

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
    """Runs TRL's trainer on the same job, at its fastest settings here, with ``between`` after each of its steps.

    ``generation`` is passed on to transformers. All responses of a step are generated at once, and read in the update
    in ``num_micro_batches``. Returns its seconds of each step, and its mean tokens of a response.
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
            # TRL draws the next batch before it announces the step, so its clock runs on from here.
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
    """What the process of TRL does: says when a step is done, and waits until the next may begin."""

    def between() -> None:
        peer.send("stepped")
        peer.recv()

    config = load_config(name, overrides)
    peer.send(run_trl(config, load_task(config.task, config.seed), steps, between))


def run_trl_apart(
    name: str, overrides: list[str], steps: int, between: Callable[[], None]
) -> tuple[list[float], float]:
    """``run_trl`` in a process of its own, which stands still while ``between`` runs here."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer_with_trl, args=(there, name, overrides, steps), daemon=True)
    process.start()
    there.close()
    while (answer := here.recv()) == "stepped":
        between()
        here.send("go on")
    process.join()
    return answer


def measure(quick: bool) -> list[Figure]:
    """All figures; one cycle of small steps if ``quick``, which leaves TRL out."""
    small = ["rollout.prompts_per_step=2", "record.flush_every=2", "record.after_update_every=2"] if quick else []
    steps = 2 if quick else PLATEAU_STEPS
    alone = [f"steps={steps}", f"record.checkpoint_every={steps}", f"eval.every={steps}", "task.num_heldout=8"]
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        train(load_config("tiny", ["policy.device=cpu", *small, *alone]), run, {})
        trained = f"policy.path={run / 'checkpoints' / f'step-{steps:06d}' / 'policy'}"
        for policy, where in ((START, []), (PLATEAU, [trained])):
            figures += _measure(policy, [*small, *where], 1 if quick else CYCLES[policy], HAS_TRL and not quick)
    return figures


def _measure(policy: str, more: list[str], cycles: int, with_trl: bool) -> list[Figure]:
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
    # What recording adds hardly changes, but a step on the plateau is short: most of its groups need no update.
    targets = {"trl": (AT_MOST, MAX_OF_TRL), "not recording": (AT_MOST, MAX_OF_NOT_RECORDING)}
    figures = []
    for peer in [name for name in ("trl", "not recording") if name in seconds]:
        ratios = quotients(*(by_cycle(seconds[name], cycle) for name in ("recording", peer)))
        target = targets[peer] if peer == "trl" or policy == START else ()
        figures.append(Figure.of(part, f"recording / {peer}", "ratio", ratios, *target))
    figures += [Figure.of(part, name, "s per step", by_cycle(values, cycle)) for name, values in seconds.items()]
    phases = arms["recording"].phases
    figures += [Figure.of(part, f"{name} phase", "s per step", by_cycle(v, cycle)) for name, v in phases.items()]
    return figures + [Figure.of(part, f"{name}: length", "tokens per response", [v]) for name, v in lengths.items()]


def by_cycle(values: list[float], cycle: int) -> list[float]:
    """Means over cycles, the first steps left out."""
    kept = values[WARM_UP:]
    return [statistics.mean(kept[start : start + cycle]) for start in range(0, len(kept), cycle)]
