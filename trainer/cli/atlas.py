"""``entrace atlas``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from entrace.analysis.cli import note_incomplete, print_json, say
from entrace.analysis.trace import InputError
from entrace.trainer.cli.options import Json, Overrides, require_train_extra

if TYPE_CHECKING:
    import polars as pl

    from entrace.analysis.atlas import Described, Tally, Trace
    from entrace.analysis.runs import Runs
    from entrace.trainer.atlas import Method, RecordedStep


def atlas(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")],
    overrides: Overrides = None,
    *,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the page, figures, and CSV files.")],
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Also weigh a method of your own; repeatable (default: none)."),
    ] = None,
    json: Json = False,
) -> None:
    """Compute the weight of each token under each registered method.

    The atlas reads a recorded run, and trains nothing.

    Example: entrace atlas data/runs/study/none-seed0 --out reports/atlas

    Example: entrace atlas data/runs/study/none-seed0 loss.entropy_mask.top_frac=0.1 --out reports/atlas
    """
    require_train_extra()
    from entrace.analysis.atlas import write_atlas
    from entrace.analysis.runs import open_runs
    from entrace.trainer.atlas import find_methods
    from entrace.trainer.settings import merge, parse_override

    values: dict[str, Any] = {}
    for override in overrides or []:
        values = merge(values, parse_override(override))
    for key in ("shaping", "loss"):
        if isinstance(section := values.get(key), Mapping) and "method" in section:
            raise InputError(f"{key}.method: the atlas weighs every method; set parameters, such as loss.clip_high=0.3")
    methods = find_methods(method or [], values)
    opened = open_runs(run)
    page, summary = write_atlas(opened, out, lambda trace: weigh_run(opened, trace, methods))
    note_incomplete(opened)
    if json:
        print_json({"page": str(page), "methods": summary.to_dicts()})
    else:
        for row in summary.filter(summary["remark"] != "").to_dicts():
            say(f"{row['name']}: {row['remark']}")
        say(f"atlas: {page}")


def weigh_run(runs: Runs, trace: Trace, methods: Sequence[Method]) -> tuple[list[Described], Tally]:
    """Weigh the tokens of all steps, with a progress bar."""
    import torch

    from entrace.analysis.atlas import AFTER, SAMPLED, Described, Tally, read_steps
    from entrace.analysis.terminal.progress import Progress
    from entrace.trainer.atlas import Weigher

    # Tensors are small, and threads would wait for each other.
    torch.set_num_threads(1)
    weigher, tally = Weigher(methods), Tally([method.name for method in methods], trace)
    with Progress("atlas", trace.steps.height) as progress:
        for done, (responses, tokens) in enumerate(read_steps(runs, trace), start=1):
            recorded = record_step(responses, tokens, has_entropy=bool(trace.thresholds))
            found = weigher.weigh(recorded)
            codes = tally.codes(tokens)
            in_update = recorded.is_kept[recorded.row]
            for at, weights in zip((SAMPLED, AFTER), found, strict=True):
                chosen = in_update if at == SAMPLED else in_update & np.isfinite(recorded.log_ratio)
                if weights and chosen.any():
                    kept = {name: values[chosen] for name, values in weights.items()}
                    tally.add(at, kept, {name: code[chosen] for name, code in codes.items()})
            progress.update(done, f"step {recorded.step}")
    if not tally.tokens[SAMPLED]:
        raise InputError(f"{trace.run_id}: no response took part in an update, so that no method weighs a token")
    through_ratio = [method for method in methods if method.acts_through_ratio and not method.lacks]
    if through_ratio and not tally.tokens[AFTER]:
        for method in through_ratio:
            method.lacks = "acts through the ratio; tokens.logprob_after was not recorded (record.after_update_every)"
        names = ", ".join(method.name for method in through_ratio)
        say(
            f"entrace: {trace.run_id}: no values after the update, which {names} need; record.after_update_every and "
            "record.after_update_responses record them",
            err=True,
        )
    described = [
        Described(m.name, m.kind, m.equation, m.lacks, m.acts_through_ratio and not m.lacks, m.passes) for m in methods
    ]
    return described, tally


def record_step(responses: pl.DataFrame, tokens: pl.DataFrame, has_entropy: bool) -> RecordedStep:
    """Return a step as arrays.

    A response is part of the update unless it is known not to be.
    """
    from entrace.trainer.atlas import RecordedStep

    ids = responses["rollout_id"].to_numpy()
    groups = np.unique(responses["group_id"].to_numpy(), return_inverse=True)[1]
    row = np.searchsorted(ids, tokens["rollout_id"].to_numpy())
    number = {
        name: tokens[name].fill_null(np.nan).to_numpy() for name in ("logprob", "entropy", "log_ratio", "entropy_after")
    }
    advantage = tokens["advantage"]
    # A response without an advantage takes no part in an update.
    has_advantage = np.ones(len(ids), bool)
    has_advantage[row[advantage.is_null().to_numpy()]] = False
    return RecordedStep(
        step=int(tokens["step"][0]),
        row=row,
        group_ids=groups,
        is_correct=responses["is_correct"].fill_null(False).to_numpy(),
        is_kept=responses["is_kept"].fill_null(True).to_numpy() & has_advantage,
        rewards=responses["reward"].cast(float).fill_null(np.nan).to_numpy(),
        advantage=advantage.fill_null(0.0).to_numpy(),
        logprob=np.nan_to_num(number["logprob"]),
        entropy=np.nan_to_num(number["entropy"]) if has_entropy else None,
        log_ratio=number["log_ratio"],
        entropy_after=number["entropy_after"],
    )
