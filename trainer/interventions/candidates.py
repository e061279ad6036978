"""Which recorded tokens to replace, and in which order, so that any beginning of the order is balanced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from entrace.analysis.trace import InputError

# Responses of the steps up to a checkpoint are those whose policies were near it.
WINDOW_STEPS = 10
# The quantile from which on a token belongs to the 20 % of highest entropy.
HIGH_ENTROPY = 0.8
STRATA = ("fifth", "ppl_tercile", "is_high_entropy")


def load_candidates(run_dir: Path, last_step: int) -> pl.DataFrame:
    """Load tokens of the responses in the updates of the ``WINDOW_STEPS`` steps up to ``last_step``.

    A response of unknown perplexity belongs to no tercile and is left out.

    Returns:
        Columns of table tokens, and the response's ``ppl`` and ``ppl_tercile``, by rollout_id and position.

    Raises:
        InputError: no response of known perplexity took part in these updates.
    """
    in_window = pl.col("step").is_between(last_step - WINDOW_STEPS + 1, last_step)
    # Traces of schema 1 have no group_id: a prompt sampled twice in one step is two groups of equal sample indices.
    repeat = pl.int_range(pl.len()).over("step", "prompt_id", "sample_index")
    group = ("step", "prompt_id", "repeat")
    rank = pl.col("ppl").rank("ordinal").over(group).cast(pl.Int64) - 1
    responses = (
        _scan(run_dir, "rollouts")
        .filter(in_window)
        .sort("rollout_id")
        .with_columns(repeat.alias("repeat"))
        .filter(pl.col("ppl").is_not_null())
        .with_columns(ntile(rank, pl.len().over(group).cast(pl.Int64), 3).alias("ppl_tercile"))
        .filter("is_kept")
        .select("rollout_id", "ppl", "ppl_tercile")
    )
    tokens = _scan(run_dir, "tokens").filter(in_window)
    found = tokens.join(responses, on="rollout_id").sort("rollout_id", "position").collect()
    if found.is_empty():
        first_step = max(1, last_step - WINDOW_STEPS + 1)
        raise InputError(
            f"{run_dir}: no response of known perplexity took part in the updates of steps {first_step} to {last_step}"
        )
    return found


def _scan(run_dir: Path, table: str) -> pl.LazyFrame:
    """Scan a table whose parts may have different schema versions."""
    return pl.scan_parquet(run_dir / table / "*.parquet", missing_columns="insert", extra_columns="ignore")


def order_candidates(
    tokens: pl.DataFrame,
    entropy: tuple[float, float],
    position: tuple[float, float],
    ppl_tercile: tuple[int, ...],
    rng: np.random.Generator,
) -> pl.DataFrame:
    """Filters tokens and puts them into a random order that visits strata in turn.

    A stratum is a fifth of relative position x a tercile of perplexity x the top 20 % of entropy or the rest.

    Args:
        tokens: What ``load_candidates`` returns.
        entropy: Lowest and highest quantile of entropy among ``tokens``, both included.
        position: Range of position / response_length; the upper end is left out, except that 1 leaves out nothing.
        ppl_tercile: Terciles to keep.
        rng: Decides the order.

    Raises:
        InputError: no token is left.
    """
    quantiles = np.quantile(tokens["entropy"].to_numpy().astype(np.float64), [*entropy, HIGH_ENTROPY])
    low, high, top = quantiles.tolist()
    value = pl.col("entropy").cast(pl.Float64)
    relative = pl.col("position") / pl.col("response_length")
    chosen = tokens.filter(
        value.is_between(low, high),
        (relative >= position[0]) & (relative < position[1]),
        pl.col("ppl_tercile").is_in(ppl_tercile),
    ).with_columns(
        (5 * pl.col("position") // pl.col("response_length")).alias("fifth"), (value >= top).alias("is_high_entropy")
    )
    if chosen.is_empty():
        raise InputError(
            f"--entropy, --position, --ppl-tercile: none of {len(tokens)} tokens passes all three; widen one of them"
        )
    shuffled = chosen[rng.permutation(len(chosen))]
    turn = pl.int_range(pl.len()).over(STRATA)
    return shuffled.with_columns(turn.alias("turn")).sort("turn", maintain_order=True).drop("turn")


def ntile(rank: pl.Expr, count: pl.Expr, parts: int) -> pl.Expr:
    """SQL's ntile: the part, from 1, of row ``rank``, from 0, of ``count``; the first count % parts hold one more."""
    size, longer = count // parts, count % parts
    return 1 + pl.max_horizontal(rank // (size + 1), (rank - longer) // size.clip(1))
