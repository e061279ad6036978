"""Collect TRL's evaluations until the trace can hold them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from torch import Tensor

from entrace.analysis.trace.recorder import Recorder
from entrace.trainer.live.arguments import HELDOUT
from entrace.trainer.live.generation import Pass, none_for_nan
from entrace.trainer.live.recording import Notices, first_truths
from entrace.trainer.live.trl_recorder import of_policy


class Evaluations:
    """Hold evaluations that are not recorded yet.

    Attributes:
        has_trained: Training is over, so that evaluations are added to the finished trace.
    """

    def __init__(self, trainer: Any, run_dir: Path, notices: Notices) -> None:
        """Start without any evaluation."""
        self._trainer, self._run_dir, self._notices = trainer, run_dir, notices
        self.has_trained = False
        # Batches of the running evaluation; None outside.
        self._batches: list[dict[str, Any]] | None = None
        self._waiting: dict[tuple[int, str], dict[str, Any]] = {}

    @contextmanager
    def running(self, prefix: str, dataset: Any, step: int) -> Iterator[None]:
        """Keep the responses of the evaluation of ``step`` that the block runs."""
        self._batches = batches = []
        try:
            yield
        finally:
            self._batches = None
        parts = gather_object([batches])
        in_order = [part for of_batch in zip(*parts, strict=False) for part in of_batch]
        if not self._trainer.accelerator.is_main_process or not in_order:
            return
        joined = {
            name: [value for part in in_order for value in part[name]]
            for name in ("reward", "is_correct", "response_length", "entropy_mean")
        }
        for name in ("prompt", "prompt_id", "ground_truth", "task"):
            joined[name] = [value for part in in_order for value in part["response"][name]]
        # The last batch repeats rows of the first one, so that every process has equally many.
        count = len(joined["reward"])
        if hasattr(dataset, "__len__"):
            count = min(count, len(dataset) * self._trainer.num_generations_eval)
        benchmark = prefix.removeprefix("eval").lstrip("_") or HELDOUT
        # A later evaluation of the same step replaces this one.
        self._waiting[step, benchmark] = {name: values[:count] for name, values in joined.items()}
        if self.has_trained:
            with Recorder(
                self._run_dir,
                self._trainer._tokenizer,
                correct_at=None,
                resume_after="last",
                **of_policy(self._trainer),
            ) as recorder:
                self.flush(recorder, math.inf)

    def add(self, described: dict[str, Any]) -> None:
        """Add a batch of the running evaluation; see ``BatchReader.describe``."""
        if self._batches is not None:
            self._batches.append(described)

    def take_pass(self, inputs: Any, rows: Tensor, found: Pass) -> None:
        """Keep the mean entropies of ``rows`` of the latest batch."""
        if self._batches and found.entropy is not None:
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            means = (found.entropy.float() * mask).sum(1) / mask.sum(1)
            for row, mean in zip(rows.tolist(), means.tolist(), strict=True):
                # NaN if the loss masks the whole response.
                self._batches[-1]["entropy_mean"][row] = mean if np.isfinite(mean) else None

    def flush(self, recorder: Recorder | None, last_step: float) -> None:
        """Record the evaluations up to ``last_step``."""
        if recorder is None:
            return
        for step, benchmark in sorted(self._waiting):
            if step <= last_step:
                self._write(recorder, step, benchmark, self._waiting.pop((step, benchmark)))

    def _write(self, recorder: Recorder, step: int, benchmark: str, rows: Mapping[str, Any]) -> None:
        if recorder.has_eval(step, benchmark):
            self._notices.say_already_recorded(step, benchmark)
        elif step >= recorder.last_step:
            truths = first_truths(recorder, rows["prompt_id"], rows["ground_truth"])
            rows = {**rows, "reward": none_for_nan(rows["reward"]), "ground_truth": truths}
            recorder.record_eval(step, benchmark=benchmark, **rows)
