"""Test weights of recorded tokens, and the command.

Expected weights come from plain GRPO, a loop over tokens, and cases worked out by hand.
"""

import json
import math
import shutil

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from entrace.analysis.atlas import Trace, correlations_frame, describe, read_steps
from entrace.analysis.runs import open_runs
from entrace.analysis.trace import InputError
from entrace.analysis.trace.verify import accept_edits
from entrace.trainer.algorithm.advantages import group_relative_advantage
from entrace.trainer.atlas import RecordedStep, Weigher, find_methods
from entrace.trainer.cli.atlas import record_step, weigh_run
from entrace.trainer.config import load_config
from entrace.trainer.train import train
from tests.analysis.conftest import write_failed

from .conftest import SHORT

RATIO = {"gspo", "no_clip_higher", "clip_cov", "kl_cov", "ce_gppo", "cispo", "dcpo", "erc"}
STEMS = ("entropy", "position", "sign", "category", "correlations")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a trace of three steps with several updates each.

    The last step has values after the update.
    """
    folder = tmp_path_factory.mktemp("atlas") / "run"
    more = ["steps=3", "record.after_update_every=3", "optim.mini_batches=3", "optim.lr=1e-3", "optim.warmup_steps=0"]
    train(load_config("tiny", [*SHORT, *more]), folder, {})
    return folder


@pytest.fixture(scope="module")
def steps(run):
    """Return recorded steps, and each method's weights at ratio 1 and after updates."""
    opened = open_runs(run)
    weigher = Weigher(find_methods())
    recorded = [record_step(*parts, has_entropy=True) for parts in read_steps(opened, Trace.of(opened))]
    return [(step, *weigher.weigh(step)) for step in recorded]


def in_update(step):
    return step.is_kept[step.row]


def test_plain_weights_are_the_advantages_over_their_mean(steps):
    for step, sampled, _ in steps:
        kept = in_update(step)
        found, advantage = sampled["none"][kept], step.advantage[kept]
        np.testing.assert_allclose(found / np.abs(found).mean(), advantage / np.abs(advantage).mean(), rtol=1e-12)
        assert not sampled["none"][~kept].any()
        assert kept.any()


def test_methods_change_nothing_or_drop_what_they_say(steps):
    for step, sampled, _ in steps:
        assert np.array_equal(sampled["released_noop"], sampled["none"])
        right, kept = step.is_correct[step.row], in_update(step)
        assert not sampled["nsr"][right].any()
        assert (sampled["nsr"][kept & ~right] < 0).all()
        assert not sampled["psr"][~right].any()


def test_weights_after_the_update_equal_a_loop(steps):
    step, _, after = steps[-1]
    assert all(not weights for _, _, weights in steps[:-1])
    count, known = int(in_update(step).sum()), in_update(step) & np.isfinite(step.log_ratio)
    assert known.sum() > 100
    for i in np.flatnonzero(known):
        a, rho = step.advantage[i], math.exp(step.log_ratio[i])
        is_cut = (rho > 1.28 and a > 0) or (rho < 0.8 and a < 0)
        assert after["none"][i] * count == pytest.approx(0 if is_cut else rho * a, rel=1e-6, abs=1e-9)
        assert after["cispo"][i] * count == pytest.approx(min(rho, 5) * a, rel=1e-6, abs=1e-9)
        is_cut |= not 0.95 < (step.entropy_after[i] + 1e-8) / (step.entropy[i] + 1e-8) < 1.05
        assert after["erc"][i] * count == pytest.approx(0 if is_cut else rho * a, rel=1e-6, abs=1e-9)
    assert np.isnan(after["none"][~np.isfinite(step.log_ratio)]).all()


def hand():
    """Return responses of two and three tokens, entropies .1, .9, .5, .4, .8."""
    nothing = np.full(5, np.nan)
    return RecordedStep(
        step=1,
        row=np.array([0, 0, 1, 1, 1]),
        group_ids=np.array([0, 0]),
        is_correct=np.array([True, False]),
        is_kept=np.array([True, True]),
        rewards=np.array([1.0, 0.0]),
        advantage=np.array([2.0, 2.0, -1.0, -1.0, -1.0]),
        logprob=np.log([0.9, 0.5, 0.6, 0.7, 0.25]),
        entropy=np.array([0.1, 0.9, 0.5, 0.4, 0.8]),
        log_ratio=nothing,
        entropy_after=nothing,
    )


def test_weights_are_those_worked_out_by_hand():
    values = {"loss": {"entropy_mask": {"top_frac": 0.4}}, "shaping": {"reweighting": {"alpha": 0.5}}}
    sampled, after = Weigher(find_methods([], values)).weigh(hand())
    # Two of five tokens, .9 and .8, and a mean over these two.
    assert sampled["entropy_mask"] == pytest.approx([0, 1, 0, 0, -0.5])
    # A (.5 p + .5) / 5.
    assert sampled["reweighting"] == pytest.approx([0.38, 0.3, -0.16, -0.17, -0.125])
    # A mean per response: 2 / (2 x 2) and -1 / (2 x 3).
    assert sampled["no_token_mean"] == pytest.approx([0.5, 0.5, -1 / 6, -1 / 6, -1 / 6])
    # Rewards 1 and 0 less their mean, over two responses of at most 64 tokens.
    assert sampled["dr_grpo"] == pytest.approx(np.array([0.5, 0.5, -0.5, -0.5, -0.5]) / 128)
    assert sampled["lopti"] == pytest.approx(sampled["none"])
    assert after == {}


def test_entropies_that_were_not_recorded_leave_out_the_methods_that_read_them():
    weigher = Weigher(find_methods())
    sampled, _ = weigher.weigh(RecordedStep(**{**vars(hand()), "entropy": None}))
    left_out = {method.name for method in weigher.methods if "tokens.entropy" in method.lacks}
    assert left_out == {"entropy_advantage", "entropy_mask", "steer", "erc"}
    assert not left_out & sampled.keys()


@pytest.mark.parametrize("normalize_std", [True, False])
def test_recorded_advantages_need_not_be_normalized(normalize_std):
    """A run with ``loss.normalize_std = false`` records centered rewards.

    Plain GRPO divides them by the standard deviation, and dr_grpo does not.
    """
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.25], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1])
    normalized, centered = (
        group_relative_advantage(rewards, groups, normalize_std=choice).numpy() for choice in (True, False)
    )
    row = np.array([0, 1, 1, 2, 3])
    responses = {"group_ids": groups.numpy(), "is_kept": np.ones(4, bool), "is_correct": np.array([True, False] * 2)}
    recorded = {**vars(hand()), **responses, "row": row, "rewards": rewards.numpy()}
    recorded["advantage"] = (normalized if normalize_std else centered)[row].astype(np.float32)
    weigher = Weigher(find_methods())
    sampled, _ = weigher.weigh(RecordedStep(**recorded))
    assert sampled["none"] == pytest.approx(normalized[row] / 5, rel=1e-6)
    assert sampled["dr_grpo"] == pytest.approx(centered[row] / 4 / 64, rel=1e-6)


def test_methods_that_rank_responses_are_left_out_where_some_are_not_stored():
    step = RecordedStep(
        **{
            **vars(hand()),
            "group_ids": np.array([0, 0, 0]),
            "is_correct": np.array([True, False, False]),
            "is_kept": np.ones(3, bool),
            "rewards": np.array([1.0, 0.0, 0.0]),
        }
    )
    weigher = Weigher(find_methods())
    sampled, _ = weigher.weigh(step)
    left_out = {method.name for method in weigher.methods if "only some responses are stored" in method.lacks}
    assert {"ppl", "ppl_permuted", "low_ppl_only", "high_ppl_only", "unlikeliness"} <= left_out
    assert not left_out & sampled.keys()
    assert {"position", "entropy_mask", "pass_at_k", "quantile_advantage", "reweighting"} <= sampled.keys()


def test_equal_methods_are_found_and_sums_equal_polars(run, steps):
    opened = open_runs(run)
    methods, tally = weigh_run(opened, Trace.of(opened), find_methods())
    described = {method.name: method for method in describe(methods, tally)}
    assert described["scale_matched"].equals == ["none", "released_noop"]
    assert described["released_noop"].does_nothing
    assert not described["scale_matched"].does_nothing
    assert described["psr"].equals == described["ppl"].equals == []
    rows = []
    for step, sampled, _ in steps:
        kept = in_update(step)
        weight = sampled["steer"][kept] / np.abs(sampled["steer"][kept]).mean()
        rows.append(pl.DataFrame({"w": weight, "a": step.advantage[kept], "plain": sampled["none"][kept]}))
    frame = pl.concat(rows)
    wanted = [frame.filter(pl.col("a").sign() == sign)["w"].abs().sum() for sign in (-1, 0, 1)]
    assert tally.sums["sampled"]["sign"][1, tally.names.index("steer")] == pytest.approx(wanted)
    rho = [part.select(pl.corr("w", "plain", method="spearman")).item() * part.height for part in rows]
    found = correlations_frame(methods, tally).filter(method="steer", other="none")
    assert found["spearman"][0] == pytest.approx(sum(rho) / frame.height)


def test_command_writes_a_page_and_tables(run, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "atlas_methods.py").write_text(
        "def halved(advantages, rollouts, factor: float = 0.5):\n    return advantages * factor\n"
    )
    out = tmp_path / "out"
    arguments = ["atlas", run, "--out", out, "--method", "atlas_methods:halved", "--json"]
    status, output, _ = call(*arguments)
    assert status == 0
    methods = json.loads(output)["methods"]
    remarks = {(row["name"], row["at"]): row["remark"] for row in methods}
    assert remarks["atlas_methods:halved", "sampled"].startswith("equal up to a constant to none")
    assert {row["name"] for row in methods if row["at"] == "after"} == {"none", *RATIO}
    lacking = {row["name"] for row in methods if row["lacks"]}
    assert lacking == {"no_dynamic_sampling", "no_overlong_penalty", "adaptive_entropy"}
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    pictures = {f"{stem}.{form}" for stem in STEMS for form in ("png", "pdf")}
    assert files.keys() == {"atlas.html", "methods.csv", "weights.csv", "correlations.csv", *pictures}
    assert files["atlas.html"].count(b"<img ") == len(STEMS)
    for part in pl.read_csv(out / "weights.csv").filter(method="nsr").partition_by("dimension"):
        assert part["weight_share"].sum() == pytest.approx(1, abs=1e-4)


def test_the_atlas_of_a_sampled_trace_says_so(run, call, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    call("prune", tmp_path / "run", "--token-responses", "0.25")
    status, output, _ = call("atlas", tmp_path / "run", "--out", tmp_path / "out", "--json")
    assert status == 0
    page = (tmp_path / "out/atlas.html").read_text()
    assert "Note: tokens are stored for 25% of the responses on every step." in page
    lacks = {row["name"]: row["lacks"] for row in json.loads(output)["methods"]}
    assert lacks["low_ppl_only"] == "compares the tokens of whole groups, of which only some responses are stored"
    assert not lacks["steer"]


def changed(run, folder, change):
    """Return a copy of the run whose tokens were edited."""
    shutil.copytree(run, folder)
    for path in (folder / "tokens").glob("*.parquet"):
        found = pq.read_table(path)
        pq.write_table(change(pl.DataFrame(found)).to_arrow().cast(found.schema), path)
    accept_edits(folder)
    return folder


def test_a_trace_without_what_every_method_needs_is_refused(run, tmp_path):
    write_failed(tmp_path / "early")
    folder = changed(run, tmp_path / "run", lambda frame: frame.with_columns(advantage=pl.lit(None)))
    for path, message in (
        (tmp_path / "early", "early: no tokens are stored, and every method needs them; see record.token_steps"),
        (folder, "run: tokens.advantage has no values, which every method needs"),
    ):
        with pytest.raises(InputError, match=message):
            Trace.of(open_runs(path))


def test_a_trace_without_values_after_the_update_names_setting_and_methods(run, tmp_path, capsys):
    opened = open_runs(changed(run, tmp_path / "run", lambda frame: frame.with_columns(logprob_after=pl.lit(None))))
    described, tally = weigh_run(opened, Trace.of(opened), find_methods())
    [line] = [line for line in capsys.readouterr().err.splitlines() if "record.after_update_every" in line]
    assert all(name in line for name in RATIO)
    assert {method.name for method in described if "logprob_after" in method.lacks} == RATIO
    assert tally.tokens["after"] == 0


def test_bad_input_is_refused_in_one_line(run, call, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note.txt").write_text("mine")
    shutil.copytree(run, tmp_path / "study" / "run")
    shutil.copytree(run, tmp_path / "study" / "b")
    manifest = tmp_path / "study" / "b" / "run.json"
    manifest.write_text(manifest.read_text().replace('"run_id": "run"', '"run_id": "b"'))
    accept_edits(manifest.parent)
    out = ["--out", tmp_path / "out"]
    for arguments, message in (
        ([run, "--out", tmp_path / "other"], "holds files other than an atlas; choose a new or an empty folder"),
        ([run, "shaping.method=ppl", *out], "shaping.method: the atlas weighs every method"),
        ([run, "--method", "no_such:thing", *out], "no module"),
        ([run, "loss.entropy_mask.top=1", *out], "loss.entropy_mask"),
        ([tmp_path / "study", *out], "expected one run, found 2"),
    ):
        status, _, errors = call("atlas", *arguments)
        assert status == 2
        assert message in errors.splitlines()[-1]
        assert "Traceback" not in errors
