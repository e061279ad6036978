"""Choose recorded tokens to replace, in an order with balanced prefixes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from entrace.analysis.trace import TABLES, InputError, digests, read_manifest
from entrace.analysis.trace.parts import check_parts, read_part

# The policies of the last steps before a checkpoint were close to it.
WINDOW_STEPS = 10
# The entropy quantile above which a token belongs to the top 20%.
HIGH_ENTROPY = 0.8
STRATA = ("fifth", "ppl_tercile", "is_high_entropy")


def load_candidates(run_dir: Path, last_step: int) -> pl.DataFrame:
    """Load tokens of responses in the updates of the last ``WINDOW_STEPS`` steps.

    The last of these steps is ``last_step``. A response of unknown perplexity belongs to no tercile and is excluded.

    Returns:
        Columns of table tokens, and the response's ``ppl`` and ``ppl_tercile``, sorted by rollout_id and position.

    Raises:
        InputError: no response of known perplexity was in these updates, or none whose tokens are stored.
    """
    first_step = max(1, last_step - WINDOW_STEPS + 1)
    # Traces of schema 1 have no group_id: a prompt sampled twice in one step is two groups of equal sample indices.
    repeat = pl.int_range(pl.len()).over("step", "prompt_id", "sample_index")
    group = ("step", "prompt_id", "repeat")
    rank = pl.col("ppl").rank("ordinal").over(group).cast(pl.Int64) - 1
    responses = (
        _read(run_dir, "rollouts", first_step, last_step)
        .sort("rollout_id")
        .with_columns(repeat.alias("repeat"))
        .filter(pl.col("ppl").is_not_null())
        .with_columns(ntile(rank, pl.len().over(group).cast(pl.Int64), 3).alias("ppl_tercile"))
        .filter("is_kept")
        .select("rollout_id", "ppl", "ppl_tercile")
    )
    tokens = _read(run_dir, "tokens", first_step, last_step)
    found = tokens.join(responses, on="rollout_id").sort("rollout_id", "position")
    if found.is_empty():
        raise InputError(
            f"{run_dir}: no response of known perplexity was in the updates of steps {first_step} to {last_step}, or "
            "none of which tokens are stored; see record.token_steps and record.token_responses"
        )
    return found


def _read(run_dir: Path, table: str, first_step: int, last_step: int) -> pl.DataFrame:
    """Read the rows of some steps.

    The parts of the table may have different schema versions.
    """
    steps = [("step", ">=", first_step), ("step", "<=", last_step)]
    files = check_parts(run_dir, read_manifest(run_dir), digests.read(run_dir))[table]
    parts = [pl.DataFrame(read_part(path, filters=steps)) for path in files]
    return pl.concat(parts, how="diagonal_relaxed") if parts else pl.DataFrame(TABLES[table].arrow_schema.empty_table())


def order_candidates(
    tokens: pl.DataFrame,
    entropy: tuple[float, float],
    position: tuple[float, float],
    ppl_tercile: tuple[int, ...],
    rng: np.random.Generator,
) -> pl.DataFrame:
    """Filter tokens and put them in a random order that visits strata in turn.

    A stratum is a fifth of relative position x a tercile of perplexity x the top 20% of entropy or the rest.

    Args:
        tokens: Result of ``load_candidates``.
        entropy: Lowest and highest entropy quantile among ``tokens``, inclusive.
        position: Range of position / response_length, without the upper bound, except that 1 excludes nothing.
        ppl_tercile: Terciles to keep.
        rng: Determines the order.

    Raises:
        InputError: no token passes the filters.
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
    """Return SQL's ntile, from 1, of row ``rank``, from 0, among ``count``.

    The first ``count % parts`` tiles hold one more row.
    """
    size, longer = count // parts, count % parts
    return 1 + pl.max_horizontal(rank // (size + 1), (rank - longer) // size.clip(1))
