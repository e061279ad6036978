"""Test that `entrace train --dry-run` finds faults before a run starts.

A fault stops a run or makes it worthless.
"""

import json

import pytest

from entrace.trainer.config import load_config
from entrace.trainer.preflight import Checks, check_run
from entrace.trainer.resources import find_base_policy


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Write fifty training rows and two held-out files.

    Two of the training rows repeat held-out prompts.
    """
    return {
        "train": write(tmp_path / "train.jsonl", [{"prompt": f"{i}?", "answer": i} for i in range(50)]),
        "aime": write(tmp_path / "aime.jsonl", [{"prompt": f" {i}? ", "answer": i} for i in range(48, 60)]),
        "amc": write(tmp_path / "amc.jsonl", [{"prompt": f"And {i}?", "answer": i} for i in range(7)]),
    }


def configure(files, *overrides):
    held_out = f'task.heldout_file=["{files["aime"]}", "{files["amc"]}"]'
    return load_config("tiny", [f"task.name={files['train']}", "task.params={}", held_out, *overrides])


def test_files_prompts_verifiers_and_evaluations_are_counted(files):
    found = check_run(configure(files, "steps=50", "eval.every=20", "eval.samples=4"))
    assert found.files[files["train"]] == {"rows": 50, "bad_rows": 0, "too_long": 0}
    assert found.training == {"train": 48}
    assert found.heldout == {"aime": 12, "amc": 7}
    assert found.tokenizer_entries == 512
    assert found.gold_accepted == {"aime": (5, 5), "amc": (5, 5), "train": (5, 5)}
    # Before the first step, after steps 20 and 40, and after the last.
    assert (found.evaluations, found.evaluation_responses, found.evaluation_tokens) == (4, 76, 76 * 64)
    assert (found.lost_characters, found.warnings, found.problems) == ([], [], [])
    assert list(found.lines()) == [
        f"file          {files['train']}: 50 rows",
        f"file          {files['aime']}: 12 rows",
        f"file          {files['amc']}: 7 rows",
        "training      train: 48 prompts",
        "held out      aime: 12 prompts",
        "held out      amc: 7 prompts",
        "tokenizer     512 entries",
        "verifier      aime: accepts 5 of 5 correct answers",
        "verifier      amc: accepts 5 of 5 correct answers",
        "verifier      train: accepts 5 of 5 correct answers",
        "evaluation    76 responses, at most 4,864 tokens; 4 times, at most 19,456 tokens over the run",
    ]


@pytest.mark.parametrize(
    ("steps", "every", "number"), [(120, 20, 7), (119, 20, 7), (121, 20, 8), (5, 20, 2), (20, 1, 21)]
)
def test_the_number_of_evaluations(steps, every, number):
    config = load_config("tiny", [f"steps={steps}", f"eval.every={every}", "task.num_heldout=1"])
    assert check_run(config).evaluations == number


def test_a_task_of_reasoning_gym_is_tried_too():
    found = check_run(load_config("tiny"))
    assert (found.training, found.heldout) == ({"chain_sum": None}, {"chain_sum": 200})
    assert found.gold_accepted == {"chain_sum": (5, 5)}
    assert "training      chain_sum: generated without end" in list(found.lines())
    assert not found.warnings + found.problems


PROBLEMS = {
    "a missing file": (["task.name=nowhere.parquet"], "nowhere.parquet: no such file or directory"),
    "a missing held-out file": (["task.heldout_file=nowhere.jsonl"], "nowhere.jsonl: no such file or directory"),
    "too many held out": (["task.num_heldout=8"], "amc.jsonl: 7 distinct prompts, fewer than task.num_heldout = 8"),
    "no verifier": (["task.verifiers.default=nowhere:f"], 'verifier nowhere:f: no module "nowhere"'),
    "no data source": (["task.verifiers.amcc=math"], 'no prompt has data source "amcc"; did you mean "amc"'),
    "no model": (["policy.path=/nowhere"], "policy.path: no model folder at /nowhere"),
    "no lexicon": (["record.lexicon=nowhere.toml"], "nowhere.toml"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_one_line(files, name):
    overrides, message = PROBLEMS[name]
    found = check_run(configure(files, *overrides))
    assert len(found.problems) == 1
    assert message in found.problems[0]
    assert "\n" not in found.problems[0]


def test_all_problems_are_named_at_once(files, tmp_path):
    found = check_run(configure(files, "policy.path=/nowhere", f"task.name={tmp_path}/gone.jsonl"))
    assert [problem.split(":")[0] for problem in found.problems] == ["policy.path", f"{tmp_path}/gone.jsonl"]
    # Without a tokenizer the rows are counted all the same, though prompts cannot be measured.
    unmeasured = check_run(configure(files, "policy.path=/nowhere", "task.max_prompt_tokens=1"))
    assert unmeasured.heldout == {"aime": 12, "amc": 7}
    assert len(unmeasured.problems) == 1
    assert "no usable row" in check_run(configure(files, "task.max_prompt_tokens=1")).problems[0]


def test_a_verifier_that_rejects_right_answers_is_a_warning(files, tmp_path, monkeypatch):
    (tmp_path / "half_marks.py").write_text(
        "def half(completion, row):\n    return 0.5\n"
        "def broken(completion, row):\n    return row['missing']\n"
        "def plain(completion, row):\n    return completion == str(row['answer'])\n"
    )
    monkeypatch.chdir(tmp_path)
    found = check_run(configure(files, "task.verifiers.amc=half_marks:half"))
    assert found.gold_accepted["amc"] == (5, 0)
    assert found.warnings == [
        "task.verifiers: 5 of 5 correct answers of amc are judged incorrect, in tags, boxed, and plain: "
        f"{files['amc']}, line 1 ('0' gets 0.5); check the answers, the verifier, and task.correct_at"
    ]
    assert not check_run(configure(files, "task.verifiers.amc=half_marks:half", "task.correct_at=0.5")).warnings
    assert check_run(configure(files, "task.verifiers.amc=half_marks:plain")).gold_accepted["amc"] == (5, 5)
    broken = check_run(configure(files, "task.verifiers.amc=half_marks:broken"))
    assert "(KeyError: no key 'missing')" in broken.problems[0]


def test_a_function_is_tried_where_no_row_has_an_answer(files, tmp_path, monkeypatch):
    (tmp_path / "open_judge.py").write_text("def judge(completion, row):\n    return 0\n")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Say {i}."} for i in range(3)]
    open_file = write(tmp_path / "open.jsonl", rows)
    config = configure(files, f"task.heldout_file={{open = '{open_file}'}}", "task.verifiers.open=open_judge:judge")
    found = check_run(config)
    assert found.gold_accepted["open"] == (0, 0)
    assert f"file          {open_file}: 3 rows, 3 without an answer" in list(found.lines())
    assert "verifier      open: runs; no answer to try" in list(found.lines())


def test_fewer_prompts_than_a_step_draws_are_a_warning(files):
    found = check_run(configure(files, "rollout.prompts_per_step=49"))
    assert found.warnings == [
        "rollout.prompts_per_step = 49: there are only 48 training prompts, so that a step repeats some"
    ]
    mixed = configure(files, "rollout.prompts_per_step=49", "task.mix.sums={name='chain_sum', num_heldout=1}")
    assert not check_run(mixed).warnings


def test_characters_that_the_tokenizer_lacks_are_a_warning(files, monkeypatch):
    monkeypatch.setattr(
        "entrace.trainer.preflight.find_lost", lambda tokenizer, texts: ["é"] if "And 3?" in texts else []
    )
    found = check_run(configure(files))
    assert found.lost_characters == ["é"]
    assert 'cannot encode 1 character of the task, "é" (U+00E9)' in found.warnings[0]


def test_prompts_that_the_chat_template_refuses_are_a_problem(files, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((find_base_policy() / name).read_bytes())
    (model / "chat_template.jinja").write_text("{{ raise_exception('no turns') }}")
    (problem,) = check_run(configure(files, f"policy.path={model}")).problems
    assert "the chat template rejects a prompt (no turns: " in problem


def test_only_the_tokenizer_of_a_model_is_loaded(files, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).write_bytes((find_base_policy() / name).read_bytes())
    assert check_run(configure(files, f"policy.path={model}")).tokenizer_entries == 512


def test_the_command_ends_with_2_if_the_run_cannot_start(files, call):
    arguments = [
        f"task.name={files['train']}",
        "task.params={}",
        f"task.heldout_file={files['amc']}",
        "policy.dtype=float32",
    ]
    code, out, err = call("train", "tiny", "--dry-run", *arguments)
    assert (code, err) == (0, "")
    assert "held out      train: 7 prompts" in out
    code, out, err = call("train", "tiny", "--dry-run", *arguments, "task.num_heldout=8")
    assert code == 2
    assert "peak" in out
    assert err == (
        f"entrace: {files['amc']}: 7 distinct prompts, fewer than task.num_heldout = 8; lower it, or remove it to "
        "evaluate the whole file\n"
    )
    code, out, err = call("train", "tiny", "--dry-run", "--json", *arguments)
    assert set(Checks().__dict__) | {"peak", "parameters"} <= set(json.loads(out))
    assert json.loads(out)["heldout"] == {"train": 7}
