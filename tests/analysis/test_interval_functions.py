"""Test that intervals of tables and figures have nominal coverage.

The intervals must equal those of the scorecard.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from scipy import optimize, stats

from entrace.analysis import queries
from entrace.analysis.runs import Runs
from entrace.analysis.statistics import interval_functions
from entrace.analysis.statistics.autocorrelation import (
    CORRELATIONS,
    MEASURED,
    NO_STATE_MEASURED,
    NO_STATE_UNMEASURED,
    UNMEASURED,
    VARIANCE_RATIOS,
)
from entrace.analysis.statistics.clusters import level, over_clusters, ratio
from entrace.analysis.statistics.shares import bounded
from entrace.analysis.trace import InputError

STEPS, PROMPTS = 40, 8
RUNS = 250


@pytest.fixture
def con():
    con = duckdb.connect()
    interval_functions.register(con)
    con.execute((queries.SQL_ROOT / "staging" / "macros.sql").read_text())
    yield con
    con.close()


def drifting(rng: np.random.Generator, autocorrelation: float = 0.9) -> np.ndarray:
    """Return one state of variance 1 per run and step, ``(RUNS, STEPS, 1)``."""
    state = rng.normal(size=(RUNS, STEPS))
    for step in range(1, STEPS):
        state[:, step] = autocorrelation * state[:, step - 1] + np.sqrt(1 - autocorrelation**2) * state[:, step]
    return state[:, :, None]


def coverage(
    con: duckdb.DuckDBPyConnection, function: str, means: np.ndarray, counts: np.ndarray, truth: float
) -> float:
    """Return the coverage over runs.

    ``means`` and ``counts`` have axes run, step, and prompt.
    """
    run, step, prompt = (index.ravel() for index in np.indices(means.shape))
    columns = {"run": run, "step": step, "prompt": prompt, "total": (means * counts).ravel(), "count": counts.ravel()}
    con.register("measured", pl.DataFrame(columns).to_arrow())
    # Every step has new prompts.
    row = "step_prompt(step, 1000 * step + prompt, total, count)"
    found = con.sql(f"select {function}(list({row})) as mean from measured group by run").pl().unnest("mean")
    assert found.height == means.shape[0]
    return float(((found["low"].to_numpy() <= truth) & (truth <= found["high"].to_numpy())).mean())


def test_entropy_by_position_covers_its_mean_under_drift(con: duckdb.DuckDBPyConnection):
    rng = np.random.default_rng(0)
    means = 1 + 0.1 * drifting(rng) + 0.2 * rng.normal(size=(RUNS, STEPS, PROMPTS))
    counts = rng.integers(5, 80, means.shape).astype(float)
    assert 0.9 <= coverage(con, "estimate_positive", means, counts, 1) <= 0.99


def test_potential_by_position_covers_its_mean_under_drift(con: duckdb.DuckDBPyConnection):
    # A few captured steps; some prompts move ten times as far as others.
    rng = np.random.default_rng(1)
    means = 0.02 * np.exp(0.3 * drifting(rng) + 0.8 * rng.normal(size=(RUNS, STEPS, PROMPTS)))[:, ::2]
    counts = rng.integers(5, 80, means.shape).astype(float)
    assert 0.9 <= coverage(con, "estimate_positive", means, counts, 0.02 * np.exp((0.3**2 + 0.8**2) / 2)) <= 0.99


def test_movement_concentration_covers_its_mean_under_drift(con: duckdb.DuckDBPyConnection):
    # The count, the total movement of a prompt, is heavy-tailed.
    rng = np.random.default_rng(2)
    logits = 2 + 0.5 * drifting(rng) + 0.8 * rng.normal(size=(RUNS, STEPS, PROMPTS))
    means = 1 / (1 + np.exp(-logits))
    counts = np.exp(0.7 * rng.normal(size=means.shape))
    truth = float((1 / (1 + np.exp(-2 - np.sqrt(0.89) * rng.normal(size=1_000_000)))).mean())
    assert 0.9 <= coverage(con, "estimate_share", means, counts, truth) <= 0.99


def test_a_single_step_of_seven_prompts_covers_its_mean(con: duckdb.DuckDBPyConnection):
    rng = np.random.default_rng(3)
    means = 1 + 0.3 * rng.normal(size=(1000, 1, 7))
    counts = rng.integers(100, 400, means.shape).astype(float)
    assert 0.92 <= coverage(con, "estimate_positive", means, counts, 1) <= 0.98


def test_recurring_prompts_count_once(con: duckdb.DuckDBPyConnection):
    # Six prompts recur at 40 steps and differ mainly in level, so the interval is over prompts.
    rng = np.random.default_rng(4)
    levels = rng.normal(size=6)
    rows = [(step, prompt, levels[prompt] + 0.01 * rng.normal()) for step in range(40) for prompt in range(6)]
    con.register("measured", pl.DataFrame(rows, ["step", "prompt", "total"], orient="row").to_arrow())
    mean = (
        con.sql("select estimate(list(step_prompt(step, prompt, total, 1))) as mean from measured").pl().unnest("mean")
    )
    half = 2.570582 * levels.std(ddof=1) / np.sqrt(6)
    assert (mean["high"] - mean["value"]).item() == pytest.approx(half, rel=0.02)


def test_interval_of_a_table_is_that_of_the_scorecard(study: Runs):
    rows = study.query("entropy_by_position", runs=["none-seed0"], stage="plateau")
    tokens = study.sql(
        "select step, prompt_id, sample_sign, entropy::double as entropy, floor(relative_position * 10) as place "
        "from staged_tokens where run_id = 'none-seed0' and stage = 'plateau' and sample_sign is not null"
    ).with_columns(prompt=pl.col("prompt_id").rank("dense").cast(pl.Int64))
    for row in rows.iter_rows(named=True):
        own = tokens.filter(sample_sign=row["sample_sign"], place=row["position_bin"])
        sums = np.column_stack((own["entropy"].to_numpy(), np.ones(own.height)))
        found = level(own["step"].to_numpy(), own["prompt"].to_numpy(), sums, ratio)
        assert (row["entropy"], row["low"], row["high"]) == pytest.approx(
            (found.value, found.low, found.high), rel=1e-4
        )
        assert row["num_prompts"] == own["prompt"].n_unique()


def test_squares_of_the_errors_of_two_phases_add_up(study: Runs):
    row = study.query("word_changes", runs=["none-seed0"]).row(0, named=True)
    steps = study.sql(
        "select step, staged_steps.phase as part, count(*)::double as tokens, "
        "count(*) filter (where trim(text) = $word)::double as occurrences "
        "from tokens join vocab using (run_id, token_id) join staged_steps using (run_id, step) "
        "where run_id = 'none-seed0' and part is not null group by all order by step",
        {"word": row["word"]},
    )
    halves, values = [], []
    for part in ("start", "end"):
        own = steps.filter(part=part)
        found = level(own["step"].to_numpy(), own["step"].to_numpy(), own[["occurrences", "tokens"]].to_numpy(), ratio)
        halves.append(found.high - found.value)
        values.append(found.value)
    change, half = values[1] - values[0], np.hypot(*halves)
    assert (row["change"], row["low"], row["high"]) == pytest.approx((change, change - half, change + half), rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("null", (None, None, None)),
        ("[]", (None, None, None)),
        ("[null]", (None, None, None)),
        ("[step_prompt(1, 'a', null, 3), step_prompt(1, 'b', 2, null)]", (None, None, None)),
        ("[step_prompt(1, 'a', 0, 0)]", (None, None, None)),
        ("[step_prompt(1, 'a', 3, 0)]", (None, None, None)),
        ("[step_prompt(1, 'a', 1, 4)]", (0.25, None, None)),
        # Rows with a null or without units are dropped, so one prompt remains.
        ("[step_prompt(1, 'a', 1, 4), step_prompt(2, 'b', 0, 0), step_prompt(3, 'c', null, 1)]", (0.25, None, None)),
    ],
)
def test_means_without_an_interval(tiny: Runs, rows: str, expected: tuple[float | None, ...]):
    found = tiny.sql(f"select estimate({rows}) as mean").row(0)[0]
    assert tuple(found.values()) == expected


def test_functions_can_be_explained_and_run_on_threads(tiny: Runs):
    text = (
        "select i % 3000 as g, estimate_share(list(step_prompt(i % 2, i, i % 7 = 0, 1))) as mean from range(60000) _(i)"
    )
    assert "Aggregates: list" in tiny.sql(f"explain {text} group by g")["explain_value"].item()
    found = tiny.sql(f"select * from ({text} group by g) order by g").unnest("mean")
    assert found.height == 3000
    assert ((found["low"] >= 0) & (found["low"] <= found["value"]) & (found["value"] <= found["high"])).all()
    assert (found["high"] <= 1).all()


def test_a_list_of_anything_else_is_refused_in_one_line(tiny: Runs):
    with pytest.raises(InputError, match="sql: Binder Error: No function matches") as error:
        tiny.sql("select estimate([1, 2])")
    assert "\n" not in str(error.value)


def test_nothing_is_printed_when_a_connection_outlives_the_interpreter():
    script = (
        "import duckdb; from entrace.analysis.statistics import interval_functions; con = duckdb.connect(); "
        "interval_functions.register(con); found = con.sql('select estimate([])').pl()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("function", interval_functions.BOUNDS)
def test_lists_of_one_step_give_together_what_each_gives_alone(con: duckdb.DuckDBPyConnection, function: str):
    rng = np.random.default_rng(5)
    row = rng.integers(0, 60, 600)
    # Prompts recur within a list; lists of one prompt, of zero totals, and of equal means are among the others.
    prompt = np.where(row < 5, 7, rng.integers(0, 12, 600))
    count = rng.integers(0, 4, 600) * (row != 6).astype(float)
    share = np.select([row % 10 == 1, row % 10 == 2, row % 10 == 3], [0.0, 1.0, 0.25], rng.uniform(size=600))
    columns = {"row": row, "prompt": prompt, "total": share * count, "count": count}
    con.register("measured", pl.DataFrame(columns).to_arrow())
    text = f"select row, {function}(list(step_prompt(3, prompt, total, count))) as mean from measured group by row"
    for found in con.sql(text).pl().unnest("mean").iter_rows(named=True):
        own = row == found["row"]
        used = own & (count > 0)
        expected = interval_functions.mean_with_interval(
            np.full(used.sum(), 3),
            prompt[used],
            columns["total"][used],
            count[used],
            interval_functions.BOUNDS[function],
        )
        assert [found[name] for name in ("value", "low", "high")] == [
            value if value is None else pytest.approx(value, rel=1e-9, abs=1e-12) for value in expected
        ]


def test_the_order_of_sums_changes_an_interval_by_rounding_only():
    # Threads add up totals in any order, and reports of equal traces must be equal.
    rng = np.random.default_rng(0)
    for _ in range(20):
        steps, prompts = np.repeat(np.arange(60), 10), rng.integers(0, 40, 600)
        counts = rng.integers(1, 9, 600).astype(float)
        totals = counts * (1 + 0.5 * rng.normal(size=600) + 0.3 * np.sin(steps / 9))
        first = interval_functions.mean_with_interval(steps, prompts, totals, counts, (0, np.inf))
        rounded = totals * (1 + rng.choice([-2e-16, 0, 2e-16], 600))
        again = interval_functions.mean_with_interval(steps, prompts, rounded, counts, (0, np.inf))
        np.testing.assert_allclose(again, first, rtol=1e-13)


Row = tuple[int, int, float | None, float | None]


def random_lists(rng: np.random.Generator) -> list[list[Row] | None]:
    """Return lists of rows (step, prompt, total, count) of every kind."""

    def rows(steps: Sequence[int] | np.ndarray, prompts: int, mean: float = 0.4, spread: float = 0.3) -> list[Row]:
        drift = np.cumsum(rng.normal(size=len(steps))) * spread / 8
        found = []
        for i, step in enumerate(steps):
            counts = rng.integers(1, 6, prompts)
            shares = np.clip(mean + drift[i] + spread * rng.normal(size=prompts), 0, 1)
            found += [(int(step), 100 * i + j, shares[j] * counts[j], float(counts[j])) for j in range(prompts)]
        return [found[i] for i in rng.permutation(len(found))]

    def recurring(found: list[Row], prompts: int) -> list[Row]:
        return [(step, prompt % prompts, total, count) for step, prompt, total, count in found]

    several = [np.arange(40), np.arange(10, 50), np.sort(rng.choice(60, 31, False)), np.arange(0, 200, 5)]
    lists: list[list[Row] | None] = [rows(steps, prompts) for steps in several for prompts in (1, 2, 7)]
    lists += [rows([3], prompts) for prompts in (1, 2, 9)] + [rows([3, 9], prompts) for prompts in (1, 4)]
    lists += [recurring(rows(np.arange(25), 6), prompts) for prompts in (1, 2, 6, 17)] + [recurring(rows([4], 9), 3)]
    lists += [rows(np.arange(12), 3, mean, 0.0) for mean in (0.0, 0.3, 1.0)] + [rows([5], 6, 1.0, 0.0)]
    lists += [rows(np.arange(700), prompts, 0.5, 0.1) for prompts in (1, 2)]
    # Steps with one and with many prompts, rows of the same prompt and step, no units, and nulls.
    lists += [rows(np.arange(9), 1) + [(2, 1000 + i, 0.1 * i, 1.0) for i in range(9)]]
    lists += [rows(np.arange(15), 3) * 2, [], None, [(1, 1, 0.0, 0.0)], [(1, 1, 2.0, 0.0), (2, 5, 1.0, 0.0)]]
    lists += [[*rows(np.arange(8), 3), (1, 7, None, 2.0), (2, 7, 1.0, None), (3, 9, float("nan"), 1.0)]]
    return lists


def used_columns(rows: list[Row] | None) -> np.ndarray:
    """Return the columns of the rows that carry information, ``(4, rows)``."""
    found = np.array(rows or [], dtype=float).reshape(-1, 4)
    return found[np.isfinite(found).all(1) & (found[:, 2:] != 0).any(1)].T


def naive_contrast(y: np.ndarray, steps: np.ndarray, noise: np.ndarray | None, noise_df: int) -> tuple[float, ...]:
    """Return half the interval of a mean of steps, its error, and its df, by loops."""
    if len(y) > 600:
        starts = np.linspace(0, len(y), 601).astype(int)
        parts = [slice(*ends) for ends in itertools.pairwise(starts)]
        sizes = np.array([part.stop - part.start for part in parts])
        y, weights = np.array([y[part].mean() for part in parts]), sizes / len(y)
        noise = None if noise is None else np.array([noise[part].mean() for part in parts]) / sizes
        steps = steps[starts[:-1]]
    else:
        weights = np.full(len(y), 1 / len(y))
    n = len(y)
    if noise is not None and noise.mean() * max(VARIANCE_RATIOS) <= y.var():
        noise = None
    basis = np.ones(n)
    if noise is not None:
        near = [noise[max(i - n // 20, 0) : i + n // 20 + 1].mean() / noise.mean() for i in range(n)]
        scale = np.sqrt(np.maximum(near, 0.05))
        y, basis, weights = y / scale, basis / scale, weights * scale
    unit = np.std(y - basis * (basis @ y) / (basis @ basis))
    if unit <= 1e-9 * max(1.0, np.abs(y).max()):
        return 0.0, 0.0, n - 1.0
    extra = 0 if noise is None else min(noise_df, 10 * n)
    prior, no_state = (UNMEASURED, NO_STATE_UNMEASURED) if noise is None else (MEASURED, NO_STATE_MEASURED)
    t = np.arange(n)
    transform = np.sqrt(2 / n) * np.cos(np.pi * np.outer(t, 2 * t + 1) / (2 * n)) / np.where(t, 1, np.sqrt(2))[:, None]
    z, x, a = transform @ y / unit, transform @ basis, transform @ weights
    logs, scales = [], []
    for i, r in enumerate((0.0, *CORRELATIONS)):
        covariance = (r ** np.median(np.diff(steps))) ** np.abs(t[:, None] - t)
        state = np.einsum("fs,st,ft->f", transform, covariance, transform, optimize=True)
        for share in VARIANCE_RATIOS if i else (0.0,):
            weight = (1 - no_state) * prior[i - 1] / sum(prior) / len(VARIANCE_RATIOS) if i else no_state
            v = 1 + share * state
            squares = (z * z / v).sum() - (x * z / v).sum() ** 2 / (x * x / v).sum()
            squares += 0 if noise is None else extra * noise.mean() / unit**2
            df = n - 1 + extra
            logs.append(np.log(weight) - (np.log(v).sum() + np.log((x * x / v).sum()) + df * np.log(squares)) / 2)
            scales.append(unit * np.sqrt(squares / df * (v * a * a).sum()))
    weights, scales = np.exp(np.array(logs) - max(logs)), np.array(scales)
    kept = weights > 1e-6 * weights.sum()
    weights, scales = weights[kept] / weights[kept].sum(), scales[kept]

    def quantile(share: float) -> float:
        ends = stats.t.ppf(share, df) * scales.min(), stats.t.ppf(share, df) * scales.max() * (1 + 1e-9)
        return float(optimize.brentq(lambda x: weights @ stats.t.cdf(x / scales, df) - share, *ends, xtol=1e-300))

    half = quantile(0.975)
    tail = round(half / quantile(0.841345), 3)
    ratios = [stats.t.ppf(0.975, df) / stats.t.ppf(0.841345, df) - tail for df in (1, 1e4)]
    matched = 1.0 if ratios[0] < 0 else 1e4
    if ratios[0] > 0 > ratios[1]:
        solve = optimize.brentq(lambda log: stats.t.ppf(0.975, 10**log) / stats.t.ppf(0.841345, 10**log) - tail, 0, 4)
        matched = 10 ** float(solve)
    return half, half / stats.t.ppf(0.975, matched), matched


def naive_mean(given: list[Row] | None, bounds: tuple[float, float]) -> tuple[float | None, ...]:
    """Return the mean of a list with its interval, by loops over steps and prompts."""
    steps, prompts, totals, counts = used_columns(given)
    if not counts.sum():
        return None, None, None
    mean = totals.sum() / counts.sum()
    influence = (totals - mean * counts) / counts.sum()
    sums, num_prompts = np.column_stack((totals - mean * counts, counts)), len(set(prompts.tolist()))
    over_prompts = over_clusters(sums, prompts, ratio, "prompts")
    found = over_prompts.high - over_prompts.value, over_prompts.error, over_prompts.df
    distinct = np.unique(steps)
    if len(distinct) > 1:
        parts = [[influence[(steps == s) & (prompts == p)].sum() for p in set(prompts[steps == s])] for s in distinct]
        noise = np.array([len(part) * np.var(part, ddof=1) if len(part) > 1 else np.nan for part in parts])
        noise_df = sum(len(part) - 1 for part in parts)
        noise = np.where(np.isnan(noise), np.nanmean(noise), noise) * len(distinct) ** 2 if noise_df else None
        series = np.array([sum(part) for part in parts]) * len(distinct)
        over_time = naive_contrast(series, distinct, noise, noise_df)
        if num_prompts == sum(map(len, parts)) or found[0] <= over_time[0]:
            found = over_time
    half, error, df = found
    if np.isfinite(bounds).all():
        ends = bounded(mean, error, df, num_prompts, "prompts", bounds)
        return mean, ends.low, ends.high
    return (mean, max(mean - half, bounds[0]), mean + half) if np.isfinite(half) else (mean, None, None)


def as_arrow(lists: Sequence[list[Row] | None]) -> pa.ListArray:
    names = ("step", "prompt", "total", "count")
    kinds = pa.list_(pa.struct(list(zip(names, (pa.int64(), pa.uint64(), pa.float64(), pa.float64()), strict=True))))
    return pa.array([rows and [dict(zip(names, row, strict=True)) for row in rows] for rows in lists], kinds)


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("function", interval_functions.BOUNDS)
def test_lists_of_every_kind_equal_loops(function: str):
    bounds = interval_functions.BOUNDS[function]
    lists = random_lists(np.random.default_rng(11))
    found = interval_functions.estimates(as_arrow(lists), bounds).to_pylist()
    for rows, row in zip(lists, found, strict=True):
        value, low, high = naive_mean(rows, bounds)
        assert row["value"] == (value if value is None else pytest.approx(value, rel=1e-12, abs=1e-15))
        width = 0.0 if low is None or high is None else high - low
        for end, expected in ((row["low"], low), (row["high"], high)):
            assert end == (
                expected if expected is None else pytest.approx(expected, rel=1e-12, abs=1e-9 * width + 1e-15)
            )


@pytest.mark.parametrize("function", interval_functions.BOUNDS)
def test_a_list_has_the_same_digits_alone_and_among_others(function: str):
    # DuckDB splits lists among threads as it likes, and reports of equal traces must be equal.
    rng = np.random.default_rng(12)
    lists = [rows for _ in range(9) for rows in random_lists(rng)]
    bounds = interval_functions.BOUNDS[function]
    together = interval_functions.estimates(as_arrow(lists), bounds).to_pylist()
    order = rng.permutation(len(lists)).tolist()
    parts = [order[:1], order[1:3], order[3:90], order[90:]]
    for part in parts:
        found = interval_functions.estimates(as_arrow([lists[i] for i in part]), bounds).to_pylist()
        assert found == [together[i] for i in part]


def test_a_list_of_a_table_has_the_interval_of_one_estimate():
    lists = random_lists(np.random.default_rng(13))
    for bounds in ((-np.inf, np.inf), (0.0, 1.0)):
        found = interval_functions.estimates(as_arrow(lists), bounds).to_pylist()
        for rows, row in zip(lists, found, strict=True):
            steps, prompts, totals, counts = used_columns(rows)
            expected = interval_functions.mean_with_interval(steps, prompts, totals, counts, bounds)
            assert tuple(row.values()) == tuple(
                value if value is None else pytest.approx(value, rel=1e-10, abs=1e-13) for value in expected
            )
