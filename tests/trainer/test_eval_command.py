"""Test `entrace eval`: one row per benchmark, and their mean on request.

Each row has an interval and its number of prompts.
"""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrace.analysis.statistics.shares import bounded
from entrace.trainer.cli.evaluate import MEAN, _lines, mean_over_benchmarks, summarize_evals
from entrace.trainer.config import load_config
from entrace.trainer.evaluate import load_policy_and_task
from entrace.trainer.resources import find_base_policy
from entrace.trainer.tasks import load_task


def columns(**verdicts):
    """Return columns of two samples per prompt, as pairs of verdicts by benchmark."""
    pairs = [(name, pair) for name, found in verdicts.items() for pair in found]
    return {
        "benchmark": [name for name, _ in pairs for _ in range(2)],
        "answer": ["x" if verdict else "y" for _, pair in pairs for verdict in pair],
        "answer_class": [None] * (2 * len(pairs)),
        "is_correct": [verdict for _, pair in pairs for verdict in pair],
    }


def test_every_benchmark_has_its_own_estimates():
    summary = summarize_evals(columns(easy=[(1, 1), (1, 0), (1, 1)], hard=[(0, 0), (0, 1)]), k=2)
    assert {name: e.value for name, e in summary["easy"].items()} == {
        "avg@2": pytest.approx(5 / 6),
        "maj@2": pytest.approx(5 / 6),
        "pass@2": 1.0,
    }
    assert {name: e.value for name, e in summary["hard"].items()} == {"avg@2": 0.25, "maj@2": 0.25, "pass@2": 0.5}
    assert [summary[name]["avg@2"].n for name in ("easy", "hard")] == [3, 2]
    # The jackknife of .5 and 0: half their distance.
    expected = bounded(0.25, 0.25, 1, 2, "prompts")
    hard = summary["hard"]["avg@2"]
    assert (hard.low, hard.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_the_mean_weighs_benchmarks_alike():
    summary = summarize_evals(columns(easy=[(1, 1), (1, 0)] * 8, hard=[(0, 0), (0, 1)]), k=2)
    mean = mean_over_benchmarks(summary)["avg@2"]
    assert mean.value == pytest.approx((0.75 + 0.25) / 2)
    assert (mean.n, mean.of) == (18, "prompts of 2 benchmarks")
    errors = [summary[name]["avg@2"].error for name in ("easy", "hard")]
    assert mean.error == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)


def test_responses_without_a_verdict_do_not_count():
    summary = summarize_evals(columns(some=[(None, 1), (None, None), (0, 0)], none=[(None, None)]), k=2)
    assert {name: (e.value, e.n) for name, e in summary["some"].items()} == {
        "avg@2": (0.5, 2),
        "maj@2": (0.5, 2),
        "pass@2": (0.5, 2),
    }
    assert summary["none"] == {}
    assert mean_over_benchmarks(summary)["avg@2"].value == 0.5


VERDICT = st.sampled_from([True, True, True, False, None])
PROMPTS = st.lists(st.tuples(VERDICT, VERDICT), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(first=PROMPTS, second=PROMPTS)
def test_no_printed_share_lies_outside_of_0_and_1(first, second):
    summary = summarize_evals(columns(first=first, second=second), k=2)
    summary[MEAN] = mean_over_benchmarks(summary)
    for name, metrics in summary.items():
        for estimate in metrics.values():
            assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1, name
    for line in _lines({"model": summary}):
        shares = [float(number) for number in re.findall(r"\d+\.\d+", line)]
        assert len(shares) == 3 * len(summary[line.split()[1]])
        assert all(0 <= share <= 1 for share in shares), line


@pytest.fixture
def exams(tmp_path):
    """Write a config with two held-out files, of five and of three prompts.

    Both have the same data source.
    """
    prompts = load_task(load_config("tiny").task, seed=5).heldout
    files = {}
    for name, part in (("first", prompts[:5]), ("second", prompts[5:8]), ("train", prompts[8:20])):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": p.text, "answer": p.ground_truth, "data_source": "sums"} for p in part]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[name] = str(path)
    config = tmp_path / "exams.toml"
    config.write_text(
        f'[task]\nname = "{files["train"]}"\nheldout_file = ["{files["first"]}", "{files["second"]}"]\n'
        "[eval]\nsamples = 2\n[rollout]\nprompts_per_step = 4\n"
    )
    return config


def test_the_command_prints_one_row_per_benchmark_and_the_mean_on_request(exams, call):
    policy = find_base_policy()
    code, out, err = call("eval", policy, "--config", exams)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()]
    assert [row[:4] for row in rows] == [[str(policy), "first", "n", "="], [str(policy), "second", "n", "="]]
    assert [row[4] for row in rows] == ["5", "3"]
    assert all(out.count(f"{name} ") == 2 for name in ("avg@2", "maj@2", "pass@2"))
    assert "8/8" in err
    code, out, _ = call("eval", policy, "--config", exams, "--mean")
    assert [line.split()[1] for line in out.splitlines()] == ["first", "second", MEAN]
    found = json.loads(call("eval", policy, "--config", exams, "--mean", "--json")[1])[str(policy)]
    assert {name: metrics["n"] for name, metrics in found.items()} == {"first": 5, "second": 3, MEAN: 8}
    for name in ("avg@2", "maj@2", "pass@2"):
        value, low, high = found[MEAN][name]
        assert value == pytest.approx((found["first"][name][0] + found["second"][name][0]) / 2)
        assert 0 <= low <= value <= high <= 1


def test_an_evaluation_warns_of_characters_that_the_tokenizer_lacks(exams, monkeypatch, caplog):
    monkeypatch.setattr("entrace.trainer.tasks.characters.find_lost", lambda tokenizer, texts: ["é"])
    load_policy_and_task(load_config(str(exams)))
    assert 'cannot encode 1 character of the task, "é" (U+00E9)' in caplog.text


def test_a_folder_that_is_not_there_is_named_as_typed(call, tmp_path):
    path = tmp_path / "nowhere"
    assert call("eval", path) == (2, "", f"entrace: RUN_OR_MODEL: no model folder at {path}\n")
