"""Test that a training loop's arrays become a trace.

The tests cover derived values, nulls, and refused input.
"""

import json
import math

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import entrace
from entrace.analysis import queries
from entrace.analysis.trace import TABLES, InputError, Recorder, Vocabulary
from entrace.analysis.trace.groups import group_relative_advantage, ppl_z
from entrace.analysis.trace.prune import prune
from entrace.analysis.trace.recorder import prompt_hash
from entrace.analysis.trace.sampling import TokenSampling
from entrace.analysis.trace.verify import verify_run
from entrace.trainer.algorithm import advantages as by_torch

VOCAB = Vocabulary(["<eos>", "so", " 2", " plus", " 3", " is", " 5", "<user>"], [True, *[False] * 6, True])
STEP = {
    "prompt": ["What is 2 plus 3?"] * 2 + ["What is 3 plus 2?"] * 2,
    "response_ids": [[1, 6, 0], [4, 0], [6, 0], [1, 1, 1, 5]],
    "logprob": [[-1.0, -2.0, -3.0], [-0.5, -0.5], [-1.0, 0.0], [-4.0, -2.0, -1.0, -1.0]],
    "entropy": [[0.1, 0.2, 0.3], [1.0, 2.0], [0.0, 0.0], [1.0, 1.0, 1.0, 1.0]],
    "reward": [1.0, 0.0, 1.0, None],
}


def table(folder, name):
    return pl.read_parquet(folder / name / "*.parquet").sort(
        [key for key in ("step", "rollout_id", "position", "sample_index") if key in COLUMNS[name]]
    )


COLUMNS = {name: [c.name for c in t.columns] for name, t in entrace.trace.TABLES.items()}


ENDLESS = {}
ENDLESS["self"] = ENDLESS


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path / "study" / "run", VOCAB, temperature=0.7, flush_every=1)


def written(recorder):
    recorder.close()
    return recorder.run_dir


def test_everything_that_follows_from_a_step_is_derived(recorder):
    row = recorder.record(1, **STEP, metrics={"loss": 0.5, "lr": 1e-5})
    folder = written(recorder)
    rollouts, tokens, steps = (table(folder, name) for name in ("rollouts", "tokens", "steps"))
    assert rollouts["response_length"].to_list() == [3, 2, 2, 4]
    assert rollouts["completion"].to_list() == ["so 5", " 3", " 5", "sososo is"]
    assert rollouts["entropy_mean"].to_list() == pytest.approx([0.2, 1.5, 0.0, 1.0])
    assert rollouts["surprisal_mean"].to_list() == pytest.approx([2.0, 0.5, 0.5, 2.0])
    assert rollouts["ppl"].to_list() == pytest.approx([math.exp(x) for x in (2.0, 0.5, 0.5, 2.0)])
    assert rollouts["ppl_z"].to_list() == pytest.approx([1, -1, -1, 1])
    assert rollouts["group_id"].to_list() == [0, 0, 2, 2]
    assert rollouts["sample_index"].to_list() == [0, 1, 0, 1]
    assert rollouts["is_correct"].to_list() == [True, False, True, None]
    assert rollouts["advantage"].to_list() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5), 0, 0], rel=1e-5)
    assert rollouts["is_kept"].to_list() == [True, True, True, False]
    assert rollouts["drop_reason"].to_list() == [None, None, None, "no_verdict"]
    assert rollouts["entropy_kind"].unique().to_list() == ["exact"]
    assert rollouts["temperature"].to_list() == pytest.approx([0.7] * 4)
    assert rollouts["prompt_id"].n_unique() == 2 == table(folder, "prompts").height
    assert tokens["position"].to_list() == [0, 1, 2, 0, 1, 0, 1, 0, 1, 2, 3]
    assert tokens["token_id"].to_list() == [i for ids in STEP["response_ids"] for i in ids]
    assert tokens["logprob"].to_list() == [x for row in STEP["logprob"] for x in row]
    assert tokens["shaped_advantage"].null_count() == len(tokens)
    assert tokens["loss_mask"].null_count() == len(tokens)
    assert steps["reward_mean"].item() == pytest.approx(2 / 3) == row["reward_mean"]
    assert steps["accuracy"].item() == pytest.approx(2 / 3)
    assert steps["entropy_token_mean"].item() == pytest.approx(7.6 / 11)
    assert steps["loss"].item() == 0.5
    assert steps["tokens"].item() == 11
    assert steps["groups_kept"].item() == 2


def padded(rows, fill, dtype=float):
    return np.array([[*row, *[fill] * (6 - len(row))] for row in rows], dtype)


def test_padded_arrays_tensors_and_lists_give_the_same_rows(tmp_path):
    mask = padded([[1] * len(ids) for ids in STEP["response_ids"]], 0, int)
    arrays = {
        "response_ids": padded(STEP["response_ids"], 0, int),
        "logprob": padded(STEP["logprob"], np.nan),
        "entropy": padded(STEP["entropy"], np.nan),
    }
    tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
    lists = {name: [torch.tensor(row) for row in STEP[name]] for name in arrays}
    right = {"response_ids": STEP["response_ids"], "logprob": arrays["logprob"], "entropy": arrays["entropy"]}
    found = []
    for name, values in {
        "lists": {},
        "arrays": {**arrays, "response_mask": mask},
        "tensors": {**tensors, "response_mask": torch.from_numpy(mask)},
        "rows": lists,
        "right": right,
    }.items():
        recorder = Recorder(tmp_path / name, VOCAB)
        recorder.record(1, **{**STEP, **values})
        found.append(table(written(recorder), "tokens").drop("run_id"))
    assert all(frame.equals(found[0], null_equal=True) for frame in found[1:])


def test_a_perplexity_that_overflows_is_null(recorder):
    recorder.record(1, **{**STEP, "logprob": [[-100.0] * len(ids) for ids in STEP["response_ids"]]})
    recorder.record(2, **STEP)
    rollouts = table(written(recorder), "rollouts")
    assert rollouts.filter(step=1)["surprisal_mean"].to_list() == [100.0] * 4
    assert rollouts.filter(step=1)["ppl"].to_list() == [None] * 4
    assert rollouts.filter(step=2)["ppl"].null_count() == 0


def test_context_counts_in_positions_and_has_no_measures(recorder):
    step = {name: values[:2] for name, values in STEP.items()}
    # The measures of context are not read, whatever they are.
    step["logprob"] = [[-1.0, math.nan, -3.0], [-0.5, -0.5]]
    recorder.record(1, **step, loss_mask=[[True, False, True], [True, True]], advantage=[1.0, -1.0])
    folder = written(recorder)
    tokens, rollouts = table(folder, "tokens"), table(folder, "rollouts")
    context = tokens.row(1, named=True)
    assert context["position"] == 1
    assert tokens["loss_mask"].to_list() == [True, False, True, True, True]
    for name in ("logprob", "entropy", "advantage", "shaped_advantage"):
        assert context[name] is None
        assert tokens[name].null_count() == 1
    assert rollouts["response_length"].to_list() == [3, 2]
    assert rollouts["generated_length"].to_list() == [2, None]
    assert rollouts["surprisal_mean"].to_list() == pytest.approx([2.0, 0.5])
    assert table(folder, "steps")["tokens"].item() == 4
    runs = entrace.open_runs(str(folder))
    assert runs.sql("select count(*) as n from tokens")["n"].item() == 4
    assert runs.sql("select count(*) as n from response_tokens")["n"].item() == 5


def test_lone_surrogates_in_names_of_prompts_are_replaced(recorder):
    recorder.record(1, **STEP, prompt_id=["\ud800", "\ud800", "b", "b"])
    folder = written(recorder)
    for name in ("rollouts", "tokens", "prompts"):
        assert set(table(folder, name)["prompt_id"]) == {"\ufffd", "b"}


def test_values_beside_the_usual_ones_are_recorded(recorder):
    recorder.record(
        1,
        **{name: values[:2] for name, values in STEP.items()},
        group=["a", "a"],
        advantage=[[1.0, 1.0, 1.0], [0.5, -0.5]],
        shaped_advantage=[2.0, -2.0],
        sampling_logprob=padded(STEP["logprob"][:2], 0.0),
        logprob_after=[[-1.1, -2.1, None], None],
        is_clipped=[[False, True, False], [False, False]],
        turn=[[0, 0, 1], [0, 0]],
        policy_version=3,
        reward_components=[{"accuracy": 1.0, "style": None}, {"accuracy": 0.0, "style": 0.5}],
        answer=["5", None],
        is_truncated=[False, True],
        is_kept=[True, False],
        drop_reason=[None, "truncated"],
        ground_truth=["5", "5"],
    )
    folder = written(recorder)
    tokens, rollouts = table(folder, "tokens"), table(folder, "rollouts")
    assert tokens["advantage"].to_list() == [1.0, 1.0, 1.0, 0.5, -0.5]
    assert rollouts["advantage"].to_list() == [1.0, None]
    assert tokens["shaped_advantage"].to_list() == [2, 2, 2, -2, -2]
    assert tokens["logprob_after"].to_list() == pytest.approx([-1.1, -2.1, None, None, None])
    assert tokens["is_clipped"].to_list() == [False, True, False, False, False]
    assert tokens["turn"].to_list() == [0, 0, 1, 0, 0]
    assert tokens["policy_version"].to_list() == [3] * 5
    assert tokens["is_kept"].to_list() == [True] * 3 + [False] * 2
    components = pq.read_table(folder / "rollouts")["reward_components"].to_pylist(maps_as_pydicts="strict")
    assert components == [{"accuracy": 1.0}, {"accuracy": 0.0, "style": 0.5}]
    assert rollouts["has_answer"].to_list() == [True, False]
    assert rollouts["defects"].to_list() == [[], ["format_violation", "truncated"]]
    assert rollouts["drop_reason"].to_list() == [None, "truncated"]
    assert table(folder, "prompts")["ground_truth"].to_list() == ["5"]


@pytest.mark.parametrize(
    "values", [[True, False], [1, 0], [1.0, 0.0], np.array([True, False]), np.array([1, 0]), torch.tensor([1.0, 0.0])]
)
def test_flags_are_booleans_or_0_and_1(recorder, values):
    flags = dict.fromkeys(("is_correct", "has_answer", "is_truncated", "is_kept"), values)
    per_token = np.stack([np.asarray(values)] * 2)
    response = {"prompt": ["p", "p"], "response_ids": [[1, 0], [4, 0]], "reward": [1.0, 0.0]}
    recorder.record(1, **response, **flags, is_clipped=per_token, loss_mask=np.ones_like(per_token))
    recorder.record_eval(1, prompt=["p", "p"], response_length=[2, 2], is_correct=values)
    folder = written(recorder)
    for name in flags:
        assert table(folder, "rollouts")[name].to_list() == [True, False], name
    assert table(folder, "tokens")["is_clipped"].to_list() == [True, False] * 2
    assert table(folder, "evals")["is_correct"].to_list() == [True, False]


@pytest.mark.parametrize("name", ["is_correct", "has_answer", "is_truncated", "is_kept"])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("no", "'no'"),
        ("", "''"),
        (2, "2"),
        (-1, "-1"),
        (0.5, "0.5"),
        (math.nan, "nan"),
        (10**400, "10000"),
        ([], "[]"),
        (b"1", "b'1'"),
    ],
)
def test_other_values_of_flags_are_refused(recorder, name, value, shown):
    with pytest.raises(InputError) as raised:
        recorder.record(1, **{**STEP, name: [True, value, False, True]})
    assert str(raised.value).startswith(f"{name}: {shown}")
    assert str(raised.value).endswith(" at response 1, expected true, false, or None")
    if name == "is_correct":
        with pytest.raises(InputError, match="at response 1, expected true, false, or None"):
            recorder.record_eval(1, prompt=["p", "p"], response_length=[2, 2], is_correct=[None, value])
    recorder.record(1, **{**STEP, name: [True, False, False, True]})
    assert table(written(recorder), "rollouts")[name].to_list() == [True, False, False, True]


@pytest.mark.parametrize(
    "changed",
    [
        {"response_ids": [[], []]},
        {"response_ids": np.ones((2, 3), int), "response_mask": np.zeros((2, 3)), "entropy": np.ones((2, 3))},
        {"response_ids": [[], []], "logprob": [[], []], "is_clipped": [[], None], "turn": 0, "advantage": [0.0, 0.0]},
    ],
)
def test_a_step_without_tokens_is_recorded(recorder, changed):
    row = recorder.record(1, **{"prompt": ["p", "p"], "reward": [0.0, 1.0], **changed})
    assert (row["tokens"], row["reward_mean"], row["entropy_token_mean"]) == (0, 0.5, None)
    recorder.record(2, **STEP)
    folder = written(recorder)
    first = table(folder, "rollouts").filter(step=1)
    assert first["response_length"].to_list() == [0, 0]
    assert first["completion"].to_list() == ["", ""]
    assert first["is_kept"].to_list() == [False, False]
    assert verify_run(folder).findings == []
    runs = entrace.open_runs(str(folder))
    assert runs.sql("select step, count(*) as n from tokens group by step").rows() == [(2, 11)]
    assert runs.query("stage_dynamics").height


@pytest.mark.parametrize("scalar", [1.0, 1, np.float32(1), np.ones(()), torch.tensor(1.0)])
def test_a_scalar_applies_to_all_responses(recorder, scalar):
    recorder.record(1, **{**STEP, "reward": scalar}, advantage=scalar, grad_norm=scalar)
    folder = written(recorder)
    rollouts, tokens = table(folder, "rollouts"), table(folder, "tokens")
    assert rollouts["reward"].to_list() == rollouts["advantage"].to_list() == [1.0] * 4
    for name in ("advantage", "shaped_advantage", "grad_norm"):
        assert tokens[name].to_list() == [1.0] * 11, name


def test_a_reason_is_given_for_every_null_and_for_no_value(recorder):
    recorder.record(1, **STEP)
    recorder.record(2, **STEP, policy_step=1)
    folder = written(recorder)
    unknown = json.loads((folder / "run.json").read_text())["unknown"]
    for name in ("tokens", "rollouts", "steps", "prompts"):
        frame = table(folder, name)
        nulls = {c for c in frame.columns if frame[c].null_count() == frame.height}
        nulls |= {column.name for column in TABLES[name].columns if column.name not in frame.columns}
        named = {key.partition(".")[2] for key in unknown if key.startswith(f"{name}.")}
        assert named <= nulls, name
        meant = {"loss_mask", "turn", "generated_length", "reward_components", "answer_class", "length_penalty"}
        assert nulls - named <= meant, name
    assert unknown["tokens.logprob_after"] == "the training loop did not pass it to the recorder"
    assert "evals" in unknown


def test_evaluations_add_up(recorder):
    for _ in range(2):
        recorder.record_eval(
            0, prompt=["a", "b"], response_ids=[[6, 0], [4, 0]], reward=[1.0, 0.0], entropy=[[1, 2], [0, 1]]
        )
    recorder.record(1, **STEP)
    recorder.record_eval(1, prompt=["a"], response_length=[7], is_correct=[True], entropy_mean=[0.5], benchmark="other")
    folder = written(recorder)
    evals = table(folder, "evals").sort("step", "prompt_id", "sample_index")
    assert evals["sample_index"].to_list() == [0, 1, 0, 1, 0]
    assert evals["benchmark"].to_list() == ["heldout"] * 4 + ["other"]
    assert sorted(evals["entropy_mean"].to_list()) == [0.5, 0.5, 0.5, 1.5, 1.5]
    assert evals.filter(step=1)["response_length"].item() == 7
    assert table(folder, "prompts").filter(split="heldout").height == 2
    assert "evals" not in json.loads((folder / "run.json").read_text())["unknown"]


def test_the_last_policy_can_be_evaluated_after_training(recorder):
    recorder.record(1, **STEP)
    recorder.record_eval(1, prompt=["a"], response_length=[7], is_correct=[True])
    folder = written(recorder)
    for benchmark in ("b", "c"):
        with Recorder(folder, VOCAB, resume_after="last") as again:
            again.record_eval(1, prompt=[benchmark], response_length=[3], is_correct=[False], benchmark=benchmark)
    assert sorted(table(folder, "evals").select("step", "benchmark").rows()) == [(1, "b"), (1, "c"), (1, "heldout")]
    assert set(table(folder, "prompts").filter(split="heldout")["prompt"]) == {"a", "b", "c"}
    assert verify_run(folder).findings == []
    with Recorder(folder, VOCAB, resume_after=1) as again:
        again.record(2, **STEP)
    assert table(folder, "evals").height == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logprob": [[-1.0]] * 4}, "logprob: response 0 has 1 values, expected 3 as in response_ids"),
        ({"logprob": STEP["logprob"][:3]}, "logprob: 3 responses, expected 4 as in response_ids"),
        (
            {"entropy": [[0.1, math.nan, 0.3], *STEP["entropy"][1:]]},
            "entropy: nan at response 0, position 1; pass None",
        ),
        ({"entropy": [["a", "b", "c"], *STEP["entropy"][1:]]}, "entropy: response 0 is not a list of numbers"),
        ({"reward": [1.0, math.nan, 0.0, 0.0]}, "reward: nan at response 1; pass None where it is unknown"),
        ({"reward": [1.0]}, "reward: 1 values, expected 4, one per response"),
        ({"advantage": [1.0, math.inf, 0.0, 0.0]}, "advantage: inf at response 1, position 0"),
        ({"advantage": math.inf}, "advantage: inf at response 0, position 0"),
        ({"advantage": "high"}, "advantage: expected numbers, found <U4"),
        ({"reward": object()}, "reward: expected one value per response, found object"),
        ({"prompt": ["a"]}, "prompt: 1 prompts, expected 4, one per response"),
        ({"group": [1, 2]}, "group: 2 values, expected 4, one per response"),
        ({"logprobs": STEP["logprob"]}, 'record: unknown name "logprobs"; did you mean "logprob"?'),
        ({"metrics": {"los": 1.0}}, 'metrics: unknown name "los"; did you mean "loss"?'),
        ({"metrics": {"loss": math.nan}}, "metrics: loss is nan; leave it out where it is unknown"),
        ({"metrics": {"accuracy": 1.0}}, "metrics: accuracy follows from the responses; leave it out"),
        ({"response_ids": [[1, 6, 99], *STEP["response_ids"][1:]]}, "response_ids: expected text or token ids"),
        ({"response_ids": [[0.5] * 3, *STEP["response_ids"][1:]]}, "response_ids: token ids must be integers"),
        ({"response_ids": np.zeros((4, 4), int)}, "response_mask: missing; a padded array of response_ids needs it"),
        (
            {"response_ids": np.ones((4, 3), int), "response_mask": np.array([[1, 0, 1]] * 4)},
            "response_mask: response 0 has gaps; mark context in loss_mask instead",
        ),
        ({"response_mask": np.ones((4, 4))}, "response_mask: expected the shape (B, T) of response_ids"),
        ({"loss_mask": [[None] * 3, *STEP["entropy"][1:]]}, "loss_mask: None is not a mask"),
        ({"is_kept": [True, None, True, True]}, "is_kept: None is not a verdict"),
        ({"is_kept": "yes"}, "is_kept: 'yes' at response 0, expected true, false, or None"),
        (
            {"is_clipped": [[0, 1, 1], [0, 2], *STEP["entropy"][2:]]},
            "is_clipped: 2.0 at response 1, position 1, expected true or false",
        ),
        ({"is_clipped": ["no"] * 4}, "is_clipped: expected numbers, found <U2"),
        (
            {"loss_mask": [[1, 1, 1], [1, 0.5], *STEP["entropy"][2:]]},
            "loss_mask: 0.5 at response 1, position 1, expected true or false",
        ),
        (
            {"loss_mask": np.array([["true"] * 4] * 4)},
            "loss_mask: 'true' at response 0, position 0, expected true or false",
        ),
        (
            {"response_ids": np.ones((4, 3), int), "response_mask": np.array([[1, 1, 0], [1, 2, 0]] * 2)},
            "response_mask: 2 at response 1, position 1, expected true or false",
        ),
        ({"reward": [1.0, 10**400, 0.0, 0.0]}, "reward: inf at response 1; pass None where it is unknown"),
        ({"reward": -(10**400)}, "reward: -inf at response 0; pass None where it is unknown"),
        ({"advantage": [10**400, 0.0, 0.0, 0.0]}, "advantage: expected float (int too large to convert to float)"),
        ({"answer": [1, 2, 3, 4]}, "table rollouts: column answer is not string"),
        ({"reward_components": [1.0] * 4}, "reward_components: expected a mapping of name to score"),
        ({"reward_components": [{"a": 10**400}] * 4}, 'reward_components: "a" is 1000000'),
        ({"reward_components": [{"a": math.nan}] * 4}, 'reward_components: "a" is nan, expected a finite number or'),
        ({"reward_components": [{"a": "x"}] * 4}, "reward_components: \"a\" is 'x', expected a finite number or None"),
        ({"prompt": 5}, "prompt: expected one value per response, found int"),
        ({"prompt": np.array(5)}, "prompt: expected one value per response, found ndarray"),
        ({"group": [[1], [2], [3], [4]]}, "group: expected one text or number per response (unhashable type: 'list')"),
        ({"response_ids": np.array(5)}, "response_ids: expected one list per response or an array (B, T), found ndarr"),
        ({"loss_mask": np.array(1)}, "loss_mask: expected one list per response or an array (B, T), found ndarray"),
        ({"entropy": np.zeros((4, 4, 2))}, "entropy: expected one list per response or an array (B, T), found ndarray"),
        ({"completion": np.array("x")}, "Recorder.record: completion: expected Sequence[str] | None, found a value"),
        ({"step": 0}, "step 0: expected at least 1; steps never go back"),
        ({"step": "1"}, "Recorder.record: step: expected int, found '1'"),
    ],
)
def test_bad_input_is_one_error_and_leaves_no_rows(recorder, changed, message):
    with pytest.raises(InputError) as raised:
        recorder.record(**{"step": 1, **STEP, **changed})
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    recorder.record(1, **STEP)
    folder = written(recorder)
    assert (table(folder, "rollouts").height, table(folder, "prompts").height) == (4, 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"response_ids": None}, "record_eval: response_ids is missing; pass it, or response_length per response"),
        ({"response_ids": None, "response_length": [1], "entropy": [[1.0]]}, "entropy: needs response_ids"),
        ({"response_ids": None, "response_length": 1}, "response_length: expected one value per response, found int"),
        ({"rewards": [1.0]}, 'record_eval: unknown name "rewards"; did you mean "reward"?'),
        ({"step": 1}, "step 1: expected at least 2; steps never go back"),
    ],
)
def test_bad_evaluations_are_one_error(recorder, changed, message):
    recorder.record(2, **STEP)
    with pytest.raises(InputError) as raised:
        recorder.record_eval(**{"step": 2, "prompt": ["a"], "response_ids": [[1]], **changed})
    assert str(raised.value).startswith(message)
    recorder.close()


def test_steps_go_forward_only(recorder):
    recorder.record(3, **STEP)
    with pytest.raises(InputError, match="step 3: expected at least 4"):
        recorder.record(3, **STEP)
    recorder.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"manifest": {"seed": "zero"}}, "manifest: seed is 'zero', expected a 32-bit integer"),
        (
            {"unknown": {"tokens.logprobs": "no"}},
            'unknown: no column "tokens.logprobs"; did you mean "tokens.logprob"?',
        ),
        ({"flush_every": 0}, "flush_every is 0, expected at least 1 step"),
        ({"temperature": 0}, "temperature is 0, expected a number above 0; pass 0, greedy decoding, to record_eval"),
        ({"temperature": -0.5}, "temperature is -0.5, expected a number above 0"),
        ({"temperature": math.nan}, "temperature is nan, expected a number above 0"),
        ({"temperature": math.inf}, "temperature is inf, expected a number above 0"),
        ({"temperature": 1e39}, "temperature is 1e+39, expected a number above 0"),
        ({"temperature": 10**400}, "temperature is inf, expected a number above 0"),
        ({"correct_at": math.nan}, "correct_at is nan, expected a finite number or None"),
        ({"correct_at": -math.inf}, "correct_at is -inf, expected a finite number or None"),
        ({"correct_at": 10**400}, "correct_at is inf, expected a finite number or None"),
        (
            {"manifest": {"x": math.nan}},
            "manifest: x is nan, which JSON cannot hold; leave it out, or write it as text",
        ),
        ({"manifest": {"config": {"a": [1, {"b": -math.inf}]}}}, "manifest: config.a[1].b is -inf, which JSON cannot"),
        ({"manifest": {"x": object()}}, "manifest: x is of type object, which JSON cannot hold; write it as text"),
        ({"manifest": {"x": np.float32(1)}}, "manifest: x is of type float32, which JSON cannot hold"),
        ({"manifest": {"config": {1: 2, "a": 3}}}, "manifest: key 1 of config is not text; write it as text"),
        ({"manifest": {"config": ENDLESS}}, "manifest: config.self holds itself, which JSON cannot; leave it out"),
        ({"manifest": {"run_id": ""}}, "manifest: run_id is '', expected text that names the run"),
        ({"manifest": {"run_id": " "}}, "manifest: run_id is ' ', expected text that names the run"),
        ({"manifest": {"run_id": 5}}, "manifest: run_id is 5, expected text"),
    ],
)
def test_bad_settings_are_refused(tmp_path, arguments, message):
    with pytest.raises(InputError) as raised:
        Recorder(tmp_path / "run", VOCAB, **arguments)
    assert str(raised.value).startswith(message)
    Recorder(tmp_path / "run", VOCAB).close()


TWO = {"response_ids": [[1, 0], [4, 0]], "reward": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"prompt": ["p", "q"], "prompt_id": ["x", "x"]},
            None,
            'prompt: response 1 has another text than earlier ones of prompt_id "x"; prompts that differ need',
        ),
        (
            {"prompt": ["p", "r"], "prompt_id": ["x", "y"]},
            {"prompt": ["r", "q"], "prompt_id": ["y", "x"]},
            'prompt: response 1 has another text than earlier ones of prompt_id "x"',
        ),
        (
            {"prompt": ["p", "p"], "prompt_id": ["x", "x"], "ground_truth": ["1", "2"]},
            None,
            'ground_truth: response 1 has another one than earlier ones of prompt_id "x"; questions with the same text',
        ),
        (
            {"prompt": ["p", "q"], "prompt_id": ["x", "y"], "ground_truth": [1, None]},
            {"prompt": ["p", "q"], "prompt_id": ["x", "y"], "ground_truth": [2, 3]},
            'ground_truth: response 0 has another one than earlier ones of prompt_id "x"',
        ),
    ],
)
@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_prompt_has_one_text_and_one_ground_truth(tmp_path, first, second, message, is_resumed):
    recorder = Recorder(tmp_path / "run", VOCAB)
    if second:
        recorder.record(1, **TWO, **first)
    if is_resumed:
        recorder.close()
        recorder = Recorder(tmp_path / "run", VOCAB, resume_after="last")
    lengths = {"response_length": [2, 2]}
    for call, arguments in ((recorder.record, TWO), (recorder.record_eval, lengths)):
        with pytest.raises(InputError) as raised:
            call(2, **arguments, **(second or first))
        assert str(raised.value).startswith(message)
    recorder.record(2, **TWO, prompt=["s", "s"])
    assert table(written(recorder), "rollouts").height == (4 if second else 2)


def test_the_ground_truth_of_a_prompt_may_be_left_out(recorder):
    prompts = {"prompt": ["p", "q"]}
    recorder.record(1, **TWO, **prompts, ground_truth=["1", None])
    recorder.record(2, **TWO, **prompts, ground_truth=[1, "2"])
    recorder.record(3, **TWO, **prompts)
    recorder.record(4, **TWO, prompt=["r", "r"], ground_truth=[None, "3"])
    with pytest.raises(InputError, match=r"ground_truth: response 1 has another one than earlier"):
        recorder.record(5, **TWO, **prompts, ground_truth=["1", "1"])
    assert recorder.has_prompt(prompt_hash("p"))
    assert not recorder.has_prompt("p")
    folder = written(recorder)
    truths = dict(table(folder, "prompts").select("prompt", "ground_truth").iter_rows())
    assert truths == {"p": "1", "q": None, "r": "3"}


def test_lone_surrogates_in_prompts_stay_equal_after_a_resume(tmp_path):
    for resume_after in (None, "last"):
        with Recorder(tmp_path / "run", VOCAB, resume_after=resume_after) as recorder:
            recorder.record(recorder.last_step + 1, **TWO, prompt=["\ud800"] * 2, ground_truth="\udfff")
    assert table(tmp_path / "run", "prompts")["prompt"].to_list() == ["\ufffd"]


def test_manifests_are_json_and_settings_are_floats(tmp_path):
    settings = {"temperature": np.float32(0.5), "correct_at": np.float32(2)}
    with Recorder(tmp_path / "run", VOCAB, **settings, manifest={"config": {"list": (1, None, "nan")}}) as recorder:
        recorder.record(1, **STEP)
        recorder.record_eval(1, prompt=["a"], response_ids=[[1]], temperature=0)
        recorder.manifest["x"] = math.inf
        with pytest.raises(InputError, match=r"run/run.json: x is inf, which JSON cannot hold"):
            recorder.flush()
        del recorder.manifest["x"]
    manifest = json.loads((tmp_path / "run/run.json").read_text(), parse_constant=pytest.fail)
    assert manifest["config"] == {"list": [1, None, "nan"]}
    assert manifest["recorded"] == {"correct_at": 2.0}
    assert table(tmp_path / "run", "rollouts")["temperature"].to_list() == [0.5] * 4
    assert table(tmp_path / "run", "evals")["temperature"].to_list() == [0.0]


def test_a_manifest_with_nan_can_be_resumed(tmp_path):
    Recorder(tmp_path / "run", VOCAB, manifest={"config": {"limit": "x"}}).close()
    path = tmp_path / "run/run.json"
    path.write_text(path.read_text().replace('"x"', "Infinity"))
    (tmp_path / "run/digests.jsonl").unlink()
    with Recorder(tmp_path / "run", VOCAB, resume_after="last") as recorder:
        assert recorder.manifest["config"] == {"limit": "Infinity"}


@pytest.mark.parametrize("arguments", [{"manifest": {"x": math.nan}}, {"manifest": {"seed": "one"}}])
def test_a_refused_manifest_leaves_the_trace_to_resume(tmp_path, arguments):
    with Recorder(tmp_path / "run", VOCAB, flush_every=1) as recorder:
        recorder.record(1, **STEP)
        recorder.record(2, **STEP)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="manifest: "):
        Recorder(tmp_path / "run", VOCAB, resume_after=1, **arguments)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_resumed_trace_keeps_its_run_id(tmp_path):
    Recorder(tmp_path / "run", VOCAB, manifest={"run_id": "a"}).close()
    with pytest.raises(InputError, match="manifest: run_id is 'b', and that of the trace is 'a'; leave it out"):
        Recorder(tmp_path / "run", VOCAB, resume_after="last", manifest={"run_id": "b"})
    for manifest in ({}, {"run_id": "a"}):
        with Recorder(tmp_path / "run", VOCAB, resume_after="last", manifest=manifest) as recorder:
            assert recorder.manifest["run_id"] == "a"


@pytest.mark.parametrize(
    ("recorded", "given", "message"),
    [
        (["<eos>", "a", "b"], ["<eos>", "b", "a"], "vocab: token 1 is 'b', and 'a' in the trace; resume with the voc"),
        (["<eos>", "a", "b"], Vocabulary(["<eos>", "a", "c"]), "vocab: token 2 is 'c', and 'b' in the trace"),
        (["<eos>", "a", ""], ["<eos>", "a", "b"], "vocab: token 2 is 'b', and '' in the trace"),
        (["<eos>", "a", "b"], ["<eos>", "a"], "vocab: 2 entries, and the trace has 3; resume with the vocabulary"),
        (["<eos>", "a"], ["<eos>", "a", "b"], "vocab: 3 entries, and the trace has 2; resume with the vocabulary"),
        (["<eos>", "a", "b"], ["<eos>", "a", "b"], None),
        (["<eos>", "a", "b"], Vocabulary(["<eos>", "a", "b"], [True, False, False]), None),
        (["<eos>", "a", "b"], ["<eos>", "a", "b", "", ""], None),
        (["<eos>", "a", "b", "", ""], ["<eos>", "a", "b"], None),
        (["<eos>", "a", "\ud800"], ["<eos>", "a", "\ud800"], None),
        (Vocabulary(["<0>", "1", "b"], has_text=[False, False, True]), ["<eos>", "a", "b"], None),
        (Vocabulary(["<eos>", "a", "b"]), Vocabulary(["<0>", "?", "b"], has_text=[False, False, True]), None),
        (Vocabulary(["<0>", "1"], has_text=[False] * 2), ["b", "c", "d"], "vocab: 3 entries, and the trace has 2"),
    ],
)
def test_a_trace_resumes_with_its_vocabulary(tmp_path, recorded, given, message):
    run_dir = tmp_path / "run"
    with Recorder(run_dir, recorded, flush_every=1) as recorder:
        for step in (1, 2):
            recorder.record(step, prompt=["p"], response_ids=[[1, 0]])
    if message is None:
        with Recorder(run_dir, given, resume_after=1) as recorder:
            recorder.record(2, prompt=["p"], response_ids=[[1, 0]])
        return
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as raised:
        Recorder(run_dir, given, resume_after=1)
    assert str(raised.value).startswith(message)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


class Letters:
    """Tokenizer of transformers, as far as it is used, with one letter per token."""

    all_special_ids = ()

    def __init__(self, letters):
        self.letters = letters

    def __len__(self):
        return len(self.letters)

    def get_vocab(self):
        return {letter: i for i, letter in enumerate(self.letters)}

    def convert_ids_to_tokens(self, ids):
        return [self.letters[i] for i in ids]

    def decode(self, ids, **settings):
        return "".join(self.letters[i] for i in ids)

    def batch_decode(self, rows, **settings):
        return [self.decode(ids) for ids in rows]


def test_a_trace_resumes_with_its_tokenizer(tmp_path):
    with Recorder(tmp_path / "run", Letters("abc"), vocab_size=5) as recorder:
        recorder.record(1, prompt=["p"], response_ids=[[1, 0]])
    for size in (5, None, 8):
        Recorder(tmp_path / "run", Letters("abc"), vocab_size=size, resume_after="last").close()
    with pytest.raises(InputError, match="vocab: token 1 is 'c', and 'b' in the trace"):
        Recorder(tmp_path / "run", Letters("acb"), resume_after="last")


def test_a_pruned_trace_resumes(tmp_path):
    with Recorder(tmp_path / "run", VOCAB) as recorder:
        recorder.record(1, **STEP)
    prune(tmp_path / "run", TokenSampling(1, 0.5))
    Recorder(tmp_path / "run", VOCAB, resume_after="last").close()


def test_a_run_in_the_current_folder_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Recorder(".", VOCAB).close()
    assert json.loads((tmp_path / "here/run.json").read_text())["run_id"] == "here"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("file", "file: is a file; name a folder"),
        ("file/run", "file: is a file; name a folder"),
        ("x" * 300, "cannot be the folder of a run (file name too long; choose a shorter name)"),
        ("a\0b", "cannot be the folder of a run (embedded null byte)"),
        ("loop/run", "cannot be the folder of a run (Symlink loop from"),
    ],
)
def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path, path, reason):
    (tmp_path / "file").write_text("text")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError) as raised:
        Recorder(tmp_path / path, VOCAB)
    assert reason in str(raised.value)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_temperatures_of_evaluations_are_at_least_0(recorder, value):
    with pytest.raises(InputError, match=r"temperature is .*, expected a number of at least 0"):
        recorder.record_eval(0, prompt=["a"], response_ids=[[1]], temperature=value)
    recorder.close()


def test_a_used_folder_and_a_second_writer_are_refused(recorder):
    with pytest.raises(InputError, match="another process is already recording"):
        Recorder(recorder.run_dir, VOCAB)
    recorder.close()
    with pytest.raises(InputError, match="already holds files; choose another folder, or pass resume_after"):
        Recorder(recorder.run_dir, VOCAB)


def record_and_raise(recorder, error, record):
    record(recorder)
    raise error


def test_a_resumed_trace_equals_an_uninterrupted_one(tmp_path):
    def record(recorder, steps):
        for step in steps:
            recorder.record(step, **STEP)
            recorder.record_eval(step, prompt=["a"], response_ids=[[6]], reward=[1.0])
            if step == 4:
                recorder.flush()

    with Recorder(tmp_path / "whole", VOCAB, flush_every=3) as whole:
        record(whole, range(1, 8))
    with pytest.raises(KeyboardInterrupt), Recorder(tmp_path / "parts", VOCAB, flush_every=3) as first:
        record_and_raise(first, KeyboardInterrupt(), lambda recorder: record(recorder, range(1, 7)))
    assert json.loads((tmp_path / "parts/run.json").read_text())["status"] == "running"
    with Recorder(tmp_path / "parts", VOCAB, flush_every=3, resume_after=4) as second:
        assert second.last_step == 4
        assert len(second.past_metrics()) == 4
        record(second, range(5, 8))
    for name in ("tokens", "rollouts", "prompts", "evals", "steps"):
        frames = [table(tmp_path / run, name).drop("run_id", "record_s", strict=False) for run in ("whole", "parts")]
        if name == "prompts":
            frames = [frame.sort("prompt_id") for frame in frames]
        assert frames[0].equals(frames[1], null_equal=True), name


def test_a_step_inside_a_file_cannot_be_resumed(tmp_path):
    with Recorder(tmp_path / "run", VOCAB, flush_every=4) as recorder:
        for step in range(1, 5):
            recorder.record(step, **STEP)
    with pytest.raises(InputError, match=r"cannot continue after step 2, which lies inside part-000001-000004"):
        Recorder(tmp_path / "run", VOCAB, resume_after=2)
    with pytest.raises(InputError, match="ends at step 4, and cannot continue after step 9"):
        Recorder(tmp_path / "run", VOCAB, resume_after=9)
    with Recorder(tmp_path / "run", VOCAB, resume_after="last") as recorder:
        recorder.record(5, **STEP)
    assert table(tmp_path / "run", "rollouts")["rollout_id"].to_list() == list(range(20))


def test_a_failed_loop_keeps_its_steps_and_says_why(tmp_path):
    with pytest.raises(ZeroDivisionError), Recorder(tmp_path / "run", VOCAB) as recorder:
        record_and_raise(recorder, ZeroDivisionError("division by zero"), lambda recorder: recorder.record(1, **STEP))
    manifest = json.loads((tmp_path / "run/run.json").read_text())
    assert (manifest["status"], manifest["error"]) == ("failed", "ZeroDivisionError: division by zero")
    assert table(tmp_path / "run", "steps").height == 1


def test_every_question_can_be_asked(recorder):
    for step in range(1, 4):
        recorder.record(step, **STEP, advantage=[1.0, -1.0, 0.5, -0.5])
        recorder.record_eval(step, prompt=["a"], response_ids=[[6]], reward=[1.0])
    runs = entrace.open_runs(str(written(recorder)))
    for stem in queries.BUILT_IN.paths:
        if queries.BUILT_IN.paths[stem].parent.name != "claims":
            runs.query(stem)
    assert runs.query("entropy_by_position").height


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.floats(-3, 3, width=32) | st.just(math.nan), st.floats(0, 4, width=32)),
        min_size=1,
        max_size=24,
    )
)
def test_group_statistics_equal_those_of_the_trainer(rows):
    labels, rewards, surprisal = map(np.array, zip(*rows, strict=True))
    groups = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    known = ~np.isnan(rewards)
    expected = by_torch.group_relative_advantage(
        torch.from_numpy(np.nan_to_num(rewards)), torch.from_numpy(groups), is_counted=torch.from_numpy(known)
    )
    np.testing.assert_allclose(group_relative_advantage(rewards, groups), expected, rtol=1e-9, atol=1e-9)
    z = by_torch.ppl_z(
        -torch.from_numpy(surprisal)[:, None], torch.ones(len(groups), 1).bool(), torch.from_numpy(groups)
    )
    np.testing.assert_allclose(ppl_z(surprisal, groups), z, rtol=1e-6, atol=1e-6)
