"""Choose a launcher, run with a live table, and plan, for grid commands.

The commands are ``entrace ablate`` and ``entrace study``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from entrace.analysis.cli import say
from entrace.analysis.plan import GridPlan, Pilot, PlannedRun, measure_pilot
from entrace.analysis.terminal.grid_progress import GridProgress
from entrace.analysis.trace import InputError
from entrace.trainer.ablation.grid import RunSpec
from entrace.trainer.ablation.launch.job import Launcher
from entrace.trainer.ablation.launch.local import LocalLauncher
from entrace.trainer.ablation.launch.ray import RayLauncher
from entrace.trainer.ablation.runner import run_grid, survey
from entrace.trainer.resources import resolve_config
from entrace.trainer.settings import read_toml


def choose_launcher(
    name: str,
    jobs: int | None,
    threads: int | None,
    address: str | None,
    cpus_per_run: int | None,
    gpus_per_run: float | None,
) -> Launcher:
    """Return the launcher of that name; options that were not given are None.

    Raises:
        InputError: an option belongs to the other launcher.
    """
    ray_only = {"--address": address, "--cpus-per-run": cpus_per_run, "--gpus-per-run": gpus_per_run}
    for option, value in ray_only.items():
        if name == "local" and value is not None:
            raise InputError(f"{option} needs --launcher ray")
    if name == "local":
        return LocalLauncher(jobs or 1, threads)
    if jobs is not None:
        raise InputError(
            "--jobs needs --launcher local; with Ray, --cpus-per-run and --gpus-per-run limit the number of runs"
        )
    if threads is not None:
        raise InputError("--threads needs --launcher local; with Ray, a run has as many threads as --cpus-per-run")
    return RayLauncher(address, cpus_per_run or 1, gpus_per_run)


def run(specs: Sequence[RunSpec], out: Path, launcher: Launcher, resume: bool, retry_failed: bool) -> dict[str, str]:
    """Run a grid with a live table, and return errors by run id.

    Failed runs are also reported on stderr.
    """
    runs = {spec.run_id: (spec.arm, spec.config.steps) for spec in specs}
    with GridProgress(out.resolve().name, runs) as progress:
        failed = run_grid(specs, out, launcher, train_run, resume=resume, retry_failed=retry_failed, listener=progress)
    for run_id, error in failed.items():
        say(f"entrace: {run_id} failed: {error}", err=True)
    if failed:
        say(f"entrace: {len(failed)} of {len(specs)} runs failed; retry them with --retry-failed", err=True)
    return failed


def train_run(*arguments: Any, **options: Any) -> None:
    """Call ``train.train`` in the process of a run.

    The process of the command does not load torch.
    """
    from entrace.trainer.train import train

    train(*arguments, **options)


def summarize(specs: Sequence[RunSpec], out: Path) -> dict[str, Any]:
    """Return status, last durable step, and error of every run, for scripts."""
    statuses = survey(specs, out)
    return {
        "out": str(out),
        "runs": [
            {"run_id": spec.run_id, "arm": spec.arm, "seed": spec.config.seed, **asdict(statuses[spec.run_id])}
            for spec in specs
        ],
    }


def check(specs: Sequence[RunSpec]) -> tuple[list[str], list[str]]:
    """Return the distinct warnings and problems of the runs.

    Runs with equal needs are checked once.
    """
    from entrace.trainer.preflight import check_run

    distinct = {}
    for spec in specs:
        config = spec.config
        needs = config.task, config.policy, config.rollout.prompts_per_step, config.record.lexicon
        distinct.setdefault(repr(needs), config)
    found = [check_run(config) for config in distinct.values()]
    warnings, problems = (
        list(dict.fromkeys(line for checks in found for line in getattr(checks, name)))
        for name in ("warnings", "problems")
    )
    return warnings, problems


def plan(specs: Sequence[RunSpec], out: Path, launcher: Launcher, retry_failed: bool, pilot: Path | None) -> GridPlan:
    """Return the plan of a grid, given what ``out`` already holds.

    Raises:
        InputError: ``out`` was made from another grid, the launcher cannot start runs, or ``pilot`` holds no values.
    """
    statuses = survey(specs, out)
    if pilot:
        values, source = measure_pilot(pilot), str(pilot)
    else:
        values = Pilot(**read_toml(resolve_config("pilot")))
        source = "the shipped values of the embedded policy; --pilot STUDY measures others"
    try:
        launcher.connect()
        slots = launcher.slots
    finally:
        launcher.close()
    runs = [
        PlannedRun(
            spec.run_id,
            spec.arm,
            spec.baseline,
            spec.config.seed,
            spec.config.steps,
            statuses[spec.run_id].status,
            0 if statuses[spec.run_id].is_kept(retry_failed) else spec.config.steps - statuses[spec.run_id].step,
        )
        for spec in specs
    ]
    return GridPlan(runs, slots, values, source)
