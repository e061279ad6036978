"""The ``entrace`` command: commands that analyze, and commands that train.

Commands import heavy libraries themselves.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entrace.analysis.cli import app, print_json, run, say
from entrace.analysis.terminal.stops import stoppable
from entrace.analysis.trace import InputError
from entrace.trainer.cli.atlas import atlas
from entrace.trainer.cli.audit import audit
from entrace.trainer.cli.evaluate import evaluate
from entrace.trainer.cli.import_rollouts import import_rollouts, score
from entrace.trainer.cli.intervene import DEFAULT_BUDGET, intervene, run_interventions
from entrace.trainer.cli.options import (
    Json,
    Overrides,
    Resume,
    RetryFailed,
    import_lazily,
    require_train_extra,
)
from entrace.trainer.parallel.ranks import Ranks, prepare, was_launched

if TYPE_CHECKING:
    from entrace.trainer.config import Config


class LauncherName(StrEnum):
    """Launchers of ``entrace ablate``."""

    LOCAL = "local"
    RAY = "ray"


def main() -> None:
    """Run the command line, the entry point of the console script."""
    if was_launched():
        prepare()
        if sys.argv[1:2] != ["train"]:
            say("entrace: only `entrace train` can run in several processes; start other commands once", err=True)
            sys.exit(2)
    run(app)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version

        typer.echo(f"entrace {version('entrace')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Handle the options that precede a command."""
    del version


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="TOML file, or the name of a shipped config such as tiny.")],
    overrides: Overrides = None,
    *,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; its name is the run id (required without --dry-run).")
    ] = None,
    resume: Resume = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check memory, files, prompts, tokenizer, verifiers, and evaluations instead of training; exit code 2 "
            "if the run cannot start (default: train).",
        ),
    ] = False,
    devices: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: number of processes, one per device (default 1).")
    ] = None,
    json: Json = False,
) -> None:
    """Train one policy with GRPO and record every token.

    Example: entrace train tiny seed=1 shaping.method=ppl --out data/runs/mine/ppl-seed1

    Example: entrace train paper-qwen2.5-7b --dry-run --devices 8
    """
    require_train_extra()
    from entrace.trainer.config import load_config

    if dry_run:
        raise typer.Exit(_print_plan(load_config(config, overrides or []), devices or 1, json))
    if out is None:
        raise InputError("--out: missing; name the folder of the run")
    if devices or json:
        raise InputError("--devices and --json need --dry-run")
    from entrace.analysis.terminal.progress import Progress
    from entrace.trainer.runs.run_folder import run_lock
    from entrace.trainer.train import train as run_training

    with stoppable(f"with --resume continues in {out}"), Ranks.join() as ranks:
        with ranks.together():
            settings = load_config(config, overrides or [])
            ranks.barrier()
        with run_lock(out, waits=False, ranks=ranks), Progress(out.name, settings.steps) as progress:
            run_training(settings, out, resume=resume, on_step=progress.update, ranks=ranks)
    say(str(out))


def _print_plan(settings: Config, devices: int, json: bool) -> int:
    """Print what a run needs and return the exit code: 2 if the run cannot start."""
    from entrace.trainer.dry_run import make_plan
    from entrace.trainer.preflight import check_run

    plan = make_plan(settings, devices)
    if not json:
        for line in plan.lines():
            say(line)
    checks = check_run(settings)
    if json:
        print_json({**asdict(plan), "peak": plan.peak, "sharded_peak": plan.sharded_peak, **asdict(checks)})
    else:
        for line in checks.lines():
            say(line)
    return _report(checks.warnings, checks.problems)


def _report(warnings: list[str], problems: list[str]) -> int:
    """Print warnings and problems and return the exit code: 2 if a run cannot start."""
    for line in (*warnings, *problems):
        say(f"entrace: {line}", err=True)
    return 2 if problems else 0


@app.command()
def ablate(
    grid: Annotated[str, typer.Argument(help="TOML grid, or the name of a shipped one such as tiny-study.")],
    overrides: Overrides = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the study, with one folder per run.")],
    seeds: Annotated[str | None, typer.Option(help="Seeds, such as 0,1,2 (default: the grid's).")] = None,
    resume: Resume = False,
    retry_failed: RetryFailed = False,
    launcher: Annotated[
        LauncherName,
        typer.Option(help="Processes on this machine, or tasks of a Ray cluster whose nodes share --out."),
    ] = LauncherName.LOCAL,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="local: concurrent runs, which share the cores (default 1).")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="local: CPU threads per run (default: 1 for the embedded policy, otherwise cores / jobs)."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="ray: host:port of a cluster, or auto (default: RAY_ADDRESS, else a cluster on this machine)."
        ),
    ] = None,
    cpus_per_run: Annotated[int | None, typer.Option(min=1, help="ray: CPUs per run (default 1).")] = None,
    gpus_per_run: Annotated[
        float | None, typer.Option(min=0, help="ray: GPUs per run (default 1, or 0 in a cluster without GPUs).")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print runs, time, and detectable difference, and check files, tokenizer, and verifiers, instead of "
            "running; exit code 2 if a run cannot start (default: run).",
        ),
    ] = False,
    pilot: Annotated[
        Path | None,
        typer.Option(
            metavar="STUDY",
            help="With --dry-run: study whose times and spread the plan uses (default: shipped values).",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Run a grid of arms x seeds x sweep.

    Failed runs are reported and do not stop the others.

    Example: entrace ablate tiny-study --seeds 0,1,2 --jobs 2 --out data/runs/three-seeds
    """
    require_train_extra()
    from entrace.trainer.ablation.grid import load_grid
    from entrace.trainer.cli import grid as grid_command

    specs = load_grid(grid, overrides or [], _parse_seeds(seeds))
    chosen = grid_command.choose_launcher(launcher.value, jobs, threads, address, cpus_per_run, gpus_per_run)
    if dry_run:
        plan = grid_command.plan(specs, out, chosen, retry_failed, pilot)
        warnings, problems = grid_command.check(specs)
        if json:
            print_json({**plan.to_dict(), "warnings": warnings, "problems": problems})
        else:
            for line in plan.lines():
                say(line)
        raise typer.Exit(_report(warnings, problems))
    if pilot:
        raise InputError("--pilot needs --dry-run")
    with stoppable(f"with --resume continues in {out}"):
        failed = grid_command.run(specs, out, chosen, resume, retry_failed)
    if json:
        print_json(grid_command.summarize(specs, out))
    else:
        say(str(out))
    raise typer.Exit(1 if failed else 0)


@app.command()
def study(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("data/runs/study"),
    report: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("reports/study"),
    resume: Resume = False,
    retry_failed: RetryFailed = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Concurrent runs (default: the number of cores).")] = None,
) -> None:
    """Run the default study on the embedded policy, and write its report.

    Interventions are made on the runs of its baseline.

    Example: entrace study --out data/runs/study --report reports/study
    """
    require_train_extra()
    from entrace.analysis.cli import report as write_report
    from entrace.analysis.report import check_target
    from entrace.analysis.trace.manifest import count_cores
    from entrace.trainer.ablation.grid import load_grid
    from entrace.trainer.ablation.launch.local import LocalLauncher
    from entrace.trainer.cli import grid as grid_command
    from entrace.trainer.interventions.intervene import Settings, resolve_checkpoint

    check_target(report)
    specs = load_grid("tiny-study")
    with stoppable(f"with --resume continues in {out}"):
        launcher = LocalLauncher(jobs or min(count_cores(), len(specs)))
        failed = grid_command.run(specs, out, launcher, resume, retry_failed)
        subjects = [out / spec.run_id for spec in specs if spec.arm == spec.baseline and spec.run_id not in failed]
        for subject in subjects:
            run_interventions(subject, Settings(resolve_checkpoint(subject, None)), DEFAULT_BUDGET // len(subjects))
        write_report([str(out)], out=str(report))
    raise typer.Exit(1 if failed else 0)


@app.command()
def methods(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME_OR_TOML]...",
            help="Your own methods as module:function, or run configs and grids that name them.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the methods that an arm can use.

    The list has equation, summary, source, parameters, and the keys that select each method.

    Example: entrace methods my_methods:confident my-grid.toml
    """
    require_train_extra()
    # Loading torch takes seconds, and no method is applied.
    import_lazily("torch")
    from entrace.trainer.ablation.arms import describe_methods, named_methods

    found = describe_methods(named_methods(names or []))
    if json:
        print_json(found)
        return
    for name, entry in found.items():
        typer.echo(f"{name}: {entry['summary']}\n    {entry['equation']}   [{entry['source']}]")
        if entry["parameters"]:
            section = f"{entry['section']}: " if entry["section"] else ""
            typer.echo(f"    {section}{', '.join(f'{key} = {value}' for key, value in entry['parameters'].items())}")
        typer.echo(f"    {entry['kind']}: {' '.join(entry['settings']) or 'nothing to set'}")


app.command()(atlas)
app.command()(audit)
app.command(name="eval")(evaluate)
app.command(name="import")(import_rollouts)
app.command(
    hidden=True, add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)(score)
app.command()(intervene)


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="TOML recipe, or the name of a shipped one such as base-policy.")],
    *,
    out: Annotated[Path, typer.Option(help="New folder for the model, in Hugging Face layout.")],
) -> None:
    """Rebuild the embedded base policy from its recipe.

    Example: entrace pretrain base-policy --out data/my-base-policy
    """
    require_train_extra()
    from entrace.analysis.terminal.progress import Progress
    from entrace.trainer.pretraining.pretrain import load_recipe
    from entrace.trainer.pretraining.pretrain import pretrain as run_pretraining
    from entrace.trainer.resources import resolve_config

    path = resolve_config(recipe)
    with Progress("pretrain", load_recipe(path).training.steps) as progress:
        metrics = run_pretraining(path, out, progress.update)
    for name, value in asdict(metrics).items():
        typer.echo(f"{name:<24} {value:.3f}")
    say(str(out))


def _parse_seeds(text: str | None) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise InputError(f'--seeds "{text}": expected integers separated by commas, such as 0,1,2') from None
