"""Follow a trainer of TRL, and record each generation batch as a step.

A batch is complete once every slice has passed through the loss in every iteration and the optimizer step after that
was taken. Statistics of tokens come from TRL's own forward passes where these see the sampling policy; see
``entrace.trainer.live.trl``.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from entrace.analysis.trace.batch import mean_of_known
from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.groups import rows_by_group
from entrace.analysis.trace.recorder import Recorder
from entrace.analysis.trace.schema import TRUNCATED
from entrace.trainer.live.arguments import Arguments
from entrace.trainer.live.batches import BatchReader, Scored
from entrace.trainer.live.evaluations import Evaluations
from entrace.trainer.live.generation import Generation, Pass, join, none_for_nan, split_by_response
from entrace.trainer.live.passes import Passes, take_clipping
from entrace.trainer.live.recording import Notices, first_truths
from entrace.trainer.live.shaper import Shaper
from entrace.trainer.live.trl_recorder import CHECKPOINTS, open_trl_recorder

# Key of the row number that travels with each response through TRL's shuffling and slicing.
ROW = "entrace_row"
METRICS = {"kl": "kl", "clip_ratio/low_mean": "clip_frac_low", "clip_ratio/high_mean": "clip_frac_high"}
# Relative rounding error of the mean of equal rewards, divided by the 1e-4 that TRL adds to a standard deviation of 0.
UNIFORM_ROUNDING = 4 * torch.finfo(torch.float32).eps / 1e-4
# Sampling settings that leave the policy's distribution as it is; the first value is the default.
NEUTRAL = {"top_p": (1.0, None), "top_k": (0, None, -1), "min_p": (None,), "repetition_penalty": (1.0, None)}


class Tracer:
    """Follow a trainer and record what it does; only the main process writes.

    Attributes:
        reader: Reads the batches that TRL builds.
        passes: Takes statistics of tokens from forward passes.
        shaper: Shapes advantages.
        evaluations: Holds evaluations until they are recorded.
        lr: Learning rate of the optimizer step that is being taken.
    """

    def __init__(self, trainer: Any, arguments: Arguments) -> None:
        """Follow ``trainer``."""
        self.trainer, self.arguments = trainer, arguments
        self.accelerator = trainer.accelerator
        notices = Notices(is_main=self.accelerator.is_main_process)
        self.reader = BatchReader(trainer, arguments.correct)
        self.passes = Passes(trainer, notices)
        self.shaper = Shaper(trainer, arguments)
        self.evaluations = Evaluations(trainer, arguments.run_dir, notices)
        self.lr: float | None = None
        self._recorder: Recorder | None = None
        # Batches that TRL has built and this trace does not hold, and the last step that it holds.
        self._open: list[Generation] = []
        self._last = 0
        self._scored: Scored | None = None
        # Seconds that recording took so far, and those that a step has been charged with.
        self._overhead = self._charged = 0.0
        notices.say_truncated("TRL", functools.partial(getattr, trainer), NEUTRAL)

    # The trace

    def open(self) -> None:
        """Open a new trace, or the trace of the checkpoint that training resumes from."""
        history: list[tuple[float | None, float | None]] = []
        with _together():
            if self.accelerator.is_main_process:
                self._recorder = open_trl_recorder(self.trainer, self.arguments, self.reader, self.passes)
                self._last = self._recorder.last_step
                history = self._recorder.past_metrics()
        self._last, history = broadcast_object_list([self._last, history])
        self.shaper.plateau = self.arguments.detector(history)
        self._open.clear()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close the trace after the block.

        Its status is complete after success and failed after an error; an interrupted trace stays as it is.
        """
        try:
            yield
            self.finish_steps(None, is_end=True)
            self.evaluations.flush(self._recorder, self._last)
        except BaseException as error:
            if self._recorder is not None:
                self._recorder.__exit__(type(error), error, error.__traceback__)
                self._recorder = None
            raise
        finally:
            self._open.clear()
        self.evaluations.has_trained = True
        if self._recorder is not None:
            # Windows of gradient accumulation may be cut short by the end of an epoch.
            self._recorder.manifest["total_steps"] = self._last
            self._recorder.close()
            self._recorder = None

    def before_checkpoint(self) -> None:
        """Make the steps durable that a checkpoint contains."""
        with _together():
            self.evaluations.flush(self._recorder, self._last)
            if self._recorder is not None:
                checkpoints = self._recorder.manifest.setdefault(CHECKPOINTS, {})
                checkpoints[str(self.trainer.state.global_step)] = self._last
                self._recorder.flush()

    # Generation

    @contextmanager
    def generation(self) -> Iterator[Scored]:
        """Follow TRL while the block builds a generation batch or evaluation batch."""
        is_training = self.trainer.model.training
        if is_training:
            self.finish_steps(None)
            self.evaluations.flush(self._recorder, self._last)
        started = time.perf_counter()
        self._scored = scored = Scored()
        try:
            with self.passes.collecting() as passes:
                yield scored
        finally:
            self._scored = None
        output = scored.output
        output[ROW] = torch.arange(len(scored.ids), device=output["completion_ids"].device)
        if not is_training:
            self.evaluations.add(self.reader.describe(scored))
            return
        step = (self._open[-1].step if self._open else self._last) + 1
        batch = self.reader.begin(scored, step=step, policy_step=self._last)
        rollout_s = time.perf_counter() - started - scored.reward_s
        batch.seconds |= {"rollout_s": rollout_s, "reward_s": scored.reward_s}
        with self._costing():
            self.passes.take(batch, output, passes)
            self.passes.complete(batch, is_early=self.shaper.is_early)
            if self.shaper.is_on and all(gather_object([batch.known.all()])):
                self.shaper.shape(batch, output, torch.arange(len(batch.ids)))
        self._open.append(batch)

    def keep_rewards(
        self, inputs: Any, prompts: Any, completions: Any, ids: Any, rewards: Tensor, started: float
    ) -> None:
        """Keep the inputs and scores of the reward functions."""
        if self._scored is not None:
            found = self._scored
            found.inputs, found.prompts, found.completions, found.ids = inputs, prompts, completions, ids
            found.rewards = rewards.detach().float().cpu()
            found.reward_s = time.perf_counter() - started

    # Updates

    @contextmanager
    def timed_pass(self) -> Iterator[list[Tensor]]:
        """Keep the loss of the pass in the block, and its duration without generation."""
        started, before = time.perf_counter(), self._overhead
        latest = self._open[-1] if self._open else None
        losses: list[Tensor] = []
        yield losses
        if not self._open:
            return
        batch = self._open[-1]
        elapsed = time.perf_counter() - started - (self._overhead - before)
        if batch is not latest:
            elapsed -= batch.seconds["rollout_s"] + batch.seconds["reward_s"]
        batch.seconds["update_s"] += elapsed
        batch.losses += losses
        batch.pending = True

    @contextmanager
    def loss_pass(self, inputs: Any) -> Iterator[None]:
        """Follow the loss over a slice of the latest batch, or over an evaluation batch."""
        rows = inputs[ROW].cpu()
        if not self.trainer.model.training:
            with self.passes.in_loss(functools.partial(self.evaluations.take_pass, inputs, rows)):
                yield
            return
        batch = self._open[-1]
        before = {name: len(self._metric(name)) for name in METRICS}
        with self.passes.in_loss(functools.partial(self._take_loss, batch, inputs, rows)):
            yield
        batch.in_loss[rows.numpy()] = True
        for name, column in METRICS.items():
            values = self._metric(name)
            # RLOO reports the KL estimate once per batch, before the loss.
            if len(values) > before[name] or (name == "kl" and values and not batch.losses):
                batch.add_metric(column, values[-1])

    def _metric(self, name: str) -> list[float]:
        return self.trainer._metrics["train"].get(name, [])

    def _take_loss(self, batch: Generation, inputs: Any, rows: Tensor, found: Pass) -> None:
        """Take statistics, shaping, and ratio clipping from the loss's forward pass."""
        with self._costing():
            if batch.updates == 0 and not self.passes.has_dropout:
                batch.add_own(found, rows)
                waits = self.shaper.is_on and not batch.is_shaped and not batch.losses
                if waits and not self.shaper.is_early:
                    self.shaper.shape(batch, inputs, rows)
            take_clipping(self.trainer, batch, inputs, rows, found)

    def count_update(self) -> None:
        """Count an optimizer step for the batches whose losses it contains."""
        for batch in self._open:
            if batch.pending:
                batch.updates += 1
                batch.pending = False
                batch.add_metric("lr", self.lr)

    def finish_steps(self, grad_norm: Any, *, is_end: bool = False) -> None:
        """Record completed batches.

        At the end of training, also record incomplete batches that a loss has used.
        """
        if grad_norm is not None:
            for batch in self._open:
                if batch.updates and len(batch.metrics.get("grad_norm", [])) < batch.updates:
                    batch.add_metric("grad_norm", grad_norm)
        while self._open and (self._open[0].is_complete or (is_end and self._open[0].in_loss.any())):
            self._record(self._open[0])
            self._last = self._open.pop(0).step
        if is_end:
            self._open.clear()

    def _record(self, batch: Generation) -> None:
        every = self.arguments.after_update_every
        with self._costing():
            if every and batch.step % every == 0 and batch.updates:
                wanted = self.arguments.num_after(len(batch.ids) * self.accelerator.num_processes)
                self.passes.capture_after(batch, wanted)
            parts = gather_object([batch.payload()])
        cost, self._charged = self._overhead - self._charged, self._overhead
        row: dict[str, Any] = {}
        with self._costing(), _together():
            if self._recorder is not None:
                row = self._write(self._recorder, batch, join(parts), cost)
        if self.shaper.waits:
            self.shaper.end_step(row)
            if self._recorder is not None:
                self._recorder.manifest["plateau_step"] = self.shaper.plateau.plateau_step

    def _write(self, recorder: Recorder, batch: Generation, joined: dict[str, Any], cost: float) -> dict[str, Any]:
        lengths = joined["lengths"]
        token = {name: split_by_response(values, lengths) for name, values in joined["token"].items()}
        loss_mask = token.pop("loss_mask")
        response = dict(joined["response"])
        response["ground_truth"] = first_truths(recorder, response["prompt_id"], response["ground_truth"])
        metrics = {name: mean_of_known(values) for name, values in batch.metrics.items()}
        metrics["loss"] = joined["loss"]
        return recorder.record(
            batch.step,
            prompt=response.pop("prompt"),
            completion=response.pop("completion"),
            response_ids=split_by_response(joined["ids"], lengths),
            loss_mask=loss_mask,
            reward=none_for_nan(joined["reward"]),
            group=joined["group"],
            advantage=exact_zeros(joined["advantage"], joined["reward"], joined["group"]),
            is_correct=joined["is_correct"],
            is_kept=joined["in_loss"] & ~joined["is_masked"],
            drop_reason=[TRUNCATED if masked else None for masked in joined["is_masked"]],
            policy_step=batch.policy_step,
            policy_version=batch.policy_version,
            metrics={
                **{name: value for name, value in metrics.items() if value is not None and np.isfinite(value)},
                **batch.seconds,
                "record_s": cost,
                "is_shaped": batch.is_shaped,
            },
            **response,
            **token,
        )

    # Evaluations

    def evaluation(self, prefix: str, dataset: Any) -> AbstractContextManager[None]:
        """Record the responses of an evaluation, which the block runs."""
        # A batch that has begun to change the policy counts.
        started = [batch.step for batch in self._open if batch.updates]
        return self.evaluations.running(prefix, dataset, started[-1] if started else self._last)

    @contextmanager
    def _costing(self) -> Iterator[None]:
        """Add the time of the block to the time that recording takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._overhead += time.perf_counter() - started


@contextmanager
def _together() -> Iterator[None]:
    """Raise an error of the block, which only the main process may meet, everywhere."""
    # trainer.parallel.ranks would take over the signals and errors of the user's process.
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    (message,) = broadcast_object_list([None if error is None else str(error)])
    if error is not None:
        raise error
    if message is not None:
        raise InputError(f"the main process cannot record: {message}")


def exact_zeros(advantages: np.ndarray, rewards: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Set advantages to exactly 0 in groups with equal rewards.

    TRL leaves rounding errors there. The mean of equal numbers may differ from them in the last bit, and TRL divides by
    a standard deviation of 0 plus 1e-4. Larger advantages of such a group have another source, such as a penalty, and
    stay.
    """
    result = advantages.copy()
    for rows in rows_by_group(group):
        values = rewards[rows]
        if np.isnan(values).any() or np.ptp(values) > 0:
            continue
        bound = UNIFORM_ROUNDING * max(abs(float(values[0])), 1e-30)
        result[rows[np.abs(advantages[rows]) <= bound]] = 0
    return result
