"""``entrace score``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entrace.analysis.cli import say
from entrace.analysis.trace import InputError
from entrace.trainer.cli.options import Resume, require_train_extra, stoppable


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
        list[str] | None,
        typer.Option(metavar="NAME=KEY", help="Key of a field called otherwise; NAME= leaves it out; may be repeated."),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens read at once, padding too if there is any.")] = 8192,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave malformed rows out.")] = False,
    resume: Resume = False,
) -> None:
    """Write the trace of rollouts that another trainer sampled: rows of prompt, response, reward, and perhaps step.

    A model reads every response once, and its entropy, log-probability and gradient norm are recorded token by token.

    Example: entrace score rollouts.jsonl --model data/base-policy --out data/runs/mine/scored
    """
    require_train_extra()
    from entrace.analysis.terminal.progress import Progress
    from entrace.trainer.external import teacher_forcing as scoring
    from entrace.trainer.external.plain_rollouts import read_rollouts
    from entrace.trainer.external.rollout_rows import ScoreSettings
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
    settings = validate_section(ScoreSettings, values, "score")
    with stoppable(f"with --resume goes on in {out}"), run_lock(out, waits=False):
        scoring.check_target(out, resume)
        policy = Policy.load(settings.policy)
        with read_rollouts(rollouts, settings, policy) as read, Progress(out.name, read.counts.rollouts) as progress:
            for remark in read.remarks():
                say(f"entrace: {remark}", err=True)
            scoring.score(read, rollouts, settings, policy, out, resume=resume, on_step=progress.update)
    say(str(out))


def _parse_fields(pairs: list[str]) -> dict[str, str]:
    fields = {}
    for pair in pairs:
        name, sign, key = pair.partition("=")
        if not (name and sign):
            raise InputError(f'--field "{pair}": expected NAME=KEY, such as reward=accuracy_reward')
        fields[name] = key
    return fields
