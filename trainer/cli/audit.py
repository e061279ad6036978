"""``entrace audit``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from entrace.analysis.cli import note_incomplete, print_json, say
from entrace.analysis.trace import InputError
from entrace.trainer.cli.options import Json, named_by, require_train_extra


def audit(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="DUMP_OR_RUN...", help="Run folders, study folders, globs, or dumps of trainers."),
    ],
    *,
    format_name: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="Format of the dumps (default: detected).")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="tokenizer.json or its folder, for dumps of text (default: none)."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model that sampled the responses, whose values are compared with the recorded ones; any value of "
            "policy.path, such as embedded or a folder (default: none, checks that need no model)."
        ),
    ] = None,
    model_step: Annotated[
        str | None,
        typer.Option(
            metavar="STEP",
            help="Training step whose responses --model sampled, or all if the policy did not change (default: the "
            "only step, or the one that run.json names for this model).",
        ),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="With --model: tokens per forward pass, padding included (default 8192).")
    ] = 8192,
    json: Json = False,
) -> None:
    """Check recorded logprobs, entropies, groups, and advantages for errors.

    The audit finds the distribution that the recorded numbers describe. The exit code is 1 on an alarm. --model adds
    one teacher-forced pass over at most 20,000 tokens that this model sampled.

    Example: entrace audit data/runs/study

    Example: entrace audit runs/mine/token_exports --tokenizer Qwen3-4B

    Example: entrace audit data/runs/study/none-seed0 --model embedded
    """
    from entrace.analysis.audit import ALARM
    from entrace.analysis.audit import audit as find
    from entrace.analysis.importers.temporary import as_traces
    from entrace.analysis.importers.tokenizer import TokenizerFile
    from entrace.analysis.runs import is_run, open_runs
    from entrace.analysis.terminal.progress import reading

    if model and tokenizer:
        raise InputError("--tokenizer: --model has its own tokenizer; leave one of them out")
    if model_step is not None and not model:
        raise InputError("--model-step needs --model MODEL")
    comparison = None
    if model:
        require_train_extra()
        from entrace.trainer.cli.audit_model import Comparison

        with named_by("--model"):
            comparison = Comparison.load(model, model_step, batch_tokens)
    codec = comparison.codec if comparison else TokenizerFile(tokenizer) if tokenizer else None
    dumps = [path for path in runs if format_name or tokenizer or not is_run(path)]
    keep = comparison.keep if comparison else None
    with as_traces(dumps, format_name, codec, keep=keep, reading=reading) as (folders, remarks):
        for remark in remarks:
            say(f"entrace: {remark}", err=True)
        opened = open_runs([*(path for path in runs if path not in dumps), *folders])
        findings = find(
            opened, (lambda sample, run_id: comparison.refer(opened, sample, run_id)) if comparison else None
        )
    alarms = sum(finding.state == ALARM for finding in findings)
    if json:
        print_json({"alarms": alarms, "findings": list(map(asdict, findings))})
    else:
        for finding in findings:
            say(str(finding))
        say(f"{len(opened.manifests)} runs, {len(findings)} checks, {alarms} alarms")
    note_incomplete(opened)
    raise typer.Exit(1 if alarms else 0)
