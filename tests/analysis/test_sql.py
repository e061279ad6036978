"""Test every shipped query on a trace whose answers were computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from entrace.analysis import queries
from entrace.analysis.claims import load_ledger
from entrace.analysis.figures import STEMS
from entrace.analysis.runs import Runs, open_runs
from entrace.analysis.trace import Recorder, TraceWriter, Vocabulary
from tests.analysis.conftest import step_row
from tests.analysis.expected import ablation, cluster, instance, laws, stage, token

EXPECTED = {}
for module in (stage, instance, token, laws, ablation, cluster):
    EXPECTED |= module.EXPECTED


@pytest.mark.parametrize("stem", queries.BUILT_IN.paths)
def test_query_gives_the_rows_computed_by_hand(tiny: Runs, stem: str):
    params, columns, rows = EXPECTED[stem]
    found = tiny.query(stem, **params).select(columns).rows()
    assert [tuple(row) for row in found] == [
        tuple(pytest.approx(value, abs=1e-6) if isinstance(value, int | float) else value for value in row)
        for row in rows
    ]


@pytest.mark.parametrize("stem", queries.BUILT_IN.paths)
def test_query_says_what_it_answers(stem: str):
    text = queries.BUILT_IN.read(stem)
    headers = queries.headers(text)
    assert tuple(headers) == queries.HEADERS
    if named := queries.CLAIMS.match(headers["question"]):
        assert set(named["claim"].split(", ")) <= set(load_ledger())
    for name in ("$runs", *EXPECTED[stem][0]):
        assert name.lstrip("$") in headers["params"]
    assert queries.BUILT_IN.needs(stem)
    assert text.rstrip().endswith("select * from final")


def test_an_indented_comment_continues_a_header():
    text = "-- question: S1. Is it so?\n-- units: share in [0, 1];\n--   num_steps in steps\n-- needs: steps\nselect 1"
    assert queries.headers(text) == {
        "question": "S1. Is it so?",
        "units": "share in [0, 1]; num_steps in steps",
        "needs": "steps",
    }


def test_comments_name_no_table_that_a_query_reads():
    text = "-- units: num_tokens in tokens\nselect step\n  -- all tokens\nfrom steps"
    assert queries.tables_in(text) == {"steps"}


def test_each_question_has_query_figure_and_claim():
    questions = {stem for stem, path in queries.BUILT_IN.paths.items() if path.parent.name != "claims"}
    assert questions == set(STEMS)
    for claim in load_ledger().values():
        assert {
            claim["figure"],
            *(part.get("figure", claim["figure"]) for part in claim["parts"].values()),
        } <= questions


def test_words_leave_out_case_and_white_space_except_in_special_tokens_and_bytes(tmp_path: Path):
    texts = [" So", "so\n", "Ġso", "<EOS>", " <EOS>", "<0xF0>", " <0xF0><0x9F>", "a<0xF0>", " ", "<B>"]
    for name, vocab in (
        ("marked", Vocabulary(texts, [text.strip() == "<EOS>" for text in texts])),
        ("texts", texts),
    ):
        TraceWriter.create(tmp_path / name, {"run_id": name}, vocab).flush(0)
    words = open_runs(tmp_path).sql("select run_id, list(word order by token_id) as words from vocab_words group by 1")
    found = dict(words.rows())
    both = ["so", "so", "so"]
    assert found["marked"] == [*both, "<EOS>", "<EOS>", "<0xF0>", "<0xF0><0x9F>", "a<0xF0>", "(blank)", "<b>"]
    assert found["texts"] == [*both, "<eos>", "<eos>", "<0xF0>", "<0xF0><0x9F>", "a<0xF0>", "(blank)", "<b>"]


def test_bytes_are_words_of_their_own(tmp_path: Path):
    folder = tmp_path / "bytes"
    vocab = Vocabulary([" So", "so", "<0xF0>", "<0x9F>"], [False] * 4)
    writer = TraceWriter.create(folder, {"run_id": "bytes"}, vocab)
    for step in range(1, 25):
        common = {"step": step, "prompt_id": "p", "rollout_id": step, "is_correct": True, "response_length": 4}
        measured = {"logprob": -1.0, "entropy": 1.0, "grad_norm": 1.0, "advantage": 1.0, "shaped_advantage": 1.0}
        positions = {"position": np.arange(4), "token_id": np.arange(4)}
        writer.append("tokens", {**common, **measured, **positions, "is_kept": True})
        writer.append("steps", step_row(step, entropy=2 - min(step, 10) / 10, accuracy=min(step, 10) / 20))
        writer.end_step(step)
    writer.flush()
    found = open_runs(folder).query("high_entropy_words", stage="plateau", top=1.0)
    assert found.select("text", "category", "share", "num_all").rows() == [
        ("so", "logical_structuring", 0.5, 28),
        ("<0x9F>", "special", 0.25, 14),
        ("<0xF0>", "special", 0.25, 14),
    ]
    changes = open_runs(folder).query("word_changes", min_count=1)
    assert set(changes["word"]) <= {"so", "<0x9F>", "<0xF0>"}


def test_run_without_evaluations_stays_in_the_final_table(study_path):
    frame = open_runs(study_path).query("ablation_final")
    failed = frame.filter(run_id="broken-seed0").to_dicts()
    assert len(failed) == 1
    assert failed[0]["status"] == "failed"
    assert failed[0]["error"] == "step 3: loss is nan"
    assert failed[0]["value"] is None


def test_pass_at_k_in_sql(tiny: Runs):
    # 1 - C(3, 3) / C(5, 3) = 0.9.
    found = tiny.sql("select pass_at_k(5, 2, 3) as p, pass_at_k(5, 0, 5) as none, pass_at_k(5, 5, 1) as all_right")
    assert found.row(0) == pytest.approx((0.9, 0.0, 1.0))


@pytest.mark.parametrize("top", [0.05, 0.2, 0.5])
def test_entropy_threshold_is_the_quantile_within_its_documented_error(study: Runs, top: float):
    thresholds = study.sql("from entropy_thresholds($top)", {"top": top})
    assert thresholds.height == 2 * study.sql("select count(distinct run_id) from steps").item()
    for run_id, part, found in thresholds.iter_rows():
        conditions = "run_id = $run and stage = $part and sample_sign is not null"
        entropies = study.sql(f"select entropy from staged_tokens where {conditions}", {"run": run_id, "part": part})
        exact = np.sort(entropies["entropy"].cast(float).to_numpy())[::-1][int(np.ceil(top * entropies.height)) - 1]
        assert 0.995 * exact <= found <= exact * (1 + 1e-6)


def test_positions_fall_into_equal_bins(tiny: Runs):
    found = tiny.sql(
        """
        select bin_of_position(position, length, bins) = position * bins // length as is_equal, count(*) as num
        from range(1, 128) as lengths(length), range(1, 128) as all_bins(bins), range(128) as positions(position)
        where position < length
        group by all
        """
    )
    assert found.rows() == [(True, 127 * 128 // 2 * 127)]
    assert tiny.sql("select bin_of_position(2000000000, 2000000001, 1000) as bin")["bin"].to_list() == [999]


@pytest.fixture
def one_uncertain_token(tmp_path: Path) -> Runs:
    """Open a run in which token 29 of 100 is uncertain.

    The advantage of one response in three is unknown.
    """
    entropies = [[float(i == 29) for i in range(100)]] * 3
    with Recorder(tmp_path / "run", ["<eos>", "a"]) as recorder:
        for step in (1, 2):
            recorder.record(
                step,
                prompt=["p"] * 3,
                response_ids=[[1] * 100] * 3,
                reward=[1.0, 0.0, 0.0],
                advantage=[1.0, None, -1.0],
                entropy=entropies,
                logprob=[[-1.0] * 100] * 3,
            )
    return open_runs(tmp_path / "run")


@pytest.mark.parametrize("stem", ["entropy_by_position", "high_entropy_by_position"])
def test_each_of_100_tokens_has_a_bin(one_uncertain_token: Runs, stem: str):
    value = {"entropy_by_position": "entropy", "high_entropy_by_position": "share_of_high"}[stem]
    rows = one_uncertain_token.query(stem, bins=100)
    assert sorted(set(rows["position_bin"])) == list(range(100))
    assert set(rows.filter(position_bin=29)[value]) == {1.0}


def test_an_unknown_advantage_has_no_sign(one_uncertain_token: Runs):
    counts = one_uncertain_token.query("u_shape").group_by("sample_sign").agg(pl.col("num_responses").max())
    assert dict(counts.iter_rows()) == {"positive": 2, "negative": 2}


def test_an_empty_answer_names_the_column_that_was_not_recorded(one_uncertain_token: Runs):
    expected = "tokens.sampling_logprob is unknown: the training loop did not pass it to the recorder"
    with pytest.warns(UserWarning, match=f"engine_mismatch: no rows: {expected}"):
        one_uncertain_token.query("engine_mismatch")
