"""``entrace intervene``, which ``entrace study`` calls as well."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entrace.analysis.cli import print_json
from entrace.analysis.trace import InputError
from entrace.trainer.cli.options import Json, require_train_extra, stoppable

if TYPE_CHECKING:
    from entrace.trainer.interventions.intervene import InterventionCounts, Settings

DEFAULT_BUDGET = 200_000

Budget = Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Tokens to generate, earlier calls counted.")]


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
    require_train_extra()
    from entrace.trainer.interventions.intervene import Settings, resolve_checkpoint

    filters = {
        "entropy": _parse_range("--entropy", entropy),
        "position": _parse_range("--position", position),
        "ppl_tercile": _parse_terciles(ppl_tercile),
    }
    settings = Settings(resolve_checkpoint(run, checkpoint), seed, continuations, **filters)
    tally = run_interventions(run, settings, budget)
    if json:
        print_json({"checkpoint_step": settings.checkpoint_step, "seed": seed, **asdict(tally)})
        return
    if not tally.num_new:
        why = "no candidate is left" if tally.is_exhausted else "a larger --budget goes on"
        typer.echo(f"nothing to do: checkpoint {settings.checkpoint_step} with seed {seed} is finished; {why}")
    typer.echo(f"{tally.interventions} interventions, {tally.tokens} tokens, mean |impact| {tally.mean_abs_impact:.3f}")


def run_interventions(run: Path, settings: Settings, budget: int) -> InterventionCounts:
    """Intervenes with a progress bar and a way to stop; see ``interventions.intervene.intervene``."""
    from entrace.analysis.terminal.progress import Progress
    from entrace.trainer.interventions.intervene import intervene as go_on

    with stoppable(f"goes on in {run / 'interventions'}"), Progress("intervene", budget) as progress:

        def show(tally: InterventionCounts) -> None:
            note = f"{tally.interventions} interventions"
            progress.update(min(tally.tokens, budget), note, mean_abs_impact=tally.mean_abs_impact)

        return go_on(run, settings, budget, show)


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
