"""Compute the breakdowns of the report's questions with polars' lazy engine.

The code is that of a typical polars user. A breakdown is a mean by keys, over a lazy frame of rows. Without
intervals, polars computes it in one pass. With intervals, polars sums rows by keys, step, and prompt, and
``mean_with_interval`` estimates each group, as entrace does. Any other question is a lazy frame without intervals.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from entrace.analysis.statistics.interval_functions import BOUNDS, mean_with_interval

TOP = 0.8
TABLES = ("tokens", "rollouts", "steps", "evals", "interventions", "vocab")

c = pl.col
sign = (c("advantage") > 0).alias("sign")
one = pl.lit(1.0)


@dataclass(frozen=True)
class Mean:
    """A mean of ``total`` per ``count`` of rows by ``keys``.

    The interval is that of a function of ``BOUNDS``.
    """

    rows: pl.LazyFrame
    keys: list[pl.Expr]
    total: pl.Expr
    count: pl.Expr = one
    kind: str = "estimate"

    def without_intervals(self) -> np.ndarray:
        """Return the means."""
        mean = (self.total.sum() / self.count.sum() if self.count is not one else self.total.mean()).alias("mean")
        return self.rows.group_by(self.keys).agg(mean).collect(engine="streaming")["mean"].to_numpy()

    def with_intervals(self) -> np.ndarray:
        """Return the means, after computing their intervals as well."""
        keys = [key.alias(f"key{i}") for i, key in enumerate(self.keys)]
        prompt = c("prompt_id").hash().alias("prompt")
        count = self.count.sum() if self.count is not one else pl.len().cast(pl.Float64)
        sums = self.rows.group_by([*keys, c("step").alias("at"), prompt]).agg(
            total=self.total.cast(pl.Float64).sum(), count=count.cast(pl.Float64)
        )
        groups = (
            sums.sort("at", "prompt").collect(engine="streaming").partition_by([f"key{i}" for i in range(len(keys))])
        )
        found = []
        for group in groups:
            steps, prompts, totals, counts = (group[name].to_numpy() for name in ("at", "prompt", "total", "count"))
            found.append(mean_with_interval(steps, prompts, totals, counts, BOUNDS[self.kind])[0])
        return np.array(found, dtype=float)


@dataclass(frozen=True)
class Other:
    """A breakdown without intervals: the column ``name`` of a lazy frame."""

    rows: pl.LazyFrame
    name: str

    def without_intervals(self) -> np.ndarray:
        """Return the values."""
        return self.rows.collect(engine="streaming")[self.name].to_numpy()


class Breakdowns:
    """The breakdowns of a trace with one run, by question.

    ``boundary`` is the last step of the rising stage.
    """

    def __init__(self, trace: Path, boundary: float) -> None:
        """Scan the tables of ``trace``."""
        tables = {name: pl.scan_parquet(trace / name / "*.parquet") for name in TABLES}
        self.tokens, self.rollouts, self.steps, self.evals, self.interventions, self.vocab = tables.values()
        self.boundary = boundary
        self.late = (c("step") > boundary).alias("late")
        self.part = (10 * c("position") // c("response_length")).alias("part")
        self.signed = self.tokens.filter(c("is_kept") & (c("advantage") != 0))
        after, before = c("logprob_after").cast(pl.Float64).exp(), c("logprob").cast(pl.Float64).exp()
        self.moved = self.tokens.filter(c("is_kept") & c("logprob_after").is_not_null()).with_columns(dp=after - before)
        self.moved_signed = self.moved.filter(c("advantage") != 0)

    def category_shares(self) -> Other:
        """Return the share of each category by step."""
        counts = self.tokens.group_by("step", "category").len()
        return Other(counts.with_columns(share=c("len") / c("len").sum().over("step")), "share")

    def defects_over_steps(self) -> Other:
        """Return the share of responses with each defect by step."""
        kinds = ("format_violation", "truncated", "repetition", "irrelevant")
        flags = [c("defects").list.contains(kind).mean().alias(kind) for kind in kinds]
        shares = self.rollouts.group_by("step").agg((c("defects").list.len() > 0).mean().alias("any"), *flags)
        return Other(shares.unpivot(index="step", value_name="share"), "share")

    def entropy_by_sample_sign(self) -> Mean:
        """Return the entropy per token by step and sign."""
        rows = self.rollouts.filter(c("is_kept") & (c("advantage") != 0))
        length = c("response_length").cast(pl.Float64)
        return Mean(rows, [c("step"), sign], c("entropy_mean").cast(pl.Float64) * length, length, "estimate_positive")

    def entropy_gap_by_prompt(self) -> Mean:
        """Return the difference of mean entropies within groups by step."""
        rows = self.rollouts.filter(c("is_kept") & (c("advantage") != 0))
        entropy = c("entropy_mean").cast(pl.Float64)
        gap = entropy.filter(c("advantage") < 0).mean() - entropy.filter(c("advantage") > 0).mean()
        groups = rows.group_by("step", "prompt_id", "group_id").agg(gap=gap).drop_nulls("gap")
        return Mean(groups, [c("step")], c("gap"))

    def entropy_gradient_density(self) -> Other:
        """Return the number of tokens by cell of log entropy by log gradient norm."""
        rows = self.signed.filter((c("entropy") > 0) & (c("grad_norm") > 0))
        logs = [c(name).cast(pl.Float64).log10() for name in ("entropy", "grad_norm")]
        cells = [
            ((log + 4) / width).floor().clip(0, 39).alias(f"bin{i}")
            for i, (log, width) in enumerate(zip(logs, (0.125, 0.15), strict=True))
        ]
        return Other(rows.group_by(self.late, sign, *cells).len("num_tokens"), "num_tokens")

    def exchange_law(self) -> Other:
        """Return the least-squares fit of accuracy on exp(entropy)."""
        x, y = c("entropy_token_mean").cast(pl.Float64).exp(), c("accuracy").cast(pl.Float64)
        a = -pl.cov(x, y) / x.var()
        return Other(self.steps.with_columns(accuracy_fit=y.mean() + a * x.mean() - a * x), "accuracy_fit")

    def movement_by_category(self) -> Mean:
        """Return the change of probability by stage, sign, and category."""
        return Mean(self.moved_signed, [self.late, sign, c("category")], c("dp"))

    def movement_by_entropy(self) -> Mean:
        """Return the change of probability by stage, sign, and decile of entropy."""
        rank = c("entropy").rank("ordinal").over(self.late)
        rows = self.moved_signed.with_columns(decile=((rank - 1) * 10 // pl.len().over(self.late)).cast(pl.Int32))
        return Mean(rows, [self.late, sign, c("decile")], c("dp"))

    def movement_concentration(self) -> Other:
        """Return the share of movement of the tokens that move most.

        The share is averaged over the steps of a stage.
        """
        size = c("dp").abs()
        shares = [
            (size.filter(size >= size.quantile(1 - top)).sum() / size.sum()).alias(str(top))
            for top in (0.01, 0.05, 0.2)
        ]
        steps = self.moved.group_by(self.late, "step").agg(shares).drop("step")
        return Other(steps.group_by("late").mean().unpivot(index="late", value_name="share"), "share")

    def movement_distribution(self) -> Other:
        """Return the number of tokens by stage, sign, and bin of |dp|."""
        size = c("dp").abs()
        bins = pl.when(size < 1e-6).then(-25).otherwise((4 * size.log10()).floor().clip(-24, -1)).alias("bin")
        return Other(self.moved_signed.group_by(self.late, sign, bins).len("num_tokens"), "num_tokens")

    def stage_dynamics(self) -> Other:
        """Return the accuracy of each step."""
        return Other(self.steps.select("step", "entropy_token_mean", "accuracy", "format_rate"), "accuracy")

    def word_changes(self) -> Other:
        """Return the words whose shares rise and fall most over the rising stage."""
        length = max(1, min(10, int(self.boundary) // 2))
        start, end = c("step") <= length, (c("step") > self.boundary - length) & (c("step") <= self.boundary)
        rows = self.tokens.filter(start | end).group_by("token_id", start.alias("start")).len()
        words = self.vocab.select("token_id", word=c("text").str.strip_chars().str.to_lowercase())
        counts = rows.join(words, on="token_id").group_by("start", "word").agg(c("len").sum())
        shares = counts.with_columns(share=c("len") / c("len").sum().over("start"))
        share = [c("share").filter(c("start") == is_start).sum() for is_start in (False, True)]
        changes = shares.group_by("word").agg(change=share[0] - share[1], n=c("len").sum()).filter(c("n") >= 20)
        ends = [changes.sort("change", descending=falls).head(10) for falls in (True, False)]
        return Other(pl.concat(ends), "change")

    def accuracy_by_ppl_decile(self) -> Mean:
        """Return the accuracy by stage and decile of perplexity."""
        rank = c("ppl").rank("ordinal").over(self.late)
        rows = self.rollouts.with_columns(decile=((rank - 1) * 10 // pl.len().over(self.late)).cast(pl.Int32))
        return Mean(rows, [self.late, c("decile")], c("is_correct").cast(pl.Float64), kind="estimate_share")

    def correctness_by_ppl(self) -> Mean:
        """Return the accuracy by stage and quarter of perplexity in mixed groups.

        Perplexity is adjusted for length.
        """
        rows = self._at_length().filter(
            c("is_correct").any().over("group_id") & ~c("is_correct").all().over("group_id")
        )
        rows = rows.with_columns(quarter=self._ntile(4))
        return Mean(rows, [self.late, c("quarter")], c("is_correct").cast(pl.Float64), kind="estimate_share")

    def high_entropy_by_ppl(self) -> Other:
        """Return category shares of high-entropy tokens, by stage and tercile.

        Terciles are of perplexity.
        """
        terciles = self._at_length().filter("is_kept").select("rollout_id", tercile=self._ntile(3))
        counts = self._high().filter("is_high").group_by("late", "rollout_id", "category").len()
        joined = counts.join(terciles, on="rollout_id").group_by("late", "tercile", "category").agg(c("len").sum())
        return Other(joined.with_columns(share=c("len") / c("len").sum().over("late", "tercile")), "share")

    def robustness_by_ppl(self) -> Mean:
        """Return the impact of replacements by correctness and tercile of perplexity."""
        return self._impact(c("ppl_tercile"))

    def entropy_by_position(self) -> Mean:
        """Return the entropy by stage, sign, and tenth of the response."""
        return Mean(self.signed, [self.late, sign, self.part], c("entropy").cast(pl.Float64), kind="estimate_positive")

    def high_entropy_by_position(self) -> Mean:
        """Return the share of high-entropy tokens by stage and tenth of the response."""
        return Mean(self._high(), [c("late"), self.part], c("is_high").cast(pl.Float64), kind="estimate_share")

    def high_entropy_words(self) -> Other:
        """Return the counts of the most frequent high-entropy tokens by stage."""
        counts = self._high().filter("is_high").group_by("late", "token_id").len("num_high")
        return Other(counts.group_by("late").agg(c("num_high").top_k(15)).explode("num_high"), "num_high")

    def impact_by_position(self) -> Mean:
        """Return the impact of replacements by correctness and fifth of the response."""
        return self._impact((c("position") / c("response_length") * 5).floor())

    def potential_by_position(self) -> Mean:
        """Return the movement by stage, sign, and tenth of the response."""
        return Mean(self.moved_signed, [self.late, sign, self.part], c("dp").abs(), kind="estimate_positive")

    def u_shape(self) -> Mean:
        """Return the entropy at the ends of responses relative to the middle.

        Values are by stage and sign.
        """
        place, length, entropy = 5 * c("position"), c("response_length"), c("entropy").cast(pl.Float64)
        parts = {
            "first": entropy.filter(place < length).mean(),
            "middle": entropy.filter((place >= length) & (place < 4 * length)).mean(),
            "last": entropy.filter(place >= 4 * length).mean(),
        }
        responses = self.signed.filter(length >= 5).group_by("step", "prompt_id", "rollout_id", sign).agg(**parts)
        rows = responses.unpivot(("first", "last"), index=("step", "prompt_id", "sign", "middle"))
        return Mean(rows, [self.late, c("sign"), c("variable")], c("value"), c("middle"), "estimate_positive")

    def ablation_curves(self) -> Mean:
        """Return the held-out accuracy by evaluation."""
        prompts = self.evals.group_by("benchmark", "step", "prompt_id").agg(c("is_correct").mean())
        return Mean(prompts, [c("benchmark"), c("step")], c("is_correct"), kind="estimate_share")

    def cost_accuracy(self) -> Mean:
        """Return the held-out accuracy at the last evaluation."""
        last = self.evals.filter(c("step") == c("step").max())
        prompts = last.group_by("benchmark", "step", "prompt_id").agg(c("is_correct").mean())
        return Mean(prompts, [c("benchmark")], c("is_correct"), kind="estimate_share")

    def performance_profile(self) -> Mean:
        """Return the share of held-out prompts above each accuracy, at the last step.

        The last step is that of the last evaluation.
        """
        last = self.evals.filter(c("step") == c("step").max())
        prompts = last.group_by("benchmark", "step", "prompt_id").agg(c("is_correct").sum(), n=pl.len())
        rows = prompts.with_columns(below=pl.int_ranges(0, c("n"))).explode("below")
        above = (c("is_correct") > c("below")).cast(pl.Float64)
        return Mean(rows, [c("benchmark"), c("below")], above, kind="estimate_share")

    def _impact(self, key: pl.Expr) -> Mean:
        rows = self.interventions.with_columns(step=pl.lit(0))
        return Mean(rows, [c("is_correct"), key], c("impact").cast(pl.Float64), kind="estimate_difference")

    def _high(self) -> pl.LazyFrame:
        """Return the tokens in the update, with the column is_high."""
        rows = self.tokens.filter("is_kept").with_columns(self.late)
        thresholds = rows.group_by("late").agg(threshold=c("entropy").quantile(TOP))
        return rows.join(thresholds, on="late").with_columns(is_high=c("entropy") >= c("threshold"))

    def _at_length(self) -> pl.LazyFrame:
        """Return responses with their surprisal at equal length.

        See the view responses_at_length.
        """
        log = c("response_length").log()
        rows = self.rollouts.with_columns(
            self.late,
            x=c("surprisal_mean").cast(pl.Float64) - c("surprisal_mean").cast(pl.Float64).mean().over("group_id"),
            y=log - log.mean().over("group_id"),
        )
        slope = (c("x") * c("y")).sum().over("late") / (c("y") * c("y")).sum().over("late")
        return rows.with_columns(at_length=c("x") - slope * c("y"))

    def _ntile(self, num: int) -> pl.Expr:
        rank = c("at_length").rank("ordinal").over("group_id")
        return ((rank - 1) * num // pl.len().over("group_id")).cast(pl.Int32)


# Questions whose breakdown is computed with polars, and the column of the question that holds the same values.
COLUMNS: dict[str, str] = {
    "category_shares": "share",
    "defects_over_steps": "share",
    "entropy_by_sample_sign": "entropy",
    "entropy_gap_by_prompt": "gap",
    "entropy_gradient_density": "num_tokens",
    "exchange_law": "accuracy_fit",
    "movement_by_category": "dp",
    "movement_by_entropy": "dp",
    "movement_concentration": "share",
    "movement_distribution": "num_tokens",
    "stage_dynamics": "accuracy",
    "word_changes": "change",
    "accuracy_by_ppl_decile": "accuracy",
    "correctness_by_ppl": "accuracy",
    "high_entropy_by_ppl": "share",
    "robustness_by_ppl": "impact",
    "entropy_by_position": "entropy",
    "high_entropy_by_position": "share",
    "high_entropy_words": "num_high",
    "impact_by_position": "impact",
    "potential_by_position": "movement",
    "u_shape": "excess",
    "ablation_curves": "avg_at_k",
    "cost_accuracy": "avg_at_k",
    "performance_profile": "share",
}
