"""Test dumps as other trainers write them, with literal expected values."""

import json
import math
import shutil
import uuid
from pathlib import Path

import polars as pl
import pytest

import entrace
from entrace.analysis.importers import run as importer
from entrace.analysis.importers.columns import Columns
from entrace.analysis.importers.dump import Dump
from entrace.analysis.importers.formats import FORMATS
from entrace.analysis.importers.reader import RowReader
from entrace.analysis.importers.rebuild import Rebuilder
from entrace.analysis.importers.row_files import BadRowError
from entrace.analysis.importers.settings import ImportSettings
from entrace.analysis.importers.tokenizer import TokenizerFile
from entrace.analysis.trace import InputError, TraceWriter, Vocabulary, read_manifest
from entrace.analysis.trace.places import to_place
from entrace.trainer.resources import find_model

from .conftest import table

DUMPS = Path(__file__).parents[1] / "fixtures" / "dumps"
SMOLLM = DUMPS / "smollm2-tokenizer"
PROMPT = [3, 308, 265, 305, 275, 286, 265, 311, 312, 310, 30, 318, 270, 320, 264, 294, 271, 4]
QUESTION = "State the final answer to the following arithmetic problem: 3 + 4 - 2 ="


@pytest.fixture(scope="module")
def tokenizer():
    return find_model("embedded")


@pytest.fixture
def load(call, tmp_path):
    """Import a dump and return the trace and stderr."""

    def import_dump(*arguments, name="run", status=0):
        found, _, err = call("import", *arguments, "--out", tmp_path / name)
        assert found == status, err
        assert status == 0 or len(err.strip().splitlines()) == 1
        return tmp_path / name, err

    return import_dump


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# TRL


def test_a_stripped_prompt_of_trl_is_rebuilt_to_what_was_sampled():
    """The ids are those that TRL sampled from; the texts are what it logged."""
    codec = TokenizerFile(SMOLLM)
    rebuilder = Rebuilder(codec)
    rows = pl.read_parquet(DUMPS / "trl" / "completions_00001.parquet").to_dicts()
    truth = [json.loads(line) for line in (DUMPS / "trl" / "truth_ids.jsonl").read_text().splitlines()]
    for row, ids in zip(rows, truth, strict=True):
        assert codec.encode_prompt(rebuilder.find(row["prompt"])) == ids["prompt_ids"]
        # The dump does not say whether the response ended with <|im_end|>, which is 2.
        assert codec.encode(row["completion"]) == [token for token in ids["response_ids"] if token != 2]
    assert (codec.turn_end, codec.stop_ids) == (2, {2})
    # As text, it is another prompt.
    assert codec.encode_prompt(rows[0]["prompt"]) != truth[0]["prompt_ids"]


def test_completions_of_trl(load):
    trace, err = load(DUMPS / "trl", "--tokenizer", SMOLLM)
    assert "found TRL completions in 1 file" in err
    assert "8 prompts rebuilt with the chat template, whose special tokens the dump lacks" in err
    rollouts = table(trace, "rollouts").sort("rollout_id")
    assert rollouts["reward"].to_list() == [0.0] * 8
    assert rollouts["reward_components"][0] == {"accuracy_reward": 0.0}
    assert rollouts["advantage"].to_list() == [0.0] * 8
    assert set(table(trace, "prompts")["prompt"]) == {"What is 3 + 5?", "What is 6 + 7?"}
    truth = [json.loads(line) for line in (DUMPS / "trl" / "truth_ids.jsonl").read_text().splitlines()]
    tokens = table(trace, "tokens").sort("rollout_id", "position")
    assert tokens["token_id"].to_list() == [token for row in truth for token in row["response_ids"] if token != 2]
    unknown = read_manifest(trace)["unknown"]
    assert {"tokens.logprob", "tokens.entropy", "rollouts.is_truncated"} <= unknown.keys()


def test_a_stripped_prompt_of_another_model_is_refused(load, tmp_path):
    """A text that fits no dialog, or several, is not guessed."""
    rows = [{"input": "system\nBe brief.\nuser\n1 + 1?\nassistant\n", "output": "2", "score": 1.0, "step": 1}]
    path = write(tmp_path / "dump" / "1.jsonl", rows)
    _, err = load(path, "--tokenizer", SMOLLM)
    assert "1 prompts rebuilt" in err
    assert table(tmp_path / "run", "prompts")["prompt"].item() == "system: Be brief.\n\nuser: 1 + 1?"
    text = "user\n1 + 1?\nassistant\n2\nuser\n2 + 2?\nassistant\n"
    codec = TokenizerFile(SMOLLM)
    default = "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\n"
    with pytest.raises(BadRowError, match="may have been 1 or 3 turns"):
        Rebuilder(codec).find(default + text)
    assert Rebuilder(codec).find(text) is None


def test_files_of_steps_share_task_and_prompts(load, tmp_path, monkeypatch):
    row = {"input": "user\n1 + 1?\nassistant\n", "gts": "2"}
    for step in (1, 2):
        rows = [{**row, "output": output, "score": float(output), "step": step} for output in ("0", "1")]
        write(tmp_path / "dump" / f"{step}.jsonl", rows)
    monkeypatch.chdir(tmp_path / "dump")
    for i, path in enumerate((tmp_path / "dump", ".", "1.jsonl")):
        trace, _ = load(path, "--tokenizer", SMOLLM, name=f"run{i}")
        prompts = table(trace, "prompts")
        assert prompts["task"].to_list() == [read_manifest(trace)["task"]] == ["dump"]
        assert table(trace, "rollouts")["prompt_id"].unique().to_list() == prompts["prompt_id"].to_list()


def test_several_reward_functions_of_trl_have_no_known_sum(load, tmp_path):
    rows = [
        {
            "step": 1,
            "prompt": [{"role": "user", "content": QUESTION}],
            "completion": [{"role": "assistant", "content": text}],
            "accuracy_reward": accuracy,
            "format_reward": form,
            "advantage": advantage,
        }
        for text, accuracy, form, advantage in (("2", 1.0, 0.5, 0.7), ("3", 0.0, math.nan, -0.7))
    ]
    folder = tmp_path / "out" / "completions"
    folder.mkdir(parents=True)
    pl.DataFrame(rows).write_parquet(folder / "completions_00001.parquet")
    trace, err = load(tmp_path / "out", "--tokenizer", find_model("embedded"))
    assert "reward is null: accuracy_reward, format_reward may all be rewards" in err
    rollouts = table(trace, "rollouts").sort("rollout_id")
    assert rollouts["reward"].to_list() == [None, None]
    assert rollouts["reward_components"].to_list()[1] == {"accuracy_reward": 0.0}
    assert rollouts["advantage"].to_list() == pytest.approx([0.7, -0.7])
    chosen = "reward=accuracy_reward+format_reward"
    trace, err = load(
        tmp_path / "out", "--tokenizer", find_model("embedded"), "--field", "reward=accuracy_reward", name="b"
    )
    assert "reward is null" not in err
    assert table(trace, "rollouts").sort("rollout_id")["reward"].to_list() == [1.0, 0.0]
    rows[1]["format_reward"] = 0.25
    pl.DataFrame(rows).write_parquet(folder / "completions_00001.parquet")
    trace, _ = load(tmp_path / "out", "--tokenizer", find_model("embedded"), "--field", chosen, name="c")
    assert table(trace, "rollouts").sort("rollout_id")["reward"].to_list() == [1.5, 0.25]


# verl


def verl_rows(step, uid):
    return [
        {"input": QUESTION, "output": f"{n}", "gts": "5", "score": float(n % 2), "step": step, "uid": uid(n)}
        for n in range(4)
    ]


def test_rollouts_of_verl_in_a_folder(load, tmp_path, tokenizer):
    """From version 0.9, uid is the key of the response, {sample}_{rollout}_{output}."""
    for step in (2, 10):
        write(tmp_path / "rollouts" / f"{step}.jsonl", verl_rows(step, lambda n: f"s{n // 2}_{n}_0"))
    trace, err = load(tmp_path / "rollouts", "--tokenizer", tokenizer)
    assert "found verl rollouts in 2 files" in err
    rollouts = table(trace, "rollouts").sort("rollout_id")
    assert rollouts["step"].to_list() == [2] * 4 + [10] * 4
    assert rollouts["group_id"].to_list() == [0, 0, 2, 2, 4, 4, 6, 6]
    assert set(table(trace, "prompts")["prompt"]) == {QUESTION}
    assert set(table(trace, "prompts")["ground_truth"]) == {"5"}


def test_a_stripped_prompt_is_scored_as_the_prompt_that_was_sampled_from(load, tmp_path):
    """The log lacks <user> and <assistant>.

    With the ids of the prompt, the numbers are the same.
    """
    text = verl_rows(1, str)
    for row in text:
        del row["uid"]
    rebuilt, err = load(write(tmp_path / "dump" / "1.jsonl", text), "--model", "embedded", name="rebuilt")
    assert "4 prompts rebuilt with the chat template" in err
    exact = [{"prompt_ids": PROMPT, "response": row["output"], "reward": row["score"]} for row in text]
    given, _ = load(write(tmp_path / "rows.jsonl", exact), "--model", "embedded", name="given")
    found, expected = (table(run, "tokens").sort("rollout_id", "position") for run in (rebuilt, given))
    for column in ("token_id", "logprob", "entropy", "grad_norm"):
        assert found[column].to_list() == pytest.approx(expected[column].to_list(), abs=1e-6)


def test_rows_whose_prompt_is_stripped_are_rebuilt_too(load, tmp_path):
    prompt = "system\nBe brief.\nuser\n1 + 1?\nassistant\n"
    path = write(
        tmp_path / "rows.jsonl", [{"prompt": text, "response": "2", "reward": 1.0} for text in (prompt, "user?")]
    )
    trace, err = load(path, "--tokenizer", SMOLLM)
    assert "1 prompts rebuilt" in err
    assert set(table(trace, "prompts")["prompt"]) == {"system: Be brief.\n\nuser: 1 + 1?", "user?"}


def test_two_runs_are_refused(load, tmp_path):
    for run in "ab":
        write(tmp_path / "dumps" / run / "1.jsonl", verl_rows(1, str))
    _, err = load(tmp_path / "dumps", status=2)
    assert f"2 runs, {tmp_path}/dumps/a and {tmp_path}/dumps/b; import one run at a time" in err


# prime-rl and verifiers


def expected_stream(first, count):
    return [-(first + n) / 100 for n in range(count)]


@pytest.mark.parametrize("layout", ["chunks", "single"])
def test_traces_of_prime_rl_with_annotations(load, tmp_path, tokenizer, layout):
    """Annotations hold the shipped step, advantages, and trainer values.

    The classes of verifiers wrote the episodes.
    """
    run = tmp_path / "prime"
    shutil.copytree(DUMPS / "prime-rl" / "stream-run", run)
    if layout == "single":
        from entrace.analysis.importers.row_files import open_lines

        root = run / "monitors" / "file" / "traces"
        for folder in (root / "stream", root / "annotations" / "orchestrator", root / "annotations" / "trainer"):
            lines = []
            for path in sorted(folder.iterdir()):
                with open_lines(path) as opened:
                    lines += list(opened)
            folder.with_name(f"{folder.name}.jsonl").write_bytes(b"".join(lines))
            shutil.rmtree(folder)
    trace, err = load(run, "--tokenizer", tokenizer)
    assert "traces left out: 1 of agents that are not trained, 1 without sampled tokens, 1 of evaluations" in err
    rollouts = table(trace, "rollouts").sort("rollout_id")
    assert rollouts["step"].to_list() == [2, 2, 3, 3, 3, 3]
    assert rollouts["group_id"].to_list() == [0, 0, 2, 2, 2, 5]
    assert rollouts["reward"].to_list() == [1.5, 0.5, 0.5, 0.5, 1.5, None]
    assert rollouts["is_correct"].to_list() == [True, False, False, False, True, None]
    assert rollouts["advantage"].to_list() == pytest.approx([0.5, -0.5, -0.7, -0.7, 0.7, None])
    assert rollouts["is_kept"].to_list() == [True] * 5 + [False]
    assert rollouts["is_truncated"].to_list() == [False, True, *[False] * 4]
    assert rollouts["logprob_kind"].to_list() == ["trainer"] * 5 + ["engine"]
    assert rollouts["entropy_kind"].to_list() == ["exact"] * 4 + [None] * 2
    assert rollouts["temperature"].to_list() == pytest.approx([0.7] * 6)
    # Null = the policy generated all tokens.
    assert rollouts["response_length"].to_list() == [4, 3, 8, 7, 2, 2]
    assert rollouts["generated_length"].to_list() == [None, None, 4, 5, None, None]
    tokens = table(trace, "tokens").sort("rollout_id", "position")
    sampled = tokens.filter(rollout_id=0)
    assert sampled["sampling_logprob"].to_list() == pytest.approx(expected_stream(1, 4))
    assert sampled["logprob"].to_list() == pytest.approx(expected_stream(2, 4))
    assert sampled["entropy"].to_list() == pytest.approx([0.5, 0.6, 0.7, 0.8])
    with_tool = tokens.filter(rollout_id=2)
    assert with_tool["loss_mask"].to_list() == [True, True, False, False, False, False, True, True]
    assert with_tool["turn"].to_list() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert with_tool["entropy"].to_list() == pytest.approx([0.5, 0.6, *[None] * 4, 0.5, 0.6])
    assert with_tool["policy_version"].to_list() == [3] * 8
    # Generated with two versions of the weights.
    assert tokens.filter(rollout_id=1)["policy_version"].to_list() == [None] * 3
    # The trainer never saw this one, so that the logprobs are those of the engine.
    assert tokens.filter(rollout_id=5)["logprob"].to_list() == pytest.approx(expected_stream(2, 2))
    assert tokens.filter(rollout_id=5)["sampling_logprob"].to_list() == [None, None]
    assert table(trace, "prompts")["ground_truth"].to_list() == ["5", "5"]


def test_exports_of_prime_rl_get_rewards_from_the_rollouts_beside_them(load, tokenizer):
    trace, err = load(DUMPS / "prime-rl" / "export-run", "--tokenizer", tokenizer)
    assert "found prime-rl token exports in 1 file" in err
    assert "1 exported sequences have no rollout with the same tokens" in err
    rollouts = table(trace, "rollouts").sort("rollout_id")
    assert rollouts["reward"].to_list() == [0.5, 1.5, None]
    assert rollouts["advantage"].to_list() == [-0.5, 0.5, 0.5]
    assert rollouts["group_id"].to_list() == [0, 0, 0]
    tokens = table(trace, "tokens").sort("rollout_id", "position").filter(rollout_id=1)
    assert tokens["logprob"].to_list() == pytest.approx(expected_stream(2, 4))
    assert tokens["sampling_logprob"].to_list() == pytest.approx(expected_stream(1, 4))
    assert tokens["entropy"].to_list() == pytest.approx([0.5, 0.6, 0.7, 0.8])


def test_a_step_that_ranks_still_export_is_left_out(load, tmp_path):
    run = tmp_path / "prime"
    shutil.copytree(DUMPS / "prime-rl" / "export-run", run)
    shutil.copytree(run / "token_exports" / "step_2", run / "token_exports" / "step_10")
    (run / "token_exports" / "step_10" / "STABLE").unlink()
    trace, err = load(run)
    assert "left out step_10, which has no STABLE file" in err
    assert table(trace, "rollouts").height == 3


def test_a_stream_of_two_runs_is_refused(load, tmp_path):
    source = DUMPS / "prime-rl" / "export-run" / "rollouts" / "step_2" / "train" / "effective" / "traces.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[1]["run"]["id"] = "run-2"
    path = write(tmp_path / "traces.jsonl", rows)
    _, err = load(path, status=2)
    assert f"{path}: holds runs run-1 and run-2; import one run at a time" in err


@pytest.mark.parametrize("named", [False, True])
def test_the_streams_of_two_runs_in_one_folder_are_refused(load, tmp_path, named):
    """Chunks of both runs have the same names, as do copies of one run.

    The runs also have the same id.
    """
    for run in "ab":
        shutil.copytree(DUMPS / "prime-rl" / "stream-run", tmp_path / "dumps" / run)
    _, err = load(tmp_path / "dumps", *(["--from", "verifiers"] if named else []), status=2)
    roots = [tmp_path / "dumps" / run / "monitors" / "file" / "traces" for run in "ab"]
    assert f"2 runs, {roots[0]} and {roots[1]}; import one run at a time" in err


def test_a_chunk_that_is_there_twice_is_read_once(load, tmp_path):
    """A chunk is compressed before the plain file is removed.

    Other files beside it are not chunks.
    """
    from entrace.analysis.importers.row_files import open_lines

    run = tmp_path / "prime"
    shutil.copytree(DUMPS / "prime-rl" / "stream-run", run)
    expected = table(load(run, name="once")[0], "rollouts").drop("run_id")
    packed = run / "monitors" / "file" / "traces" / "stream" / "00000.jsonl.zst"
    with open_lines(packed) as lines:
        packed.with_suffix("").write_bytes(b"".join(lines))
    packed.with_name("00001.jsonl.tmp").write_text("{")
    trace, err = load(run, name="twice")
    assert "found verifiers traces in 2 files" in err
    assert table(trace, "rollouts").drop("run_id").equals(expected)


# open-instruct


def open_instruct_row(n, **fields):
    return {
        "step": 3,
        "sample_idx": n,
        "prompt_idx": n // 2,
        "prompt_tokens": PROMPT[: 17 + n // 2],
        "response_tokens": [504, 335, 1],
        "reward": 10.0 * (n % 2),
        "advantage": float(2 * (n % 2) - 1),
        "finish_reason": "length" if n == 1 else "stop",
        "dataset": "gsm8k",
        "ground_truth": ["5"],
        "request_info": {"num_calls": 0},
        "logprobs": [-0.1, -0.2, -0.3],
        **fields,
    }


def test_traces_of_open_instruct(load, tmp_path):
    write(tmp_path / "out" / "run__1_metadata.jsonl", [{"run_name": "run__1", "model_name": "m"}])
    write(tmp_path / "out" / "run__1_rollouts_000000.jsonl", [open_instruct_row(n) for n in range(4)])
    trace, err = load(tmp_path / "out", "--correct-at", 10)
    assert "found open-instruct traces in 1 file" in err
    rollouts = table(trace, "rollouts").sort("rollout_id")
    assert rollouts["group_id"].to_list() == [0, 0, 2, 2]
    assert rollouts["is_correct"].to_list() == [False, True] * 2
    assert rollouts["is_truncated"].to_list() == [False, True, False, False]
    assert rollouts["advantage"].to_list() == [-1.0, 1.0] * 2
    assert set(rollouts["logprob_kind"]) == {"engine"}
    assert table(trace, "tokens")["logprob"].to_list() == pytest.approx([-0.1, -0.2, -0.3] * 4)
    assert table(trace, "prompts")["task"].to_list() == ["gsm8k"] * 2
    write(tmp_path / "out" / "other_rollouts_000000.jsonl", [open_instruct_row(0)])
    _, err = load(tmp_path / "out", name="two", status=2)
    assert "2 runs" in err


# ms-swift


def test_completions_of_ms_swift(load, tmp_path, tokenizer, policy):
    """One line is a table; whole prompts are tokenized as they stand."""
    prompt = f"<user>{QUESTION}<assistant>"
    first = {
        "step": ["1", "1"],
        "prompt": [prompt] * 2,
        "completion": ["so we", "2"],
        "Accuracy": [1.0, 0.0],
        "advantages": [0.5, -0.5],
        "entropy": [0.25, 0.75],
    }
    path = write(tmp_path / "out" / "completions.jsonl", [first, {**first, "step": ["2", "2"]}])
    trace, err = load(tmp_path / "out", "--tokenizer", tokenizer)
    assert "found ms-swift completions in 1 file" in err
    rollouts = table(trace, "rollouts").sort("rollout_id")
    assert rollouts["step"].to_list() == [1, 1, 2, 2]
    assert rollouts["reward"].to_list() == [1.0, 0.0] * 2
    assert rollouts["advantage"].to_list() == [0.5, -0.5] * 2
    assert rollouts["entropy_mean"].to_list() == [0.25, 0.75] * 2
    assert table(trace, "tokens")["entropy"].null_count() == len(table(trace, "tokens"))
    scored, _ = load(path, "--model", "embedded", name="scored")
    import torch

    ids = [*PROMPT, *policy.tokenizer("2", add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        log_p = policy.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    expected = float(log_p[len(PROMPT) - 1, ids[len(PROMPT)]])
    assert table(scored, "tokens").filter(rollout_id=1)["logprob"][0] == pytest.approx(expected, abs=1e-4)


# OpenAI-compatible servers


def chat(content, tokens, *, choices=1, **fields):
    logprobs = [
        {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []} for text, value in tokens
    ]
    choice = {
        "message": {"role": "assistant", "content": content},
        "logprobs": {"content": logprobs},
        "finish_reason": "stop",
    }
    listed = [{**choice, "index": n} for n in range(choices)]
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": "m", "choices": listed, **fields}


def test_chat_completions_have_the_texts_of_their_tokens(load, tmp_path):
    tokens = [("wait", -0.5), (",", -0.25), (" so", -9999.0)]
    answer = chat("wait, so", tokens, choices=2)
    request = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0.6}
    other = {**chat("so", [(" so", -0.1)]), "id": "chatcmpl-2"}
    rows = [{"step": 4, "reward": 1.0, "request": request, "response": entry} for entry in (answer, other)]
    trace, err = load(write(tmp_path / "responses.jsonl", rows))
    assert "found responses of an OpenAI-compatible server in 1 file" in err
    rollouts = table(trace, "rollouts").sort("rollout_id")
    assert rollouts["completion"].to_list() == ["wait, so", "wait, so", "so"]
    assert rollouts["step"].to_list() == [4] * 3
    assert rollouts["group_id"].to_list() == [0] * 3
    assert set(rollouts["logprob_kind"]) == {"engine"}
    assert rollouts["entropy_kind"].to_list() == [None] * 3
    assert rollouts["temperature"].to_list() == pytest.approx([0.6] * 3)
    texts = table(trace, "vocab").sort("token_id")
    assert texts["text"].to_list() == ["wait", ",", " so"]
    assert texts["category"][0] == "metacognitive"
    joined = table(trace, "tokens").sort("rollout_id", "position")
    assert joined["logprob"].to_list() == pytest.approx([-0.5, -0.25, None] * 2 + [-0.1])
    assert joined["token_id"].to_list() == [0, 1, 2, 0, 1, 2, 2]
    unknown = read_manifest(trace)["unknown"]
    assert "tokens.category" not in unknown
    assert unknown["tokens.entropy"] == 'the rows have no "entropy"; add --model'


def test_a_model_scores_at_the_recorded_temperature(load, tmp_path, policy):
    import torch

    texts = [policy.vocab().texts[token] for token in (504, 335)]
    answers = [chat("", [(text, -0.5) for text in texts])]
    request = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0.5}
    path = write(tmp_path / "responses.jsonl", [{"request": request, "response": answer} for answer in answers])
    trace, err = load(path, "--model", "embedded")
    assert "recorded logprobs differ by more than rounding from those of embedded" in err
    with torch.no_grad():
        logits = policy.model(torch.tensor([[*PROMPT, 504, 335]])).logits[0, -3:-1].double() / 0.5
    log_p = logits.log_softmax(-1)
    expected = (-(log_p.exp() * log_p).sum(-1)).tolist()
    tokens = table(trace, "tokens").sort("position")
    assert tokens["token_id"].to_list() == [504, 335]
    assert tokens["entropy"].to_list() == pytest.approx(expected, abs=1e-4)
    assert tokens["logprob"].to_list() == [-0.5, -0.5]
    differences = [abs(float(log_p[n, token]) + 0.5) for n, token in enumerate((504, 335))]
    assert read_manifest(trace)["rescored"]["logprob"]["largest"] == pytest.approx(max(differences), abs=1e-4)
    assert table(trace, "rollouts")["temperature"].to_list() == [0.5]
    other = {**request, "temperature": 1.0}
    write(path, [{"request": entry, "response": answers[0]} for entry in (request, other)])
    _, err = load(path, "--model", "embedded", name="two", status=2)
    assert "the dump records temperatures from 0.5 to 1, and a pass has one; add --temperature" in err
    write(path, answers)
    _, err = load(path, "--model", "embedded", name="three", status=2)
    assert 'no "prompt" or "prompt_ids"; --model needs one of them' in err


def test_completions_of_vllm_with_token_ids(load, tmp_path, tokenizer):
    choice = {"index": 0, "text": "so we", "finish_reason": "length", "prompt_token_ids": PROMPT}
    marked = {"tokens": ["token_id:504", "token_id:335"], "token_logprobs": [-0.1, -0.2]}
    plain = {"tokens": ["so", " we"], "token_logprobs": [-0.1, -0.2]}
    rows = [
        {"id": "cmpl-1", "choices": [{**choice, "logprobs": marked}]},
        {"id": "cmpl-2", "choices": [{**choice, "logprobs": plain, "token_ids": [504, 335]}]},
    ]
    path = write(tmp_path / "responses.jsonl", rows)
    trace, _ = load(path)
    tokens = table(trace, "tokens").sort("rollout_id", "position")
    assert tokens["token_id"].to_list() == [504, 335] * 2
    assert tokens["logprob"].to_list() == pytest.approx([-0.1, -0.2] * 2)
    rollouts = table(trace, "rollouts")
    assert rollouts["is_truncated"].to_list() == [True, True]
    assert rollouts["reward"].to_list() == [None, None]
    assert table(trace, "vocab").filter(token_id=335)["text"].item() == " we"
    assert table(trace, "vocab").filter(token_id=3)["text"].item() == "<3>"
    named, _ = load(path, "--tokenizer", tokenizer, name="named")
    assert table(named, "prompts")["prompt"].to_list() == [QUESTION]
    _, err = load(write(tmp_path / "none.jsonl", [chat("so", []) | {"prompt_token_ids": PROMPT}]), name="x", status=2)
    assert '"logprobs" holds no tokens' in err


# Rows with recorded values


def test_rows_may_hold_values_per_token(load, tmp_path):
    row = {
        "prompt_ids": PROMPT,
        "response_ids": [504, 335],
        "reward": 1.0,
        "logprob": [-0.1, None],
        "entropy": [0.5, 0.7],
    }
    lists = {"sampling_logprob": [-0.2, -0.3], "advantage": [0.0] * 18 + [1.0, 2.0], "ref_log_probs": [-1, -2]}
    trace, _ = load(write(tmp_path / "rows.jsonl", [{**row, **lists}]))
    tokens = table(trace, "tokens").sort("position")
    assert tokens["logprob"].to_list() == pytest.approx([-0.1, None])
    assert tokens["sampling_logprob"].to_list() == pytest.approx([-0.2, -0.3])
    assert tokens["reference_logprob"].to_list() == [-1.0, -2.0]
    assert tokens["advantage"].to_list() == [1.0, 2.0]
    rollout = table(trace, "rollouts").row(0, named=True)
    # A mean over some of the tokens would pass for that of all.
    assert (rollout["surprisal_mean"], rollout["ppl"], rollout["advantage"]) == (None, None, None)
    assert rollout["entropy_mean"] == pytest.approx(0.6)
    assert table(trace, "steps")["entropy_token_mean"].item() == pytest.approx(0.6)
    for fields, message in (
        ({"logprob": [-0.1]}, '"logprob" has 1 entries, the response has 2 tokens; ignore it with --field logprob='),
        ({"logprob": [-0.1, 0.5]}, '"logprob" holds 0.5 at index 1, expected a number up to 0.001 or null'),
        ({"entropy": [-1, 0]}, '"entropy" holds -1 at index 0, expected a number of at least 0 or null'),
        ({"step": "final"}, "\"step\" is 'final', expected an integer from 0"),
    ):
        _, err = load(write(tmp_path / "bad.jsonl", [{**row, **fields}]), name="bad", status=2)
        assert message in err


def test_a_key_may_index_a_list(load, tmp_path):
    row = {"prompt_ids": PROMPT, "response_ids": [504], "rewards": [0.0, 2.0]}
    trace, err = load(write(tmp_path / "rows.jsonl", [row]), "--field", "reward=rewards.1")
    assert "read reward from rewards.1" in err
    assert table(trace, "rollouts")["reward"].to_list() == [2.0]


def test_a_prompt_with_special_tokens_is_not_put_into_the_template(load, tmp_path):
    rows = [{"prompt": f"<user>{QUESTION}<assistant>", "response": "2", "reward": 1.0}]
    path = write(tmp_path / "rows.jsonl", rows)
    _, err = load(path, "--model", "embedded", status=2)
    assert "holds the special token <user>" in err
    assert "pass --template '{question}'" in err
    load(path, "--model", "embedded", "--template", "{question}")


# All formats


def test_a_dump_that_is_not_one_is_refused(load, tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "other" / "metrics.jsonl", [{"loss": 1.0, "step": 1}])
    write(tmp_path / "mixed" / "completions.txt", [])
    verl = write(tmp_path / "1.jsonl", verl_rows(1, str))
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "r", "reward": 1}])
    for arguments, message in (
        ([tmp_path / "empty"], "empty: an empty folder; name the folder of a dump or its files"),
        ([tmp_path / "other"], "other: no dump of a known format; found metrics.jsonl; formats: prime-rl, verifiers"),
        ([tmp_path / "other", "--from", "verl"], "other: no files of verl rollouts; found metrics.jsonl"),
        (
            [tmp_path / "other" / "metrics.jsonl"],
            "metrics.jsonl: unknown format, its first row has the keys loss, step",
        ),
        ([verl, rows], "1.jsonl holds verl rollouts, "),
        ([tmp_path / "none.jsonl"], "none.jsonl: no such file"),
        ([rows], "the rows hold text without token ids; add --tokenizer PATH or --model MODEL"),
        ([rows, "--tokenizer", tmp_path], "tokenizer.json: no such file; name a tokenizer.json or the folder"),
        ([rows, "--rewards", tmp_path / "none.jsonl"], "none.jsonl: no such file"),
    ):
        _, err = load(*arguments, name="refused", status=2)
        assert message in err
        assert not (tmp_path / "refused").exists()


STRANGE = (None, True, -1, 0.5, 1e400, "x", [], [None], [[]], ["x"], [10**12], {}, {"a": None}, {"content": 1})


def mutations(value):
    """Yield copies of a value in which one part, at any depth, is strange.

    In a list, the strange part is the first.
    """
    yield from STRANGE
    if isinstance(value, dict):
        for key, part in value.items():
            yield from ({**value, key: found} for found in mutations(part))
            yield {name: other for name, other in value.items() if name != key}
    elif isinstance(value, list) and value:
        yield from ([found, *value[1:]] for found in mutations(value[0]))


def samples():
    """Yield a row of each format, with the name of its file."""
    prime = DUMPS / "prime-rl"
    export = prime / "export-run" / "token_exports" / "step_2" / "rank_0.jsonl"
    traces = prime / "export-run" / "rollouts" / "step_2" / "train" / "effective" / "traces.jsonl"
    nemo = DUMPS / "cases" / "nemo_train_data_step1.jsonl"
    for name, path in (("prime-rl", export), ("verifiers", traces), ("nemo-rl", nemo)):
        row = json.loads(path.read_text().splitlines()[0])
        # Another run would be refused.
        row.pop("run", None)
        yield name, path.name, row
    yield "open-instruct", "a_rollouts_0.jsonl", open_instruct_row(0)
    table = {"step": ["1"], "prompt": ["p"], "completion": ["so"], "accuracy": [1.0], "advantages": [0.5]}
    yield "ms-swift", "completions.jsonl", table
    yield "trl", "completions_1.jsonl", {"step": 1, "prompt": "p", "completion": "c", "r": 1.0, "advantage": 0.5}
    yield "verl", "1.jsonl", verl_rows(1, str)[0]
    yield (
        "openai",
        "a.jsonl",
        {"request": {"messages": [{"role": "user", "content": "p"}]}, "response": chat("a", [("a", -1)])},
    )
    lists = {"logprob": [-0.1], "entropy": [0.5], "advantage": [1.0], "loss_mask": [1], "turn": [0]}
    others = {"id": 1, "answer": "5", "acc": True, "reward_components": {"a": 1.0}, "finish_reason": "stop"}
    yield "rows", "a.jsonl", {"prompt": "p", "response_ids": [5], "response": "c", "reward": 1.0, **lists, **others}


@pytest.mark.parametrize(("name", "file", "row"), samples(), ids=[name for name, *_ in samples()])
def test_a_strange_value_is_a_fault_of_its_row(name, file, row, tmp_path, tokenizer):
    """Every row is read or reported as malformed; no other error is raised."""
    path = write(tmp_path / file, [found for found in mutations(row) if isinstance(found, dict)])
    form = FORMATS[name]
    dump = Dump([path], [path], form)
    codec = TokenizerFile(tokenizer)
    faults = 0
    for place, found, task in dump.rows(tmp_path):
        for using in (codec, None):
            reader = RowReader(ImportSettings(), using, Columns({}, form.needed), form.prompts, has_model=False)
            try:
                reader.read(found, place, task)
            except (BadRowError, InputError):
                faults += 1
    assert faults


def test_from_overrides_what_was_detected(load, tmp_path, tokenizer):
    path = write(tmp_path / "1.jsonl", verl_rows(1, str))
    _, err = load(path, "--from", "rows", "--tokenizer", tokenizer)
    assert "found verl" not in err
    assert read_manifest(tmp_path / "run")["imported"]["format"] == "rows"


def test_an_import_without_a_model_resumes(load, tmp_path, monkeypatch, call):
    rows = [open_instruct_row(n, step=step) for step in (1, 5, 7) for n in range(4)]
    path = write(tmp_path / "run_rollouts_0.jsonl", rows)
    whole, _ = load(path, name="whole")
    end_step = TraceWriter.end_step

    def stop(self, step):
        if step == 7:
            raise KeyboardInterrupt
        end_step(self, step)

    monkeypatch.setattr(importer, "FLUSH_TOKENS", 1)
    monkeypatch.setattr(TraceWriter, "end_step", stop)
    assert call("import", path, "--out", tmp_path / "cut")[0] == 130
    monkeypatch.undo()
    assert read_manifest(tmp_path / "cut")["last_durable_step"] == 5
    load(path, "--resume", name="cut")
    for name in ("tokens", "rollouts", "prompts", "steps", "vocab"):
        assert table(whole, name).drop("run_id").equals(table(tmp_path / "cut", name).drop("run_id"))


def test_a_tokenizer_file_has_the_texts_of_the_model(policy, tokenizer):
    codec = TokenizerFile(tokenizer)
    assert codec.vocabulary() == Vocabulary.of(policy.tokenizer, policy.vocab_size)
    assert codec.encode_prompt(QUESTION) == policy.encode_prompt(QUESTION) == PROMPT
    assert (codec.turn_end, codec.stop_ids) == (policy.turn_end, frozenset(policy.stop_ids.tolist()))
    assert codec.decode([*PROMPT[1:4], 1]) == policy.decode([[*PROMPT[1:4], 1]])[0]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # The response is not in the text, so that what follows the user's turn is not the end of a response.
        ("{% for m in messages if m.role == 'user' %}<user>{{ m.content }}<system>{% endfor %}", 1),
        ("{% for m in messages %}<user>{{ m.content }}<system>{% endfor %}", 2),
    ],
)
def test_the_stop_token_is_the_one_after_a_response(policy, tokenizer, tmp_path, template, expected):
    shutil.copytree(tokenizer, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    policy.tokenizer.chat_template = template
    policy.model.generation_config.eos_token_id = [2, 1]
    codec = TokenizerFile(tmp_path / "model")
    assert (
        (codec.turn_end, codec.stop_ids) == (policy.turn_end, frozenset(policy.stop_ids.tolist())) == (expected, {1, 2})
    )


def test_a_trace_resumes_with_its_own_tokenizer_and_template_only(load, tmp_path, tokenizer, call):
    path = write(tmp_path / "run_rollouts_0.jsonl", [open_instruct_row(n) for n in range(4)])
    whole = ["--tokenizer", tokenizer, "--template", "{question}"]
    for name, given in (("none", []), ("own", ["--tokenizer", tokenizer]), ("templated", whole)):
        load(path, *given, name=name)
        load(path, *given, "--resume", name=name)
    for name, given, changed in (
        ("none", ["--tokenizer", tokenizer], "tokenizer"),
        ("own", ["--tokenizer", SMOLLM], "tokenizer"),
        ("own", [], "tokenizer"),
        ("own", whole, "template"),
        ("templated", ["--tokenizer", tokenizer], "template"),
    ):
        status, _, err = call("import", path, *given, "--resume", "--out", tmp_path / name)
        assert status == 2
        assert f"imported with another value of {changed}; choose another folder" in err


def test_a_template_needs_what_tokenizes_it(load, tmp_path):
    path = write(tmp_path / "run_rollouts_0.jsonl", [open_instruct_row(0)])
    _, err = load(path, "--template", "{question}", status=2)
    assert "--template: needs --tokenizer PATH or --model MODEL" in err
    assert not (tmp_path / "run").exists()


def test_every_format_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "import.md").read_text()
    for name in FORMATS:
        assert f"`{name}`" in page


def test_a_recorded_trace_is_verified_and_read(load, tmp_path, call):
    trace, _ = load(write(tmp_path / "run_rollouts_0.jsonl", [open_instruct_row(n) for n in range(4)]))
    assert call("verify", trace)[0] == 0
    found = entrace.open_runs(trace).sql("select count(*), count(entropy), count(logprob) from tokens")
    assert found.row(0) == (12, 0, 12)


# Storage


@pytest.mark.parametrize("dump", ["prime-rl/export-run", "prime-rl/stream-run", "trl"])
def test_a_dump_in_a_storage_is_read_as_a_local_one(load, dump, tokenizer):
    url = f"memory://{uuid.uuid4().hex}/{dump}"
    for path in (DUMPS / dump).rglob("*"):
        if path.is_file():
            to_place(f"{url}/{path.relative_to(DUMPS / dump)}").write_bytes(path.read_bytes())
    options = ["--tokenizer", SMOLLM if dump == "trl" else tokenizer]
    sources = [f"{root}/completions_00001.parquet" if dump == "trl" else root for root in (url, str(DUMPS / dump))]
    runs = [load(source, *options, name=f"run{i}")[0] for i, source in enumerate(sources)]
    for name in ("tokens", "rollouts", "prompts", "steps"):
        found, expected = (table(run, name).drop("run_id") for run in runs)
        assert found.equals(expected), name
    assert all(name.startswith("memory://") for name in read_manifest(runs[0])["imported"]["files"])
