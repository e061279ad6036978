"""``entrace import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entrace.analysis.cli import say, stoppable
from entrace.analysis.trace import InputError
from entrace.trainer.cli.options import Resume, require_train_extra


def import_rollouts(
    rollouts: Annotated[list[Path], typer.Argument(metavar="ROLLOUTS...", help="JSONL or Parquet files of rollouts.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the trace; its name is the run id.")],
    model: Annotated[
        str, typer.Option(help="Model whose probabilities are recorded; any value of policy.path.")
    ] = "embedded",
    template: Annotated[
        str | None,
        typer.Option(
            help="Prompt text that replaces the chat template, with {question} for the prompt; {question} alone if the "
            "rows hold the templated prompt (default: the chat template)."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature of the rollouts.")] = 1.0,
    correct_at: Annotated[float, typer.Option(help="Lowest reward of a correct response.")] = 1.0,
    field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=KEY",
            help="Key that holds a field under another name; NAME= ignores the field. Repeatable.",
        ),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per forward pass, padding included.")] = 8192,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Skip malformed rows (default: stop at them).")
    ] = False,
    resume: Resume = False,
) -> None:
    """Import rollouts that another trainer sampled: rows of prompt, response, reward, and optionally step.

    One teacher-forced pass of a model records the log-probability, entropy, and gradient norm of every token.

    Example: entrace import rollouts.jsonl --model data/base-policy --out data/runs/mine/imported
    """
    require_train_extra()
    from entrace.analysis.terminal.progress import Progress
    from entrace.trainer.external import teacher_forcing
    from entrace.trainer.external.plain_rollouts import read_rollouts
    from entrace.trainer.external.rollout_rows import ImportSettings
    from entrace.trainer.model.policy import Policy
    from entrace.trainer.runs.run_folder import run_lock
    from entrace.trainer.settings import validate_section

    values = {
        "policy": {"path": model, "template": template},
        "temperature": temperature,
        "correct_at": correct_at,
        "batch_tokens": batch_tokens,
        "skip_bad_rows": skip_bad_rows,
        "fields": _parse_fields(field or []),
    }
    settings = validate_section(ImportSettings, values, "import")
    with stoppable(f"with --resume continues in {out}"), run_lock(out, waits=False):
        teacher_forcing.check_target(out, resume)
        policy = Policy.load(settings.policy)
        with read_rollouts(rollouts, settings, policy) as read, Progress(out.name, read.counts.rollouts) as progress:
            for remark in read.remarks():
                say(f"entrace: {remark}", err=True)
            teacher_forcing.import_rollouts(
                read, rollouts, settings, policy, out, resume=resume, on_step=progress.update
            )
    say(str(out))


def score() -> None:
    """Name the command that replaced ``entrace score``.

    Raises:
        InputError: always.
    """
    raise InputError("score: this command is now `entrace import`, with the same arguments")


def _parse_fields(pairs: list[str]) -> dict[str, str]:
    fields = {}
    for pair in pairs:
        name, sign, key = pair.partition("=")
        if not (name and sign):
            raise InputError(f'--field "{pair}": expected NAME=KEY, such as reward=accuracy_reward')
        fields[name] = key
    return fields
