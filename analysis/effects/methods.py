"""Effects that claims about methods are judged by: an arm against another, paired by seed and prompt.

Every function takes the runs, pairs of run_ids (reference first) of equal seed and a random generator, and returns an
``Estimate``. With at least ``estimate.MIN_RUNS`` pairs the interval also covers the choice of seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from analysis.effects.estimate import Effect, NoEffectError, count, fetch, over_runs, ratio, tensor, widest
from analysis.runs import Runs
from analysis.stats import Estimate, resample_clusters

Pairs = Sequence[tuple[str, str]]
Compared = Callable[[Runs, Pairs, np.random.Generator], Estimate]


def accuracy_gain(runs: Runs, pairs: Pairs, rng: np.random.Generator) -> Estimate:
    """M1, M2, I3: avg@k of the arm minus that of the reference at the last common evaluation."""
    return _over_pairs(_last_evals(runs, pairs, "avg_at_k"), _gain, rng)


def length_gain(runs: Runs, pairs: Pairs, rng: np.random.Generator) -> Estimate:
    """M3: relative change of response length at the last common evaluation."""
    sums = _last_evals(runs, pairs, "response_length")
    return _over_pairs(sums, lambda totals: ratio(0, 1)(totals[..., 1, :]) / ratio(0, 1)(totals[..., 0, :]) - 1, rng)


def formal_gain(runs: Runs, pairs: Pairs, rng: np.random.Generator) -> Estimate:
    """M3: change of the share of formal-reasoning tokens in the last 10 training steps."""
    frame = fetch(runs, "formal_sums", [run for pair in pairs for run in pair])
    prompts = sorted(frame["prompt_id"].unique())
    sums = np.stack(
        [tensor(frame, {"prompt_id": prompts, "run_id": pair}, ["num_formal", "num_tokens"]) for pair in pairs], axis=1
    )
    return _over_pairs(sums, _gain, rng)


PARTS: dict[str, dict[str, Compared]] = {
    "I3": {"avg@k": accuracy_gain},
    "M1": {"avg@k": accuracy_gain},
    "M2": {"avg@k": accuracy_gain},
    "M3": {"length": length_gain, "formal tokens": formal_gain},
}


def paired_runs(runs: Runs, reference: str, arm: str) -> list[tuple[str, str]]:
    """(run of ``reference``, run of ``arm``) of equal seed, complete runs only."""
    by_seed: dict[str, dict[object, str]] = {reference: {}, arm: {}}
    for run_id, manifest in runs.manifests.items():
        if manifest.get("arm") in by_seed and manifest.get("status") == "complete":
            by_seed[manifest["arm"]].setdefault(manifest.get("seed"), run_id)
    return [(by_seed[reference][seed], by_seed[arm][seed]) for seed in by_seed[reference] if seed in by_seed[arm]]


def _gain(totals: np.ndarray) -> np.ndarray:
    """Mean of the arm minus that of the reference, ``(..., pairs, arms, 2)`` -> ``(..., pairs)``."""
    mean = ratio(0, 1)(totals)
    return mean[..., 1] - mean[..., 0]


def _last_evals(runs: Runs, pairs: Pairs, column: str) -> np.ndarray:
    """Per prompt, pair, arm: sum of ``column`` and count, at the last step that both runs of a pair evaluated."""
    import polars as pl

    frame = runs.query_once("eval_sums", [run for pair in pairs for run in pair]).with_columns(count=pl.lit(1))
    prompts = sorted(frame["prompt_id"].unique())
    tensors = []
    for pair in pairs:
        steps = [set(frame.filter(run_id=run)["step"]) for run in pair]
        last = max(set.intersection(*steps), default=0)
        if last == 0:
            raise NoEffectError(f"{' and '.join(pair)} have no common evaluation after training")
        part = frame.filter(step=last)
        tensors.append(tensor(part, {"prompt_id": prompts, "run_id": pair}, [column, "count"]))
    return np.stack(tensors, axis=1)


def _over_pairs(sums: np.ndarray, effect: Effect, rng: np.random.Generator) -> Estimate:
    """Mean effect over pairs, ``sums`` (prompts, pairs, arms, values): the widest of prompts and pairs."""
    n, of = len(sums), f"prompts, {count(sums[0], 'seed')}"
    with np.errstate(divide="ignore", invalid="ignore"):
        by_pair = effect(sums.sum(0))
        if not np.isfinite(by_pair).all():
            raise NoEffectError("a run holds no such tokens or responses", is_recorded=True)
        draws = effect(resample_clusters(sums, rng)).mean(-1)
    estimate = Estimate.from_draws(float(by_pair.mean()), draws, n - 1, n, of)
    return widest([estimate, *over_runs(by_pair, n, of)])
