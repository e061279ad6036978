"""Plan a grid of runs: estimate its time and its detectable differences."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entrace.analysis.terminal.grid_progress import clock, makespan
from entrace.analysis.trace import InputError

if TYPE_CHECKING:
    from entrace.analysis.runs import Runs

SEEDS_SHOWN = (3, 5, 10, 20)


@dataclass(frozen=True)
class Pilot:
    """Hold planning values, measured on earlier runs.

    Attributes:
        model: Model that was trained.
        task: Task that it was trained on.
        seconds_per_step: Seconds per training step of one run, evaluations included.
        sd_difference: Standard deviation over seeds of avg@k at the last evaluation, arm minus baseline.
        hardware: Hardware of the runs.
    """

    model: str
    task: str
    seconds_per_step: float
    sd_difference: float
    hardware: str


@dataclass(frozen=True)
class PlannedRun:
    """Describe one run of the grid; ``steps_left`` of its ``steps`` remain."""

    run_id: str
    arm: str
    baseline: str
    seed: int
    steps: int
    status: str
    steps_left: int


@dataclass(frozen=True)
class GridPlan:
    """Plan the runs of a grid, ``slots`` in parallel, with values of ``pilot``."""

    runs: Sequence[PlannedRun]
    slots: int
    pilot: Pilot
    source: str

    @property
    def seconds_left(self) -> float:
        """Return the seconds until the last run ends."""
        return makespan([run.steps_left * self.pilot.seconds_per_step for run in self.runs], self.slots)

    @property
    def num_tests(self) -> int:
        """Return the number of arms that are compared with a baseline."""
        return len({run.arm for run in self.runs if run.arm != run.baseline})

    @property
    def num_seeds(self) -> int:
        """Return the number of seeds that every arm shares with its baseline."""
        seeds: dict[str, set[int]] = {}
        for run in self.runs:
            seeds.setdefault(run.arm, set()).add(run.seed)
        return min(len(seeds[run.arm] & seeds.get(run.baseline, set())) for run in self.runs)

    def detectable(self) -> dict[int, float | None]:
        """Return the avg@k difference detectable with 80% power, by number of seeds.

        A difference above 1 is None.
        """
        from entrace.analysis.statistics.estimates import detectable_difference

        sizes = {
            seeds: float(detectable_difference(self.pilot.sd_difference, seeds, self.num_tests))
            for seeds in sorted({self.num_seeds, *SEEDS_SHOWN})
        }
        # A difference between shares of correct answers cannot exceed 1.
        return {seeds: size if size <= 1 else None for seeds, size in sizes.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the whole plan, ready for JSON."""
        names = ("seconds_left", "num_tests", "num_seeds")
        return {**asdict(self), **{name: getattr(self, name) for name in names}, "detectable": self.detectable()}

    def lines(self) -> list[str]:
        """Return the whole plan as lines of text."""
        width = max(len(run.run_id) for run in self.runs)
        arm_width = max(len(run.arm) for run in self.runs)
        steps, left = sum(run.steps for run in self.runs), sum(run.steps_left for run in self.runs)
        sizes = [
            f"{'none' if size is None else f'{size:.4f}'} with {seeds}" for seeds, size in self.detectable().items()
        ]
        pilot, time = self.pilot, clock(self.seconds_left)
        return [
            *(
                f"{run.run_id:<{width}}  {run.arm:<{arm_width}}  seed {run.seed}  {run.steps} steps  {run.status}"
                for run in self.runs
            ),
            f"runs: {len(self.runs)}, {steps:,} steps, {left:,} remaining",
            f"time: about {time}, {self.slots} in parallel, {pilot.seconds_per_step:.3g} s per step",
            f"detectable difference in avg@k to the baseline, by number of seeds: {', '.join(sizes)}",
            f"    power 0.8, level 0.05 with Holm over {self.num_tests} tests, sd over seeds {pilot.sd_difference:.3g}",
            f"seeds of this grid: {self.num_seeds}",
            f"planned with {self.source}: {pilot.model} on {pilot.task}, {pilot.hardware}",
        ]


def measure_pilot(study: Path) -> Pilot:
    """Measure planning values in the complete runs of a study.

    Raises:
        InputError: there is no study, no complete run in it, or no arm that shares two seeds with its baseline.
    """
    from entrace.analysis.runs import open_runs

    runs = open_runs(study)
    per_step = dict(runs.run_shipped(SECONDS).drop_nulls().iter_rows())
    complete = {run_id: found for run_id, found in runs.manifests.items() if found.get("status") == "complete"}
    if not complete:
        raise InputError(f"--pilot {study}: the study has no complete run; choose another study")
    manifests = {run_id: found for run_id, found in complete.items() if run_id in per_step}
    if not manifests:
        missing = "rollout_s, reward_s, update_s, or record_s of table steps is null"
        raise InputError(f"--pilot {study}: no complete run recorded its timings: {missing}; choose another study")
    first = next(iter(manifests.values()))
    hardware = first.get("hardware") or {}
    return Pilot(
        model=first.get("model") or "?",
        task=first.get("task") or "?",
        seconds_per_step=float(statistics.median(per_step[run_id] for run_id in manifests)),
        sd_difference=_sd_difference(runs, manifests, study),
        hardware=f"{hardware.get('cores', '?')} cores of {hardware.get('cpu', '?')}",
    )


# Evaluations are not timed: a token is assumed to cost as much to sample and verify as in training.
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
with last_evals as (select run_id, max(step) as step from evals where is_correct is not null group by run_id)
select run_id, avg(is_correct::int) as accuracy from evals join last_evals using (run_id, step) group by run_id
"""


def _sd_difference(runs: Runs, run_ids: Collection[str], study: Path) -> float:
    """Return the standard deviation of paired differences over seeds.

    The variance is pooled over arms, each around its own mean.
    """
    from entrace.analysis.compare.pairs import pair_runs

    accuracy = dict(runs.run_shipped(FINAL).iter_rows())
    by_arm: dict[str, list[float]] = {}
    for pair in pair_runs(runs, {})[0]:
        if set(pair.run_ids) <= set(run_ids):
            by_arm.setdefault(pair.arm, []).append(accuracy[pair.run] - accuracy[pair.baseline_run])
    groups = [values for values in by_arm.values() if len(values) > 1]
    if not groups:
        raise InputError(f"--pilot {study}: no arm shares two complete seeds with its baseline; choose another study")
    squares = sum(np.var(values, ddof=1) * (len(values) - 1) for values in groups)
    return float(np.sqrt(squares / sum(len(values) - 1 for values in groups)))
