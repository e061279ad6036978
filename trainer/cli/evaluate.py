"""``entrace eval``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entrace.analysis.cli import print_json, say
from entrace.trainer.cli.options import Json, named_by, require_train_extra

if TYPE_CHECKING:
    from entrace.analysis.statistics.estimates import Estimate

# Estimates by metric, by benchmark.
Summary = dict[str, dict[str, "Estimate"]]

# The parentheses keep this label distinct from the name of any benchmark.
MEAN = "(mean)"


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="RUN_OR_MODEL...", help="Run folders or model folders.")],
    config: Annotated[str, typer.Option(help="Config with task and sampling settings for model folders.")] = "tiny",
    mean: Annotated[
        bool,
        typer.Option(
            "--mean",
            help="Add the unweighted mean over benchmarks, with an interval over their prompts (default: no mean).",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Evaluate policies on held-out prompts: avg@k, maj@k, pass@k per benchmark.

    Intervals are over prompts. A run is evaluated at its latest checkpoint with its own configuration. The output has
    one row per benchmark with its number of prompts. A benchmark is a data source of the task, or one of several files
    in task.heldout_file.

    Example: entrace eval data/runs/study/none-seed0 data/base-policy
    """
    require_train_extra()
    from entrace.analysis.terminal.progress import Progress
    from entrace.trainer.config import load_config
    from entrace.trainer.evaluate import evaluate as evaluate_policy
    from entrace.trainer.evaluate import find_policy, load_policy_and_task

    given = load_config(config)
    targets = [find_policy(Path(model), given) for model in models]
    found: dict[str, Summary] = {}
    for model, settings in zip(models, targets, strict=True):
        with named_by("RUN_OR_MODEL"):
            policy, task = load_policy_and_task(settings)
        with Progress(f"eval {model}", len(task.heldout)) as progress:
            rows = evaluate_policy(settings, policy, task, step=0, on_step=progress.update)
        found[model] = summarize_evals(rows, settings.eval.samples)
        if mean:
            found[model][MEAN] = mean_over_benchmarks(found[model])
    if json:
        print_json({model: {name: _to_json(metrics) for name, metrics in by.items()} for model, by in found.items()})
        return
    for line in _lines(found):
        say(line)


def summarize_evals(rows: Mapping[str, Any], k: int) -> Summary:
    """Estimate avg@k, maj@k, and pass@k by benchmark, with 95% intervals.

    Intervals are over prompts. Responses without a verdict do not count; a prompt without any verdict is left out. A
    benchmark whose responses are correct without an answer has no maj@k.

    Args:
        rows: Columns of the ``evals`` table, ``k`` consecutive rows per prompt.
        k: Responses per prompt.
    """
    import numpy as np

    from entrace.analysis.statistics.estimates import avg_at_k, maj_at_k, pass_at_k
    from entrace.analysis.statistics.interval_functions import BOUNDS, estimate_mean

    names = ("benchmark", "answer", "answer_class", "is_correct")
    samples = (np.array(rows[name], dtype=object).reshape(-1, k).tolist() for name in names)
    values: dict[str, dict[str, list[float]]] = {}
    with_answers: set[str] = set()
    for benchmarks, answers, classes, verdicts in zip(*samples, strict=True):
        metrics = values.setdefault(benchmarks[0], {f"avg@{k}": [], f"maj@{k}": [], f"pass@{k}": []})
        judged = [verdict for verdict in verdicts if verdict is not None]
        if any(answer is not None for answer in answers):
            with_answers.add(benchmarks[0])
        if judged:
            metrics[f"avg@{k}"].append(avg_at_k(judged, k))
            metrics[f"maj@{k}"].append(maj_at_k(answers, verdicts, k, classes))
            metrics[f"pass@{k}"].append(pass_at_k(len(judged), sum(judged), len(judged)))

    for benchmark in values.keys() - with_answers:
        if any(values[benchmark][f"avg@{k}"]):
            values[benchmark][f"maj@{k}"] = []

    def estimate(values: list[float]) -> Estimate:
        ones = np.ones(len(values))
        return estimate_mean(0 * ones, np.arange(len(values)), np.array(values), ones, BOUNDS["estimate_share"])

    return {
        benchmark: {name: estimate(found) for name, found in metrics.items() if found}
        for benchmark, metrics in values.items()
    }


def mean_over_benchmarks(summary: Summary) -> dict[str, Estimate]:
    """Return the unweighted mean of each metric over benchmarks, with its interval.

    Only the benchmarks that have the metric enter its mean.
    """
    from entrace.analysis.statistics.combination import mean_of_parts
    from entrace.analysis.statistics.interval_functions import BOUNDS

    parts: dict[str, list[Estimate]] = {}
    for metrics in summary.values():
        for name, estimate in metrics.items():
            parts.setdefault(name, []).append(estimate)
    return {
        name: mean_of_parts(estimates, f"prompts of {len(estimates)} benchmarks", BOUNDS["estimate_share"])
        for name, estimates in parts.items()
    }


def _to_json(metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    by_metric = {name: (estimate.value, estimate.low, estimate.high) for name, estimate in metrics.items()}
    return {**by_metric, "n": max((estimate.n for estimate in metrics.values()), default=0)}


def _lines(found: Mapping[str, Summary]) -> Iterator[str]:
    """Yield one row per model and benchmark."""
    width = max(len(benchmark) for summary in found.values() for benchmark in summary)
    for model, summary in found.items():
        for benchmark, metrics in summary.items():
            cells = [f"{name} {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for name, e in metrics.items()]
            n = max((estimate.n for estimate in metrics.values()), default=0)
            yield "  ".join([model, f"{benchmark:<{width}}", f"n = {n:<6,}", *(cells or ["no verdicts"])])
