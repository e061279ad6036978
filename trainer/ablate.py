"""A grid of runs: arms x seeds, each run in a process of its own, failures kept in the table."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from analysis.trace import InputError
from analysis.trace.manifest import count_cores
from trainer.config import (
    Config,
    Natural,
    Section,
    build_config,
    merge,
    parse_override,
    read_toml,
    validate_section,
)
from trainer.resources import resolve_config
from trainer.run_folder import error_of, has_begun, is_complete, write_failure

POLL_S = 0.2


class Grid(Section):
    """Arms (overrides of one base config) x seeds; ``baseline`` names the arm that others are compared with."""

    config: str
    baseline: str
    seeds: list[Natural] = Field(min_length=1)
    arms: dict[str, dict[str, Any]] = Field(min_length=1)


@dataclass(frozen=True)
class RunSpec:
    """One cell of the grid."""

    run_id: str
    arm: str
    baseline: str
    config: Config

    def labels(self, out: Path) -> dict[str, str]:
        """What the run's manifest says of its place in the study."""
        return {"study": out.name, "arm": self.arm, "baseline": self.baseline}


def load_grid(path: str, overrides: Sequence[str] = (), seeds: Sequence[int] | None = None) -> list[RunSpec]:
    """Reads a grid and validates the configuration of every run before anything starts.

    Args:
        path: A grid file, or the name of a shipped one.
        overrides: ``key.path=value``, applied to every run after its arm's own.
        seeds: Replace the grid's.

    Raises:
        InputError: no such file, an unknown key or arm, a seed given twice, or an invalid run.
    """
    grid = validate_section(Grid, read_toml(resolve_config(path)), path)
    seeds = grid.seeds if seeds is None else seeds
    if len(set(seeds)) < len(seeds):
        raise InputError(f"{path}: a seed is given twice in {list(seeds)}")
    if grid.baseline not in grid.arms:
        raise InputError(f'{path}: baseline "{grid.baseline}" is no arm; arms: {", ".join(grid.arms)}')
    base = read_toml(resolve_config(grid.config))
    specs = []
    for seed in seeds:
        for arm, changes in grid.arms.items():
            values = merge(merge(base, changes), {"seed": seed})
            for override in overrides:
                values = merge(values, parse_override(override))
            config = build_config(values, source=f"{path}, arm {arm}")
            specs.append(RunSpec(f"{arm}-seed{seed}", arm, grid.baseline, config))
    return specs


def run_grid(
    specs: Sequence[RunSpec],
    out: Path,
    *,
    jobs: int = 1,
    resume: bool = False,
    on_step: Callable[..., None] = lambda run_id, done, **figures: None,
) -> dict[str, str]:
    """Runs every cell of a grid, each in a folder of its own under ``out``.

    Args:
        specs: The cells.
        out: Folder of the study.
        jobs: Processes at a time; each gets an equal share of the cores.
        resume: Keep complete runs and go on with the others.
        on_step: Called with the run id, the step, and figures to show.

    Returns:
        Error of each failed run, by run id.

    Raises:
        InputError: ``out`` already holds runs and ``resume`` is not set.
    """
    if not resume and out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: already holds files; choose another folder, or go on with --resume")
    out.mkdir(parents=True, exist_ok=True)
    # Imports cost seconds: a server pays them once and forks a fresh process for each run.
    context: Any = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    context.set_forkserver_preload(["trainer.train"])
    updates = context.Queue()
    threads = max(1, count_cores() // jobs)
    waiting = [spec for spec in specs if not (resume and is_complete(spec.config, out / spec.run_id))]
    running: dict[str, Any] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                spec = waiting.pop(0)
                arguments = (spec, out, resume, threads, updates)
                running[spec.run_id] = context.Process(target=_run_one, args=arguments, daemon=True)
                running[spec.run_id].start()
            _pass_on(updates, on_step)
            running = {run_id: process for run_id, process in running.items() if process.is_alive()}
    finally:
        for process in running.values():
            process.terminate()
            process.join()
    for spec in specs:
        if not has_begun(out / spec.run_id):
            write_failure(spec.config, out / spec.run_id, spec.labels(out), "the process ended before the run began")
    return {spec.run_id: error for spec in specs if (error := error_of(out / spec.run_id))}


def _run_one(spec: RunSpec, out: Path, resume: bool, threads: int, updates: Any) -> None:
    import torch

    from trainer.train import train

    torch.set_num_threads(threads)
    run_dir = out / spec.run_id
    labels = spec.labels(out)
    parent = multiprocessing.parent_process()

    def report(done: int, **figures: float) -> None:
        # Whoever started the grid may have been killed; its runs must not go on unseen.
        if parent and not parent.is_alive():
            raise KeyboardInterrupt
        updates.put((spec.run_id, done, figures))

    try:
        train(spec.config, run_dir, labels, resume=resume, on_step=report)
    except Exception as error:
        # Past its beginning a run says so in its own manifest; whoever started the grid reads it there.
        if not has_begun(run_dir):
            write_failure(spec.config, run_dir, labels, f"{type(error).__name__}: {error}")
    updates.put((spec.run_id, spec.config.steps, {}))


def _pass_on(updates: Any, on_step: Callable[..., None]) -> None:
    try:
        run_id, done, figures = updates.get(timeout=POLL_S)
    except queue.Empty:
        return
    on_step(run_id, done, **figures)
