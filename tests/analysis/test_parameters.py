"""Test wrong parameter values and empty answers.

A wrong value is an error that names the valid ones. An empty answer says which step removed the rows.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest

import entrace
from entrace.analysis import queries
from entrace.analysis.claims import judge
from entrace.analysis.compare import compare
from entrace.analysis.parameters import Parameter, parameters
from entrace.analysis.runs import Runs, open_runs
from entrace.analysis.trace.errors import InputError
from tests.analysis.conftest import write_failed
from tests.analysis.synthetic import write_run

WORDS = ("rising or plateau", "entropy or logprob", "value or rank")
KINDS = ("list of run_id", "one benchmark", "map of arm to arm", "integer in ", "number in ", *WORDS)
OWN = """\
-- question: X1. Which benchmarks were evaluated?
-- grain: one row per benchmark
-- params: $names: list of benchmark (default all); $share: number in [0, 1); $free: anything; $kind: a, b, or c
-- units: benchmark is a name
-- needs: evaluations
select distinct benchmark, $share as share, $free as free, $kind as kind
from evals
where $names is null or list_contains($names, benchmark)
order by all
"""


@pytest.mark.parametrize("stem", list(queries.BUILT_IN))
def test_a_header_describes_every_parameter_of_its_query(stem: str):
    text = queries.BUILT_IN.read(stem)
    described = parameters(queries.headers(text)["params"])
    assert described.keys() == {name for s in duckdb.extract_statements(text) for name in s.named_parameters}
    for parameter in described.values():
        assert parameter.description.startswith(KINDS), parameter


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stage": "rise"}, 'stage: unknown value "rise"; did you mean "rising"? Valid: plateau, rising'),
        ({"stage": "Rising"}, 'stage: unknown value "Rising"; did you mean "rising"? Valid: plateau, rising'),
        ({"stage": "xyz"}, 'stage: unknown value "xyz"; valid: plateau, rising'),
        ({"stage": 3}, "stage: unknown value 3; valid: plateau, rising"),
        ({"stage": float("nan")}, "stage: unknown value nan; valid: plateau, rising"),
        ({"runs": ["tinny"]}, 'runs: unknown run_id "tinny"; did you mean "tiny"? Valid: tiny'),
        ({"runs": "tinny"}, 'runs: unknown run_id "tinny"; did you mean "tiny"? Valid: tiny'),
        ({"runs": ["tiny", 3]}, "runs: unknown run_id 3; valid: tiny"),
        ({"bins": 0}, "bins: expected an integer in [1, 1000], found 0"),
        ({"bins": 1001}, "bins: expected an integer in [1, 1000], found 1001"),
        ({"bins": "many"}, 'bins: expected an integer in [1, 1000], found "many"'),
        ({"bins": 2.0}, "bins: expected an integer in [1, 1000], found 2.0"),
        ({"bins": True}, "bins: expected an integer in [1, 1000], found True"),
        ({"bins": [2]}, "bins: expected an integer in [1, 1000], found [2]"),
        ({"top": 0}, "top: expected a number in (0, 1], found 0"),
        ({"top": 1.5}, "top: expected a number in (0, 1], found 1.5"),
        ({"top": float("nan")}, "top: expected a number in (0, 1], found nan"),
        ({"top": None, "stag": "rising"}, 'unknown parameter "stag"; did you mean "stage"?'),
    ],
)
def test_a_wrong_value_is_an_error(tiny: Runs, params: dict[str, Any], message: str):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        tiny.query("high_entropy_by_position", **params)


@pytest.mark.parametrize(
    "runs", ["tiny", ["tiny"], ("tiny",), {"tiny"}, np.array(["tiny"]), pl.Series(["tiny"]), pd.Series(["tiny"]), None]
)
def test_one_run_and_every_kind_of_list_are_accepted(tiny: Runs, runs: Any):
    assert tiny.query("stage_dynamics", runs=runs).height == 24


def test_numbers_of_numpy_are_accepted(tiny: Runs):
    plain = tiny.query("high_entropy_by_position", bins=2, top=0.5)
    assert tiny.query("high_entropy_by_position", bins=np.int64(2), top=np.float64(0.5)).equals(plain)
    assert tiny.sql("select $x + 1 as x, $y as y", {"x": np.int32(1), "y": [np.int64(2)]}).rows() == [(2, [2])]


def test_a_benchmark_and_baselines_are_checked(study: Runs):
    with pytest.raises(InputError, match=r'^benchmark: unknown benchmark "task"'):
        study.query("eval_outcomes", benchmark="task")
    for baselines, found in (({"pl": "none"}, "pl"), ({"ppl": "nine"}, "nine")):
        with pytest.raises(InputError, match=rf'^baselines: unknown arm "{found}"; did you mean '):
            study.query("paired_differences", baselines=baselines)
    with pytest.raises(InputError, match=r'^baselines: expected a dictionary from arm to arm, found "none"$'):
        study.query("paired_differences", baselines="none")
    swapped = study.query("paired_differences", baselines={"none": "ppl"})
    assert set(swapped["arm"]) == {"none", "ppl"}
    assert study.query("paired_differences", baselines={"key": ["none"], "value": ["ppl"]}).equals(swapped)
    assert study.query("paired_differences", baselines={}).equals(study.query("paired_differences"))


def test_many_valid_values_are_cut():
    options = [f"run-{i:02}" for i in range(30)]
    with pytest.raises(InputError, match=r'did you mean "run-2\d"\? Valid: run-00, .*, run-19, and 10 more$'):
        Parameter("runs", "list of run_id").check(["run-2x"], lambda column: options)


def test_own_questions_are_checked_by_their_header(study_path: Path, tmp_path: Path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "benchmarks.sql").write_text(OWN)
    runs = open_runs(study_path / "none-seed0", questions=tmp_path / "q")
    [name] = runs.query("benchmarks")["benchmark"]
    assert runs.query("benchmarks", names=name, share=0, free=[1], kind="c").rows() == [(name, 0, [1], "c")]
    with pytest.raises(InputError, match=rf"^names: unknown benchmark .*alid: {name}$"):
        runs.query("benchmarks", names="none")
    with pytest.raises(InputError, match=r"^share: expected a number in \[0, 1\), found 1$"):
        runs.query("benchmarks", share=1)
    with pytest.raises(InputError, match=r'^kind: unknown value "d"; valid: a, b, c$'):
        runs.query("benchmarks", kind="d")
    assert runs.questions["benchmarks"].claim == "X1"
    assert runs.questions["benchmarks"].level == "own"
    with pytest.raises(InputError, match="share: expected"):
        runs.sql(OWN, {"share": 1})


def test_an_empty_answer_names_the_condition(tmp_path: Path):
    # Five steps have no boundary, so that all of them are in the rising stage.
    runs = open_runs([write_run(tmp_path / "short", steps=5, seed=0), write_run(tmp_path / "long", seed=1)])
    long = runs.query("stage_dynamics", stage="plateau").height
    assert long > 0
    total = runs.query("stage_dynamics").height
    expected = {
        (("stage", "plateau"), ("runs", "short")): (
            f'stage="plateau" and runs="short" together removed all {total} rows; without stage="plateau" there '
            f'are 5 rows, whose stage is "rising"; without runs="short" there are {long} rows, whose run_id is "long"'
        ),
        (("runs", ()),): f'runs=[] removed all {total} rows, whose run_id is "long" or "short"',
    }
    for params, said in expected.items():
        with pytest.warns(UserWarning, match="no rows") as caught:
            assert runs.query("stage_dynamics", **dict(params)).is_empty()
        assert [str(warning.message) for warning in caught] == [f"stage_dynamics: no rows: {said}"]
        assert caught[0].filename == __file__
    short = open_runs(tmp_path / "short")
    assert short.why_no_rows("stage_dynamics", {"stage": "plateau", "runs": "short"}) == (
        'stage_dynamics: no rows: stage="plateau" removed all 5 rows, whose stage is "rising"'
    )


def test_a_trace_without_the_data_is_not_blamed_on_a_condition(tmp_path: Path):
    runs = open_runs(write_failed(tmp_path / "broken"))
    lacking = "impact_by_position: no rows: no interventions were recorded; run `entrace intervene RUN`"
    assert runs.why_no_rows("impact_by_position", {"runs": "broken"}) == lacking
    with pytest.warns(UserWarning, match=f"^{re.escape(lacking)}$"):
        runs.query("impact_by_position")


@pytest.mark.slow
def test_claims_comparison_and_figures_do_not_warn(study: Runs, tmp_path: Path):
    empty = open_runs(write_failed(tmp_path / "broken"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert empty.ask("impact_by_position").is_empty()
        compare(study)
        for runs in (study, empty):
            judge(runs)
            for stem in entrace.figures.STEMS:
                entrace.figures.query(runs, stem)


def test_questions_can_be_listed_and_shown(study: Runs):
    questions = entrace.questions
    assert study.questions is questions
    table = questions.table()
    assert table.columns == ["stem", "level", "question", "claim", "params", "units", "needs"]
    assert table["stem"].to_list() == list(questions) == [*queries.BUILT_IN.paths]
    row = table.row(by_predicate=pl.col("stem") == "high_entropy_words", named=True)
    assert (row["level"], row["claim"], row["needs"]) == ("token", "S6, T3", "tokens, entropies, token categories")
    assert row["question"] == "Which words are the high-entropy tokens?"
    assert repr(questions).count("\n") == len(questions) == table.height
    one = questions["high_entropy_words"]
    assert one.sql in repr(one)
    assert f"```sql\n{one.sql}```" in one._repr_markdown_()
    with pytest.raises(InputError, match=r'^unknown question "high_entropy_word"; did you mean "high_entropy_words"'):
        questions["high_entropy_word"]
