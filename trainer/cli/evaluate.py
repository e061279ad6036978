"""``entrace eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from analysis.cli import print_json, say
from trainer.cli.options import Json, require_train_extra


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="RUN_OR_MODEL...", help="Run folders or model folders.")],
    config: Annotated[str, typer.Option(help="Task and sampling for model folders (default tiny).")] = "tiny",
    json: Json = False,
) -> None:
    """Evaluate policies on held-out prompts: avg@k, maj@k, pass@k per benchmark, with intervals over prompts.

    A run is evaluated at its latest checkpoint with its own configuration.

    Example: entrace eval data/runs/study/none-seed0 data/base-policy
    """
    require_train_extra()
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
    for model, benchmarks in figures.items():
        width = max(map(len, benchmarks))
        for benchmark, metrics in benchmarks.items():
            for name, (value, low, high) in metrics.items():
                say(f"{model}  {benchmark:<{width}}  {name:<9} {value:.3f} [{low:.3f}, {high:.3f}]")


def _summarize_evals(rows: dict[str, Any], k: int) -> dict[str, dict[str, tuple[float | None, ...]]]:
    """Return mean and 95 % interval over prompts of avg@k, maj@k, and pass@k, by benchmark."""
    import numpy as np

    from analysis.interval_functions import BOUNDS, mean_with_interval
    from analysis.stats import avg_at_k, maj_at_k, pass_at_k

    names = ("benchmark", "answer", "answer_class", "is_correct")
    samples = (np.array(rows[name], dtype=object).reshape(-1, k).tolist() for name in names)
    by_benchmark: dict[str, dict[str, list[float]]] = {}
    for benchmarks, answers, classes, correct in zip(*samples, strict=True):
        metrics = by_benchmark.setdefault(benchmarks[0], {f"avg@{k}": [], f"maj@{k}": [], f"pass@{k}": []})
        values = avg_at_k(correct, k), maj_at_k(answers, correct, k, classes), pass_at_k(k, sum(correct), k)
        for found, value in zip(metrics.values(), values, strict=True):
            found.append(value)

    def estimate(values: list[float]) -> tuple[float | None, ...]:
        ones = np.ones(len(values))
        return mean_with_interval(0 * ones, np.arange(len(values)), np.array(values), ones, BOUNDS["estimate_share"])

    return {
        benchmark: {name: estimate(values) for name, values in metrics.items()}
        for benchmark, metrics in by_benchmark.items()
    }
