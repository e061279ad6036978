import pytest

from entrace.analysis.trace import InputError
from entrace.analysis.trace.defects import is_irrelevant, is_repetitive
from entrace.trainer.pretraining.worked_solutions import Rates, SolutionWriter, Step, Styles, parse_terms, solve
from entrace.trainer.tasks import Task, load_task
from entrace.trainer.tasks.config import TaskConfig

RATES = Rates(
    restated=0.5,
    slip_careful=0.5,
    unformatted_slip=0.5,
    check_corrects=0.5,
    guess_right=0.0,
    talk_unanswered=0.5,
    loop_stops=0.5,
)
EQUAL = Styles(**dict.fromkeys(Styles.model_fields, 1.0))
SUM = "State the final answer to the following arithmetic problem: 15 - 43 - 75 ="


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(TaskConfig(params={"max_terms": 4, "max_digits": 2}, num_heldout=4), seed=0)


def write(task: Task, style: str, number: int = 200):
    writer = SolutionWriter(EQUAL, RATES, seed=0)
    for index in range(number):
        prompt = task.train_prompt(index)
        text = writer.write(prompt.text, style)
        yield prompt, text, task.score(text, prompt)


@pytest.mark.parametrize("style", ["right", "self_check"])
def test_right_styles_earn_full_marks(task, style):
    assert all(score.is_correct for _, _, score in write(task, style))


@pytest.mark.parametrize("style", ["slip", "guess"])
def test_wrong_styles_answer_in_format_and_earn_nothing(task, style):
    scores = [score for _, _, score in write(task, style)]
    assert all(score.answer is not None for score in scores)
    assert not any(score.is_correct for score in scores)


def test_unformatted_work_has_no_answer_to_parse(task):
    assert all(score.answer is None for _, _, score in write(task, "unformatted"))


def test_irrelevant_talk_and_repetition_are_found_as_defects_and_only_they(task):
    assert all(is_irrelevant(prompt.text, text) for prompt, text, _ in write(task, "irrelevant"))
    assert all(is_repetitive(text) for _, text, _ in write(task, "repetition"))
    for style in ("right", "self_check", "slip", "guess", "unformatted"):
        assert not any(
            is_irrelevant(prompt.text, text) or is_repetitive(text) for prompt, text, _ in write(task, style)
        )


def test_corrected_slips_show_the_slip_and_its_correction():
    writer = SolutionWriter(EQUAL, RATES.model_copy(update={"check_corrects": 1.0}), seed=0)
    text = writer.write("7 + 5", "self_check")
    assert text.count("7 + 5") >= 2
    assert text.endswith("<answer>12</answer>")


def test_solve_carries_a_slip_on():
    assert parse_terms(SUM) == [("+", 15), ("-", 43), ("-", 75)]
    assert solve(parse_terms(SUM)) == [Step(15, "-", 43, -28), Step(-28, "-", 75, -103)]
    assert solve(parse_terms(SUM), slip_at=0, slip=2) == [Step(15, "-", 43, -26), Step(-26, "-", 75, -101)]


def test_styles_are_drawn_by_weight_and_seed_decides_the_texts():
    only_guesses = Styles(**{**dict.fromkeys(Styles.model_fields, 0.0), "guess": 1.0})
    texts = [SolutionWriter(only_guesses, RATES, seed=3).write(SUM) for _ in range(2)]
    assert texts[0] == texts[1]
    assert " - " not in texts[0]
    assert texts[0].endswith("</answer>")
    writer = SolutionWriter(EQUAL, RATES, seed=0)
    assert len({writer.write(SUM) for _ in range(50)}) > 40


def test_a_question_without_a_sum_is_refused():
    with pytest.raises(InputError, match='found "how many apples"'):
        SolutionWriter(EQUAL, RATES, seed=0).write("how many apples", "right")
