import json
import math
import shutil

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

import entrace
from entrace.analysis.importers import run as importer
from entrace.analysis.importers.collect import collect
from entrace.analysis.importers.dump import Dump
from entrace.analysis.importers.settings import ImportSettings
from entrace.analysis.trace import InputError, TraceWriter, read_manifest, write_manifest
from entrace.trainer.config import PolicyConfig, load_config
from entrace.trainer.external.policy_codec import PolicyCodec
from entrace.trainer.external.teacher_forcing import PassSettings, TeacherForcing
from entrace.trainer.faults import TrainingError
from entrace.trainer.model.policy import Policy
from entrace.trainer.train import train

from .conftest import SMALL, table

PROMPT = "What is 1 + 1?"
MEASURED = ("logprob", "entropy", "grad_norm", "advantage")


def row(**fields):
    return {"prompt": PROMPT, "response": "1 + 1 = 2", "reward": 1.0, **fields}


def write(path, rows):
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def read_rollouts(paths, policy, **settings):
    """Read files for a pass of ``policy``."""
    dump = Dump.find(paths, has_fields=bool(settings.get("fields")))
    return collect(dump, ImportSettings(**settings), PolicyCodec(policy), has_model=True)


def score_all(read, policy, run):
    settings = PassSettings(policy=PolicyConfig())
    importer.record(read, ImportSettings(), run, codec=PolicyCodec(policy), evaluator=TeacherForcing(policy, settings))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a run of two steps, and its responses as plain rows with token ids."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(load_config("tiny", [*SMALL, "steps=2", "policy.device=cpu"]), run, {"study": "s", "arm": "none"})
    tokens = table(run, "tokens").sort("rollout_id", "position")
    ids = tokens.group_by("rollout_id", maintain_order=True).agg(response_ids="token_id")
    rollouts = table(run, "rollouts").join(ids, on="rollout_id").join(table(run, "prompts"), on="prompt_id")
    kept = ["prompt", "response_ids", "completion", "reward", "is_correct", "step", "ground_truth", "answer"]
    return run, rollouts.sort("rollout_id").select(*kept, "is_truncated", "task").to_dicts()


def without(rows, *names):
    return [{key: value for key, value in entry.items() if key not in names} for entry in rows]


def test_scores_equal_what_was_recorded_while_sampling(trained, tmp_path, call):
    run, rows = trained
    status, _, err = call(
        "import", "--model", "embedded", write(tmp_path / "rows.jsonl", rows), "--out", tmp_path / "imported"
    )
    assert status == 0, err
    # The first step was sampled by the model that scores; what the second was sampled by is another.
    for name, key, columns in (
        ("tokens", ("rollout_id", "position"), MEASURED),
        ("rollouts", ("rollout_id",), ("entropy_mean", "ppl", "ppl_z", "advantage", "reward")),
    ):
        own, imported = (table(folder, name).filter(step=1).sort(key) for folder in (run, tmp_path / "imported"))
        for column in columns:
            expected, found = (torch.from_numpy(frame[column].to_numpy().copy()) for frame in (own, imported))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for column in ("category", "token_id", "response_length") if name == "tokens" else ("defects", "answer"):
            assert own[column].to_list() == imported[column].to_list()
    own, imported = (table(folder, "steps").sort("step") for folder in (run, tmp_path / "imported"))
    for column in ("reward_mean", "accuracy", "format_rate", "tokens"):
        assert imported[column].to_list() == pytest.approx(own[column].to_list(), abs=1e-6)
    assert own["entropy_token_mean"][0] == pytest.approx(imported["entropy_token_mean"][0], abs=1e-5)
    assert own["entropy_token_mean"][1] != pytest.approx(imported["entropy_token_mean"][1], abs=1e-5)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """The embedded policy with other weights."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree("data/base-policy", folder)
    weights = load_file(folder / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    changed = {k: v + 0.02 * torch.randn(v.shape, generator=noise).to(v.dtype) for k, v in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_reference_policy_adds_its_values(trained, other_model, tmp_path, call):
    _, rows = trained
    path = write(tmp_path / "rows.jsonl", rows)
    both, alone = tmp_path / "both", tmp_path / "alone"
    command = ("import", path, "--model", "embedded", "--out", both)
    status, _, err = call(*command, "--reference", other_model)
    assert status == 0, err
    assert call("import", path, "--model", other_model, "--out", alone)[0] == 0
    found, expected = (table(run, "tokens").sort("rollout_id", "position") for run in (both, alone))
    for name in ("logprob", "entropy"):
        np.testing.assert_allclose(found[f"reference_{name}"], expected[name], rtol=1e-5, atol=1e-6)
        assert np.abs(found[f"reference_{name}"].to_numpy() - found[name].to_numpy()).max() > 0.01
    unknown = read_manifest(both)["unknown"]
    assert not {"tokens.reference_logprob", "tokens.reference_entropy"} & set(unknown)
    assert entrace.open_runs(both).query("entropy_persistence").height == 2
    runs = entrace.open_runs(alone)
    assert "reference_entropy" not in table(alone, "tokens").columns
    assert runs.why_empty("entropy_persistence").endswith("add --model and --reference")
    assert "imported with another value of reference" in call(*command, "--resume")[2]


def test_recorded_values_of_the_reference_policy_stay(trained, other_model, tmp_path, call):
    _, rows = trained
    known = [dict(row, reference_logprobs=[-1.5] * len(row["response_ids"])) for row in rows[:8]]
    path = write(tmp_path / "rows.jsonl", [*known, *rows[8:]])
    options = ("--model", "embedded", "--reference", other_model, "--out", tmp_path / "run")
    assert call("import", path, *options)[0] == 0
    tokens = table(tmp_path / "run", "tokens")
    recorded = sum(len(row["response_ids"]) for row in known)
    assert (tokens["reference_logprob"] == -1.5).sum() == recorded
    assert tokens["reference_logprob"].null_count() == tokens["reference_entropy"].null_count() == 0


def test_a_reference_policy_needs_a_model_with_its_tokens(trained, other_model, tmp_path, call):
    path = write(tmp_path / "rows.jsonl", trained[1])
    status, _, err = call("import", path, "--reference", "embedded", "--out", tmp_path / "run")
    assert status == 2
    assert "--reference: needs --model MODEL" in err
    strange = tmp_path / "strange"
    shutil.copytree(other_model, strange)
    tokenizer = json.loads((strange / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = [name for name in vocab if name.isdigit()][:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (strange / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = ("--model", "embedded", "--reference", strange, "--out", tmp_path / "run")
    status, _, err = call("import", path, *options)
    assert status == 2
    assert f"--reference: {strange} has other tokens than embedded" in err


@pytest.mark.parametrize("option", ["--model", "--reference"])
def test_a_model_that_is_not_there_is_named_by_its_option(trained, tmp_path, call, option):
    given = {"--model": "embedded", "--reference": "embedded", option: tmp_path / "nowhere"}
    options = [word for pair in given.items() for word in pair]
    status, _, err = call("import", write(tmp_path / "rows.jsonl", trained[1]), *options, "--out", tmp_path / "run")
    assert (status, err) == (2, f"entrace: {option}: no model folder at {tmp_path / 'nowhere'}\n")


def test_text_alone_is_tokenised_to_what_was_sampled(trained, tmp_path, call):
    _, rows = trained
    paths = {"ids": rows, "text": without(rows, "response_ids")}
    for name, entries in paths.items():
        assert (
            call("import", "--model", "embedded", write(tmp_path / f"{name}.jsonl", entries), "--out", tmp_path / name)[
                0
            ]
            == 0
        )
    exact, text = (table(tmp_path / name, "tokens").sort("rollout_id", "position") for name in paths)
    assert exact["token_id"].to_list() == text["token_id"].to_list()
    assert exact["logprob"].to_list() == pytest.approx(text["logprob"].to_list(), abs=1e-5)
    assert read_manifest(tmp_path / "ids")["imported"]["response_tokens"] == "as given"
    assert "anew" in read_manifest(tmp_path / "text")["imported"]["response_tokens"]


@pytest.mark.slow
def test_every_analysis_command_reads_an_imported_trace(trained, tmp_path, call):
    _, rows = trained
    run = tmp_path / "imported"
    assert call("import", "--model", "embedded", write(tmp_path / "rows.jsonl", rows), "--out", run)[0] == 0
    status, out, err = call("claims", run, "--json")
    assert status == 0
    assert "recorded quantities are unknown; see `unknown` in run.json" in err
    verdicts = json.loads(out)["verdicts"]
    assert {verdict["verdict"] for verdict in verdicts} == {"not recorded"}
    reasons = {verdict["claim"]: verdict["why"] for verdict in verdicts}
    assert "2 steps; a boundary needs 20" in reasons["S3"]
    # A fixed model's entropy must not pass for that of the policy in training.
    for claim in ("S1", "E1", "S2"):
        assert reasons[claim] == "entropy is that of the importing model, not of the policies that sampled"
    assert "no checkpoint" in reasons["I2"]
    assert call("report", run, "--out", tmp_path / "report")[0] == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "the rows hold what was sampled, not what an update did" in page
    assert (tmp_path / "report" / "entropy_by_position.png").exists()
    status, out, _ = call("sql", run, "select loss, accuracy from steps order by step", "--format", "json")
    assert [entry["loss"] for entry in json.loads(out)] == [None, None]
    opened = entrace.open_runs(run)
    entrace.figures.stage_dynamics(opened)
    with pytest.raises(InputError, match="the rows hold no held-out evaluation"):
        entrace.figures.ablation_curves(opened)


def test_three_rows_by_hand(tmp_path, call, policy):
    rows = [row(), row(response="2", reward=0.0), row(prompt="What is 2 + 2?", response="4", reward=0.5)]
    assert (
        call(
            "import",
            "--model",
            "embedded",
            write(tmp_path / "rows.jsonl", rows),
            "--out",
            tmp_path / "run",
            "--correct-at",
            0.5,
        )[0]
        == 0
    )
    run = tmp_path / "run"
    rollouts = table(run, "rollouts").sort("rollout_id")
    a = math.sqrt(0.5)
    assert rollouts["advantage"].to_list() == pytest.approx([a, -a, 0], abs=1e-5)
    assert rollouts["is_correct"].to_list() == [True, False, True]
    assert rollouts["sample_index"].to_list() == [0, 1, 0]
    assert rollouts["prompt_id"].to_list() == ["prompt-000001", "prompt-000001", "prompt-000002"]
    assert rollouts["is_kept"].to_list() == [True, True, False]
    for name in ("has_answer", "is_truncated", "policy_step", "answer"):
        assert rollouts[name].to_list() == [None] * 3
    step = table(run, "steps").row(0, named=True)
    expected = {"step": 1, "reward_mean": 0.5, "accuracy": 2 / 3, "groups_kept": 1, "groups_dropped": 1}
    assert {name: step[name] for name in expected} == pytest.approx(expected)
    assert step["format_rate"] is None
    assert table(run, "prompts")["task"].to_list() == ["rows", "rows"]
    # Token by token: softmax of the model's own logits, in float64.
    tokens = table(run, "tokens").filter(rollout_id=1)
    ids = policy.encode_prompt(PROMPT) + tokens["token_id"].to_list()
    with torch.no_grad():
        log_p = policy.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)[-1 - len(tokens) : -1]
    chosen = log_p.gather(1, torch.tensor(tokens["token_id"].to_list())[:, None])[:, 0]
    assert tokens["logprob"].to_list() == pytest.approx(chosen.tolist(), abs=1e-4)
    assert tokens["entropy"].to_list() == pytest.approx((-(log_p.exp() * log_p).sum(-1)).tolist(), abs=1e-4)
    unknown = read_manifest(run)["unknown"]
    assert unknown["rollouts.has_answer"] == 'the rows have no "answer"'
    assert {"steps.loss", "tokens.logprob_after", "evals", "prompts.ground_truth"} <= unknown.keys()
    assert "policy.entropy" in unknown
    nulls = {f"rollouts.{name}" for name in rollouts.columns if rollouts[name].null_count() == 3}
    assert nulls == {name for name in unknown if name.startswith("rollouts.")}


def test_what_others_call_the_fields_and_steps_out_of_order(tmp_path, call):
    rows = [
        {"input": PROMPT, "output": "2", "gts": "2", "score": 1.0, "step": 20},
        {"input": PROMPT, "output": "3", "gts": "2", "score": 0.0, "step": 3},
        {"input": PROMPT, "output": "4", "gts": "2", "score": 0.0, "step": 20},
    ]
    status, _, err = call(
        "import", "--model", "embedded", write(tmp_path / "verl.jsonl", rows), "--out", tmp_path / "run"
    )
    assert status == 0
    assert "prompt from input" in err
    rollouts = table(tmp_path / "run", "rollouts").sort("rollout_id")
    assert rollouts["step"].to_list() == [3, 20, 20]
    assert rollouts["completion"].to_list() == ["3", "2", "4"]
    assert rollouts["prompt_id"].n_unique() == 1
    # However often a prompt comes back, it is one row.
    assert table(tmp_path / "run", "prompts").height == 1
    # Steps between those that were kept are not missing.
    assert "missing" not in call("claims", tmp_path / "run")[2]


def test_parquet_of_several_files_with_chats_and_given_advantages(tmp_path, call):
    turns = [{"role": "user", "content": PROMPT}]
    for step in (1, 2):
        rows = [
            {
                "step": step,
                "prompt": turns,
                "completion": [{"role": "assistant", "content": text}],
                "ok": r,
                "advantage": a,
            }
            for text, r, a in (("2", 1.0, 0.25), ("3", 0.0, -4.0))
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{step}.parquet")
    files = [tmp_path / "1.parquet", tmp_path / "2.parquet"]
    assert call("import", "--model", "embedded", *files, "--field", "reward=ok", "--out", tmp_path / "run")[0] == 0
    rollouts = table(tmp_path / "run", "rollouts").sort("rollout_id")
    assert rollouts["advantage"].to_list() == [0.25, -4.0] * 2
    assert rollouts["step"].to_list() == [1, 1, 2, 2]


def test_groups_that_share_a_prompt_stay_apart(tmp_path, call):
    rows = [row(group=name, reward=reward) for name, reward in (("a", 1), ("b", 1), ("a", 0), ("b", 1))]
    assert (
        call("import", "--model", "embedded", write(tmp_path / "rows.jsonl", rows), "--out", tmp_path / "run")[0] == 0
    )
    rollouts = table(tmp_path / "run", "rollouts").sort("rollout_id")
    assert rollouts["prompt_id"].to_list() == ["prompt-000001"] * 2 + ["prompt-000002"] * 2
    assert rollouts["group_id"].to_list() == [0, 0, 2, 2]
    assert rollouts["is_kept"].to_list() == [True, True, False, False]
    tokens = table(tmp_path / "run", "tokens").join(rollouts.select("rollout_id", kept="is_kept"), on="rollout_id")
    assert tokens["is_kept"].to_list() == tokens["kept"].to_list()


BAD = {
    b"{": "not JSON",
    b'{"prompt": "\xff", "response": "x", "reward": 1}': "not JSON, 'utf-8' codec",
    b"[1]": "a list, expected an object",
    b'{"prompt": "p", "response": "r", "reward": NaN}': '"reward" is nan, expected a finite number',
    b'{"prompt": "p", "response": "r", "reward": 1e999}': '"reward" is inf',
    b'{"prompt": "p", "response": "r", "reward": 1e31}': "up to 1e+30",
    b'{"prompt": "p", "response": "r", "reward": 1%s}' % (b"0" * 400): "expected a finite number",
    b'{"prompt": "p", "response": "r", "reward": "one"}': '"reward" is text, expected a number',
    b'{"prompt": "p", "response": "r", "reward": "nan"}': '"reward" is text, expected a number',
    b'{"prompt": "p", "response": "r", "reward": null}': '"reward" is null, expected a number',
    b'{"prompt": "p", "response": "r", "score": null}': '"score" is null, expected a number',
    b'{"prompt": null, "response": "r", "reward": 1}': '"prompt" is null, expected text or a list of turns',
    b'{"prompt": "p", "completion": null, "reward": 1}': '"completion" is null, expected text',
    b'{"prompt": "p", "completion": [{"content": null}], "reward": 1}': '"completion.content" is null, expected text',
    b'{"prompt": "p", "response": "r"}': (
        'no "reward" (--field reward=KEY names the key of reward; --field reward= imports without)'
    ),
    b'{"prompt": "p", "response": "r", "rewards": 1}': 'no "reward"; did you mean "rewards"? (--field reward=KEY',
    b'{"prompt": "p", "response": "r", "xyz": 1, "k": 2}': 'no "reward"; found: k, xyz (--field reward=KEY',
    b'{"prompt": "p", "respnse": "r", "reward": 1}': 'no "response"; did you mean "respnse"?',
    b'{"response": "r", "reward": 1}': 'no "prompt"',
    b'{"prompt": "p", "response": "", "reward": 1}': '"response" is empty; with "is_truncated": false',
    b'{"prompt": "p", "response": "", "reward": 1, "truncated": true}': '"response" is empty',
    b'{"prompt": "p", "response": 5, "reward": 1}': '"response" is a number',
    b'{"prompt": "p", "response": "\\ud800", "reward": 1}': "half a character",
    b'{"prompt": "p", "response_ids": [], "reward": 1}': '"response_ids" is empty',
    b'{"prompt": "p", "response_ids": [3, 100000], "reward": 1}': '"response_ids" holds 100000 at index 1',
    b'{"prompt": "p", "response_ids": [-1], "reward": 1}': "holds -1 at index 0",
    b'{"prompt": "p", "response_ids": [true], "reward": 1}': "holds True at index 0",
    b'{"prompt_ids": [], "response": "r", "reward": 1}': '"prompt_ids" is empty',
    b'{"prompt": [{"role": "user"}], "response": "r", "reward": 1}': "a turn that is no",
    b'{"prompt": "p", "output": "r", "completion": "r", "reward": 1}': "may both be response",
    b'{"prompt": "p", "response": "r", "reward": 1, "step": 1.5}': '"step" is 1.5, expected an integer',
    b'{"prompt": "p", "response": "r", "reward": 1, "step": -1}': '"step" is -1',
    b'{"prompt": "p", "response": "r", "reward": 1, "step": 99999999999999999999999999}': '"step" is 9999',
    b'{"prompt": "p", "response": "r", "reward": 1, "is_truncated": "no"}': "expected true or false",
    b'{"prompt": "p", "response": "r", "reward": 1, "acc": 0.5}': (
        '"acc" is 0.5, expected true or false; ignore it with --field is_correct='
    ),
    b'{"prompt": "p", "response": "r", "reward": 1, "group": [1]}': '"group" is a list',
    b'{"prompt": "p", "response": "r", "reward": 1, "group": 1.5}': '"group" is 1.5, expected text or an integer',
    b'{"prompt": "p", "response": "r", "reward": 1, "loss_mask": 1}': '"loss_mask" is a number, expected a list',
    b'{"prompt": "p", "response": "r", "reward": 1, "loss_mask": [1, 0]}': '"loss_mask" excludes tokens of a text',
    b'{"prompt": "p", "response_ids": [5, 6], "reward": 1, "loss_mask": [1]}': (
        '"loss_mask" has 1 entries, "response_ids" has 2'
    ),
    b'{"prompt": "p", "response_ids": [5, 6], "reward": 1, "loss_mask": [1, 0.5]}': "holds 0.5 at index 1",
    b'{"prompt": "p", "response_ids": [5, 6], "reward": 1, "tool_mask": [0, 0]}': '"tool_mask" excludes every token',
    b'{"prompt": "p", "response": "r", "reward": 1, "task": 7}': '"task" is a number',
    b'{"prompt": "p", "response": "r", "reward": 1, "temperature": -1}': (
        '"temperature" is -1, expected a number of at least 0; ignore it with --field temperature='
    ),
    b'{"prompt": "p", "response": "r", "reward": 1, "temperature": "-.5"}': "is '-.5', expected a number",
}


@pytest.mark.parametrize(("line", "message"), BAD.items(), ids=range(len(BAD)))
def test_a_malformed_row_is_named(line, message, tmp_path, policy):
    path = write(tmp_path / "rows.jsonl", [line])
    with (
        pytest.raises(InputError) as caught,
        read_rollouts([path], policy),
    ):
        pass
    assert f"{path}, line 1: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_row_unlike_those_before_it_is_malformed(tmp_path, policy):
    rows = [row(step=1, group="a"), row(group="a"), row(step=1, prompt="Another?", group="a"), row(step=1, reward=None)]
    rows[1]["step"] = None
    path = write(tmp_path / "rows.jsonl", [*rows, {**row(step=1, group="b", reward=None), "score": 1}])
    with (
        pytest.raises(InputError) as caught,
        read_rollouts([path], policy),
    ):
        pass
    for message in (
        'line 2: "step" is null, unlike earlier rows',
        "line 3: group 'a' holds another prompt at step 1",
        'line 4: no "group", unlike earlier rows',
        'line 5: reward is in "score" here, but in "reward" in earlier rows',
    ):
        assert message in str(caught.value)


FOREIGN = {
    "dump.pt": (b"PK\x03\x04\x00\x00", "found a pickle, which can run code when it is loaded"),
    "saved": (b"PK\x03\x04\x00\x00", "found a zip archive; one that torch.save wrote is a pickle, which can run code"),
    "dump.jsonl": (b"\x80\x04\x95", "found a pickle, which can run code when it is loaded"),
    "old.pkl": (b"(lp0\n.", "found a pickle"),
    "rows": (b"PAR1\x15\x04", "found Parquet; rename the file to .parquet"),
    "rows.jsonl.gz": (b"\x1f\x8b\x08", "found gzip; decompress the file"),
    "packed": (b"\x28\xb5\x2f\xfd", "found zstd; rename the file to .jsonl.zst"),
    "rows.arrow": (b"ARROW1\x00\x00", "found an Arrow file; write Parquet"),
    "rows.csv": (b"prompt,response\n", "found a table of text; write Parquet"),
    "rows.json": (b"[\n  {}\n]", "found a JSON array; write one object per line"),
    "wide.jsonl": ('{"prompt": "p"}'.encode("utf-16"), "found text in UTF-16; write UTF-8"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_format_is_named(name, tmp_path, policy):
    content, message = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    expected = f"{tmp_path / name}: expected JSONL or Parquet, one response per row; {message}"
    with (
        pytest.raises(InputError) as caught,
        read_rollouts([tmp_path / name], policy),
    ):
        pass
    assert str(caught.value).startswith(expected)


def test_a_field_that_no_row_has_is_named(tmp_path, policy):
    path = write(tmp_path / "rows.jsonl", [row(accuracy=True)])
    with (
        pytest.raises(
            InputError, match=r'--field is_correct=acuracy: no row has .* "acuracy"; did you mean "accuracy"'
        ),
        read_rollouts([path], policy, fields={"is_correct": "acuracy"}),
    ):
        pass


def read_all(path, policy, **fields):
    with read_rollouts([path], policy, fields=fields) as read:
        return list(read.in_order()), list(read.remarks)


def test_a_verdict_may_be_text_or_left_out(tmp_path, policy):
    values = ["True", "False", "true", "1", "0", 1.0, 0, True]
    expected = [True, False, True, True, False, True, False, True]
    path = write(tmp_path / "rows.jsonl", [row(reward=0.0, acc=value) for value in values])
    found, remarks = read_all(path, policy)
    assert [rollout.is_correct for rollout in found] == expected
    assert remarks == ["read is_correct from acc"]
    found, remarks = read_all(path, policy, is_correct="")
    assert [rollout.is_correct for rollout in found] == [False] * 8
    assert remarks == ["no responses count as right by reward >= 1; see --correct-at"]


def test_numbers_may_be_text(tmp_path, policy):
    values = {"1.0": 1.0, "-1": -1.0, " .5": 0.5, "1e-2": 0.01}
    path = write(tmp_path / "rows.jsonl", [row(reward=value) for value in values])
    assert [rollout.reward for rollout in read_all(path, policy)[0]] == list(values.values())


def test_a_temperature_of_0_is_greedy_decoding(tmp_path, policy):
    path = write(tmp_path / "rows.jsonl", [row(temperature=value) for value in (0, 0.7, None)])
    assert [rollout.temperature for rollout in read_all(path, policy)[0]] == [0.0, 0.7, None]
    write(path, [row(temperature=-1)])
    assert [rollout.temperature for rollout in read_all(path, policy, temperature="")[0]] == [None]


def test_groups_of_one_response_each_fall_back_to_the_prompt(tmp_path, policy):
    """A group per response has no advantage; a group that the user chose is kept."""
    path = write(tmp_path / "rows.jsonl", [row(uid=float(i), reward=i) for i in range(2)])
    found, remarks = read_all(path, policy)
    assert [rollout.group_id for rollout in found] == [0, 0]
    assert remarks == ["read group from uid", '"uid" differs for every response; groups share prompt and step instead']
    found, remarks = read_all(path, policy, group="uid")
    assert [rollout.group_id for rollout in found] == [0, 1]
    remark = "all advantages are 0: no two responses share uid; --field group= groups by prompt and step"
    assert remark in remarks
    found, remarks = read_all(path, policy, group="")
    assert [rollout.group_id for rollout in found] == [0, 0]
    assert remarks == []


def test_what_verifiers_write_without_an_answer_is_not_one(tmp_path, policy):
    answers = ["[INVALID]", "[invalid]", "[invalidanswer]", "[No answer]", " ", "", None, math.nan]
    found, _ = read_all(write(tmp_path / "rows.jsonl", [row(pred=answer) for answer in answers]), policy)
    assert [(rollout.answer, rollout.has_answer) for rollout in found] == [(None, False)] * 8
    answers = ["2", "[1, 2]", "no answer", 0, "None"]
    found, _ = read_all(write(tmp_path / "rows.jsonl", [row(pred=answer) for answer in answers]), policy)
    assert [rollout.answer for rollout in found] == ["2", "[1, 2]", "no answer", "0", "None"]


def test_an_empty_response_that_was_not_truncated_is_one_stop_token(tmp_path, policy, call):
    rows = [row(is_truncated=False) for _ in range(3)]
    rows[0]["response"], rows[1]["response"] = "", [{"role": "assistant", "content": ""}]
    rows[2] = {"prompt": PROMPT, "response_ids": [], "reward": 0, "is_truncated": False}
    found, _ = read_all(write(tmp_path / "rows.jsonl", rows), policy)
    assert [(rollout.completion, rollout.response_ids) for rollout in found] == [("", [1])] * 3
    assert call("import", "--model", "embedded", tmp_path / "rows.jsonl", "--out", tmp_path / "run")[0] == 0
    tokens = table(tmp_path / "run", "tokens")
    assert tokens.select("position", "response_length", "token_id").rows() == [(0, 1, 1)] * 3
    blank = policy.tokenizer(" \n", add_special_tokens=False)["input_ids"]
    found, _ = read_all(write(tmp_path / "rows.jsonl", [row(response=" \n")]), policy)
    assert found[0].response_ids == blank


def test_any_stop_token_ends_a_response_and_the_template_says_which_is_appended(tmp_path, policy):
    policy.tokenizer.eos_token = "<system>"
    policy.model.generation_config.eos_token_id = [2, 1]
    policy.tokenizer.chat_template = policy.tokenizer.chat_template.replace("{{ eos_token }}", "<eos>")
    rows = [row(response=text, is_truncated=False) for text in ("2", "2<eos>", "2<system>")]
    found, _ = read_all(write(tmp_path / "rows.jsonl", rows), policy)
    two = policy.tokenizer("2", add_special_tokens=False)["input_ids"]
    assert [rollout.response_ids for rollout in found] == [[*two, 1], [*two, 1], [*two, 2]]


def test_tokens_outside_the_loss_mask_are_rows_without_values(tmp_path, call):
    prompt, ids, mask = [3, 265, 4], [504, 335, 225, 63, 18, 321], [1, 1, 0, 0, 1, 1]
    whole = {"prompt_ids": prompt, "response_ids": ids, "reward": 1.0, "group": "a"}
    other = {**whole, "response_ids": ids[:2], "reward": 0.0}
    masked = [{**whole, "loss_mask": mask}, {**other, "loss_mask": None}]
    covers_prompt = [{**whole, "response_mask": [False] * 3 + [bool(m) for m in mask]}, other]
    for name, rows in (("whole", [whole, other]), ("masked", masked), ("covers_prompt", covers_prompt)):
        path = write(tmp_path / f"{name}.jsonl", rows)
        status, _, err = call("import", "--model", "embedded", path, "--out", tmp_path / name)
        assert status == 0, err
        assert ("marks 2 of 8 tokens as context" in err) == (name != "whole")
    is_generated = pl.Series([True, True, False, False, *[True] * 4])
    expected = table(tmp_path / "whole", "tokens").sort("rollout_id", "position")
    assert expected["loss_mask"].to_list() == [None] * 8
    assert table(tmp_path / "whole", "rollouts")["generated_length"].to_list() == [None] * 2
    generated = expected.filter(is_generated)
    for name in ("masked", "covers_prompt"):
        tokens = table(tmp_path / name, "tokens").sort("rollout_id", "position")
        assert tokens["loss_mask"].to_list() == [*is_generated.to_list()[:6], None, None]
        for column in ("token_id", "position", "response_length"):
            assert tokens[column].to_list() == expected[column].to_list()
        for column in MEASURED:
            found = tokens[column].to_list()
            assert found[2:4] == [None, None]
            assert found[:2] + found[4:] == pytest.approx(generated[column].to_list(), abs=1e-5)
        # Without the view, a mean over the files is that of the generated tokens as well.
        assert tokens["entropy"].mean() == pytest.approx(generated["entropy"].mean(), rel=1e-5)
        rollouts = table(tmp_path / name, "rollouts").sort("rollout_id")
        assert rollouts.select("response_length", "generated_length").rows() == [(6, 4), (2, None)]
        assert rollouts["ppl"][0] == pytest.approx(math.exp(-generated["logprob"].head(4).mean()), rel=1e-5)
        assert rollouts["entropy_mean"][0] == pytest.approx(generated["entropy"].head(4).mean(), rel=1e-5)
        assert rollouts["completion"][0] == "so we. so"
        step = table(tmp_path / name, "steps").row(0, named=True)
        assert step["tokens"] == 6
        assert step["entropy_token_mean"] == pytest.approx(generated["entropy"].mean(), rel=1e-5)
        assert read_manifest(tmp_path / name)["imported"]["response_tokens"] == "as given, without 2 outside loss_mask"
        opened = entrace.open_runs(tmp_path / name)
        counts = opened.sql("select (select count(*) from tokens), (select count(*) from response_tokens)")
        assert counts.row(0) == (6, 8)


def test_a_prompt_that_holds_its_beginning_of_sequence_gets_no_second_one(tmp_path, policy):
    specials = [("<system>", 2)]
    policy.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<system> $A", special_tokens=specials
    )
    policy.template = "{question}"
    bare = policy.tokenizer("1 + 1 =", add_special_tokens=False)["input_ids"]
    rows = [row(prompt=text) for text in ("<system><user>1 + 1 =<assistant>", "1 + 1 =")]
    found, _ = read_all(write(tmp_path / "rows.jsonl", rows), policy)
    assert [rollout.prompt_ids for rollout in found] == [[2, 3, *bare, 4], [2, *bare]]


def test_a_fault_of_all_rows_is_said_once(tmp_path, policy):
    path = write(tmp_path / "rows.jsonl", [{"question": PROMPT, "response": "2", "reward": 1}] * 7)
    with (
        pytest.raises(InputError) as caught,
        read_rollouts([path], policy),
    ):
        pass
    fault = 'no "prompt"; found: question (--field prompt=KEY names the key of prompt)'
    remedy = "fix them, or skip them with --skip-bad-rows"
    assert str(caught.value) == f"7 of 7 rows are malformed ({path}, line 1: {fault}; ...); {remedy}"


def test_skipping_bad_rows_leaves_no_group_in_part(tmp_path, call):
    groups = {name: [row(group=name, response=f"{n} = {n}", reward=n % 2) for n in range(3)] for name in "abcd"}
    # A row of group b is malformed, and one that cannot be read may be of any group: c lacks one.
    rows = [*groups["a"], *groups["b"][:2], row(group="b", response=""), *groups["c"][:2], b"{", *groups["d"]]
    path = write(tmp_path / "rows.jsonl", rows)
    status, _, err = call("import", "--model", "embedded", path, "--out", tmp_path / "run")
    assert status == 2
    assert "2 of 12 rows are malformed" in err
    assert not (tmp_path / "run").exists()
    status, _, err = call("import", "--model", "embedded", path, "--out", tmp_path / "run", "--skip-bad-rows")
    assert status == 0
    assert "2 of 12 rows skipped, with 4 further rows, the rest of 2 groups (" in err
    imported = read_manifest(tmp_path / "run")["imported"]
    assert (imported["rows"], imported["bad_rows"], imported["dropped_groups"]) == (12, 2, 2)
    rollouts = table(tmp_path / "run", "rollouts").sort("rollout_id")
    assert rollouts["completion"].to_list() == ["0 = 0", "1 = 1", "2 = 2"] * 2
    assert rollouts["group_id"].to_list() == [0, 0, 0, 3, 3, 3]


def test_a_row_that_rewards_cannot_join_takes_its_group_along(tmp_path, call):
    """A row without an id still names its group."""
    rows = [row(id=f"{name}{n}", group=name, response=f"{n}") for name in "ab" for n in range(3)]
    rewards = write(tmp_path / "rewards.jsonl", [{"id": entry["id"], "reward": 1} for entry in rows])
    del rows[4]["id"]
    arguments = ["--rewards", rewards, "--skip-bad-rows", "--model", "embedded"]
    status, _, err = call("import", write(tmp_path / "rows.jsonl", rows), *arguments, "--out", tmp_path / "run")
    assert status == 0, err
    assert "1 of 6 rows skipped, with 2 further rows, the rest of 1 groups (" in err
    assert table(tmp_path / "run", "rollouts").sort("rollout_id")["completion"].to_list() == ["0", "1", "2"]


def test_a_bad_row_whose_group_has_a_nested_key_takes_its_group_along(tmp_path, call):
    """Without its group key, the rest of a bad row's group would stay.

    The group is as large as the others.
    """
    sizes = {"a": 3, "b": 4, "c": 3}
    rows = [row(meta={"group": name}, response=f"{name}{n}") for name, size in sizes.items() for n in range(size)]
    rows[4]["reward"] = None
    arguments = ["--field", "group=meta.group", "--skip-bad-rows", "--model", "embedded"]
    status, _, err = call("import", write(tmp_path / "rows.jsonl", rows), *arguments, "--out", tmp_path / "run")
    assert status == 0, err
    found = table(tmp_path / "run", "rollouts").sort("rollout_id")["completion"].to_list()
    assert found == ["a0", "a1", "a2", "c0", "c1", "c2"]


def test_a_dump_whose_groups_all_hold_a_bad_row_is_refused(tmp_path, call):
    path = write(tmp_path / "rows.jsonl", [row(), row(response="")])
    status, _, err = call("import", "--model", "embedded", path, "--out", tmp_path / "run", "--skip-bad-rows")
    assert status == 2
    assert "every group holds a malformed row" in err


def test_parquet_text_that_is_not_utf8_is_named(tmp_path, policy):
    bad = pa.array([b"fine", b"\xff\xfe"]).view(pa.string())
    rows = pa.table({"prompt": ["p", "q"], "response": bad, "reward": [1.0, 0.0]})
    pq.write_table(rows, tmp_path / "rows.parquet")
    with (
        pytest.raises(InputError, match=r'row 2: "response" is unreadable .*utf-8'),
        read_rollouts([tmp_path / "rows.parquet"], policy),
    ):
        pass


def test_what_is_longer_than_the_model_takes_is_named(tmp_path, policy):
    limit = policy.model.config.max_position_embeddings
    path = write(tmp_path / "rows.jsonl", [row(response_ids=[5] * (limit + 1))])
    with (
        pytest.raises(InputError, match=f"line 1: prompt and response have .* tokens, embedded takes at most {limit}"),
        read_rollouts([path], policy),
    ):
        pass


def test_bad_arguments_are_one_line(tmp_path, call):
    path = write(tmp_path / "rows.jsonl", [row(score=1)])
    for arguments, message in (
        ([tmp_path / "none.jsonl"], "none.jsonl: no such file"),
        ([path, "--field", "rewrd=x"], 'did you mean "reward"?'),
        ([path, "--field", "reward"], "expected NAME=KEY"),
        ([path, "--field", "prompt="], 'no "prompt", which every row needs; remove --field prompt='),
        ([path, "--tokenizer", "data/base-policy"], "--tokenizer: --model has its own tokenizer"),
        ([path, "--from", "vrl"], 'unknown format; did you mean "verl"? Valid: ms-swift, nemo-rl'),
        ([path, "--template", "no place"], "expected {question}"),
        ([path, "--field", "reward=scor"], 'no "scor"; did you mean "score"?'),
        ([path, "--temperature", "0"], "temperature"),
        ([path, "--correct-at", "nan"], "correct_at"),
    ):
        status, _, err = call("import", "--model", "embedded", *arguments, "--out", tmp_path / "run")
        assert status == 2
        assert message in err
        assert len(err.strip().splitlines()) == 1


def test_an_interrupted_trace_goes_on_and_equals_one_that_was_not(tmp_path, monkeypatch, policy, call):
    rows = [row(step=step, response=f"{step} + {i} = 2", reward=i % 2) for step in (1, 4, 9) for i in range(3)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert call("import", "--model", "embedded", path, "--out", tmp_path / "whole")[0] == 0

    end_step = TraceWriter.end_step

    def stop(self, step):
        if step == 9:
            raise KeyboardInterrupt
        end_step(self, step)

    monkeypatch.setattr(importer, "FLUSH_TOKENS", 1)
    monkeypatch.setattr(TraceWriter, "end_step", stop)
    status, _, err = call("import", "--model", "embedded", path, "--out", tmp_path / "cut")
    assert status == 130
    assert "--resume continues" in err
    monkeypatch.undo()
    assert read_manifest(tmp_path / "cut")["last_durable_step"] == 4
    status, _, err = call(
        "import", "--model", "embedded", write(tmp_path / "other.jsonl", rows), "--out", tmp_path / "cut", "--resume"
    )
    assert status == 2
    assert f"{tmp_path / 'cut'}: imported with another value of files; choose another folder" in err
    status, _, err = call("import", "--model", "embedded", path, "--out", tmp_path / "cut")
    assert status == 2
    assert "--resume" in err
    # The path may be spelled in another way.
    monkeypatch.chdir(tmp_path)
    assert call("import", "--model", "embedded", path.name, "--out", tmp_path / "cut", "--resume")[0] == 0
    for name in ("tokens", "rollouts", "prompts", "steps", "vocab"):
        whole, cut = (table(tmp_path / run, name).drop("run_id") for run in ("whole", "cut"))
        assert whole.equals(cut)
    assert read_manifest(tmp_path / "cut")["status"] == "complete"


def test_chunks_and_batches_change_nothing_but_rounding(tmp_path, monkeypatch, call):
    rows = [row(response=f"{i} + {i} = 2", reward=i % 2, prompt=f"{i // 4} + 1") for i in range(12)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert call("import", "--model", "embedded", path, "--out", tmp_path / "one")[0] == 0
    monkeypatch.setattr(importer, "CHUNK_TOKENS", 1)
    assert call("import", "--model", "embedded", path, "--out", tmp_path / "many", "--batch-tokens", 1)[0] == 0
    for name, columns in (("tokens", MEASURED), ("rollouts", ("ppl", "ppl_z")), ("steps", ("entropy_token_mean",))):
        one, many = (table(tmp_path / run, name) for run in ("one", "many"))
        for column in columns:
            assert one[column].to_list() == pytest.approx(many[column].to_list(), rel=1e-5, abs=1e-4)


def test_running_out_of_memory_names_the_option(tmp_path, monkeypatch, policy):
    path = write(tmp_path / "rows.jsonl", [row()])

    def exhaust(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Policy, "forward_unique", exhaust)
    with (
        read_rollouts([path], policy) as read,
        pytest.raises(TrainingError, match=r"importing step 1; lower batch_tokens \(8192 now\)"),
    ):
        score_all(read, policy, tmp_path / "run")
    assert read_manifest(tmp_path / "run")["status"] == "failed"


def test_probabilities_that_are_not_finite_name_the_row(tmp_path, policy):
    path = write(tmp_path / "rows.jsonl", [row(), row(response="2 = 2")])
    with torch.no_grad():
        policy.head.weight[5] = torch.nan
    with (
        read_rollouts([path], policy) as read,
        pytest.raises(TrainingError, match="line 1: embedded gives this response a probability that is NaN"),
    ):
        score_all(read, policy, tmp_path / "run")


@pytest.mark.parametrize("arguments", [[], ["rows.jsonl", "--out", "run"], ["--help"], ["--unknown", "1"]], ids=str)
def test_the_former_name_of_the_command_points_to_the_new_one(call, arguments):
    expected = "entrace: score: this command is now `entrace import --model embedded`, with the same arguments\n"
    assert call("score", *arguments) == (2, "", expected)


def test_an_import_killed_in_its_first_manifest_resumes(tmp_path, call):
    """Digests are written before run.json gets its name."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "digests.jsonl").write_text('{"file": "run.js')
    (out / ".run.json.tmp").touch()
    arguments = ["import", write(tmp_path / "rows.jsonl", [row(step=1)]), "--model", "embedded", "--out", out]
    status, _, err = call(*arguments)
    assert (status, err.count("already holds files")) == (2, 1)
    status, _, err = call(*arguments, "--resume")
    assert status == 0, err
    assert read_manifest(out)["status"] == "complete"
    assert len(table(out, "rollouts")) == 1


def test_a_trace_of_the_former_command_resumes(tmp_path, call):
    """The key ``imported`` of the manifest was ``scored``, and described less."""
    path = write(tmp_path / "rows.jsonl", [row(), row(reward=0.0)])
    assert call("import", "--model", "embedded", path, "--out", tmp_path / "run")[0] == 0
    manifest = read_manifest(tmp_path / "run")
    assert manifest["config"] == {"import": manifest["imported"]["settings"]}
    before = {"files", "weights", "rows", "bad_rows", "fields", "advantage", "response_tokens", "settings"}
    assert set(manifest["imported"]) == before | {"format", "dropped_groups", "logprobs", "reference"}
    assert manifest["imported"]["advantage"] == "group-relative, from rewards"
    imported = manifest.pop("imported")
    write_manifest(tmp_path / "run", {**manifest, "scored": {key: imported[key] for key in before}})
    assert entrace.open_runs(tmp_path / "run").manifests["run"]["imported"]["rows"] == 2
    assert call("import", "--model", "embedded", path, "--out", tmp_path / "run", "--resume")[0] == 0
