"""The ``entrace`` command: the analysis commands plus those that train. Heavy imports stay inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.cli import app, print_json, run, say
from analysis.trace import InputError
from trainer.distributed import World, prepare, was_launched

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.intervene import Settings, Tally

DEFAULT_BUDGET = 200_000


class Where(StrEnum):
    """Launchers of ``entrace ablate``."""

    LOCAL = "local"
    RAY = "ray"


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Override single keys.", show_default=False)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what --out already holds.")]
Budget = Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Tokens to generate, earlier calls counted.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="As --resume, and try failed runs once more.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time; each gets an equal share of the cores.")]


def main() -> None:
    """Entry point of the console script."""
    if was_launched():
        prepare()
        if sys.argv[1:2] != ["train"]:
            say("entrace: processes that were launched together can train, and nothing else", err=True)
            sys.exit(2)
    run(app)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped config such as tiny.")],
    overrides: Overrides = None,
    *,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; its name is the run id.")] = None,
    resume: Resume = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what the run would take.")] = False,
    devices: Annotated[int | None, typer.Option(min=1, help="With --dry-run: processes, one a device.")] = None,
    json: Json = False,
) -> None:
    """Train one policy with GRPO and record every token.

    Example: entrace train tiny seed=1 shaping.method=ppl --out data/runs/mine/ppl-seed1

    Example: entrace train paper-qwen2.5-7b --dry-run --devices 8
    """
    _require_train_extra()
    from trainer.config import load_config

    if dry_run:
        _print_plan(load_config(config, overrides or []), devices or 1, json)
        return
    if out is None:
        raise InputError("--out: expected the folder of the run")
    if devices or json:
        raise InputError("--devices and --json go with --dry-run")
    from analysis.progress import Progress
    from trainer.run_folder import alone_in
    from trainer.train import train as run_training

    with _stoppable(f"with --resume goes on in {out}"), World.join() as world:
        with world.together():
            settings = load_config(config, overrides or [])
            world.wait()
        labels = {"study": out.resolve().parent.name, "arm": settings.shaping.method}
        with alone_in(out, waits=False, world=world), Progress(out.name, settings.steps) as progress:
            run_training(settings, out, labels, resume=resume, on_step=progress.update, world=world)
    say(str(out))


def _print_plan(settings: Config, devices: int, json: bool) -> None:
    from trainer.dry_run import make_plan

    plan = make_plan(settings, devices)
    if json:
        print_json({**asdict(plan), "peak": plan.peak, "sharded_peak": plan.sharded_peak})
        return
    for line in plan.lines():
        say(line)


@app.command()
def ablate(
    grid: Annotated[str, typer.Argument(help="A TOML grid, or the name of a shipped one such as tiny-study.")],
    overrides: Overrides = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the study; each run gets a folder in it.")],
    seeds: Annotated[str | None, typer.Option(help="Seeds instead of the grid's, as in 0,1,2.")] = None,
    resume: Resume = False,
    retry_failed: RetryFailed = False,
    launcher: Annotated[
        Where, typer.Option(help="Processes here, or tasks of a Ray cluster whose nodes share --out.")
    ] = Where.LOCAL,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="local: runs at a time, sharing the cores; 1 if left out.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="ray: host:port of a cluster, or auto.")] = None,
    cpus_per_run: Annotated[int | None, typer.Option(min=1, help="ray: CPUs of a run; 1 if left out.")] = None,
    gpus_per_run: Annotated[
        float | None, typer.Option(min=0, help="ray: GPUs of a run; 1 if left out and there are any.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print runs, time and detectable difference only.")
    ] = False,
    pilot: Annotated[Path | None, typer.Option(metavar="STUDY", help="dry-run: a study to plan with.")] = None,
    json: Json = False,
) -> None:
    """Run a grid of arms x seeds x sweep; a failed run stays in the table with its error.

    Example: entrace ablate tiny-study --seeds 0,1,2 --jobs 2 --out data/runs/three-seeds
    """
    _require_train_extra()
    from trainer.cli import grid as grid_command
    from trainer.grid import load_grid

    specs = load_grid(grid, overrides or [], _parse_seeds(seeds))
    chosen = grid_command.choose_launcher(launcher.value, jobs, address, cpus_per_run, gpus_per_run)
    if dry_run:
        plan = grid_command.plan(specs, out, chosen, retry_failed, pilot)
        if json:
            print_json(plan.to_dict())
            return
        for line in plan.lines():
            say(line)
        return
    if pilot:
        raise InputError("--pilot belongs to --dry-run")
    with _stoppable(f"with --resume goes on in {out}"):
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
    jobs: Jobs = 1,
) -> None:
    """Run the default study on the embedded policy, intervene on its baseline, and write its report.

    Example: entrace study --out data/runs/study --report reports/study
    """
    _require_train_extra()
    from analysis.cli import report as write_report
    from trainer.cli import grid as grid_command
    from trainer.grid import load_grid
    from trainer.intervene import Settings, resolve_checkpoint
    from trainer.launch.local import LocalLauncher

    specs = load_grid("tiny-study")
    with _stoppable(f"with --resume goes on in {out}"):
        failed = grid_command.run(specs, out, LocalLauncher(jobs), resume, retry_failed)
    for spec in specs:
        if spec.arm == spec.baseline and spec.run_id not in failed:
            run = out / spec.run_id
            _intervene(run, Settings(resolve_checkpoint(run, None)), DEFAULT_BUDGET)
    write_report([str(out)], out=report)
    raise typer.Exit(1 if failed else 0)


@app.command()
def methods(json: Json = False) -> None:
    """List the methods that an arm can be: equation, what it does, parameters, source, and the keys that select it.

    Example: entrace methods
    """
    _require_train_extra()
    from trainer.methods import describe_methods

    found = describe_methods()
    if json:
        print_json(found)
        return
    for name, entry in found.items():
        typer.echo(f"{name}: {entry['summary']}\n    {entry['equation']}   [{entry['source']}]")
        if entry["parameters"]:
            section = f"{entry['section']}: " if entry["section"] else ""
            typer.echo(f"    {section}{', '.join(f'{key} = {value}' for key, value in entry['parameters'].items())}")
        typer.echo(f"    {entry['kind']}: {' '.join(entry['settings']) or 'nothing to set'}")


@app.command(name="eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="RUN_OR_MODEL...", help="Run folders or model folders.")],
    config: Annotated[str, typer.Option(help="Task and sampling of what is no run.")] = "tiny",
    json: Json = False,
) -> None:
    """Evaluate policies on held-out prompts: avg@k, maj@k, pass@k with intervals over prompts.

    A run is evaluated at its latest checkpoint with its own configuration.

    Example: entrace eval data/runs/study/none-seed0 data/base-policy
    """
    _require_train_extra()
    from analysis.progress import Progress
    from trainer.config import load_config
    from trainer.evaluate import evaluate_folder, find_policy

    given = load_config(config)
    targets = [find_policy(Path(model), given) for model in models]
    figures = {}
    with Progress("eval", sum(settings.task.total_heldout for settings in targets)) as progress:
        done = 0
        for model, settings in zip(models, targets, strict=True):
            rows = evaluate_folder(
                settings, lambda n, done=done, model=model, **seen: progress.update(done + n, model, **seen)
            )
            figures[model] = _summarize_evals(rows, settings.eval.samples)
            done += settings.task.total_heldout
    if json:
        print_json(figures)
        return
    for model, metrics in figures.items():
        for name, (value, low, high) in metrics.items():
            say(f"{model}  {name:<9} {value:.3f} [{low:.3f}, {high:.3f}]")


def _summarize_evals(rows: dict[str, Any], k: int) -> dict[str, tuple[float, float, float]]:
    """Mean and 95 % interval over prompts of avg@k, maj@k and pass@k."""
    import numpy as np

    from analysis.stats import Estimate, avg_at_k, maj_at_k, pass_at_k, resample_clusters

    correct = np.array(rows["is_correct"]).reshape(-1, k).tolist()
    answers = np.array(rows["answer"], dtype=object).reshape(-1, k).tolist()
    metrics = {
        f"avg@{k}": [avg_at_k(c, k) for c in correct],
        f"maj@{k}": [maj_at_k(a, c, k) for a, c in zip(answers, correct, strict=True)],
        f"pass@{k}": [pass_at_k(k, sum(c), k) for c in correct],
    }
    figures = {}
    for name, values in metrics.items():
        draws = resample_clusters(np.array(values), np.random.default_rng(0)) / len(values)
        estimate = Estimate.from_draws(float(np.mean(values)), draws, len(values) - 1, len(values), "prompts")
        figures[name] = (estimate.value, estimate.low, estimate.high)
    return figures


@app.command()
def score(
    rollouts: Annotated[list[Path], typer.Argument(metavar="ROLLOUTS...", help="JSONL or Parquet files of rollouts.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the trace; its name is the run id.")],
    model: Annotated[str, typer.Option(help="Whose probabilities to record, named as policy.path is.")] = "embedded",
    template: Annotated[
        str | None, typer.Option(help="Text of a prompt in place of the chat template; {question} if it was applied.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    correct_at: Annotated[float, typer.Option(help="Reward from which on a response counts as right.")] = 1.0,
    field: Annotated[
        list[str] | None, typer.Option(metavar="NAME=KEY", help="Key of a field called otherwise; may be repeated.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens read at once, padding counted.")] = 8192,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave malformed rows out.")] = False,
    resume: Resume = False,
) -> None:
    """Write the trace of rollouts that another trainer sampled: rows of prompt, response, reward, and perhaps step.

    A model reads every response once, and its entropy, log-probability and gradient norm are recorded token by token.

    Example: entrace score rollouts.jsonl --model data/base-policy --out data/runs/mine/scored
    """
    _require_train_extra()
    from analysis.progress import Progress
    from trainer import score as scoring
    from trainer.config import validate_section
    from trainer.plain_rollouts import read_rollouts
    from trainer.policy import Policy
    from trainer.rollout_rows import ScoreSettings
    from trainer.run_folder import alone_in

    values = {
        "policy": {"path": model, "template": template},
        "temperature": temperature,
        "correct_at": correct_at,
        "batch_tokens": batch_tokens,
        "skip_bad_rows": skip_bad_rows,
        "fields": _parse_fields(field or []),
    }
    settings = validate_section(ScoreSettings, values, "score")
    with _stoppable(f"with --resume goes on in {out}"), alone_in(out, waits=False):
        scoring.check_target(out, resume)
        policy = Policy.load(settings.policy)
        with read_rollouts(rollouts, settings, policy) as read, Progress(out.name, read.counts.rollouts) as progress:
            for remark in read.remarks():
                say(f"entrace: {remark}", err=True)
            scoring.score(read, rollouts, settings, policy, out, resume=resume, on_step=progress.update)
    say(str(out))


@app.command()
def intervene(
    run: Annotated[Path, typer.Argument(help="A run folder with checkpoints.")],
    checkpoint: Annotated[int | None, typer.Option(metavar="STEP", help="The latest if left out.")] = None,
    continuations: Annotated[int, typer.Option(min=1, help="Responses continued from either prefix.")] = 8,
    budget: Budget = DEFAULT_BUDGET,
    entropy: Annotated[str, typer.Option(metavar="LOW,HIGH", help="Quantiles of entropy of the tokens.")] = "0,1",
    position: Annotated[str, typer.Option(metavar="LOW,HIGH", help="Relative positions of the tokens.")] = "0,1",
    ppl_tercile: Annotated[str, typer.Option(help="Thirds of their groups by perplexity; 1 = lowest.")] = "1,2,3",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Decides tokens and continuations.")] = 0,
    json: Json = False,
) -> None:
    """Replace tokens of recorded responses, continue from both, and record what that does to the outcome.

    Adds table interventions to the run. Called again, it goes on where it stopped.

    Example: entrace intervene data/runs/study/none-seed0 --entropy 0.8,1 --budget 500000
    """
    _require_train_extra()
    from trainer.intervene import Settings, resolve_checkpoint

    filters = {
        "entropy": _parse_range("--entropy", entropy),
        "position": _parse_range("--position", position),
        "ppl_tercile": _parse_terciles(ppl_tercile),
    }
    settings = Settings(resolve_checkpoint(run, checkpoint), seed, continuations, **filters)
    tally = _intervene(run, settings, budget)
    if json:
        print_json({"checkpoint_step": settings.checkpoint_step, "seed": seed, **asdict(tally)})
        return
    if not tally.num_new:
        why = "no candidate is left" if tally.is_exhausted else "a larger --budget goes on"
        typer.echo(f"nothing to do: checkpoint {settings.checkpoint_step} with seed {seed} is finished; {why}")
    typer.echo(f"{tally.interventions} interventions, {tally.tokens} tokens, mean |impact| {tally.mean_abs_impact:.3f}")


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="A TOML recipe, or the name of a shipped one such as base-policy.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the new model, in Hugging Face layout.")],
) -> None:
    """Rebuild the embedded base policy from its recipe.

    Example: entrace pretrain base-policy --out data/my-base-policy
    """
    _require_train_extra()
    from analysis.progress import Progress
    from trainer.pretrain import load_recipe
    from trainer.pretrain import pretrain as run_pretraining
    from trainer.resources import resolve_config

    path = resolve_config(recipe)
    with Progress("pretrain", load_recipe(path).training.steps) as progress:
        figures = run_pretraining(path, out, progress.update)
    for name, value in asdict(figures).items():
        typer.echo(f"{name:<24} {value:.3f}")
    say(str(out))


def _require_train_extra() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None or find_spec("transformers") is None:
        raise InputError("this command needs the train extra: pip install 'entrace[train]'")


@contextmanager
def _stoppable(how: str) -> Iterator[None]:
    """Ctrl-C ends the command with a line that says what the same command does later."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"entrace: stopped; the same command {how}", err=True)
        raise typer.Exit(130) from None


def _parse_seeds(text: str | None) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise InputError(f'--seeds "{text}": expected numbers separated by commas, such as 0,1,2') from None


def _parse_fields(pairs: list[str]) -> dict[str, str]:
    fields = {}
    for pair in pairs:
        name, _, key = pair.partition("=")
        if not (name and key):
            raise InputError(f'--field "{pair}": expected NAME=KEY, such as reward=accuracy_reward')
        fields[name] = key
    return fields


def _intervene(run: Path, settings: Settings, budget: int) -> Tally:
    from analysis.progress import Progress
    from trainer.intervene import intervene as run_interventions

    with _stoppable(f"goes on in {run / 'interventions'}"), Progress("intervene", budget) as progress:

        def show(tally: Tally) -> None:
            note = f"{tally.interventions} interventions"
            progress.update(min(tally.tokens, budget), note, mean_abs_impact=tally.mean_abs_impact)

        return run_interventions(run, settings, budget, show)


def _parse_range(option: str, text: str) -> tuple[float, float]:
    with suppress(ValueError):
        low, high = map(float, text.split(","))
        if 0 <= low < high <= 1:
            return low, high
    raise InputError(f'{option} "{text}": expected LOW,HIGH with 0 <= LOW < HIGH <= 1, such as 0.8,1')


def _parse_terciles(text: str) -> tuple[int, ...]:
    given = {part.strip() for part in text.split(",")}
    if not given <= {"1", "2", "3"}:
        raise InputError(f'--ppl-tercile "{text}": expected some of 1,2,3, such as 1,3')
    return tuple(sorted(map(int, given)))
