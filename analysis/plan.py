"""What a grid of runs will cost and what it can find, before anything is started."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entrace.analysis.terminal.grid_progress import clock, makespan
from entrace.analysis.trace import InputError

SEEDS_SHOWN = (3, 5, 10, 20)


@dataclass(frozen=True)
class Pilot:
    """Planning values of a model and task.

    Attributes:
        model: What was trained.
        task: On what.
        seconds_per_step: Of one run, its share of evaluations included.
        sd_difference: Standard deviation over seeds of an arm's avg@k at its last evaluation minus the baseline's.
        hardware: On what this was measured.
    """

    model: str
    task: str
    seconds_per_step: float
    sd_difference: float
    hardware: str


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid; ``steps_left`` of its ``steps`` are still to be done."""

    run_id: str
    arm: str
    baseline: str
    seed: int
    steps: int
    status: str
    steps_left: int


@dataclass(frozen=True)
class Plan:
    """The runs of a grid, ``slots`` at a time, planned with the values of ``pilot``."""

    runs: Sequence[PlannedRun]
    slots: int
    pilot: Pilot
    source: str

    @property
    def seconds_left(self) -> float:
        """Time until the last run has ended."""
        return makespan([run.steps_left * self.pilot.seconds_per_step for run in self.runs], self.slots)

    @property
    def num_tests(self) -> int:
        """Arms that are compared with a baseline."""
        return len({run.arm for run in self.runs if run.arm != run.baseline})

    @property
    def num_seeds(self) -> int:
        """Seeds that every arm shares with its baseline."""
        seeds: dict[str, set[int]] = {}
        for run in self.runs:
            seeds.setdefault(run.arm, set()).add(run.seed)
        return min(len(seeds[run.arm] & seeds.get(run.baseline, set())) for run in self.runs)

    def detectable(self) -> dict[int, float | None]:
        """Smallest difference in avg@k to the baseline found with 80 % power, by number of seeds; None if none is."""
        from entrace.analysis.statistics.estimates import detectable_difference

        sizes = {
            seeds: float(detectable_difference(self.pilot.sd_difference, seeds, self.num_tests))
            for seeds in sorted({self.num_seeds, *SEEDS_SHOWN})
        }
        # No difference between shares of right answers exceeds 1.
        return {seeds: size if size <= 1 else None for seeds, size in sizes.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything, for scripts."""
        names = ("seconds_left", "num_tests", "num_seeds")
        return {**asdict(self), **{name: getattr(self, name) for name in names}, "detectable": self.detectable()}

    def lines(self) -> list[str]:
        """Everything, to be read."""
        width = max(len(run.run_id) for run in self.runs)
        arm_width = max(len(run.arm) for run in self.runs)
        steps, left = sum(run.steps for run in self.runs), sum(run.steps_left for run in self.runs)
        sizes = [
            f"{'none' if size is None else f'{size:.4f}'} with {seeds}" for seeds, size in self.detectable().items()
        ]
        pilot = self.pilot
        return [
            *(
                f"{run.run_id:<{width}}  {run.arm:<{arm_width}}  seed {run.seed}  {run.steps} steps  {run.status}"
                for run in self.runs
            ),
            f"runs: {len(self.runs)}, {steps:,} steps, {left:,} of them to do",
            f"time: about {clock(self.seconds_left)}, {self.slots} at a time, {pilot.seconds_per_step:.3g} s a step",
            f"detectable difference in avg@k to the baseline, by number of seeds: {', '.join(sizes)}",
            f"    power 0.8, level 0.05 with Holm over {self.num_tests} tests, sd over seeds {pilot.sd_difference:.3g}",
            f"seeds of this grid: {self.num_seeds}",
            f"planned with {self.source}: {pilot.model} on {pilot.task}, {pilot.hardware}",
        ]


def measure_pilot(study: Path) -> Pilot:
    """Planning values measured in the complete runs of a study.

    Raises:
        InputError: no study, no complete run in it, or no arm that shares two seeds with its baseline.
    """
    from entrace.analysis.runs import open_runs

    runs = open_runs(study)
    per_step = dict(runs.sql(SECONDS).drop_nulls().iter_rows())
    complete = {run_id: found for run_id, found in runs.manifests.items() if found.get("status") == "complete"}
    if not complete:
        raise InputError(f"--pilot {study}: holds no complete run")
    manifests = {run_id: found for run_id, found in complete.items() if run_id in per_step}
    if not manifests:
        missing = "rollout_s, reward_s, update_s, or record_s of table steps is null"
        raise InputError(f"--pilot {study}: no complete run recorded how long it took: {missing}; choose another study")
    first = next(iter(manifests.values()))
    hardware = first.get("hardware") or {}
    return Pilot(
        model=first.get("model") or "?",
        task=first.get("task") or "?",
        seconds_per_step=float(statistics.median(per_step[run_id] for run_id in manifests)),
        sd_difference=_sd_difference(runs, manifests, study),
        hardware=f"{hardware.get('cores', '?')} cores of {hardware.get('cpu', '?')}",
    )


# Evaluations are not timed: their tokens are taken to cost what those of training cost to sample and score.
SECONDS = """
with trained as (
    select run_id, count(*) as steps, sum(rollout_s + reward_s) as sample_s, sum(tokens) as tokens,
           sum(rollout_s + reward_s + update_s + record_s) as seconds
    from steps group by run_id
), evaluated as (
    select run_id, sum(response_length) as eval_tokens from evals group by run_id
)
select run_id, (seconds + eval_tokens * sample_s / tokens) / steps as per_step
from trained join evaluated using (run_id)
"""

FINAL = """
with last_evals as (select run_id, max(step) as step from evals group by run_id)
select run_id, avg(is_correct::int) as accuracy from evals join last_evals using (run_id, step) group by run_id
"""


def _sd_difference(runs: Any, manifests: dict[str, dict[str, Any]], study: Path) -> float:
    """Pooled over arms, each with a mean of its own."""
    accuracy = {row["run_id"]: row["accuracy"] for row in runs.sql(FINAL).iter_rows(named=True)}
    cells = {(m.get("arm"), m.get("seed")): accuracy[run_id] for run_id, m in manifests.items()}
    by_arm: dict[str, list[float]] = {}
    for manifest in manifests.values():
        arm, baseline, seed = (manifest.get(key) for key in ("arm", "baseline", "seed"))
        if arm != baseline and (baseline, seed) in cells:
            by_arm.setdefault(str(arm), []).append(cells[arm, seed] - cells[baseline, seed])
    groups = [values for values in by_arm.values() if len(values) > 1]
    if not groups:
        raise InputError(f"--pilot {study}: no arm has two complete seeds in common with its baseline")
    squares = sum(np.var(values, ddof=1) * (len(values) - 1) for values in groups)
    return float(np.sqrt(squares / sum(len(values) - 1 for values in groups)))
