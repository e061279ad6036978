"""The effect that each claim is judged by, with its interval.

Every function takes the runs, the run_ids (or pairs of them) to look at and a random generator, and returns an
``Estimate`` by part of the claim. Effects of several runs are averaged, each run with the same weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.runs import Runs
from analysis.stages import MIN_STEPS, decompose_fall, slowdown
from analysis.stats import Estimate, interval_over_seeds, resample_clusters

if TYPE_CHECKING:
    import polars as pl

WINDOWS = ["start", "end"]
SIGNS = ["negative", "positive"]


class NoEffectError(Exception):
    """No effect can be computed; the message says why.

    Attributes:
        is_recorded: The data are there, but the effect is not defined on them.
    """

    def __init__(self, reason: str, *, is_recorded: bool = False) -> None:
        """``reason`` ends up in the scorecard."""
        super().__init__(reason)
        self.is_recorded = is_recorded


def stage_slowdown(runs: Runs, run_ids: Sequence[str], rng: np.random.Generator) -> dict[str, Estimate]:
    """S1: share of the rising stage's speed that is lost in the plateau; see ``stages.slowdown``."""
    del rng  # The fit brings its own bootstrap.
    fits = [runs.stage_fits[run] for run in run_ids]
    for run, fit in zip(run_ids, fits, strict=True):
        if fit.boundary is None:
            raise NoEffectError(f"no boundary inside run {run}: {fit.reason}", is_recorded=True)
    values = np.mean([slowdown(fit.slopes) for fit in fits], axis=0)
    draws = np.mean([slowdown(fit.slope_draws) for fit in fits], axis=0)
    steps = sum(fit.last_step - fit.first_step + 1 for fit in fits)
    of = f"steps of {_count(run_ids, 'run')}"
    return {
        name: Estimate.from_draws(values[i], draws[:, i], steps, of) for i, name in enumerate(("entropy", "accuracy"))
    }


def entropy_fall_by_sign(runs: Runs, run_ids: Sequence[str], rng: np.random.Generator) -> dict[str, Estimate]:
    """S2: (fall within negative - fall within positive samples) / fall of entropy, rising stage."""
    _require_steps(runs, run_ids)
    frame = runs.query("window_sums", runs=list(run_ids))
    sums = _tensor(frame, {"run_id": run_ids, "window": WINDOWS, "sample_sign": SIGNS}, ["num_tokens", "entropy_sum"])

    def effect(totals: np.ndarray) -> np.ndarray:
        within, between = decompose_fall(totals[..., 0], totals[..., 1])
        fall = (within + between).sum(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (within[..., 0] - within[..., 1]) / fall
        return np.where(fall > 0, share, np.nan).mean(-1)

    if not np.isfinite(effect(sums.sum(0))):
        raise NoEffectError("entropy did not fall in the rising stage", is_recorded=True)
    return {"mainly negative": _bootstrap(sums, effect, rng, f"prompts of {_count(run_ids, 'run')}")}


def defect_fall(runs: Runs, run_ids: Sequence[str], rng: np.random.Generator) -> dict[str, Estimate]:
    """S4: share of defective responses at the start minus at the end of the rising stage."""
    _require_steps(runs, run_ids)
    frame = runs.query("window_sums", runs=list(run_ids))
    sums = _tensor(frame, {"run_id": run_ids, "window": WINDOWS}, ["num_defective", "num_responses"])
    if not sums[..., 0, 0].any():
        raise NoEffectError("no defective response at the start, so none could become rarer", is_recorded=True)

    def effect(totals: np.ndarray) -> np.ndarray:
        share = totals[..., 0] / totals[..., 1]
        return (share[..., 0] - share[..., 1]).mean(-1)

    return {"any defect": _bootstrap(sums, effect, rng, f"prompts of {_count(run_ids, 'run')}")}


def accuracy_by_ppl_half(runs: Runs, run_ids: Sequence[str], rng: np.random.Generator) -> dict[str, Estimate]:
    """I1: accuracy of the lower-perplexity half of a mixed group minus that of the higher half, plateau."""
    _require_plateau(runs, run_ids)
    frame = runs.query("ppl_halves", runs=list(run_ids))
    sums = _tensor(frame, {"run_id": run_ids}, ["difference_sum", "num_groups"])
    of = f"prompts with {int(sums[..., 1].sum())} mixed groups"
    return {"accuracy": _bootstrap(sums, lambda totals: (totals[..., 0] / totals[..., 1]).mean(-1), rng, of)}


def entropy_at_ends(runs: Runs, run_ids: Sequence[str], rng: np.random.Generator) -> dict[str, Estimate]:
    """T1: entropy of the first (last) fifth of a response relative to its three middle fifths, minus 1, plateau."""
    _require_plateau(runs, run_ids)
    frame = runs.query("position_fifths", runs=list(run_ids))
    sums = _tensor(frame, {"run_id": run_ids}, ["first_sum", "middle_sum", "last_sum", "num_responses"])
    of = f"prompts with {int(sums[..., 3].sum())} responses"

    def relative(part: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda totals: (totals[..., part] / totals[..., 1] - 1).mean(-1)

    return {name: _bootstrap(sums, relative(part), rng, of) for name, part in (("beginning", 0), ("end", 2))}


def accuracy_gain(runs: Runs, pairs: Sequence[tuple[str, str]], rng: np.random.Generator) -> dict[str, Estimate]:
    """M1, M2: avg@k of the arm minus that of the baseline, same seed, same prompts, last common evaluation."""
    sums = _eval_sums(runs, pairs, "avg_at_k")
    return {"avg@k": _over_seeds(sums, lambda totals: (totals[..., 1, 0] - totals[..., 0, 0]) / totals[..., 0, 1], rng)}


def style_change(runs: Runs, pairs: Sequence[tuple[str, str]], rng: np.random.Generator) -> dict[str, Estimate]:
    """M3: relative change of response length (last evaluation), change of the share of formal tokens (last steps)."""
    lengths = _eval_sums(runs, pairs, "response_length")
    frame = runs.query("formal_sums", runs=[run for pair in pairs for run in pair])
    prompts = sorted(frame["prompt_id"].unique())
    shares = np.stack(
        [_tensor(frame, {"run_id": list(pair)}, ["num_formal", "num_tokens"], prompts) for pair in pairs], axis=1
    )
    return {
        "length": _over_seeds(lengths, lambda totals: totals[..., 1, 0] / totals[..., 0, 0] - 1, rng),
        "formal tokens": _over_seeds(
            shares,
            lambda totals: totals[..., 1, 0] / totals[..., 1, 1] - totals[..., 0, 0] / totals[..., 0, 1],
            rng,
        ),
    }


def paired_runs(runs: Runs, arm: str) -> list[tuple[str, str]]:
    """(baseline run, run of ``arm``) of equal seed, complete runs only."""
    by_seed: dict[str, dict[object, str]] = {runs.baseline: {}, arm: {}}
    for run_id, manifest in runs.manifests.items():
        if manifest.get("arm") in by_seed and manifest.get("status") == "complete":
            by_seed[manifest["arm"]].setdefault(manifest.get("seed"), run_id)
    baseline, treated = by_seed[runs.baseline], by_seed[arm]
    return [(baseline[seed], treated[seed]) for seed in baseline if seed in treated]


def _require_steps(runs: Runs, run_ids: Sequence[str]) -> None:
    for run in run_ids:
        fit = runs.stage_fits[run]
        if fit.last_step - fit.first_step + 1 < MIN_STEPS:
            raise NoEffectError(f"no rising stage recorded: {fit.reason}")


def _require_plateau(runs: Runs, run_ids: Sequence[str]) -> None:
    for run in run_ids:
        if runs.stage_fits[run].boundary is None:
            raise NoEffectError(f"run {run} has no plateau: {runs.stage_fits[run].reason}")


def _eval_sums(runs: Runs, pairs: Sequence[tuple[str, str]], column: str) -> np.ndarray:
    """Per prompt, pair, arm (baseline first): sum of ``column`` and count, at the last step that both evaluated."""
    import polars as pl

    frame = runs.query("eval_sums", runs=[run for pair in pairs for run in pair]).with_columns(count=pl.lit(1))
    parts = []
    for pair in pairs:
        steps = [set(frame.filter(pl.col("run_id") == run)["step"]) for run in pair]
        last = max(set.intersection(*steps), default=0)
        if last == 0:
            raise NoEffectError(f"{' and '.join(pair)} have no common evaluation after training")
        parts.append(frame.filter(pl.col("run_id").is_in(pair), pl.col("step") == last))
    prompts = sorted({prompt for part in parts for prompt in part["prompt_id"]})
    tensors = [
        _tensor(part, {"run_id": list(pair)}, [column, "count"], prompts)
        for part, pair in zip(parts, pairs, strict=True)
    ]
    return np.stack(tensors, axis=1)


def _tensor(
    frame: pl.DataFrame,
    axes: Mapping[str, Sequence[str]],
    values: list[str],
    prompts: Sequence[str] | None = None,
) -> np.ndarray:
    """Sums of ``values`` by prompt and ``axes``, shape ``(prompts, *axes, values)``; other levels are left out."""
    import polars as pl

    for name, levels in axes.items():
        frame = frame.filter(pl.col(name).is_in(list(levels)))
    if frame.is_empty():
        raise NoEffectError("the trace holds no such rows")
    prompts = prompts or sorted(frame["prompt_id"].unique())
    tensor = np.zeros((len(prompts), *(len(levels) for levels in axes.values()), len(values)))
    columns = {"prompt_id": prompts, **axes}
    codes = [
        np.array([{level: i for i, level in enumerate(levels)}[entry] for entry in frame[name]])
        for name, levels in columns.items()
    ]
    np.add.at(tensor, tuple(codes), frame.select(values).to_numpy())
    return tensor


def _bootstrap(
    sums: np.ndarray, effect: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator, of: str
) -> Estimate:
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(effect(sums.sum(0)))
        draws = effect(resample_clusters(sums, rng))
    if not np.isfinite(value):
        raise NoEffectError("a run that is averaged over holds no such rows")
    return Estimate.from_draws(value, draws, len(sums), of)


def _over_seeds(sums: np.ndarray, effect: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator) -> Estimate:
    """Effect averaged over pairs (axis 1 of ``sums``).

    With two or more seeds the interval is the hull of the bootstrap over prompts and Student's t over seeds.
    """
    by_pair = effect(sums.sum(0))
    estimate = _bootstrap(sums, lambda totals: effect(totals).mean(-1), rng, f"prompts, {_count(by_pair, 'seed')}")
    if len(by_pair) < 2:
        return estimate
    low, high = interval_over_seeds(list(by_pair))
    return Estimate(estimate.value, min(low, estimate.low), max(high, estimate.high), estimate.n, estimate.of)


def _count(items: Sequence[object] | np.ndarray, noun: str) -> str:
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"
