"""Measure paired runs: metric sums by prompt, and held-out accuracy curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.compare.paired import SeedSums
from entrace.analysis.compare.pairs import Pair
from entrace.analysis.compare.verdict import FORMAL, metric_of
from entrace.analysis.runs import Runs
from entrace.analysis.statistics.estimates import pass_at_k

if TYPE_CHECKING:
    import polars as pl

# Takes the place of the benchmark for metrics of training responses.
TRAINING = "training"

# Prompts are identified by text, since equal ids in different seeds may name different prompts. A prompt without a
# recorded text is identified by its id.
PROMPTS = """
select run_id, prompt_id, any_value(hash(prompt)) as prompt
from prompts where list_contains($runs, run_id) group by all
"""
NUM_SAMPLES = """
with by_prompt as (
  select run_id, benchmark, step, prompt_id, count(*) as num_samples
  from evals where is_correct is not null and list_contains($runs, run_id) group by all
)
select run_id, benchmark, step, min(num_samples) as num_samples from by_prompt group by all order by all
"""


@dataclass(frozen=True)
class Curve:
    """Hold the held-out accuracy of a pair at the steps that both runs evaluated.

    ``accuracy`` has shape (2 runs, T), and ``steps`` has shape (T,).
    """

    seed: int
    baseline_run: str
    steps: np.ndarray
    accuracy: np.ndarray


@dataclass
class Measured:
    """Hold the measurements of the pairs of one arm on one benchmark.

    Attributes:
        sums: By metric, one entry per seed.
        curves: One per seed with at least two common evaluations.
        num_samples: The k of avg@k and maj@k; 0 for ``TRAINING``.
    """

    num_samples: int = 0
    sums: dict[str, list[SeedSums]] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)

    def add(self, metric: str, seed: int, prompts: np.ndarray, sums: np.ndarray) -> None:
        """Add the sums of a seed, (P, 2 runs, 2), if both runs have the metric."""
        counted = sums[..., 1].sum(0)
        is_relative = metric_of(metric).is_relative
        if not (np.isfinite(sums).all() and (counted > 0).all()) or (is_relative and sums[:, 1, 0].sum() == 0):
            return
        self.sums.setdefault(metric, []).append(SeedSums(seed, prompts, sums, is_relative))


class Evaluations:
    """Read the held-out evaluations of paired runs, by benchmark.

    Attributes:
        steps: Evaluated steps, ascending, by (run_id, benchmark).
        num_samples: By benchmark, the k of avg@k, maj@k, and the largest pass@k: the smallest number of samples of any
            prompt in a last evaluation. Samples of equal index share random numbers, so all runs use their first k.
    """

    def __init__(self, runs: Runs, run_ids: Sequence[str]) -> None:
        """Read the evaluated steps and sample counts; outcomes are read on request."""
        self._runs, self._run_ids = runs, list(run_ids)
        counts = runs.run_shipped(NUM_SAMPLES, {"runs": self._run_ids})
        self.steps: dict[tuple[str, str], list[int]] = {}
        for run, benchmark, step, _ in counts.iter_rows():
            self.steps.setdefault((run, benchmark), []).append(step)
        fewest: dict[str, int] = {}
        for run, benchmark, step, num in counts.iter_rows():
            if step == self.steps[run, benchmark][-1]:
                fewest[benchmark] = min(num, fewest.get(benchmark, num))
        self.num_samples = dict(sorted(fewest.items()))

    def last_common_step(self, run_ids: Sequence[str], benchmark: str) -> int:
        """Return the last step that all runs evaluated; 0 if none after training."""
        return max(self.common_steps(run_ids, benchmark), default=0)

    def common_steps(self, run_ids: Sequence[str], benchmark: str) -> list[int]:
        """Return the steps that all runs evaluated."""
        return sorted(set.intersection(*(set(self.steps.get((run, benchmark), ())) for run in run_ids)))

    def outcomes(self, benchmark: str, prompts: pl.DataFrame) -> dict[str, pl.DataFrame]:
        """Return the outcomes of each run, one row per step and prompt_id.

        The columns are all metrics, ``prompt``, and the divisors. ``prompt`` identifies the text. The divisor is
        ``count``, or ``entropy_count`` for entropy, which may be null.
        """
        import polars as pl

        params = {"runs": self._run_ids, "benchmark": benchmark, "k": self.num_samples[benchmark]}
        frame = name_prompts(self._runs.ask("eval_outcomes", **params), prompts)
        k_of = pass_metrics(self.num_samples[benchmark])
        frame = frame.with_columns(
            pl.lit(1.0).alias("count"),
            pl.col("entropy").is_not_null().cast(float).alias("entropy_count"),
            pl.col("entropy").fill_null(0),
            pl.col("maj_at_k").fill_null(float("nan")),
            *(_pass_at_k(frame, k).alias(metric) for metric, k in k_of.items()),
        )
        return {str(run): part for (run,), part in frame.group_by("run_id", maintain_order=True)}


def pass_metrics(num_samples: int) -> dict[str, int]:
    """Return names and k of pass@k for powers of two from 2 up to ``num_samples``."""
    return {f"pass_at_{2**i}": 2**i for i in range(1, num_samples.bit_length())}


def read_prompts(runs: Runs, run_ids: Sequence[str]) -> pl.DataFrame:
    """Return ``prompt``, an integer for each text, by run_id and prompt_id."""
    return runs.run_shipped(PROMPTS, {"runs": list(run_ids)})


def name_prompts(frame: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    """Add column ``prompt`` to rows with run_id and prompt_id."""
    import polars as pl

    named = frame.join(prompts, on=["run_id", "prompt_id"], how="left", maintain_order="left")
    return named.with_columns(pl.col("prompt").fill_null(pl.col("prompt_id").hash()))


def measure(
    pairs: Sequence[Pair], evaluations: Evaluations, benchmark: str, outcomes: Mapping[str, pl.DataFrame]
) -> Measured:
    """Measure all metrics of held-out responses.

    Pairs without a common evaluation are skipped.
    """
    import polars as pl

    num_samples = evaluations.num_samples[benchmark]
    measured = Measured(num_samples)
    metrics = ["avg_at_k", "maj_at_k", *pass_metrics(num_samples), "response_length"]
    columns = ["count", *metrics, "entropy", "entropy_count"]
    for pair in pairs:
        steps = evaluations.common_steps(pair.run_ids, benchmark)
        if not steps or steps[-1] == 0:
            continue
        frame = pl.concat([outcomes[run] for run in pair.run_ids])
        prompts = frame["prompt"].unique().sort().to_list()
        cube = tensor(frame, {"run_id": pair.run_ids, "step": steps, "prompt": prompts}, columns)
        names = np.array(prompts, dtype=np.uint64)
        by_name = dict(zip(columns, np.moveaxis(cube, -1, 0), strict=True))

        in_last = (by_name["count"][:, -1] > 0).all(0)
        for metric in (*metrics, "entropy"):
            count = by_name["entropy_count" if metric == "entropy" else "count"]
            sums = np.stack((by_name[metric][:, -1], count[:, -1]), axis=-1)
            measured.add(metric, pair.seed, names[in_last], sums[:, in_last].swapaxes(0, 1))

        in_all = (by_name["count"] > 0).all((0, 1))
        if len(steps) > 1 and in_all.any():
            correct, count = by_name["avg_at_k"][..., in_all], by_name["count"][..., in_all]
            area = np.stack([_mean_over_steps(np.array(steps), part) for part in (correct, count)], axis=-1)
            measured.add("accuracy_auc", pair.seed, names[in_all], area.swapaxes(0, 1))
            accuracy = correct.sum(-1) / count.sum(-1)
            measured.curves.append(Curve(pair.seed, pair.baseline_run, np.array(steps), accuracy))
    return measured


def measure_training(pairs: Sequence[Pair], formal_sums: pl.DataFrame) -> Measured:
    """Measure the share of formal-reasoning tokens.

    Pairs with a run without tokens are skipped.
    """
    import polars as pl

    measured = Measured()
    for pair in pairs:
        frame = formal_sums.filter(pl.col("run_id").is_in(pair.run_ids))
        prompts = frame["prompt"].unique().sort().to_list()
        sums = tensor(frame, {"prompt": prompts, "run_id": pair.run_ids}, ["num_formal", "num_tokens"])
        measured.add(FORMAL, pair.seed, np.array(prompts, dtype=np.uint64), sums)
    return measured


def first_reached(steps: np.ndarray, accuracy: np.ndarray, level: float) -> float:
    """Return the first step at which an interpolated curve reaches ``level``.

    The result is nan if the curve never does.
    """
    above = np.flatnonzero(accuracy >= level)
    if not above.size:
        return float("nan")
    i = int(above[0])
    if i == 0:
        return float(steps[0])
    return float(np.interp(level, accuracy[i - 1 : i + 1], steps[i - 1 : i + 1]))


def tensor(frame: pl.DataFrame, axes: Mapping[str, Sequence[object]], values: Sequence[str]) -> np.ndarray:
    """Return sums of ``values`` by ``axes``, shape ``(*axes, values)``.

    Rows of other levels are dropped.
    """
    import polars as pl

    for name, levels in axes.items():
        frame = frame.filter(pl.col(name).is_in(list(levels)))
    sums = np.zeros((*map(len, axes.values()), len(values)))
    codes = [
        frame[name].replace_strict(list(levels), range(len(levels)), return_dtype=pl.Int64).to_numpy()
        for name, levels in axes.items()
    ]
    np.add.at(sums, tuple(codes), frame.select(values).to_numpy())
    return sums


def _mean_over_steps(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the mean of ``values`` over steps, by the trapezoid rule.

    ``values`` has shape (runs, T, prompts). The mean is over the span of the steps.
    """
    gaps = np.diff(steps) / (steps[-1] - steps[0])
    weights = (np.append(gaps, 0) + np.insert(gaps, 0, 0)) / 2
    return np.einsum("t,rtp->rp", weights, values)


def _pass_at_k(frame: pl.DataFrame, k: int) -> pl.Series:
    """Return the unbiased pass@k of each row; null with fewer than k samples."""
    import polars as pl

    kinds = frame.select("num_samples", "num_correct").unique()
    values = [pass_at_k(n, c, k) if n >= k else None for n, c in kinds.iter_rows()]
    kinds = kinds.with_columns(pl.Series("value", values, dtype=pl.Float64))
    return frame.join(kinds, on=["num_samples", "num_correct"], how="left", maintain_order="left")["value"]
