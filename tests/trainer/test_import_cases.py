"""Test dumps that were once misread, with their expected values."""

import json
import math
import shutil
from pathlib import Path

import polars as pl
import pytest

import entrace
from entrace.analysis.trace import read_manifest
from entrace.trainer.resources import find_model

from .conftest import table

CASES = Path(__file__).parents[1] / "fixtures" / "dumps" / "cases"


def rows_of(name):
    return [json.loads(line) for line in (CASES / name).read_text().splitlines()]


@pytest.fixture
def run(call, tmp_path):
    """Import a case, and return the trace and stderr.

    The embedded model is used unless arguments name another.
    """

    def import_case(name, *arguments, model="embedded"):
        out = tmp_path / f"{Path(name).stem}-{len(list(tmp_path.iterdir()))}"
        chosen = ("--model", model) if model else ()
        status, _, err = call("import", CASES / name, *chosen, *arguments, "--out", out)
        assert status == 0, err
        return out, err

    return import_case


def means(trace):
    """Return means over the raw files, without the view that leaves context out."""
    tokens = table(trace, "tokens")
    return pytest.approx((tokens["entropy"].mean(), tokens["logprob"].mean()), abs=1e-4)


def model(folder, *, bos=None, eos=None, stops=None):
    """Copy the embedded model with another ``bos`` or ``eos``.

    Its tokenizer begins every text with ``bos``.
    """
    shutil.copytree(find_model("embedded"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    special = ["<eos>", "<system>", "<user>", "<assistant>"]
    template = folder / "chat_template.jinja"
    if bos:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        parts = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        pair = [*parts, {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
        tokens = {bos: {"id": bos, "ids": [2], "tokens": [bos]}}
        own = {"type": "TemplateProcessing", "single": parts, "pair": pair, "special_tokens": tokens}
        old = tokenizer["post_processor"]
        tokenizer["post_processor"] = {"type": "Sequence", "processors": [*([old] if old else []), own]}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        config["bos_token"] = bos
        template.write_text("{{ bos_token }}" + template.read_text())
    if eos:
        config["eos_token"] = eos
        for name in ("generation_config.json", "config.json"):
            path = folder / name
            path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": stops}))
        template.write_text(template.read_text().replace("{{ eos_token }}", "<eos>"))
    config["extra_special_tokens"] = [x for x in special if x not in (config.get("eos_token"), config.get("bos_token"))]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_beginning_of_sequence_appears_once(run, tmp_path):
    chosen = model(tmp_path / "bos", bos="<system>")
    text, _ = run("bos_text.jsonl", "--template", "{question}", model=chosen)
    ids, _ = run("bos_ids.jsonl", model=chosen)
    tokens = table(ids, "tokens")
    assert (tokens["entropy"].mean(), tokens["logprob"].mean()) == means(text)


def test_tool_tokens_enter_no_mean(run):
    trace, _ = run("tool_loss_mask.jsonl")
    # All tokens give .6739.
    assert table(trace, "tokens")["entropy"].mean() == pytest.approx(0.5169, abs=2e-3)
    masks = [mark for row in rows_of("tool_loss_mask.jsonl") for mark in row["loss_mask"]]
    tokens = table(trace, "tokens").sort("rollout_id", "position")
    assert tokens["loss_mask"].to_list() == [mark == 1 for mark in masks]
    assert entrace.open_runs(trace).sql("select count(*) from tokens").item() == sum(masks)


def test_an_answer_marked_invalid_counts_as_none(run):
    rows = rows_of("verl_dapo_invalid.jsonl")
    expected = sum(row["pred"] != "[INVALID]" for row in rows) / len(rows)
    for template in (("--template", "{question}"), ()):
        trace, _ = run("verl_dapo_invalid.jsonl", *template)
        assert table(trace, "steps")["format_rate"][0] == pytest.approx(expected, abs=1e-6)
        assert table(trace, "rollouts").sort("rollout_id")["is_correct"].to_list() == [row["acc"] for row in rows]


def test_a_null_reward_is_named(call, tmp_path):
    status, _, err = call("import", CASES / "reward_null.jsonl", "--model", "embedded", "--out", tmp_path / "run")
    assert status == 2
    assert '"reward" is null, expected a number' in err
    assert "did you mean" not in err
    assert len(err.splitlines()) == 1


def test_a_pickle_is_refused_with_instructions(call, tmp_path):
    status, _, err = call("import", CASES / "slime_1.pt", "--out", tmp_path / "run")
    assert status == 2
    assert "expected JSONL or Parquet" in err
    assert "found a pickle" in err
    assert 'torch.load(FILE)["samples"], with n = response_length: prompt_ids = tokens[:-n]' in err
    assert len(err.splitlines()) == 1


def test_the_end_of_a_turn_is_the_token_that_the_template_writes(run, tmp_path):
    chosen = model(tmp_path / "two", eos="<system>", stops=[2, 1])
    text, _ = run("twoeos_text.jsonl", model=chosen)
    ids, _ = run("twoeos_ids.jsonl", model=chosen)
    assert table(text, "tokens")["logprob"].mean() == pytest.approx(table(ids, "tokens")["logprob"].mean(), abs=1e-3)


def test_an_empty_response_is_one_token(run):
    trace, _ = run("response_empty.jsonl")
    empty = [n for n, row in enumerate(rows_of("response_empty.jsonl")) if not row["response"]]
    assert empty
    found = table(trace, "rollouts").filter(pl.col("completion") == "")
    assert found["response_length"].to_list() == [1] * len(empty)


def test_a_verdict_may_be_text(run):
    trace, _ = run("verl_acc_as_text.jsonl", "--template", "{question}")
    expected = [row["acc"] == "True" for row in rows_of("verl_acc_as_text.jsonl")]
    assert table(trace, "rollouts").sort("rollout_id")["is_correct"].to_list() == expected


def test_bytes_of_emoji_are_told_apart(run):
    trace, _ = run("emoji.jsonl")
    found = entrace.open_runs(trace).query("high_entropy_words")
    assert found.filter(text="\ufffd").is_empty()


# The files below had no check. Expected values follow from the files and the schema alone.


def test_nemo_rl_keeps_its_logprobs_and_advantages(run):
    """Padding is cut at input_lengths; masks split prompt and response.

    Entropies are not recorded.
    """
    trace, err = run("nemo_train_data_step1.jsonl", model=None)
    assert "found NeMo-RL training data in 1 file" in err
    assert "token texts are unknown, so that questions about words have no answer; add --tokenizer PATH" in err
    rows = rows_of("nemo_train_data_step1.jsonl")
    rollouts = table(trace, "rollouts").sort("rollout_id")
    tokens = table(trace, "tokens").sort("rollout_id", "position")
    expected_ids, expected_logprobs = [], []
    for row in rows:
        length = row["input_lengths"][0]
        for n in range(length):
            if row["token_loss_mask"][0][n]:
                expected_ids.append(row["token_ids"][0][n])
                expected_logprobs.append(row["prev_logprobs"][0][n])
    assert tokens["token_id"].to_list() == expected_ids
    assert tokens["logprob"].to_list() == pytest.approx(expected_logprobs)
    assert tokens["sampling_logprob"].to_list() == pytest.approx(expected_logprobs)
    assert tokens["entropy"].null_count() == len(tokens)
    assert rollouts["response_length"].to_list() == [sum(row["token_loss_mask"][0]) for row in rows]
    assert rollouts["reward"].to_list() == [row["rewards"][0] for row in rows]
    assert rollouts["advantage"].to_list() == pytest.approx([row["advantages"][0][-1] for row in rows])
    assert rollouts["group_id"].to_list() == [0] * 4 + [4] * 4 + [8] * 4
    assert rollouts["is_kept"].to_list() == [True] * 12
    assert set(rollouts["logprob_kind"]) == {"trainer"}
    assert rollouts["ppl"].to_list() == pytest.approx([math.exp(0.1)] * 12)
    assert table(trace, "steps").row(0, named=True)["step"] == 1
    # Without a tokenizer, tokens have numbers for texts.
    assert set(tokens["category"]) == {"other"}
    assert table(trace, "vocab").filter(token_id=504)["text"].item() == "<504>"
    unknown = read_manifest(trace)["unknown"]
    assert unknown["tokens.entropy"] == 'the rows have no "entropy"; add --model'
    assert unknown["tokens.category"] == "token texts are unknown; import with --tokenizer or --model"


def test_nemo_rl_text_beside_the_tokens_is_compared(run, tmp_path, call):
    trace, err = run("nemo_train_data_step1.jsonl", "--tokenizer", find_model("embedded"), model=None)
    assert "differ from their text" not in err
    assert table(trace, "rollouts").sort("rollout_id")["completion"][3] == " it is <answer>0</answer>"
    assert set(table(trace, "tokens")["category"]) > {"formal_reasoning", "semantic_support"}
    rows = rows_of("nemo_train_data_step1.jsonl")
    rows[2]["content"] = ["<user>another text<assistant>"]
    path = tmp_path / "train_data_step1.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("import", path, "--tokenizer", find_model("embedded"))
    status, _, err = call(*arguments, "--out", tmp_path / "differs")
    assert status == 0
    assert f'1 of 12 rows have token ids that differ from their text ({path}, line 3: "response_ids" are the' in err
    path.write_text("".join(json.dumps({**row, "content": ["else"]}) + "\n" for row in rows))
    status, _, err = call(*arguments, "--out", tmp_path / "refused")
    assert status == 2
    assert "no row has the tokens of its text" in err


def test_prime_rl_exports_keep_the_values_of_trainer_and_engine(run):
    """Reward, verdict, and accuracy are null because there is no reward.

    Advantages are as recorded.
    """
    trace, err = run("prime_token_export_rank_0.jsonl", model=None)
    assert "found prime-rl token exports in 1 file" in err
    rows = rows_of("prime_token_export_rank_0.jsonl")
    tokens = table(trace, "tokens").sort("rollout_id", "position")
    for column, key in (("logprob", "trainer_logprobs"), ("sampling_logprob", "inference_logprobs"), ("entropy",) * 2):
        expected = [value for row in rows for value, mark in zip(row[key], row["loss_mask"], strict=True) if mark]
        assert tokens[column].to_list() == pytest.approx(expected)
    rollouts = table(trace, "rollouts").sort("rollout_id")
    assert rollouts["advantage"].to_list() == [row["advantages"][-1] for row in rows]
    for column in ("reward", "is_correct", "has_answer"):
        assert rollouts[column].null_count() == 12
    assert rollouts["group_id"].to_list() == [0] * 4 + [4] * 4 + [8] * 4
    assert rollouts["entropy_mean"].to_list() == pytest.approx([0.3] * 12)
    step = table(trace, "steps").row(0, named=True)
    assert (step["reward_mean"], step["accuracy"]) == (None, None)
    assert step["entropy_token_mean"] == pytest.approx(0.3)
    assert set(table(trace, "prompts")["task"]) == {"sums"}
    # The trainer's entropies are those of the policy, unlike rescored ones.
    assert "policy.entropy" not in read_manifest(trace)["unknown"]


def test_rewards_are_joined_by_id(run, tmp_path, call):
    rows = rows_of("prime_token_export_rank_0.jsonl")
    ids = [f"{row['step']}/{row['rank']}/{row['export_sequence_idx']}" for row in rows]
    path = tmp_path / "rewards.jsonl"
    given = [{"id": name, "reward": n % 2} for n, name in enumerate(ids[:-1])]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*given, {"id": "9/9/9", "reward": 1}]))
    trace, err = run("prime_token_export_rank_0.jsonl", "--rewards", path, model=None)
    assert "1 of 12 rewards belong to no response" in err
    assert "responses without a reward, such as 1/0/11" in err
    rollouts = table(trace, "rollouts").sort("rollout_id")
    assert rollouts["reward"].to_list() == [*([0, 1] * 5), 0, None]
    assert rollouts["is_correct"].to_list() == [*([False, True] * 5), False, None]
    assert table(trace, "steps")["accuracy"][0] == pytest.approx(5 / 11)
    path.write_text(json.dumps({"id": "x", "reward": 1}))
    arguments = ("import", CASES / "prime_token_export_rank_0.jsonl", "--rewards", path, "--out", tmp_path / "none")
    status, _, err = call(*arguments)
    assert status == 2
    assert "no id matches; it has 'x', the dump has '1/0/0'" in err
    path.write_text(2 * (json.dumps({"id": "x", "reward": 1}) + "\n"))
    assert "id 'x' occurs twice" in call(*arguments)[2]


def test_recorded_values_are_compared_with_those_of_a_model(run, policy):
    """Recorded values stay, and the differences are those of a pass in float64."""
    import torch

    trace, err = run("prime_token_export_rank_0.jsonl")
    rows = rows_of("prime_token_export_rank_0.jsonl")
    differences = []
    for row in rows:
        start = row["loss_mask"].index(True)
        with torch.no_grad():
            log_p = policy.model(torch.tensor([row["token_ids"]])).logits[0].double().log_softmax(-1)
        for n in range(start, len(row["token_ids"])):
            value = float(log_p[n - 1, row["token_ids"][n]])
            differences.append(abs(value - row["trainer_logprobs"][n]))
    rescored = read_manifest(trace)["rescored"]["logprob"]
    assert rescored["tokens"] == len(differences)
    assert rescored["mean"] == pytest.approx(sum(differences) / len(differences), rel=1e-3)
    assert rescored["largest"] == pytest.approx(max(differences), rel=1e-3)
    assert "recorded logprobs differ by more than rounding from those of embedded: mean difference" in err
    tokens = table(trace, "tokens")
    assert tokens["entropy"].to_list() == pytest.approx([0.3] * len(tokens))
    assert tokens["grad_norm"].null_count() == 0
    assert set(table(trace, "rollouts")["logprob_kind"]) == {"trainer"}


def test_a_uid_per_trajectory_does_not_split_groups(run):
    trace, err = run("uid_per_trajectory.jsonl")
    assert '"uid" differs for every response; groups share prompt and step instead' in err
    rollouts = table(trace, "rollouts").sort("rollout_id")
    assert rollouts["group_id"].to_list() == [n - n % 4 for n in range(24)]
    assert rollouts["prompt_id"].n_unique() == 3
    rewards = [row["reward"] for row in rows_of("uid_per_trajectory.jsonl")]
    for start in range(0, 24, 4):
        group = rewards[start : start + 4]
        mean = sum(group) / 4
        spread = math.sqrt(sum((reward - mean) ** 2 for reward in group) / 3)
        expected = [(reward - mean) / (spread + 1e-6) if spread else 0 for reward in group]
        assert rollouts["advantage"].to_list()[start : start + 4] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["nemo_train_data_step1.jsonl", "prime_token_export_rank_0.jsonl"])
def test_questions_answer_on_recorded_values(run, call, name):
    trace, _ = run(name, "--tokenizer", find_model("embedded"), model=None)
    opened = entrace.open_runs(trace)
    assert len(opened.query("entropy_by_position")) >= 0
    status, _, err = call("claims", trace, "--json")
    assert status == 0, err
