import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrace.analysis.trace import InputError
from entrace.trainer.config import load_config
from entrace.trainer.tasks import Mixture, Score, extract_answer, load_task
from entrace.trainer.tasks.config import SourceConfig, TaskConfig
from entrace.trainer.tasks.prompt import extract_boxed

PARAMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
LONGER = {**PARAMS, "min_terms": 3, "max_terms": 3}


def chain_sum(num_heldout: int = 5, **keys) -> TaskConfig:
    return TaskConfig(params=PARAMS, num_heldout=num_heldout, **keys)


def test_splits_share_no_question_even_where_questions_are_few():
    task = load_task(chain_sum(num_heldout=100), seed=3)
    heldout = {prompt.text for prompt in task.heldout}
    assert len(heldout) == 100
    assert not heldout & {task.train_prompt(i).text for i in range(300)}


def test_prompts_depend_on_the_seed_alone():
    one, same, other = (load_task(chain_sum(), seed=s) for s in (0, 0, 1))
    assert [one.train_prompt(i) for i in (7, 3)] == [same.train_prompt(i) for i in (7, 3)]
    assert [p.text for p in one.heldout] == [p.text for p in other.heldout]
    assert [p.text for p in load_task(chain_sum(heldout_seed=1), seed=0).heldout] != [p.text for p in one.heldout]


def test_seeds_train_on_different_prompts_and_share_the_held_out_set():
    long = {"min_terms": 6, "max_terms": 8, "min_digits": 3, "max_digits": 4}
    tasks = [load_task(TaskConfig(params=long, num_heldout=50), seed=s) for s in (0, 1, 2, 17)]
    trained = [{task.train_prompt(i).text for i in range(500)} for task in tasks]
    assert len(set.union(*trained)) == 4 * 500
    assert all(task.heldout == tasks[0].heldout for task in tasks)


def test_correctness_has_a_threshold():
    task, strict = (load_task(chain_sum(correct_at=value), seed=0) for value in (0.0, 1.5))
    prompt = task.train_prompt(0)
    right = f"<answer>{prompt.ground_truth}</answer>"
    assert (task.score("", prompt).is_correct, task.score(right, prompt).is_correct) == (True, True)
    assert (strict.score("", prompt).is_correct, strict.score(right, prompt).is_correct) == (False, False)
    assert Score(None, None).is_correct is None


def test_scores_come_from_the_task():
    task = load_task(chain_sum(), seed=0)
    prompt = task.train_prompt(0)
    right = task.score(f"so <answer> {prompt.ground_truth} </answer>", prompt)
    assert (right.answer, right.is_correct) == (prompt.ground_truth, True)
    wrong = task.score("<answer>1000</answer>", prompt)
    assert (wrong.answer, wrong.is_correct, wrong.score) == ("1000", False, 0.0)
    none = task.score(f"it is {prompt.ground_truth}", prompt)
    assert (none.answer, none.score) == (None, 0.0)


ANSWERS = [
    ("<answer>4</answer>", "4"),
    ("<answer>4</answer> wait <answer> 5\n</answer>", "5"),
    ("<answer>4</answer><answer> </answer>", "4"),
    ("<answer>4 <answer>5</answer></answer>", "4 <answer>5"),
    ("<answer></answer>", None),
    ("</answer><answer>4", None),
    ("4", None),
    ("", None),
]


@pytest.mark.parametrize(("completion", "answer"), ANSWERS)
def test_the_last_answer_with_content_counts(completion, answer):
    assert extract_answer(completion) == answer


BOXES = [
    (r"\boxed{4}", "4"),
    (r"$\boxed{\frac{1}{2}}$ or \boxed{ 0.5 }", "0.5"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed {4}", "4"),
    (r"\boxed{4} \boxed{}", "4"),
    (r"\boxed{4} and \boxed{\frac{1}{2}", "4"),
    (r"{\boxed{4}", "4"),
    (r"\boxed{x \boxed{4}}", r"x \boxed{4}"),
    (r"\fbox{4} 4}", None),
    (r"\boxed 73", "73"),
    (r"\boxed\frac12. So", r"\frac12"),
    (r"\boxed{4} \boxed", "4"),
    (r"\boxed{4 \boxed{5}", "5"),
    (r"\\boxed{4}", "4"),
    ("", None),
]


@pytest.mark.parametrize(("completion", "answer"), BOXES)
def test_the_last_box_that_is_closed_counts(completion, answer):
    assert extract_boxed(completion) == answer


def test_extraction_takes_time_linear_in_what_it_reads():
    # Patterns with backtracking take minutes on these.
    assert extract_answer("<answer> " * 200_000) is None
    assert extract_boxed(r"\boxed{" * 200_000) is None


def test_difficulty_is_the_instance_own():
    prompt = load_task(chain_sum(), seed=0).train_prompt(0)
    assert prompt.difficulty == '{"num_digits": 1, "num_terms": 2}'


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "chain_summ"}, 'unknown task "chain_summ"; did you mean "chain_sum"'),
        ({"params": {"terms": 2}}, "terms"),
        ({"params": {"min_terms": 3, "max_terms": 2}}, "max_terms"),
        (
            {"params": PARAMS, "num_heldout": 1000},
            r"task.num_heldout = 1000: too few distinct questions, chain_sum has \d{3} with these params; lower it",
        ),
    ],
)
def test_bad_tasks_are_one_line(config, message):
    with pytest.raises(InputError, match=message) as error:
        load_task(TaskConfig(**config), seed=0)
    assert "\n" not in str(error.value)


BAD_OVERRIDES = [
    ("task.name=train.csv", ["task.name", '"train.csv" is not a .jsonl or .parquet file']),
    ("task.heldout_file=test.jsonl", ["heldout_file", "chain_sum generates its own", "task.mix.NAME", "weight = 0"]),
    ("task.heldout_file=7", ["task.heldout_file: expected a file, a list of files, or a table", "found 7"]),
    ('task.heldout_file=["a.jsonl", 7]', ["task.heldout_file: expected a file, a list of files, or a table"]),
    ('task.heldout_file={x = "test.csv"}', ['task.heldout_file: "test.csv" is not a .jsonl or .parquet file']),
    ('task.heldout_file={" " = "test.jsonl"}', ["task.heldout_file: a benchmark name is blank"]),
    (
        'task.heldout_file=["a/test.jsonl", "b/test.parquet"]',
        ['both "a/test.jsonl" and "b/test.parquet" would be the benchmark "test"', "heldout_file = { NAME"],
    ),
    ("task.num_heldout=all", ['num_heldout = "all" needs a file of rows', "chain_sum generates prompts without end"]),
    ("task.num_heldout=many", ["task.num_heldout", "'all'", "'many'"]),
    ("task.weight=0", ["task", "no source has a weight above 0"]),
    ("task.mix.chain_sum.name=basic_arithmetic", ['"chain_sum" is the name of the task itself']),
    ("task.mix.other.nam=basic_arithmetic", ['"task.mix.other.nam"', 'did you mean "name"']),
    ("task.mix.other={}", ['"task.mix.other.name" is missing']),
    ("task.verifiers.default=exakt", ["task.verifiers.default", 'did you mean "exact"']),
    ("task.verifiers.default=math_txt", ["task.verifiers.default", 'did you mean "math_text"']),
    ("task.on_bad_rows=ignore", ["task.on_bad_rows", "valid: skip, stop"]),
]


@pytest.mark.parametrize(("override", "expected"), BAD_OVERRIDES)
def test_a_bad_key_of_the_task_is_one_line(override, expected):
    with pytest.raises(InputError) as error:
        load_config("tiny", [override])
    for part in expected:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_table_clears_what_the_config_says():
    assert load_config("tiny", ["task.params={}"]).task.params == {}


@given(
    st.lists(st.sampled_from([0.1, 0.5, 1.0, 3.0]), min_size=1, max_size=4),
    st.integers(0, 2**31),
    st.lists(st.integers(0, 3000), min_size=1, max_size=5),
)
def test_a_mixture_is_a_function_of_the_index_and_leaves_no_prompt_out(weights, seed, indices):
    draws = [lambda i, n=n: (n, i) for n in range(len(weights))]
    drawn = list(map(Mixture(draws, weights, seed), range(3001)))
    assert [Mixture(draws, weights, seed)(i) for i in indices] == [drawn[i] for i in indices]
    for n in range(len(weights)):
        places = [place for source, place in drawn if source == n]
        assert places == list(range(len(places)))


def test_a_mixture_draws_in_proportion_to_the_weights():
    mixture = Mixture([lambda i, n=n: n for n in range(3)], [1.0, 2.0, 5.0], seed=0)
    shares = np.bincount([mixture(i) for i in range(8000)]) / 8000
    # Four standard deviations of a share of 8000 draws.
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=4 * 0.5 / 8000**0.5)


def test_mixed_sources_keep_their_names_their_verifiers_and_their_splits_apart():
    mix = {
        "longer": SourceConfig(name="chain_sum", params=LONGER, num_heldout=7, weight=2),
        # All of its questions may be those of the task itself, none of which is held out may be trained on.
        "same": SourceConfig(name="chain_sum", params=PARAMS, num_heldout=3),
        "letters": SourceConfig(name="letter_counting", num_heldout=4, weight=0),
    }
    task = load_task(chain_sum(mix=mix, verifiers={"longer": "exact"}), seed=0)
    assert [p.task for p in task.heldout] == ["chain_sum"] * 5 + ["longer"] * 7 + ["same"] * 3 + ["letters"] * 4
    train = [task.train_prompt(i) for i in range(400)]
    assert {p.task for p in train} == {"chain_sum", "longer", "same"}
    assert len({p.prompt_id for p in [*train, *task.heldout]}) == 400 + 19
    assert not {p.text for p in train} & {p.text for p in task.heldout}
    longer = next(p for p in train if p.task == "longer")
    # The task's own scorer gives part of the credit to an answer that holds more than the right one.
    assert task.score(f"<answer>it is {longer.ground_truth}</answer>", longer).score == 0
    letters = task.heldout[-1]
    assert task.score(f"<answer>{letters.ground_truth}</answer>", letters).is_correct


def test_alone_a_task_draws_what_it_draws_in_a_mixture():
    alone = load_task(chain_sum(), seed=0)
    mixed = load_task(chain_sum(mix={"letters": SourceConfig(name="letter_counting", num_heldout=1)}), seed=0)
    own = [p for p in map(mixed.train_prompt, range(200)) if p.task == "chain_sum"]
    assert [p.text for p in own] == [alone.train_prompt(i).text for i in range(len(own))]


def test_names_of_verifiers_that_no_prompt_asks_for_are_refused():
    with pytest.raises(InputError, match='no prompt has data source "chain_sums"; did you mean "chain_sum"'):
        load_task(chain_sum(verifiers={"chain_sums": "exact"}), seed=0)


def test_prompts_that_are_too_long_are_passed_over(policy):
    whole = load_task(TaskConfig(params={**PARAMS, "max_terms": 4}, num_heldout=20), 0, policy.encode_prompt)
    lengths = [len(policy.encode_prompt(p.question)) for p in whole.heldout]
    limit = sorted(lengths)[10]
    config = TaskConfig(params={**PARAMS, "max_terms": 4}, num_heldout=20, max_prompt_tokens=limit)
    task = load_task(config, 0, policy.encode_prompt)
    prompts = [*task.heldout, *map(task.train_prompt, range(50))]
    assert max(len(policy.encode_prompt(p.question)) for p in prompts) == limit < max(lengths)
    with pytest.raises(InputError, match="needs a tokenizer"):
        load_task(config, 0)
