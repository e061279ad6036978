"""Test the derivation of rows against a loop over responses and tokens."""

import math

import numpy as np
import pyarrow as pa
import pytest

from entrace.analysis.trace import find_defects
from entrace.analysis.trace.groups import mean_of, shared_by
from entrace.analysis.trace.rows import ResponseRows, nullable

SIZE = 40


@pytest.fixture(params=range(3))
def rng(request):
    return np.random.default_rng(request.param)


@pytest.fixture
def responses(rng):
    """Return responses in interleaved groups; some are empty or not judged."""
    return ResponseRows(
        step=7,
        rollout_ids=100 + np.arange(SIZE),
        groups=rng.choice([1, 2, 5, 9], SIZE),
        prompt_ids=[f"prompt {n}" for n in rng.integers(0, 3, SIZE)],
        lengths=rng.integers(0, 12, SIZE),
        is_correct=rng.choice([True, False, None], SIZE).tolist(),
        is_kept=rng.random(SIZE) < 0.5,
    )


def rows_of(columns):
    """Return columns as one dictionary per row; a scalar applies to all rows."""
    size = max(len(values) for values in columns.values() if not isinstance(values, int))
    lists = {
        name: [values] * size if isinstance(values, int) else pa.array(values).to_pylist()
        for name, values in columns.items()
    }
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def test_responses_equal_the_loop(responses, rng):
    prompts = [f"What is {n} plus 3?" for n in range(SIZE)]
    completions = ["no no no no no no", "the answer is 5", "3 + 2 = 5", ""] * (SIZE // 4)
    has_answer, is_truncated = (rng.choice([True, False, None], SIZE).tolist() for _ in range(2))
    first, count, expected = {}, {}, []
    for n in range(SIZE):
        group = responses.groups[n]
        first.setdefault(group, 100 + n)
        count[group] = count.get(group, -1) + 1
        expected.append(
            {
                "step": 7,
                "prompt_id": responses.prompt_ids[n],
                "rollout_id": 100 + n,
                "group_id": first[group],
                "sample_index": count[group],
                "completion": completions[n],
                "is_correct": responses.is_correct[n],
                "has_answer": has_answer[n],
                "defects": find_defects(
                    prompts[n], completions[n], has_answer=has_answer[n], is_truncated=is_truncated[n]
                ),
                "response_length": responses.lengths[n],
                "is_truncated": is_truncated[n],
                "is_kept": responses.is_kept[n],
            }
        )
    found = responses.rollout_columns(prompts, completions, has_answer=has_answer, is_truncated=is_truncated)
    assert rows_of(found) == expected
    assert {"repetition", "format_violation"} <= {defect for row in expected for defect in row["defects"]}


def test_tokens_equal_the_loop(responses, rng):
    """Only some responses have stored tokens."""
    stored = np.flatnonzero(rng.random(SIZE) < 0.5)
    expected = [
        {
            "step": 7,
            "prompt_id": responses.prompt_ids[n],
            "rollout_id": 100 + n,
            "position": position,
            "response_length": responses.lengths[n],
            "is_correct": responses.is_correct[n],
            "is_kept": responses.is_kept[n],
        }
        for n in stored
        for position in range(responses.lengths[n])
    ]
    assert rows_of(responses.token_columns(np.repeat(stored, responses.lengths[stored]))) == expected


def z_of(values):
    """Return the standardized values of a group by their definition."""
    q1, q3 = np.quantile(values, [0.25, 0.75])
    inside = [value for value in values if q1 - 1.5 * (q3 - q1) <= value <= q3 + 1.5 * (q3 - q1)]
    mean = math.fsum(inside) / len(inside)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in inside) / len(inside))
    return [(value - mean) / (std if std >= 1e-6 else 1) for value in values]


def test_means_equal_the_loop(responses, rng):
    """Unknown means, an overflowing perplexity, and lengths without context are null."""
    entropy, surprisal = rng.random(SIZE), rng.random(SIZE) * 3
    entropy[::5], surprisal[::7], surprisal[3] = np.nan, np.nan, 100
    generated = np.maximum(responses.lengths - rng.integers(0, 2, SIZE), 0)
    z = {}
    for group in set(responses.groups):
        known = [n for n in range(SIZE) if responses.groups[n] == group and not math.isnan(surprisal[n])]
        z |= dict(zip(known, z_of(surprisal[known]), strict=True))
    found = rows_of(responses.generated_columns(generated, entropy, surprisal, ~np.isnan(surprisal)))
    for n, row in enumerate(found):
        is_unknown = math.isnan(surprisal[n])
        assert row["generated_length"] == (None if generated[n] == responses.lengths[n] else generated[n])
        assert row["entropy_mean"] == (None if math.isnan(entropy[n]) else entropy[n])
        assert row["surprisal_mean"] == (None if is_unknown else surprisal[n])
        assert row["ppl"] == (None if is_unknown or surprisal[n] > 88 else pytest.approx(math.exp(surprisal[n])))
        assert row["ppl_z"] == (None if is_unknown else pytest.approx(z[n], abs=1e-9))


def test_values_of_tokens_reduce_like_the_loop(rng):
    """A mean or shared value is unknown if one of its values is, or if there is none."""
    rows = np.sort(rng.integers(0, SIZE, SIZE))
    values = rng.choice([1.0, 2.0, np.nan], len(rows), p=[0.8, 0.1, 0.1])
    for n, (mean, shared) in enumerate(zip(mean_of(values, rows, SIZE), shared_by(values, rows, SIZE), strict=True)):
        own = [value for value, row in zip(values, rows, strict=True) if row == n]
        is_known = own and not any(map(math.isnan, own))
        assert mean == pytest.approx(sum(own) / len(own) if is_known else math.nan, nan_ok=True)
        assert shared == pytest.approx(own[0] if is_known and len(set(own)) == 1 else math.nan, nan_ok=True)


def test_no_response_gives_no_row():
    none = np.empty(0, np.int64)
    rows = ResponseRows(
        step=1, rollout_ids=none, groups=none, prompt_ids=[], lengths=none, is_correct=[], is_kept=none > 0
    )
    for columns in (rows.rollout_columns([], [], has_answer=[], is_truncated=[]), rows.token_columns(none)):
        assert all(len(values) == 0 for name, values in columns.items() if name != "step")


def test_nan_becomes_null():
    assert nullable(np.array([0.5, np.nan, -0.0])).to_pylist() == [0.5, None, 0.0]
