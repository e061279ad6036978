"""``entrace intervene``, which ``entrace study`` also calls."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entrace.analysis.cli import print_json
from entrace.analysis.terminal.stops import stoppable
from entrace.analysis.trace import InputError
from entrace.analysis.trace.places import check_local
from entrace.trainer.cli.options import Json, require_train_extra

if TYPE_CHECKING:
    from entrace.trainer.interventions.intervene import InterventionCounts, Settings

DEFAULT_BUDGET = 200_000

Budget = Annotated[
    int,
    typer.Option(
        min=1, metavar="TOKENS", help="Tokens to generate, earlier calls included; the last batch may exceed it."
    ),
]


def intervene(
    run: Annotated[Path, typer.Argument(help="Run folder with checkpoints.")],
    checkpoint: Annotated[
        int | None, typer.Option(metavar="STEP", help="Step of the checkpoint (default: the latest).")
    ] = None,
    continuations: Annotated[int, typer.Option(min=1, help="Continuations per prefix.")] = 8,
    budget: Budget = DEFAULT_BUDGET,
    entropy: Annotated[str, typer.Option(metavar="LOW,HIGH", help="Quantile range of the tokens' entropy.")] = "0,1",
    position: Annotated[str, typer.Option(metavar="LOW,HIGH", help="Range of the tokens' relative position.")] = "0,1",
    ppl_tercile: Annotated[
        str, typer.Option(help="Perplexity terciles of the responses within their groups; 1 is the lowest.")
    ] = "1,2,3",
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Seed of the choice of tokens and of the continuations.")
    ] = 0,
    json: Json = False,
) -> None:
    """Replace tokens of recorded responses, and measure the effect on accuracy.

    Continuations of the original token and of its replacement are sampled. The rows form table interventions of the
    run. A second call continues where the first stopped.

    Example: entrace intervene data/runs/study/none-seed0 --entropy 0.8,1 --budget 500000
    """
    require_train_extra()
    from entrace.trainer.interventions.intervene import Settings, resolve_checkpoint

    check_local(run)
    filters = {
        "entropy": _parse_range("--entropy", entropy),
        "position": _parse_range("--position", position),
        "ppl_tercile": _parse_terciles(ppl_tercile),
    }
    settings = Settings(resolve_checkpoint(run, checkpoint), seed, continuations, **filters)
    counts = run_interventions(run, settings, budget)
    if json:
        print_json({"checkpoint_step": settings.checkpoint_step, "seed": seed, **asdict(counts)})
        return
    if not counts.num_new:
        why = "no candidate is left" if counts.is_exhausted else "continue with a larger --budget"
        typer.echo(f"nothing to do: checkpoint {settings.checkpoint_step} with seed {seed} is finished; {why}")
    typer.echo(
        f"{counts.interventions} interventions, {counts.tokens} tokens, mean |impact| {counts.mean_abs_impact:.3f}"
    )


def run_interventions(run: Path, settings: Settings, budget: int) -> InterventionCounts:
    """Intervene with a progress bar until the budget is spent or Ctrl-C stops it."""
    from entrace.analysis.terminal.progress import Progress
    from entrace.trainer.interventions.intervene import intervene as run_series

    with stoppable(f"continues in {run / 'interventions'}"), Progress("intervene", budget) as progress:

        def show(counts: InterventionCounts) -> None:
            note = f"{counts.interventions} interventions"
            progress.update(min(counts.tokens, budget), note, mean_abs_impact=counts.mean_abs_impact)

        return run_series(run, settings, budget, show)


def _parse_range(option: str, text: str) -> tuple[float, float]:
    with suppress(ValueError):
        low, high = map(float, text.split(","))
        if 0 <= low < high <= 1:
            return low, high
    raise InputError(f'{option} "{text}": expected LOW,HIGH with 0 <= LOW < HIGH <= 1, such as 0.8,1')


def _parse_terciles(text: str) -> tuple[int, ...]:
    given = {part.strip() for part in text.split(",")}
    if not given <= {"1", "2", "3"}:
        raise InputError(f'--ppl-tercile "{text}": expected one or more of 1,2,3, such as 1,3')
    return tuple(sorted(map(int, given)))
