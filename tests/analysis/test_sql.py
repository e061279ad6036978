"""Every shipped query on a trace whose answers are computed by hand."""

from __future__ import annotations

import pytest

from analysis import queries
from analysis.claims import load_ledger
from analysis.figures import MODULES
from analysis.runs import Runs, open_runs

SE = 1.96

# stem -> (params, columns, rows)
EXPECTED = {
    "stage_dynamics": (
        {"stage": "plateau"},
        ["step", "stage", "entropy_token_mean", "entropy_fit", "accuracy", "accuracy_fit", "boundary_step"],
        [(step, "plateau", 0.5, 0.5, 0.75, 0.75, 10) for step in range(11, 25)],
    ),
    # Step 1, negative: sums 8 and 4 over 2 and 2 tokens: mean 3, residuals +2 and -2, se = sqrt(2 * 8) / 4 = 1.
    "entropy_by_sample_sign": (
        {"stage": "rising"},
        ["step", "sample_sign", "window", "entropy", "low", "high", "num_tokens", "num_prompts", "token_share"],
        [
            (1, "negative", "start", 3, 3 - SE, 3 + SE, 4, 2, 0.5),
            (1, "positive", "start", 1.5, 1.5 - SE / 2, 1.5 + SE / 2, 4, 2, 0.5),
            (10, "negative", "end", 1, None, None, 2, 1, 0.5),
            (10, "positive", "end", 1, None, None, 2, 1, 0.5),
        ],
    ),
    "defects_over_steps": (
        {"stage": "rising"},
        ["step", "defect", "share", "low", "high", "num_responses"],
        [
            (1, "any", 0.5, 0.5, 0.5, 4),
            (1, "format_violation", 0.5, 0.5, 0.5, 4),
            (1, "irrelevant", 0, 0, 0, 4),
            (1, "repetition", 0, 0, 0, 4),
            # One of a prompt's two responses: residuals +-1/2, se = sqrt(2 * 1/2) / 4 = 1/4.
            (1, "truncated", 0.25, 0, 0.25 + SE / 4, 4),
            *[(10, name, 0, None, None, 2) for name in ("any", "format_violation", "irrelevant")],
            *[(10, name, 0, None, None, 2) for name in ("repetition", "truncated")],
        ],
    ),
    # Prompt a is right at low ppl, prompt b at high ppl in both stages; a is there once more at step 10.
    "correctness_by_ppl": (
        {"bins": 2},
        ["stage", "ppl_bin", "accuracy", "num_responses", "num_prompts"],
        [
            ("rising", 1, 2 / 3, 3, 2),
            ("rising", 2, 1 / 3, 3, 2),
            ("plateau", 1, 0.5, 2, 2),
            ("plateau", 2, 0.5, 2, 2),
        ],
    ),
    "entropy_by_position": (
        {"stage": "plateau", "bins": 5},
        ["sample_sign", "position_bin", "position_mid", "entropy", "num_tokens", "num_prompts"],
        [
            ("negative", 0, 0.1, 1.5, 2, 2),
            ("negative", 1, 0.3, 1, 2, 2),
            ("negative", 2, 0.5, 1, 2, 2),
            ("negative", 3, 0.7, 1, 2, 2),
            ("negative", 4, 0.9, 0.75, 2, 2),
            ("positive", 0, 0.1, 0.75, 2, 2),
            ("positive", 1, 0.3, 0.5, 2, 2),
            ("positive", 2, 0.5, 0.5, 2, 2),
            ("positive", 3, 0.7, 0.5, 2, 2),
            ("positive", 4, 0.9, 0.75, 2, 2),
        ],
    ),
    # Two prompts with values 0.5 and 0, 1 and 0.5: se of a mean of two = half their distance.
    "ablation_curves": (
        {},
        ["arm", "seed", "step", "avg_at_k", "low", "high", "response_length", "entropy", "k", "num_prompts"],
        [
            ("none", 0, 0, 0.25, 0, 0.25 + SE / 4, 5, 0.5, 2, 2),
            ("none", 0, 24, 0.75, 0.75 - SE / 4, 1, 5, 0.5, 2, 2),
        ],
    ),
    # maj: h1 is unanimous; h2 ties between a wrong and a right answer.
    "ablation_final": (
        {"k": 2},
        ["arm", "step", "metric", "value", "low", "high", "k", "num_prompts"],
        [
            ("none", 24, "avg_at_k", 0.75, 0.75 - SE / 4, 1, 2, 2),
            ("none", 24, "entropy", 0.5, 0.5, 0.5, 2, 2),
            ("none", 24, "maj_at_k", 0.75, 0.75 - SE / 4, 1, 2, 2),
            ("none", 24, "pass_at_k", 1, 1, 1, 2, 2),
            ("none", 24, "response_length", 5, 5, 5, 2, 2),
        ],
    ),
    "window_sums": (
        {},
        ["prompt_id", "window", "sample_sign", "entropy_sum", "num_tokens", "num_responses", "num_defective"],
        [
            ("a", "end", "negative", 2, 2, 1, 0),
            ("a", "end", "positive", 2, 2, 1, 0),
            ("a", "start", "negative", 8, 2, 1, 1),
            ("a", "start", "positive", 4, 2, 1, 0),
            ("b", "start", "negative", 4, 2, 1, 1),
            ("b", "start", "positive", 2, 2, 1, 0),
        ],
    ),
    "ppl_halves": ({}, ["prompt_id", "difference_sum", "num_groups"], [("a", 1, 1), ("b", -1, 1)]),
    "position_fifths": (
        {},
        ["prompt_id", "first_sum", "middle_sum", "last_sum", "num_responses"],
        [("a", 3, 1.5, 1.5, 2), ("b", 1.5, 1.5, 1.5, 2)],
    ),
    "eval_sums": (
        {"k": 1},
        ["step", "prompt_id", "avg_at_k", "response_length"],
        [(0, "held/h1", 1, 4), (0, "held/h2", 0, 4), (24, "held/h1", 1, 4), (24, "held/h2", 0, 4)],
    ),
    # The first token of each response is a digit; the last 10 of 24 steps hold step 20 only.
    "formal_sums": (
        {},
        ["prompt_id", "num_tokens", "num_formal"],
        [("a", 10, 2), ("b", 10, 2), ("c", 10, 2)],
    ),
}


@pytest.mark.parametrize("stem", queries.paths())
def test_query_gives_the_rows_computed_by_hand(tiny: Runs, stem: str):
    params, columns, rows = EXPECTED[stem]
    found = tiny.query(stem, **params).select(columns).rows()
    assert [tuple(row) for row in found] == [
        tuple(pytest.approx(value, abs=1e-6) if isinstance(value, int | float) else value for value in row)
        for row in rows
    ]


@pytest.mark.parametrize("stem", queries.paths())
def test_query_says_what_it_answers(stem: str):
    text = queries.read(stem)
    headers = queries.headers(text)
    assert tuple(headers) == queries.HEADERS
    claims = headers["question"].partition(". ")[0].split(", ")
    assert set(claims) <= set(load_ledger())
    for name in ("$runs", *EXPECTED[stem][0]):
        assert name.lstrip("$") in headers["params"]
    assert text.rstrip().endswith("select * from final")


def test_each_question_has_query_figure_and_claim():
    questions = {stem for stem, path in queries.paths().items() if path.parent.name != "cluster"}
    assert questions == set(MODULES)
    for claim in load_ledger().values():
        assert claim["sql"] in questions
        assert claim["figure"] in questions


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
