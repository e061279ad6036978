"""Test that intervals of tables and figures have nominal coverage.

The intervals must equal those of the scorecard.
"""

from __future__ import annotations

import subprocess
import sys

import duckdb
import numpy as np
import polars as pl
import pytest

from entrace.analysis import queries
from entrace.analysis.runs import Runs
from entrace.analysis.statistics import interval_functions
from entrace.analysis.statistics.clusters import level, ratio
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
