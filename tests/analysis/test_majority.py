"""Test that maj@k merges equal answers, in Python and in SQL.

The verifier decides which answers are equal.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from entrace import open_runs
from entrace.analysis.statistics.estimates import maj_at_k
from entrace.analysis.trace import TraceWriter
from entrace.trainer.cli.evaluate import summarize_evals
from tests.analysis.conftest import VOCAB

CASES = {
    "equal correct answers share a vote": (
        ["1/2", "0.5", r"\frac12", "3", "3"],
        [True, True, True, False, False],
        None,
        1.0,
    ),
    "equal incorrect answers share a vote": (
        ["1", "1", "1/2", "0.5", r"\frac12"],
        [True, True, False, False, False],
        ["1", "1", "1/2", "1/2", "1/2"],
        0.0,
    ),
    "without a class, the text decides": (["1", "1", "1/2", "0.5", "2"], [True, True, False, False, False], None, 1.0),
    "a class is not compared with a text": (["2", "x", "1"], [False, False, True], [None, "2", None], 1 / 3),
    "a tie is a random choice": (["1/2", "0.5", "3", "3"], [True, True, False, False], None, 0.5),
    "unknown correctness has no vote": (["3", "3", "1"], [None, None, True], None, 1.0),
    "a missing answer has no vote": ([None, None, "1"], [False, False, True], [None, None, "1"], 1.0),
    "nothing has a vote": ([None, "1"], [False, None], None, 0.0),
}


@pytest.mark.parametrize("case", CASES)
def test_votes(case: str):
    answers, is_correct, classes, expected = CASES[case]
    assert maj_at_k(answers, is_correct, len(answers), classes) == pytest.approx(expected)
    assert maj_at_k(np.array(answers, dtype=object), is_correct, len(answers), classes) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answers", "is_correct", "expected"),
    [
        ([None] * 4, [True, False, None, True], [None, None]),
        ([None] * 4, [False, False, None, False], [0.0, 0.0]),
        # An answer at another prompt shows that answers were recorded.
        ([None, None, "1", None], [True, True, False, True], [0.0, 0.0]),
    ],
)
def test_without_recorded_answers_the_majority_is_unknown(
    tmp_path: Path, answers: list[str | None], is_correct: list[bool | None], expected: list[float | None]
):
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "run"}, VOCAB)
    ids = {"step": 1, "benchmark": "b", "prompt_id": ["p", "p", "q", "q"], "sample_index": [0, 1, 0, 1]}
    given = {"answer": answers, "is_correct": is_correct, "response_length": 3, "temperature": 1.0}
    writer.append("evals", {**ids, **given})
    writer.flush(1)
    runs = open_runs(tmp_path / "run")
    found = runs.sql("select maj_at_k from eval_prompts(2) order by prompt_id")
    assert found["maj_at_k"].to_list() == expected
    metrics = runs.query("ablation_final")["metric"].to_list()
    assert ("maj_at_k" in metrics) == (None not in expected)
    rows = {**ids, "benchmark": ["b"] * 4, "answer_class": [None] * 4, **given}
    summary = summarize_evals(rows, 2)["b"]
    assert ("maj@2" in summary) == (None not in expected)
    assert "avg@2" in summary


def test_sql_counts_votes_as_python_does(tmp_path: Path):
    rng = np.random.default_rng(0)
    writer = TraceWriter.create(tmp_path / "run", {"run_id": "run"}, VOCAB)
    drawn = [
        ([None, "a", "b", "c"][i], [True, False, None][j], [None, "a", "b"][k] if i else None)
        for i, j, k in itertools.product(range(4), range(3), range(3))
    ]
    prompts = {case: list(zip(a, c, k or [None] * len(a), strict=True)) for case, (a, c, k, _) in CASES.items()}
    prompts |= {f"random {n}": [drawn[i] for i in rng.integers(0, len(drawn), 6)] for n in range(60)}
    for name, samples in prompts.items():
        answers, is_correct, classes = map(list, zip(*samples, strict=True))
        ids = {"step": 1, "benchmark": "b", "prompt_id": name, "sample_index": np.arange(len(samples))}
        given = {"answer": answers, "is_correct": is_correct, "answer_class": classes}
        writer.append("evals", {**ids, **given, "response_length": 3, "temperature": 1.0})
    writer.flush(1)
    rows = open_runs(tmp_path / "run").sql("select * from eval_prompts(5)").to_dicts()
    found = {row["prompt_id"]: row for row in rows}
    known = {name for name, samples in prompts.items() if any(correct is not None for _, correct, _ in samples)}
    assert found.keys() == known
    for name, row in found.items():
        answers, is_correct, classes = zip(*prompts[name], strict=True)
        assert row["maj_at_k"] == pytest.approx(maj_at_k(answers, is_correct, 5, classes)), name
        judged = [correct for correct in is_correct[:5] if correct is not None]
        if judged:
            assert (row["num_samples"], row["avg_at_k"]) == (len(judged), pytest.approx(np.mean(judged))), name
