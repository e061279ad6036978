import json
import shutil
from dataclasses import replace

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from entrace import open_runs
from entrace.analysis.trace import SCHEMA_VERSION, TABLES, InputError, TraceWriter, read_manifest
from entrace.analysis.trace.digests import DIGESTS
from entrace.analysis.trace.schema import VERSION_KEY
from entrace.trainer.config import build_config, load_config
from entrace.trainer.interventions import intervene as intervene_module
from entrace.trainer.interventions.candidates import STRATA, load_candidates, ntile, order_candidates
from entrace.trainer.interventions.intervene import (
    Intervener,
    Settings,
    draw_alternatives,
    intervene,
    resolve_checkpoint,
)
from entrace.trainer.model.policy import Policy
from entrace.trainer.runs.checkpoint import find_checkpoint
from entrace.trainer.seeding import Stream, generator
from entrace.trainer.train import train

from .conftest import SMALL

SETTINGS = Settings(checkpoint_step=4, continuations=2)
BUDGET = 2000


def read(run_dir, table="interventions"):
    return pl.read_parquet(run_dir / table / "*.parquet")


def rewrite(path, rows, version=SCHEMA_VERSION):
    """Replace the rows of a file, which another trainer may have written."""
    pq.write_table(rows.to_arrow().replace_schema_metadata({VERSION_KEY: str(version)}), path)
    (path.parents[1] / DIGESTS).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a run with checkpoints of steps 2 and 4, for tests to copy."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(load_config("tiny", SMALL), out, {})
    return out


@pytest.fixture(scope="module")
def run_dir(trained, tmp_path_factory):
    """Return a copy of the run with interventions."""
    out = shutil.copytree(trained, tmp_path_factory.mktemp("runs") / "intervened")
    intervene(out, SETTINGS, BUDGET)
    return out


@pytest.fixture(scope="module")
def tokens(trained):
    return load_candidates(trained, 4)


@pytest.fixture(scope="module")
def intervener(trained, tokens):
    config = build_config(read_manifest(trained)["config"], "run")
    return Intervener(config, find_checkpoint(trained, 4), tokens, SETTINGS)


def test_rows_describe_tokens_as_recorded(run_dir):
    rows = read(run_dir)
    assert pl.from_arrow(TABLES["interventions"].arrow_schema.empty_table()).schema == rows.schema
    assert len(rows) == len(rows.unique(["rollout_id", "position"])) > 20
    recorded = read(run_dir, "tokens").join(
        read(run_dir, "rollouts").select("rollout_id", "ppl", "is_kept"), on="rollout_id"
    )
    found = rows.join(recorded, on=["step", "prompt_id", "rollout_id", "position"], how="left", suffix="_recorded")
    assert found["is_kept"].all()
    for name in ("response_length", "token_id", "category", "logprob", "entropy", "ppl", "is_correct"):
        assert found[name].equals(found[f"{name}_recorded"], null_equal=False), name
    terciles = duckdb.sql(
        "select rollout_id, ntile(3) over (partition by step, prompt_id order by ppl, rollout_id) as wanted"
        f" from '{run_dir}/rollouts/*.parquet'"
    ).pl()
    compared = rows.join(terciles, on="rollout_id")
    assert compared["ppl_tercile"].to_list() == compared["wanted"].to_list()


def test_impact_is_the_difference_of_two_accuracies(run_dir):
    rows = read(run_dir)
    assert (rows["alternative_id"] != rows["token_id"]).all()
    for name in ("accuracy_original", "accuracy_alternative"):
        assert set(rows[name]) <= {0.0, 0.5, 1.0}
    assert (rows["impact"] == rows["accuracy_original"] - rows["accuracy_alternative"]).all()
    assert rows["impact"].n_unique() > 2
    assert set(rows["num_continuations"]) == {2}
    assert (rows["tokens"] <= 2 * 2 * (64 - rows["position"] - 1)).all()


def test_it_is_a_table_of_the_trace(run_dir):
    found = open_runs(run_dir).sql("select count(*) n, sum(tokens) t, any_value(run_id) r from interventions").row(0)
    rows = read(run_dir)
    assert found == (len(rows), rows["tokens"].sum(), "run")


def test_the_batch_that_reaches_the_budget_is_the_last(run_dir):
    parts = sorted((run_dir / "interventions").glob("*.parquet"))
    spent = [int(pl.read_parquet(part)["tokens"].sum()) for part in parts]
    assert len(parts) > 1
    assert sum(spent[:-1]) < BUDGET <= sum(spent)


def test_a_resumed_series_equals_an_uninterrupted_one(trained, run_dir, tmp_path):
    cut = shutil.copytree(trained, tmp_path / "run")

    def stop(tally):
        if tally.interventions:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        intervene(cut, SETTINGS, BUDGET, stop)
    first = read(cut)
    assert 0 < len(first) < len(read(run_dir))
    tally = intervene(cut, SETTINGS, BUDGET)
    assert tally.num_new == tally.interventions - len(first)
    assert read(cut).equals(read(run_dir))
    assert tally.tokens == read(cut)["tokens"].sum()
    assert tally.mean_abs_impact == pytest.approx(read(cut)["impact"].abs().mean())


def test_a_finished_series_is_left_alone(run_dir, monkeypatch):
    monkeypatch.setattr(Policy, "load", lambda config: pytest.fail("a policy was loaded"))
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.parquet")}
    tally = intervene(run_dir, SETTINGS, BUDGET)
    assert (tally.num_new, tally.interventions) == (0, len(read(run_dir)))
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.parquet")} == before


def test_a_series_ends_where_no_candidate_is_left(trained, tmp_path):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    few = replace(SETTINGS, checkpoint_step=2, entropy=(0.98, 1.0))
    tally = intervene(run_dir, few, 10**6)
    assert tally.is_exhausted
    assert tally.tokens < 10**6
    assert set(read(run_dir)["step"]) <= {1, 2}
    again = intervene(run_dir, few, 10**6)
    assert (again.is_exhausted, again.num_new, again.interventions) == (True, 0, tally.interventions)


def test_other_settings_are_refused_and_another_seed_is_another_series(run_dir, tmp_path):
    with pytest.raises(InputError, match=r"continuations 2, not 4; position \[0.0, 1.0\], not \[0.5, 1.0\]"):
        intervene(run_dir, replace(SETTINGS, continuations=4, position=(0.5, 1.0)), BUDGET)
    copy = shutil.copytree(run_dir, tmp_path / "run")
    intervene(copy, replace(SETTINGS, seed=1), 1)
    assert read(copy).filter(seed=0).equals(read(run_dir))
    assert len(read(copy).filter(seed=1)) > 0


def test_resuming_the_run_keeps_its_interventions(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    TraceWriter.resume(copy, 2)
    assert read(copy).equals(read(run_dir))
    assert read(copy, "tokens")["step"].max() == 2


def test_batching_does_not_change_a_row(intervener, tokens):
    chosen = tokens[::37][:12]
    together = intervener.replace_tokens(chosen)
    alone = [intervener.replace_tokens(chosen[i : i + 1]) for i in range(len(chosen))]
    for name, values in together.items():
        wanted = [one[name] if np.isscalar(one[name]) else one[name][0] for one in alone]
        assert np.broadcast_to(values, len(wanted)).tolist() == wanted, name


def test_the_same_token_has_no_impact(intervener, tokens, monkeypatch):
    """Both sides share their random numbers."""
    monkeypatch.setattr(intervene_module, "draw_alternatives", lambda policy, contexts, originals, *rest: originals)
    rows = intervener.replace_tokens(tokens[5::60][:12])
    assert 0 < rows["accuracy_original"].mean() < 1
    assert (rows["impact"] == 0).all()


def continue_alone(policy, context, numbers):
    """Sample token by token in float64, with a full pass for each token."""
    ids, stop_ids = list(context), policy.stop_ids.tolist()
    for number in numbers:
        logits = policy.model(torch.tensor([ids])).logits[0, -1].double()
        ids.append(int(torch.searchsorted(logits.softmax(-1).cumsum(-1), float(number), right=True)))
        if ids[-1] in stop_ids:
            break
    return ids[len(context) :]


def test_continuations_equal_a_loop_that_samples_one_at_a_time(intervener, tokens):
    chosen = tokens.filter(pl.col("position") == 6)[::9][:3]
    rows = intervener.replace_tokens(chosen)
    for i, row in enumerate(chosen.iter_rows(named=True)):
        prompt = next(p for p in map(intervener.task.train_prompt, range(200)) if p.prompt_id == row["prompt_id"])
        response = tokens.filter(rollout_id=row["rollout_id"])["token_id"].to_list()
        encoded = intervener.policy.encode_prompt(prompt.text)
        generated = 0
        for side, token in (("original", row["token_id"]), ("alternative", rows["alternative_id"][i])):
            begun = [*response[:6], token]
            numbers = generator(0, Stream.CONTINUATION, 4, row["rollout_id"], 6).random((2, 64 - 7), dtype=np.float32)
            with torch.no_grad():
                ends = [continue_alone(intervener.policy, encoded + begun, part) for part in numbers]
            texts = intervener.policy.decode([begun + end for end in ends])
            accuracy = np.mean([intervener.task.score(text, prompt).is_correct for text in texts])
            assert rows[f"accuracy_{side}"][i] == accuracy
            generated += sum(map(len, ends))
        assert rows["tokens"][i] == generated


def test_a_response_that_ends_with_the_token_is_scored_as_it_is(intervener, tokens, monkeypatch):
    """The original is the recorded response, the alternative a shortened one.

    A stop token ends the alternative.
    """
    stop_id = int(intervener.policy.stop_ids[0])
    last = tokens.filter(pl.col("position") == pl.col("response_length") - 1)
    ended, truncated = last.filter(token_id=stop_id)[:12], last.filter(response_length=64)[:2]
    assert set(ended["is_correct"]) == {True, False}
    rows = intervener.replace_tokens(ended)
    assert rows["accuracy_original"].tolist() == ended["is_correct"].cast(pl.Float64).to_list()
    room = 64 - ended["response_length"].to_numpy()
    assert (rows["tokens"] <= 2 * room).all()
    assert (rows["tokens"] > 0).any()
    assert len(truncated) > 0
    rows = intervener.replace_tokens(truncated)
    assert rows["tokens"].tolist() == [0] * len(truncated)
    monkeypatch.setattr(
        intervene_module, "draw_alternatives", lambda policy, contexts, originals, *rest: originals * 0 + stop_id
    )
    begun = tokens.filter(position=2)[:4]
    rows = intervener.replace_tokens(begun)
    assert rows["accuracy_alternative"].tolist() == [0.0] * 4
    assert (rows["tokens"] <= 2 * (64 - 3)).all()


def test_alternatives_follow_p_without_the_original(policy, task):
    """Compare draws with the CDF of a float64 loop, and frequencies with p."""
    count = 1500
    contexts = [policy.encode_prompt(prompt.text) for prompt in task.heldout[:2]]
    uniforms = torch.from_numpy(np.random.default_rng(0).random(2 * count, dtype=np.float32))
    model = policy.model
    with torch.no_grad():
        p = [torch.softmax(model(torch.tensor([c])).logits[0, -1].double() / 0.9, -1).numpy() for c in contexts]
    originals = [int(part.argmax()) for part in p]
    found = draw_alternatives(
        policy,
        [context for context in contexts for _ in range(count)],
        torch.tensor(originals).repeat_interleave(count),
        uniforms,
        0.9,
    ).numpy()
    for i, (part, original) in enumerate(zip(p, originals, strict=True)):
        part[original] = 0.0
        part /= part.sum()
        drawn, numbers = found[i * count : (i + 1) * count], uniforms[i * count : (i + 1) * count].numpy()
        assert original not in drawn
        wanted = np.searchsorted(part.cumsum(), numbers, side="right")
        assert (drawn == wanted).mean() > 0.998, "more than float32's rounding of the distribution function"
        likely = part * count >= 10
        chi2 = ((np.bincount(drawn, minlength=len(part)) - count * part)[likely] ** 2 / (count * part)[likely]).sum()
        assert likely.sum() > 3
        assert chi2 < 3 * likely.sum() + 20


def test_an_alternative_exists_where_the_policy_is_sure(policy, task):
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(200)
    context = policy.encode_prompt(task.heldout[0].text)
    logits = policy.model(torch.tensor([context])).logits[0, -1]
    original = logits.argmax()
    assert logits.softmax(-1)[original] == 1.0, "the policy is not sure enough"
    drawn = draw_alternatives(policy, [context], original[None], torch.tensor([0.0]), 1.0)
    assert drawn[0] != original


def strata_of(tokens):
    return tokens.select("rollout_id", "position", *STRATA)


def test_any_beginning_of_the_order_is_balanced(tokens):
    ordered = order_candidates(tokens, (0.0, 1.0), (0.0, 1.0), (1, 2, 3), np.random.default_rng(0))
    assert len(ordered) == len(tokens)
    sizes = dict(ordered.group_by(STRATA).len().select(pl.struct(STRATA).cast(pl.String), "len").iter_rows())
    assert len(sizes) > 20
    for count in (40, 100, 400):
        begun = ordered[:count].group_by(STRATA).len().select(pl.struct(STRATA).cast(pl.String), "len")
        taken = dict.fromkeys(sizes, 0) | dict(begun.iter_rows())
        most = max(taken.values())
        assert all(n >= most - 1 or n == sizes[stratum] for stratum, n in taken.items())
    relative = ordered["position"] / ordered["response_length"]
    assert (ordered["fifth"] == (relative * 5 + 1e-9).floor().cast(pl.Int32)).all()
    assert ordered["is_high_entropy"].mean() == pytest.approx(0.2, abs=0.01)
    other = order_candidates(tokens, (0.0, 1.0), (0.0, 1.0), (1, 2, 3), np.random.default_rng(1))
    assert not strata_of(other).equals(strata_of(ordered))


def test_filters_choose_tokens(tokens):
    chosen = order_candidates(tokens, (0.5, 0.9), (0.2, 0.6), (1, 3), np.random.default_rng(0))
    entropies = np.sort(tokens["entropy"].to_numpy().astype(np.float64))
    low, high = np.quantile(entropies, [0.5, 0.9])
    relative = tokens["position"] / tokens["response_length"]
    wanted = tokens.filter(
        (tokens["entropy"] >= low)
        & (tokens["entropy"] <= high)
        & (relative >= 0.2)
        & (relative < 0.6)
        & (tokens["ppl_tercile"] != 2)
    )
    keys = ["rollout_id", "position"]
    assert 0 < len(wanted) < len(tokens)
    assert chosen.select(keys).sort(keys).equals(wanted.select(keys).sort(keys))
    with pytest.raises(InputError, match=r"--ppl-tercile: none of \d+ tokens passes all three; widen one of them"):
        order_candidates(tokens.filter(ppl_tercile=1), (0.0, 1.0), (0.0, 1.0), (2,), np.random.default_rng(0))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 10, 11, 16])
def test_terciles_are_those_of_sql(count):
    ranks = pl.DataFrame({"rank": range(count)})
    found = ranks.select(ntile(pl.col("rank"), pl.len().cast(pl.Int64), 3).alias("part"))["part"].to_list()
    wanted = duckdb.sql(f"select ntile(3) over (order by range) from range({count}) order by range").fetchall()
    assert found == [part for (part,) in wanted]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--checkpoint", "3"], ["no checkpoint of step 3; available: 2, 4"]),
        (["--entropy", "0.8"], ['--entropy "0.8"', "LOW,HIGH", "0.8,1"]),
        (["--entropy", "nan,1"], ['--entropy "nan,1"']),
        (["--position", "0.9,0.1"], ['--position "0.9,0.1"', "LOW < HIGH"]),
        (["--ppl-tercile", "0,1"], ['--ppl-tercile "0,1"', "1,2,3"]),
        (["--continuations", "0"], ["--continuations"]),
        (["--budget", "many"], ["--budget", "integer"]),
        (["--continuations", "3"], ["checkpoint 4 with seed 0 has continuations 2, not 3", "--seed"]),
    ],
)
def test_bad_input_is_one_line(run_dir, call, arguments, expected):
    before = sorted((run_dir / "interventions").iterdir())
    if "--continuations" not in arguments:
        arguments = [*arguments, "--continuations", "2"]
    code, out, err = call("intervene", run_dir, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("entrace: ")
    assert err.count("\n") == 1
    for part in expected:
        assert part in err
    assert sorted((run_dir / "interventions").iterdir()) == before


def test_a_run_without_checkpoints_is_refused(trained, tmp_path):
    run_dir = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(InputError, match="this run has no checkpoint"):
        resolve_checkpoint(run_dir, None)


def test_responses_outside_updates_are_no_candidates(trained, tmp_path):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    for path in (run_dir / "rollouts").iterdir():
        rewrite(path, pl.read_parquet(path).with_columns(is_kept=pl.lit(False)))
    with pytest.raises(InputError, match="no response of known perplexity was in the updates of steps 1 to 4"):
        load_candidates(run_dir, 4)


def test_a_response_of_unknown_perplexity_is_no_candidate(trained, tmp_path):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    path = next((run_dir / "rollouts").iterdir())
    rows = pl.read_parquet(path)
    unknown = rows.filter("is_kept")["rollout_id"][0]
    known = pl.when(pl.col("rollout_id") != unknown).then("ppl")
    rewrite(path, rows.with_columns(ppl=known))
    found, before = load_candidates(run_dir, 4), load_candidates(trained, 4)
    assert unknown in before["rollout_id"]
    assert unknown not in found["rollout_id"]
    assert set(found["ppl_tercile"]) == {1, 2, 3}


def test_a_prompt_sampled_twice_is_ranked_group_by_group(trained, tmp_path):
    """Schema versions 1 and 2, and parts of both, give equal results.

    Version 2 added columns.
    """
    expected = load_candidates(trained, 4).select("rollout_id", "position", "ppl_tercile")
    for versions in ((2, 2), (1, 1), (1, 2)):
        run_dir = shutil.copytree(trained, tmp_path / f"run-{versions}")
        for name, added in (("rollouts", ["group_id", "answer_class"]), ("tokens", ["is_kept"])):
            for i, path in enumerate(sorted((run_dir / name).iterdir())):
                rows = pl.read_parquet(path).with_columns(prompt_id=pl.lit("same"))
                rewrite(path, rows.drop(added) if versions[i > 1] == 1 else rows, versions[i > 1])
        assert load_candidates(run_dir, 4).select(expected.columns).equals(expected)


def test_rows_say_what_was_selected_and_at_which_temperature(trained, run_dir, tmp_path):
    assert set(read(run_dir)["selection"]) == {"entropy 0-1, position 0-1, ppl_tercile 1,2,3"}
    temperature = read_manifest(trained)["config"]["rollout"]["temperature"]
    assert read(run_dir)["temperature"].to_list() == pytest.approx([temperature] * len(read(run_dir)))
    narrow = replace(SETTINGS, seed=1, entropy=(0.5, 1.0), position=(0.25, 0.75), ppl_tercile=(1, 3))
    both = shutil.copytree(run_dir, tmp_path / "both")
    intervene(both, narrow, 100)
    added = read(both).filter(seed=1)
    assert set(added["selection"]) == {"entropy 0.5-1, position 0.25-0.75, ppl_tercile 1,3"}
    assert read(both).filter(seed=0).equals(read(run_dir))
    with pytest.raises(InputError, match="another --seed"):
        intervene(both, replace(narrow, seed=0), 100)


def test_the_command_goes_on_and_says_when_it_is_done(trained, tmp_path, call):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    arguments = ["intervene", run_dir, "--continuations", "2", "--budget", "100"]
    code, out, err = call(*arguments, "--json")
    printed = json.loads(out)
    rows = read(run_dir)
    assert code == 0
    assert "100/100" in err
    assert (printed["checkpoint_step"], printed["seed"]) == (4, 0)
    assert printed["interventions"] == printed["num_new"] == len(rows)
    assert printed["tokens"] == rows["tokens"].sum()
    code, out, _ = call(*arguments)
    assert (code, out.splitlines()[0]) == (
        0,
        "nothing to do: checkpoint 4 with seed 0 is finished; continue with a larger --budget",
    )
    assert read(run_dir).equals(rows)


def test_a_run_at_a_url_is_not_changed(call):
    code, out, err = call("intervene", "s3://bucket/run")
    assert (code, out) == (2, "")
    assert err == (
        "entrace: s3://bucket/run: a run is recorded and changed on a local disk only; copy it there or from there\n"
    )
