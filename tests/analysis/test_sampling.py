"""Test the choice of stored tokens, and statistics of sampled traces.

Statistics of a sampled trace must estimate those of the full one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from entrace import open_runs
from entrace.analysis import figures, queries
from entrace.analysis.claims import judge
from entrace.analysis.runs import Runs
from entrace.analysis.trace import InputError, TraceWriter, read_manifest, write_manifest
from entrace.analysis.trace.prune import prune
from entrace.analysis.trace.sampling import TokenSampling, response_draws
from tests.analysis.conftest import BOUNDARY, VOCAB, step_row
from tests.analysis.synthetic import write_run
from tests.slow import slow_after

# Value with the interval low to high, by question about tokens, and the columns that identify a row.
VALUES = {
    "category_shares": "share",
    "entropy_by_position": "entropy",
    "u_shape": "excess",
    "high_entropy_by_position": "share",
    "high_entropy_by_ppl": "share",
    "high_entropy_words": "share",
    "word_changes": "change",
    "movement_by_category": "dp",
    "movement_by_entropy": "dp",
    "movement_distribution": "share",
    "movement_concentration": "share",
    "potential_by_position": "movement",
}
KEYS = {
    *("run_id", "step", "stage", "sample_sign", "category", "position_bin", "part"),
    *("ppl_tercile", "text", "word", "entropy_decile", "top", "bin_low"),
}
# Views and macros that read table tokens.
READERS = (
    r"(?:from|join)\s+(?:tokens|response_fifths|staged_tokens|staged_movements|moved_tokens|entropy_thresholds|steps_with|"
    r"entropy_changes|entropy_predictions|law_sums_by_prompt|entropy_law_sums|update_predictions|fifths_by_prompt)"
)


def splitmix(state: int) -> int:
    """Return the first output of SplitMix64, with Python's integers."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_draws_are_splitmix64_of_seed_step_and_id():
    assert splitmix(0) == 0xE220A8397B1DCDAF, "published first output for seed 0"
    found = response_draws(3, np.array([1, 1, 70]), np.array([0, 1, 123_456]))
    for draw, step, rollout_id in zip(found, (1, 1, 70), (0, 1, 123_456), strict=True):
        state = 0
        for value in (3, step, rollout_id):
            state = splitmix((state + value) % 2**64)
        assert draw == (state >> 11) * 2.0**-53
    assert response_draws(3, 70, np.array([123_456])) == found[2]


def test_draws_are_uniform_and_unrelated_to_neighbors_and_seeds():
    ids = np.arange(40_000)
    draws = response_draws(0, ids // 100, ids)
    counts = np.histogram(draws, 20, (0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 43.8, "chi-squared with 19 degrees of freedom, p = .001"
    for other in (response_draws(1, ids // 100, ids), response_draws(0, ids // 100 + 1, ids), np.roll(draws, 1)):
        assert abs(np.corrcoef(draws, other)[0, 1]) < 4 / 200


def test_first_last_and_every_kth_step_have_tokens():
    sampling = TokenSampling(steps=4)
    found = [step for step in range(1, 15) if sampling.has_step(step, is_last=step == 14)]
    assert found == [1, 4, 8, 12, 14]


def test_run_json_records_only_what_was_left_out():
    assert TokenSampling().entry() == {}
    sampling = TokenSampling(5, 0.25)
    assert sampling.entry() == {"token_sampling": {"steps": 5, "responses": 0.25}}
    assert TokenSampling.of(sampling.entry()) == sampling
    assert TokenSampling.of({}) == TokenSampling()
    assert sampling.thinned(TokenSampling(2, 0.5)) == TokenSampling(10, 0.25)
    assert str(sampling) == "25% of the responses on one step in 5"


@pytest.mark.parametrize("found", [{"steps": 0}, {"responses": 0}, {"responses": 1.5}, {"steps": "2"}])
def test_a_sampling_out_of_range_is_refused(tmp_path: Path, found: dict[str, object]):
    TraceWriter.create(tmp_path / "run", {"run_id": "r"}, VOCAB)
    write_manifest(tmp_path / "run", {**read_manifest(tmp_path / "run"), "token_sampling": found})
    with pytest.raises(InputError, match=r"run/run.json: token_sampling is .*, expected steps of at least 1"):
        open_runs(tmp_path / "run")


def write_falling(folder: Path) -> Path:
    """Write 24 steps with four responses of two tokens.

    Entropy falls with the step in tokens of all responses.
    """
    writer = TraceWriter.create(folder, {"run_id": "r", "arm": "none", "seed": 0, "total_steps": 24}, VOCAB)
    for step in range(1, 25):
        done = min(step, BOUNDARY) / BOUNDARY
        writer.append("steps", step_row(step, entropy=2 - 1.5 * done, accuracy=0.25 + 0.5 * done))
        ids = 4 * step + np.arange(4)
        sign = np.array([1.0, -1.0, 1.0, -1.0])
        common = {"step": step, "is_correct": sign > 0, "is_kept": True, "response_length": 2}
        writer.append(
            "rollouts",
            {
                **common,
                "rollout_id": ids,
                "prompt_id": ["a", "a", "b", "b"],
                "group_id": ids // 2,
                "sample_index": [0, 1, 0, 1],
                "advantage": sign,
                "completion": "so",
                "defects": [[]] * 4,
                "temperature": 1.0,
                "entropy_kind": "exact",
            },
        )
        writer.append(
            "tokens",
            {
                **{name: np.repeat(value, 2) if name == "is_correct" else value for name, value in common.items()},
                "rollout_id": np.repeat(ids, 2),
                "prompt_id": np.repeat(["a", "a", "b", "b"], 2),
                "position": np.tile([0, 1], 4),
                "token_id": 1,
                "logprob": -1.0,
                "entropy": 3 - 0.1 * step,
                "advantage": np.repeat(sign, 2),
                "shaped_advantage": np.repeat(sign, 2),
                "grad_norm": 1.0,
            },
        )
    writer.flush(24)
    writer.finish()
    return folder


def test_a_step_stands_for_the_steps_without_tokens_around_it(tmp_path: Path):
    run = write_falling(tmp_path / "run")
    weights = "select step, stage, step_weight, token_weight from token_steps order by step"
    full = open_runs(run)
    assert full.sql("select distinct step_weight, token_weight from token_steps").rows() == [(1.0, 1.0)]
    assert full.token_share("u_shape") == ""
    levels = full.query("entropy_by_position", bins=1)["entropy"].to_list()
    prune(run, TokenSampling(steps=8))
    runs = open_runs(run)
    # The stages are steps 1 to 10 and 11 to 24.
    assert runs.sql(weights).rows() == [
        (1, "rising", 4.0, 4.0),
        (8, "rising", 6.0, 6.0),
        (16, "plateau", 9.5, 9.5),
        (24, "plateau", 4.5, 4.5),
    ]
    found = runs.query("entropy_by_position", bins=1)["entropy"].to_list()
    # Steps 1 and 8 alone have a mean of 4.5, and 16 and 24 of 20; the stages have 5.5 and 17.5.
    assert levels == pytest.approx([3 - 0.55, 3 - 0.55, 3 - 1.75, 3 - 1.75], abs=1e-6)
    assert found == pytest.approx([3 - 0.52, 3 - 0.52, 3 - 1.857, 3 - 1.857], abs=1e-3)


def test_steps_with_fewer_stored_responses_count_alike(tmp_path: Path):
    """The first half of the run is pruned to fewer responses than the second."""
    run = write_falling(tmp_path / "run")
    part = next((run / "tokens").glob("*.parquet"))
    tokens = pl.read_parquet(part)
    ids = tokens["rollout_id"] % 4
    writer = TraceWriter.resume(run, 24)
    shutil.rmtree(run / "tokens")
    writer.manifest["files"].pop("tokens")
    kept = tokens.filter((tokens["step"] > 12) | (ids < 2))
    writer.append(
        "tokens", {name: kept[name].to_arrow() for name in kept.columns if name not in ("category", "run_id")}
    )
    writer.flush(24)
    writer.finish()
    runs = open_runs(run)
    assert runs.sql("select distinct step > 12, token_weight from token_steps order by all").rows() == [
        (False, 2.0),
        (True, 1.0),
    ]
    plateau = runs.query("entropy_by_position", bins=1, stage="plateau")
    assert plateau["entropy"].to_list() == pytest.approx([3 - 1.75] * 2, abs=1e-6)
    assert runs.token_share("entropy_by_position") == "tokens of 75% of the responses are stored, on 24 of 24 steps"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("full") / "run")


@pytest.fixture(scope="module", params=slow_after(1, [(3, 0.25), (1, 0.25), (7, 0.5)]), ids=str)
def sampled(request: pytest.FixtureRequest, full: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("sampled") / "run"
    shutil.copytree(full, folder)
    prune(folder, TokenSampling(*request.param))
    return open_runs(folder)


@pytest.mark.parametrize("stem", VALUES)
def test_estimates_agree_with_the_full_trace_and_their_intervals_widen(full: Path, sampled: Runs, stem: str):
    value, frame = VALUES[stem], open_runs(full).query(stem)
    keys = [name for name in KEYS if name in frame.columns]
    both = sampled.query(stem).join(frame, on=keys, suffix="_full").drop_nulls(["low", "low_full"])
    half = ((both["high"] - both["low"]) / 2).to_numpy()
    half_of_full = ((both["high_full"] - both["low_full"]) / 2).to_numpy()
    error = (both[value] - both[f"{value}_full"]).to_numpy()
    is_known = half_of_full > 0
    assert np.mean(np.abs(error) <= half) >= 0.95
    assert abs(np.mean((error / half)[is_known])) < 0.25
    assert np.median((half / half_of_full)[is_known]) > 1.1


def test_verdicts_on_tokens_widen_and_state_the_share(full: Path, sampled: Runs):
    share = sampled.token_share("u_shape")
    verdicts = {(v.claim, v.part): v for v in judge(sampled)}
    stating = {key for key, verdict in verdicts.items() if share in verdict.why}
    assert {claim for claim, _ in stating} == {"S3", "S5", "S6", "I1", "T1", "T3", "E2", "E3", "E4"}
    assert ("I1", "accuracy") not in stating
    widths = []
    for before in judge(open_runs(full)):
        after = verdicts[before.claim, before.part]
        assert share not in before.why
        if (before.claim, before.part) not in stating:
            assert (after.effect, after.low, after.high) == (before.effect, before.low, before.high)
            continue
        assert before.effect is not None
        assert before.low is not None
        assert before.high is not None
        assert after.low is not None
        assert after.high is not None
        assert after.low <= before.effect <= after.high, (before.claim, before.part)
        widths.append((after.high - after.low) / (before.high - before.low))
    # An interval is itself an estimate.
    assert min(widths) > 0.8
    assert np.median(widths) > 1.3


def reads_tokens(stem: str) -> bool:
    return any(need.table == "tokens" for need in queries.BUILT_IN.needs(stem))


def test_captions_and_notes_state_what_is_stored(full: Path, sampled: Runs):
    runs, share = open_runs(full), sampled.token_share("u_shape")
    assert share.startswith("tokens of ")
    for stem in figures.STEMS:
        before, after = figures.caption(runs, stem), figures.caption(sampled, stem)
        assert after == (f"{before.rstrip('.')}. Sampled: {share}." if reads_tokens(stem) else before)
    assert runs.notes == {}
    assert sampled.notes["run"].startswith("tokens are stored for ")


@pytest.mark.parametrize("stem", queries.BUILT_IN.paths)
def test_questions_that_read_tokens_say_so(stem: str):
    """``token_share`` relies on the header."""
    reads = pl.Series([queries.BUILT_IN.read(stem)]).str.contains(f"(?i){READERS}").item()
    assert reads == reads_tokens(stem)
