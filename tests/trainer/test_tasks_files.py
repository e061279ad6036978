import json

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrace.analysis.trace import InputError, read_manifest
from entrace.trainer.config import load_config
from entrace.trainer.evaluate import evaluate, load_policy_and_task
from entrace.trainer.runs.run_folder import common_random_numbers
from entrace.trainer.tasks import load_task
from entrace.trainer.tasks.config import SourceConfig, TaskConfig
from entrace.trainer.tasks.files import Epochs
from entrace.trainer.train import train

from .conftest import SHORT

TABLES = ("tokens", "rollouts", "prompts", "evals")


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def questions(number, **fields):
    return [{"prompt": f"What is {i} + {i}?", "answer": 2 * i, **fields} for i in range(number)]


def verl_row(i, source="openai/gsm8k"):
    return {
        "data_source": source,
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {i} + {i}?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
        "extra_info": {"split": "train", "index": i},
    }


def load(path, num_heldout=3, seed=0, **keys):
    return load_task(TaskConfig(name=path, num_heldout=num_heldout, **keys), seed)


def train_texts(task, number):
    return [task.train_prompt(i).text for i in range(number)]


def test_rows_of_prompt_and_answer(tmp_path):
    task = load(write_jsonl(tmp_path / "sums.jsonl", questions(10)))
    assert [p.task for p in task.heldout] == ["sums"] * 3
    assert sorted([*train_texts(task, 7), *(p.text for p in task.heldout)]) == [r["prompt"] for r in questions(10)]
    prompt = next(p for p in map(task.train_prompt, range(7)) if p.text != "What is 0 + 0?")
    line = int(prompt.prompt_id.removeprefix("train-"))
    assert (prompt.text, prompt.ground_truth) == (f"What is {line - 1} + {line - 1}?", str(2 * (line - 1)))
    assert prompt.origin == f"{tmp_path}/sums.jsonl, line {line}"
    assert task.score(f"<answer>{prompt.ground_truth}</answer>", prompt).is_correct


def test_parquet_and_jsonl_in_the_schema_of_verl_give_the_same_task(tmp_path):
    rows = [verl_row(i, source) for i in range(6) for source in ("openai/gsm8k", "mine")]
    for i, row in enumerate(rows):
        row["prompt"][1]["content"] += f" ({i})"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b").mkdir()
    keys = {"num_heldout": 4, "verifiers": {"default": "math"}}
    parquet = load(str(tmp_path / "a.parquet"), **keys)
    jsonl = load(write_jsonl(tmp_path / "b" / "a.jsonl", rows), **keys)
    for one, other in zip(map(parquet.train_prompt, range(16)), map(jsonl.train_prompt, range(16)), strict=True):
        assert (one.prompt_id, one.task, one.question) == (other.prompt_id, other.task, other.question)
        assert (one.ground_truth, one.entry) == (other.ground_truth, other.entry)
    prompt = parquet.train_prompt(0)
    assert prompt.task in ("openai/gsm8k", "mine")
    assert prompt.text.startswith("system: Be brief.\n\nuser: What is ")
    assert prompt.entry["extra_info"]["split"] == "train"
    assert parquet.score(rf"\boxed{{{prompt.ground_truth}.0}}", prompt).is_correct


def test_fields_of_other_names(tmp_path):
    rows = [{"q": {"text": f"{i}?"}, "a": i, "kind": "x"} for i in range(5)]
    params = {"prompt": "q.text", "answer": "a", "data_source": "kind"}
    task = load(write_jsonl(tmp_path / "rows.jsonl", rows), num_heldout=1, params=params)
    prompt = task.heldout[0]
    assert (prompt.task, prompt.text) == ("x", f"{prompt.ground_truth}?")


def test_a_number_is_its_shortest_text(tmp_path):
    rows = [{"prompt": f"{i}", "answer": answer} for i, answer in enumerate((7, 7.0, 0.5, "7.0"))]
    task = load(write_jsonl(tmp_path / "rows.jsonl", rows), num_heldout=1, seed=0)
    truths = {p.text: p.ground_truth for p in [*task.heldout, *map(task.train_prompt, range(3))]}
    assert truths == {"0": "7", "1": "7", "2": "0.5", "3": "7.0"}


@given(st.integers(1, 60), st.integers(0, 2**31), st.integers(0, 5))
def test_every_epoch_has_every_row_once_wherever_one_begins_to_read(number, seed, epoch):
    rows = list(range(number))
    epochs = Epochs(rows, seed, number=0)
    whole = [epochs(i) for i in range((epoch + 2) * number)]
    for start in range(0, len(whole), number):
        assert sorted(whole[start : start + number]) == rows
    backwards = Epochs(rows, seed, number=0)
    assert [backwards(i) for i in reversed(range(len(whole)))] == whole[::-1]
    quarter = number // 4
    for start in range(len(whole) - quarter):
        assert len(set(whole[start : start + quarter])) == quarter


def test_order_depends_on_the_seed_split_on_the_held_out_seed_and_epochs_differ(tmp_path):
    path = write_jsonl(tmp_path / "sums.jsonl", questions(40))
    one, same, other = (load(path, seed=s) for s in (0, 0, 1))
    assert train_texts(one, 80) == train_texts(same, 80)
    assert one.heldout == same.heldout
    # One split for all seeds, another order for each.
    assert one.heldout == other.heldout
    assert train_texts(one, 37) != train_texts(other, 37)
    assert set(train_texts(one, 37)) == set(train_texts(other, 37))
    assert {p.text for p in load(path, heldout_seed=1).heldout} != {p.text for p in one.heldout}
    assert train_texts(one, 37) != train_texts(one, 74)[37:]


def test_held_out_texts_are_nowhere_trained_on(tmp_path):
    # Every question stands twice in the file, once as a chat; some stand in the held-out file or in another source too.
    twice = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in questions(20)]
    path = write_jsonl(tmp_path / "train.jsonl", [*questions(20), *twice])
    test = write_jsonl(tmp_path / "test.jsonl", questions(30)[15:])
    own = load(path, num_heldout=5)
    assert len({p.text for p in own.heldout}) == 5
    assert not {p.text for p in own.heldout} & set(train_texts(own, 60))
    assert len(set(train_texts(own, 30))) == 15
    separate = load(path, num_heldout=15, heldout_file=test)
    assert {p.text for p in separate.heldout} == {row["prompt"] for row in questions(30)[15:]}
    assert set(train_texts(separate, 60)) == {row["prompt"] for row in questions(15)}
    mixed = load(path, mix={"other": SourceConfig(name=test, num_heldout=15, weight=0)})
    assert not {row["prompt"] for row in questions(30)[15:]} & set(train_texts(mixed, 60))


BAD_ROWS = [
    ("{", "line 2: not JSON, expecting property name"),
    ("[1, 2]", "line 2: a list, expected an object"),
    ('{"answer": 1}', 'line 2: no "prompt"'),
    ('{"promt": "x", "answer": 1}', 'line 2: no "prompt"; did you mean "promt"?'),
    ('{"prompt": "x"}', 'line 2: no "answer"'),
    ('{"prompt": "x", "reward_model": {"style": "rule"}}', 'line 2: no "reward_model.ground_truth"'),
    ('{"prompt": " ", "answer": 1}', 'line 2: "prompt" is empty'),
    ('{"prompt": [], "answer": 1}', 'line 2: "prompt" is empty'),
    ('{"prompt": 5, "answer": 1}', 'line 2: "prompt" is a number, expected text or a list of turns'),
    ('{"prompt": ["x"], "answer": 1}', 'line 2: "prompt" has a turn that is not {"role", "content"}'),
    (
        '{"prompt": [{"role": "user", "content": null}], "answer": 1}',
        'line 2: "prompt", content is null, expected text',
    ),
    (
        '{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "answer": 1}',
        'line 2: "prompt" ends with a turn of the assistant',
    ),
    ('{"prompt": "x", "answer": null}', 'line 2: "answer" is null, expected text'),
    ('{"prompt": "x", "answer": true}', 'line 2: "answer" is true or false, expected text'),
    ('{"prompt": "x", "answer": ["1"]}', 'line 2: "answer" is a list, expected text'),
    ('{"prompt": "x", "answer": 1, "data_source": 7}', 'line 2: "data_source" is a number, expected text'),
    (r'{"prompt": "\ud800", "answer": 1}', 'line 2: "prompt" holds half a character'),
    ("[" * 100_000, "line 2: not JSON"),
]


@pytest.mark.parametrize(("row", "fault"), BAD_ROWS, ids=[row[:40] for row, _ in BAD_ROWS])
def test_a_malformed_row_is_named_by_its_line(tmp_path, caplog, row, fault):
    path = write_jsonl(tmp_path / "rows.jsonl", [questions(1)[0], row, "", *questions(9)[1:]])
    with pytest.raises(InputError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: 1 of 10 rows are malformed ({fault}")
    assert "\n" not in str(error.value)
    task = load(path, on_bad_rows="skip")
    assert task.describe() == {"data": {path: {"rows": 10, "bad_rows": 1, "too_long": 0}}}
    assert len({*train_texts(task, 6), *(p.text for p in task.heldout)}) == 9
    assert f"{path}: 1 of 10 rows left out ({fault}" in caplog.text


def test_bytes_that_are_no_text_are_a_malformed_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "\xc3\xa9?", "answer": 1}\r\n{"prompt": "\xff", "answer": 1}\r\n')
    with pytest.raises(InputError, match=r"1 of 2 rows are malformed \(line 2: not JSON, .*utf-8"):
        load(str(path))


def test_the_first_few_malformed_rows_are_named(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*questions(2), *["{}"] * 8])
    with pytest.raises(InputError) as error:
        load(path)
    assert "8 of 10 rows are malformed (line 3: " in str(error.value)
    assert "line 7: " in str(error.value)
    assert "line 8" not in str(error.value)
    assert 'set task.on_bad_rows = "skip"' in str(error.value)


def test_one_parquet_file_may_hold_rows_of_both_schemas(tmp_path):
    rows = [{"prompt": verl_row(i)["prompt"][1:], "reward_model": {"ground_truth": str(2 * i)}} for i in range(3)]
    rows += [{"prompt": [{"role": "user", "content": f"{i}?"}], "answer": str(i)} for i in range(3)]
    tables = [pa.Table.from_pylist(rows[:3]), pa.Table.from_pylist(rows[3:])]
    pq.write_table(pa.concat_tables(tables, promote_options="default"), tmp_path / "rows.parquet")
    task = load(str(tmp_path / "rows.parquet"), num_heldout=1)
    truths = {p.text: p.ground_truth for p in [*task.heldout, *map(task.train_prompt, range(5))]}
    assert truths == {**{f"What is {i} + {i}?": str(2 * i) for i in range(3)}, **{f"{i}?": str(i) for i in range(3)}}


def test_rows_of_parquet_are_named_by_number(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a", None, "c"], "answer": ["1", "2", "3"]}), path)
    with pytest.raises(InputError, match=r'1 of 3 rows are malformed \(row 2: "prompt" is null'):
        load(str(path))


def test_files_that_are_of_no_use_are_one_line(tmp_path):
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 and nothing else")
    cases = {
        str(tmp_path / "nowhere.jsonl"): "nowhere.jsonl: no such file or directory",
        str(damaged): "damaged.parquet: damaged, or not a Parquet file",
        write_jsonl(tmp_path / "empty.jsonl", []): "empty.jsonl: no usable row, the file is empty",
        write_jsonl(tmp_path / "few.jsonl", questions(2)): "few.jsonl: 2 distinct prompts, fewer than .* = 3",
        write_jsonl(tmp_path / "all.jsonl", questions(3)): "all.jsonl: no row is left to train on; 3 are held out",
    }
    for path, message in cases.items():
        with pytest.raises(InputError, match=message) as error:
            load(path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r'task.params of .*few.jsonl: unknown key "promt"; did you mean "prompt"'):
        load(str(tmp_path / "few.jsonl"), params={"promt": "x"})


def test_prompts_that_are_too_long_are_left_out_and_counted(tmp_path, policy, caplog):
    rows = [*questions(8), {"prompt": "word " * 100, "answer": 1}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = TaskConfig(name=path, num_heldout=2, max_prompt_tokens=60)
    task = load_task(config, 0, policy.encode_prompt)
    assert task.describe() == {"data": {path: {"rows": 9, "bad_rows": 0, "too_long": 1}}}
    assert not any("word" in text for text in train_texts(task, 12))
    assert "line 9: longer than task.max_prompt_tokens" in caplog.text


def test_chats_go_through_the_template_and_text_is_one_turn_of_the_user(policy):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 1 + 2"}]
    decoded = policy.tokenizer.decode(policy.encode_prompt(chat))
    assert decoded == policy.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert "be brief" in decoded
    assert policy.encode_prompt(chat[1:]) == policy.encode_prompt("what is 1 + 2")
    policy.tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(InputError, match=r"the chat template rejects a prompt \(no system turns: 'system: be brief"):
        policy.encode_prompt(chat)
    policy.tokenizer.chat_template = None
    assert policy.tokenizer.decode(policy.encode_prompt(chat)) == "system: be brief\n\nuser: what is 1 + 2"


@pytest.fixture
def sums(tmp_path):
    """Write rows that the embedded policy can answer, of two data sources.

    One of the sources has chats.
    """
    task = load_task(load_config("tiny").task, seed=5)
    rows = [
        {"prompt": p.text, "answer": p.ground_truth}
        if i % 2
        else {**verl_row(i, "chats"), "prompt": [{"role": "user", "content": p.text}], "answer": None}
        | {"reward_model": {"ground_truth": p.ground_truth}}
        for i, p in enumerate(map(task.train_prompt, range(26)))
    ]
    return write_jsonl(tmp_path / "sums.jsonl", rows)


def read(run_dir, table):
    return pl.read_parquet(run_dir / table / "*.parquet").drop("run_id")


class StoppedError(Exception):
    pass


@pytest.mark.slow
def test_a_run_on_a_file_over_several_epochs_is_resumed_to_the_same_trace(sums, tmp_path):
    config = load_config("tiny", [*SHORT, f"task.name={sums}", "task.params={}", "steps=4"])
    train(config, tmp_path / "whole", {})

    def stop(done, **metrics):
        if done == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(config, tmp_path / "resumed", {}, on_step=stop)
    train(config, tmp_path / "resumed", {}, resume=True)
    for table in TABLES:
        assert read(tmp_path / "resumed", table).equals(read(tmp_path / "whole", table)), table
    prompts, rollouts, evals = (read(tmp_path / "whole", table) for table in ("prompts", "rollouts", "evals"))
    assert prompts["prompt_id"].is_unique().all()
    assert set(prompts["task"]) == {"sums", "chats"}
    assert len(prompts) == 26
    assert rollouts.group_by("prompt_id").agg(pl.col("step").n_unique())["step"].max() > 1
    assert set(rollouts["prompt_id"]) | set(evals["prompt_id"]) == set(prompts["prompt_id"])
    by_task = evals.join(prompts, on="prompt_id").select("benchmark", "task")
    assert (by_task["benchmark"] == by_task["task"]).all()
    manifest = read_manifest(tmp_path / "whole")
    assert manifest["task"] == "sums"
    assert manifest["data"] == {sums: {"rows": 26, "bad_rows": 0, "too_long": 0}}


def test_a_run_whose_file_has_changed_is_not_resumed(sums, tmp_path):
    config = load_config("tiny", [*SHORT, f"task.name={sums}", "task.params={}", "steps=4"])

    def stop(done, **metrics):
        if done == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", {}, on_step=stop)
    with open(sums, "a") as file:
        file.write('{"prompt": "one more", "answer": 1}\n')
    with pytest.raises(InputError, match=r"not resumed, its prompts would change midway; has .*sums.jsonl changed"):
        train(config, tmp_path / "run", {}, resume=True)


def test_fingerprints_cover_files_and_stay_what_they_were_for_a_task_that_names_none(sums):
    def prompts(*overrides):
        return common_random_numbers(load_config("tiny", overrides))["prompts"]

    # A new key of the task must not change it unless the key is set.
    assert prompts() == "d8c492f55cad0507"
    assert prompts("task.weight=2.0") != prompts()
    on_file = (f"task.name={sums}", "task.params={}")
    first = prompts(*on_file)
    assert prompts(*on_file) == first
    with open(sums, "a") as file:
        file.write("\n")
    assert prompts(*on_file) != first
    mixed = [f'task.mix.more={{name = "{sums}"}}']
    first = prompts(*mixed)
    with open(sums, "a") as file:
        file.write("\n")
    assert len({first, prompts(*mixed), prompts()}) == 3


def test_a_file_is_evaluated_by_data_source(sums):
    overrides = [*SHORT, f"task.name={sums}", "task.params={}", "task.num_heldout=13", "eval.samples=1"]
    config = load_config("tiny", overrides)
    rows = evaluate(config, *load_policy_and_task(config), step=0)
    assert set(rows["benchmark"]) == {"sums", "chats"}
    assert len(rows["prompt_id"]) == 13


def texts(prompts):
    return [prompt.text for prompt in prompts]


def test_a_held_out_file_is_evaluated_in_full_unless_a_number_is_requested(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", questions(10))
    # One question stands twice, once with other white space.
    rows = [{"prompt": f"And {i}?", "answer": i} for i in range(300)]
    test = write_jsonl(tmp_path / "test.jsonl", [*rows, {"prompt": "And\u00a00? ", "answer": 0}])
    whole = load_task(TaskConfig(name=path, heldout_file=test), seed=0)
    assert texts(whole.heldout) == [f"And {i}?" for i in range(300)]
    assert whole.heldout == load_task(TaskConfig(name=path, heldout_file=test, num_heldout=300), seed=0).heldout
    some = load_task(TaskConfig(name=path, heldout_file=test, num_heldout=7), seed=0)
    assert len(some.heldout) == 7
    message = r"test.jsonl: 300 distinct prompts, fewer than task.num_heldout = 301; lower it, or remove it to"
    with pytest.raises(InputError, match=message):
        load_task(TaskConfig(name=path, heldout_file=test, num_heldout=301), seed=0)
    shipped = load_config("tiny", [f"task.name={path}", "task.params={}", f"task.heldout_file={test}"])
    assert len(load_task(shipped.task, seed=0).heldout) == 300
    # A shipped config's own number gives way to a request for all.
    sampled = load_config("smollm", [f"task.name={path}", "task.params={}", f"task.heldout_file={test}"])
    assert sampled.task.heldout_limit == 40
    full = load_config("smollm", ["task.num_heldout=all", f"task.name={path}", f"task.heldout_file={test}"])
    assert full.task.heldout_limit is None


def test_rows_of_its_own_are_200_by_default_and_a_file_of_weight_0_is_evaluated_in_full(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", questions(250))
    test = write_jsonl(tmp_path / "test.jsonl", [{"prompt": f"And {i}?", "answer": i} for i in range(3)])
    config = TaskConfig.model_validate({"name": path, "mix": {"exam": {"name": test, "weight": 0}}})
    task = load_task(config, seed=0)
    assert [prompt.task for prompt in task.heldout] == ["train"] * 200 + ["exam"] * 3
    assert len({*train_texts(task, 50)}) == 50
    with pytest.raises(InputError, match=r"no row is left to train on; 250 are held out: lower task.num_heldout"):
        load_task(TaskConfig(name=path, num_heldout="all"), seed=0)
    few = SourceConfig(name=test, num_heldout=4)
    with pytest.raises(InputError, match=r"3 distinct prompts, fewer than task.mix.exam.num_heldout = 4; lower it$"):
        load_task(TaskConfig(name=path, mix={"exam": few}), seed=0)


def test_several_held_out_files_are_benchmarks_of_their_own(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", questions(10))
    # Both name one data source, and share a question with each other and with the training file.
    for name in ("aime24", "aime25"):
        rows = [{"prompt": f"{name}, problem {i}?", "answer": i, "data_source": "contest"} for i in range(4)]
        write_jsonl(tmp_path / f"{name}.jsonl", [*rows, {"prompt": "What is  3 + 3?", "answer": 6}])
    files = [str(tmp_path / f"{name}.jsonl") for name in ("aime24", "aime25")]
    listed = load_task(TaskConfig(name=path, heldout_file=tuple(files)), seed=0)
    assert [prompt.task for prompt in listed.heldout] == ["aime24"] * 5 + ["aime25"] * 5
    assert listed.heldout[5].prompt_id == "heldout-aime25-000001"
    assert len({prompt.prompt_id for prompt in listed.heldout}) == 10
    assert "What is 3 + 3?" not in train_texts(listed, 90)
    table = {"old": files[0], "new": files[1]}
    named = load_task(TaskConfig(name=path, heldout_file=table, num_heldout=2), seed=0)
    assert [prompt.task for prompt in named.heldout] == ["old"] * 2 + ["new"] * 2
    assert named.heldout == load_task(TaskConfig(name=path, heldout_file=table, num_heldout=2), seed=0).heldout
    assert named.describe()["data"][files[1]] == {"rows": 5, "bad_rows": 0, "too_long": 0}
    assert load_config("tiny", [f"task.name={path}", f"task.heldout_file.old={files[0]}"]).task.heldout_files == {
        "old": files[0]
    }
    # One file whose rows name data sources holds a benchmark for each.
    rows = [{"prompt": f"{i}?", "answer": i, "data_source": "ab"[i % 2]} for i in range(4)]
    single = load(path, num_heldout=4, heldout_file=write_jsonl(tmp_path / "both.jsonl", rows))
    assert [prompt.task for prompt in single.heldout] == ["a", "b", "a", "b"]


def test_the_verifier_of_a_named_benchmark_is_that_of_its_data_source_its_name_or_its_source(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", questions(10))
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"prompt": "1/2?", "answer": "0.5"}])
    typed = write_jsonl(tmp_path / "typed.jsonl", [{"prompt": "1/4?", "answer": "0.25", "data_source": "maths"}])

    def right(**verifiers):
        config = TaskConfig(name=path, heldout_file={"plain": plain, "typed": typed}, verifiers=verifiers)
        task = load_task(config, seed=0)
        return [task.score(rf"\boxed{{{prompt.ground_truth}}}", prompt).is_correct for prompt in task.heldout]

    assert right() == [False, False]
    assert right(train="math") == [True, True]
    assert right(plain="math") == [True, False]
    assert right(maths="math") == [False, True]
    assert right(typed="math", maths="exact") == [False, False]
    assert right(default="math") == [True, True]
    with pytest.raises(InputError, match='no prompt has data source "plane"; did you mean "plain"'):
        right(plane="math")


def test_a_name_that_two_held_out_sets_share_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", questions(10))
    test = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "And?", "answer": 1}])
    other = SourceConfig(name=write_jsonl(tmp_path / "other.jsonl", questions(4)), num_heldout=2)
    with pytest.raises(
        InputError, match=r'task.heldout_file: another held-out set is already called "exam"; name this'
    ):
        load_task(TaskConfig(name=path, heldout_file={"exam": test}, mix={"exam": other}), seed=0)
    rows = write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": f"{i}?", "answer": 1, "data_source": "a"} for i in range(4)]
    )
    mixed = {"more": SourceConfig(name=rows, heldout_file={"a": test}, weight=1)}
    with pytest.raises(InputError, match=r'task.mix.more.heldout_file: another held-out set is already called "a"'):
        load_task(TaskConfig(name=rows, num_heldout=1, mix=mixed), seed=0)


LEAK = [
    "What is 2 + 3?",
    "What is 2 + 3? ",
    " What is 2  +\n3?",
    "What\u00a0is\u20092 + 3?",
    "What is 2\u200b + 3?\ufeff",
    "What is \uff12 + \uff13?",
    [{"role": "user", "content": "What is 2 + 3?\n"}],
    "WHAT IS 2 + 3?",
]


@pytest.mark.parametrize("heldout", [0, 1, 3, 5, 6])
def test_the_split_is_disjoint_after_white_space_and_unicode_are_normalized(tmp_path, heldout):
    rows = [{"prompt": prompt, "answer": 5} for prompt in LEAK]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, *questions(2)])
    test = write_jsonl(tmp_path / "test.jsonl", [rows[heldout]])
    task = load_task(TaskConfig(name=path, heldout_file=test), seed=0)
    assert {*train_texts(task, 30)} == {"WHAT IS 2 + 3?", "What is 0 + 0?", "What is 1 + 1?"}
    # Repeats within the held-out set count once, the first of them.
    same = write_jsonl(tmp_path / "same.jsonl", rows)
    assert texts(load_task(TaskConfig(name=path, heldout_file=same), seed=0).heldout) == [LEAK[0], LEAK[7]]
    # What one source holds out, no other one trains on.
    mix = {"more": SourceConfig(name=path, num_heldout=1)}
    evaluated = {"exam": SourceConfig(name=test, num_heldout=1, weight=0)}
    mixed = load_task(TaskConfig(name=path, num_heldout=1, mix=mix | evaluated), seed=0)
    assert not {*train_texts(mixed, 60)} & set(LEAK[:6])


def test_chats_are_compared_with_all_of_their_turns(tmp_path):
    def chat(system, user):
        turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return {"prompt": turns, "answer": 1}

    rows = [
        chat("Be\u00a0brief. ", "What is 1 + 1? "),
        chat("Be brief.", "What is 1 + 2?"),
        chat("Be long.", "What is 1 + 1?"),
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    test = write_jsonl(tmp_path / "test.jsonl", [chat("Be brief.", "What is\n1 + 1?")])
    task = load_task(TaskConfig(name=path, heldout_file=test), seed=0)
    assert {*train_texts(task, 8)} == {
        "system: Be brief.\n\nuser: What is 1 + 2?",
        "system: Be long.\n\nuser: What is 1 + 1?",
    }


def test_rows_without_an_answer_are_accepted_where_a_function_of_the_user_judges(tmp_path, monkeypatch, caplog):
    (tmp_path / "free_judge.py").write_text("def judge(completion, row):\n    return row['prompt'][0] in completion\n")
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": "a?"},
        {"prompt": "b?", "answer": None},
        {"prompt": "c?", "answer": " "},
        {"prompt": "d?", "answer": True},
        {"prompt": "e?", "reward_model": {"style": "model"}},
        {"prompt": "f?", "reward_model": {"ground_truth": None}},
        {"prompt": "g?", "answer": ["x", 1]},
        {"prompt": "h?", "answer": 7.0},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    task = load(path, num_heldout=1, verifiers={"default": "free_judge:judge"})
    prompts = [*task.heldout, *(task.train_prompt(i) for i in range(7))]
    assert {prompt.text: prompt.ground_truth for prompt in prompts} == {
        "a?": None,
        "b?": None,
        "c?": None,
        "d?": "true",
        "e?": None,
        "f?": None,
        "g?": '["x", 1]',
        "h?": "7",
    }
    assert all(task.score(prompt.text[0], prompt).is_correct for prompt in prompts)
    assert task.describe()["data"][path] == {"rows": 8, "bad_rows": 0, "too_long": 0, "without_answer": 5}
    assert not caplog.text
    load(path, num_heldout=1, params={"answer": "anser"}, verifiers={"default": "free_judge:judge"})
    assert f'{path}: no row has an answer at "anser"; check task.params.answer' in caplog.text


def test_rows_without_an_answer_are_told_apart_and_named_where_a_verifier_needs_one(tmp_path):
    rows = [
        {"prompt": "a?"},
        {"prompt": "b?", "answer": None},
        {"prompt": "c?", "answer": ""},
        {"prompt": "d?", "answer": 1},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for verifier in ("exact", "math", "reasoning_gym"):
        with pytest.raises(InputError) as error:
            load(path, num_heldout=1, verifiers={"default": verifier})
        assert str(error.value) == (
            f'{path}: 3 of 4 rows are malformed (line 1: no "answer"; valid: prompt; line 2: "answer" is null, '
            'expected text or a number; line 3: "answer" is empty); fix them, or set task.on_bad_rows = "skip"; '
            "only your own function (task.verifiers) can judge rows without an answer"
        )


def test_a_data_source_may_be_nested(tmp_path):
    rows = [{"prompt": f"{i}?", "answer": i, "meta": {"set": "ab"[i % 2]}} for i in range(4)]
    task = load(
        write_jsonl(tmp_path / "rows.jsonl", [*rows, {"prompt": "x?", "answer": 1}]),
        5,
        params={"data_source": "meta.set"},
        heldout_file=write_jsonl(
            tmp_path / "test.jsonl",
            [*({**row, "prompt": f"And {i}?"} for i, row in enumerate(rows)), {"prompt": "y?", "answer": 1}],
        ),
    )
    assert [prompt.task for prompt in task.heldout] == ["a", "b", "a", "b", "rows"]
