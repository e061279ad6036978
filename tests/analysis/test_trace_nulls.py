"""Test that no question, figure, verdict, or report fails on nulls.

Nulls are in nullable columns.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from polars.testing import assert_frame_equal

from entrace import figures
from entrace.analysis import queries
from entrace.analysis.report import write_report
from entrace.analysis.runs import Runs, open_runs
from entrace.analysis.sandbox.connection import DEFAULTS
from entrace.analysis.trace import TABLES
from entrace.analysis.trace.verify import accept_edits
from tests.analysis.synthetic import Planted, write_run
from tests.slow import slow_after

mpl.use("Agg")

NULLABLE = {name: [c.name for c in table.columns if c.nullable] for name, table in TABLES.items()}
READ = (
    set()
    .union(*(queries.WORD.findall(queries.BUILT_IN.read(stem)) for stem in queries.BUILT_IN))
    .union(*(queries.WORD.findall(text) for text in queries.staging()))
)
SHARES = ["all", "half"]
ALL_FIGURES = tuple(figures.STEMS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two arms with two seeds each, without nulls."""
    root = tmp_path_factory.mktemp("nulls") / "study"
    for seed in range(2):
        for arm, accuracy in (("none", 0.6), ("ppl", 0.9)):
            planted = Planted(eval_accuracy=accuracy)
            write_run(root / f"{arm}-seed{seed}", arm=arm, seed=seed, planted=planted, steps=24, groups=3)
    return root


@pytest.fixture(scope="module")
def pair(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a study with the first seed of each arm.

    This study serves tables that no comparison of arms reads.
    """
    root = tmp_path_factory.mktemp("nulls") / "pair"
    for arm in ("none", "ppl"):
        shutil.copytree(whole / f"{arm}-seed0", root / f"{arm}-seed0")
    return root


def of_table(whole: Path, pair: Path, table: str) -> Path:
    """Return the smallest study whose answers depend on a table."""
    return pair if table in ("tokens", "interventions") else whole


# A study without nulls, and its answers.
opened = cache(open_runs)


@cache
def answer(study: Path, stem: str) -> pl.DataFrame:
    return opened(study).ask(stem)


@cache
def rows_of_figure(study: Path, stem: str) -> pl.DataFrame:
    return figures.query(opened(study), stem)


def forget(root: Path, copy: Path, table: str, columns: Iterable[str], share: str) -> None:
    """Copy a study with columns of one table set to null.

    ``share`` selects all rows, every other row, or a random fifth per column.
    """
    if not copy.exists():
        shutil.copytree(root, copy)
    rng = np.random.default_rng(0)
    for path in copy.glob(f"*/{table}/*.parquet"):
        rows = pq.read_table(path)
        # A column that was not recorded is in no file, and null already.
        for column in [name for name in columns if name in rows.column_names]:
            is_null = {
                "all": np.ones(len(rows), bool),
                "half": np.arange(len(rows)) % 2 == 0,
                "own": rng.random(len(rows)) < 0.2,
            }[share]
            i = rows.schema.get_field_index(column)
            values = pc.if_else(pa.array(is_null), pa.scalar(None, rows.schema.field(i).type), rows[i])
            rows = rows.set_column(i, rows.schema.field(i), values)
        pq.write_table(rows, path)
    for run_dir in copy.iterdir():
        accept_edits(run_dir)


@cache
def names_in(stem: str) -> set[str]:
    """Return every name in the SQL of a question and of its views and macros."""
    names = set(queries.WORD.findall(queries.BUILT_IN.read(stem)))
    for text in reversed(queries.staging()):
        if names & set(queries.CREATED.findall(text)):
            names |= set(queries.WORD.findall(text))
    return names


def draw(runs: Runs, stem: str, without_nulls: pl.DataFrame) -> None:
    """Draw a figure that the nulls change; a figure without rows must have a reason."""
    frame = figures.query(runs, stem)
    if not figures.is_drawable(frame):
        assert runs.why_empty(stem)
    elif not frame.equals(without_nulls):
        canvas = Figure(figsize=figures.size(runs, stem, frame))
        figures.figure_module(stem).draw(frame, canvas.subplots())
        canvas.draw_without_rendering()


def assert_has_null(runs: Runs, table: str, column: str) -> None:
    """Check that a column was set to null, unless readers see a default instead."""
    if (table, column) not in DEFAULTS:
        assert runs.run_shipped(f"select count(*) from {table} where {column} is null").item() > 0


def ask_all(study: Path, runs: Runs, words: set[str]) -> None:
    """Ask every question whose SQL has these words, and draw it if it has a figure."""
    for stem in (stem for stem in queries.BUILT_IN.paths if words <= names_in(stem)):
        if stem in ALL_FIGURES:
            draw(runs, stem, rows_of_figure(study, stem))
        else:
            runs.query(stem)


@pytest.mark.parametrize("table", slow_after(1, [table for table, names in NULLABLE.items() if READ & set(names)]))
def test_nulls_in_a_table(whole: Path, pair: Path, tmp_path: Path, table: str):
    """Each column of a table is null in its own fifth of the rows.

    Every two columns are therefore known and null in all combinations.
    """
    study = of_table(whole, pair, table)
    forget(study, tmp_path / "study", table, NULLABLE[table], "own")
    runs = open_runs(tmp_path / "study")
    for column in READ & set(NULLABLE[table]):
        assert_has_null(runs, table, column)
    ask_all(study, runs, {table})


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    ("table", "column"), [(table, c) for table, names in NULLABLE.items() for c in names if c in READ]
)
def test_nulls_in_a_column(whole: Path, pair: Path, tmp_path: Path, table: str, column: str, share: str):
    study = of_table(whole, pair, table)
    forget(study, tmp_path / "study", table, [column], share)
    runs = open_runs(tmp_path / "study")
    assert_has_null(runs, table, column)
    ask_all(study, runs, {table, column})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, need in queries.NEEDS.items() if need.column and need.column != "category"]
)
def test_what_a_question_needs(whole: Path, tmp_path: Path, name: str):
    """A run without the values is left out; the rest is answered as if alone."""
    need = queries.NEEDS[name]
    forget(whole, tmp_path / "study", need.table, [need.column], "all")
    shutil.rmtree(tmp_path / "study" / "ppl-seed0")
    shutil.copytree(whole / "none-seed0", tmp_path / "whole")
    none, mixed = open_runs(tmp_path / "study"), open_runs([tmp_path / "whole", tmp_path / "study" / "none-seed1"])
    for stem in (stem for stem in queries.BUILT_IN.paths if need in queries.BUILT_IN.needs(stem)):
        assert none.ask(stem).is_empty(), stem
        assert none.why_empty(stem) == need.remedy
        assert mixed.lacking(stem) == {"none-seed1": need.remedy}
        if need.table != "steps":
            assert_frame_equal(mixed.ask(stem), answer(whole / "none-seed0", stem))


@pytest.mark.usefixtures("few_figures")
@pytest.mark.parametrize("share", slow_after(1, SHARES))
def test_all_columns_at_once(pair: Path, tmp_path: Path, share: str):
    for table, columns in NULLABLE.items():
        forget(pair, tmp_path / "study", table, columns, share)
    runs = open_runs(tmp_path / "study")
    ask_all(pair, runs, set())
    assert "none-seed0" in write_report(runs, tmp_path / "report").read_text()


def test_a_null_perplexity_belongs_to_no_tercile(whole: Path, tmp_path: Path):
    forget(whole, tmp_path / "study", "rollouts", ["ppl"], "half")
    runs = open_runs(tmp_path / "study" / "none-seed0")
    found = runs.query("high_entropy_by_ppl", top=1.0).filter(category="reasoning")
    kept = "select count(*) from tokens join rollouts using (rollout_id) where rollouts.is_kept"
    known = runs.sql(f"{kept} and ppl is not null").item()
    assert 0 < found["num_tokens"].sum() == known < runs.sql(kept).item()
    assert set(found["ppl_tercile"]) == {1, 2, 3}
