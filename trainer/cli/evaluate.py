"""``entrace eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from analysis.cli import print_json, say
from trainer.cli.options import Json, require_train_extra


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="RUN_OR_MODEL...", help="Run folders or model folders.")],
    config: Annotated[str, typer.Option(help="Task and sampling of what is no run.")] = "tiny",
    json: Json = False,
) -> None:
    """Evaluate policies on held-out prompts: avg@k, maj@k, pass@k with intervals over prompts.

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
