import pytest

from analysis.trace import InputError
from trainer.tasks import ReasoningGymTask, extract_answer

PARAMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_splits_share_no_question_even_where_questions_are_few():
    task = ReasoningGymTask("chain_sum", PARAMS, seed=3, num_heldout=100)
    heldout = {prompt.text for prompt in task.heldout}
    assert len(heldout) == 100
    assert not heldout & {task.train_prompt(i).text for i in range(300)}


def test_prompts_depend_on_the_seed_alone():
    one, same, other = (ReasoningGymTask("chain_sum", PARAMS, seed=s, num_heldout=5) for s in (0, 0, 1))
    assert [one.train_prompt(i) for i in (7, 3)] == [same.train_prompt(i) for i in (7, 3)]
    assert [p.text for p in one.heldout] != [p.text for p in other.heldout]


def test_scores_come_from_the_task():
    task = ReasoningGymTask("chain_sum", PARAMS, seed=0, num_heldout=1)
    prompt = task.train_prompt(0)
    right = task.score(f"so <answer> {prompt.ground_truth} </answer>", prompt)
    assert (right.answer, right.is_correct) == (prompt.ground_truth, True)
    wrong = task.score("<answer>1000</answer>", prompt)
    assert (wrong.answer, wrong.is_correct, wrong.score) == ("1000", False, 0.0)
    none = task.score(f"it is {prompt.ground_truth}", prompt)
    assert (none.answer, none.score) == (None, 0.0)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>4</answer>", "4"),
        ("<answer>4</answer> wait <answer> 5\n</answer>", "5"),
        ("<answer>4</answer><answer> </answer>", "4"),
        ("<answer></answer>", None),
        ("<answer>4", None),
        ("4", None),
        ("", None),
    ],
)
def test_the_last_answer_with_content_counts(completion, answer):
    assert extract_answer(completion) == answer


def test_difficulty_is_the_instance_own():
    prompt = ReasoningGymTask("chain_sum", PARAMS, seed=0, num_heldout=1).train_prompt(0)
    assert prompt.difficulty == '{"num_digits": 1, "num_terms": 2}'


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("chain_summ", {}, 'unknown task "chain_summ"; did you mean "chain_sum"'),
        ("chain_sum", {"terms": 2}, "terms"),
        ("chain_sum", {"min_terms": 3, "max_terms": 2}, "max_terms"),
        ("chain_sum", {**PARAMS, "max_digits": 1}, "too few distinct questions"),
    ],
)
def test_bad_tasks_are_one_line(name, params, message):
    with pytest.raises(InputError, match=message) as error:
        ReasoningGymTask(name, params, seed=0, num_heldout=1000)
    assert "\n" not in str(error.value)
