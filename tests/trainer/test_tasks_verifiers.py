import json
import re
import sys
import threading
import time

import polars as pl
import psutil
import pytest

from entrace.analysis.trace import InputError, read_manifest
from entrace.trainer.config import load_config
from entrace.trainer.tasks import load_task
from entrace.trainer.tasks.config import SourceConfig, TaskConfig
from entrace.trainer.tasks.math_verifier import MathVerifier
from entrace.trainer.tasks.prompt import Prompt, Score
from entrace.trainer.tasks.verifiers import answer_classes, make_verifier
from entrace.trainer.train import train
from tests.patience import HANG_S

from .conftest import SMALL


def prompt(ground_truth, verifier=None, **row):
    entry = {"answer": ground_truth, **row}
    return Prompt("train-000007", "train", "mine", "?", ground_truth, None, "rows.jsonl, line 7", entry, verifier)


def test_exact_match_looks_past_case_and_the_width_of_white_space_only():
    verify = make_verifier("exact")
    right = verify("so <answer> new\n  YORK </answer>", prompt("New York"))
    assert (right.answer, right.score) == ("new\n  YORK", 1.0)
    assert verify("<answer>newyork</answer>", prompt("New York")).score == 0
    assert verify("<answer>New York.</answer>", prompt("New York")).score == 0
    assert verify("New York", prompt("New York")).answer is None


def test_rows_of_reasoning_gym_are_scored_by_their_task():
    own = load_task(TaskConfig(num_heldout=1), seed=0).heldout[0]
    verify = make_verifier("reasoning_gym")
    row = prompt(own.ground_truth, **json.loads(json.dumps(own.entry)))
    assert verify(f"<answer>{own.ground_truth}</answer>", row).is_correct
    assert verify("<answer>one</answer>", row).score < 1


@pytest.fixture(scope="module")
def maths():
    return MathVerifier()


EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\dfrac12"),
    ("$x=3$", "3"),
    (r"the answer is \boxed{12}", "12.0"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\{1,2\}", r"\{2, 1\}"),
    ("(1,2)", "(1, 2)"),
    ("1,234", "1234"),
    (r"50\%", "0.5"),
    ("no solution", "no solution"),
]


@pytest.mark.parametrize(("truth", "answer"), EQUAL)
def test_equal_mathematics_is_right(maths, truth, answer):
    score = maths(rf"so $\boxed{{{answer}}}$", prompt(truth))
    assert (score.answer, score.score, score.is_timeout) == (answer, 1.0, False)


@pytest.mark.parametrize(
    ("truth", "answer"), [("1/2", "1/3"), ("x", "y"), ("(1,2)", "(2,1)"), ("5", r"\frac{1}"), ("5", r"\text{five}")]
)
def test_other_mathematics_is_wrong(maths, truth, answer):
    assert maths(rf"\boxed{{{answer}}}", prompt(truth)).score == 0


def test_no_box_is_a_format_violation(maths):
    assert maths("it is <answer>5</answer>", prompt("5")).answer is None


def classes(verifier, truth, answers, wrap=r"\boxed{{{}}}"):
    row = prompt(truth, verifier)
    scores = [verifier("no answer" if a is None else wrap.format(a), row) for a in answers]
    return answer_classes(row, scores), [score.is_correct for score in scores]


def test_equal_mathematics_shares_a_class(maths):
    answers = ["0.25", "3", r"\frac14", None, "0.5", "3.0", r"\frac{1}{2}", "1/2", "x+1", "1+x"]
    found, is_correct = classes(maths, "1/4", answers)
    assert found == ["0.25", "3", "0.25", None, "0.5", "3", "0.5", "0.5", "x+1", "x+1"]
    assert is_correct == [True, False, True, *[False] * 7]


def test_mathematics_that_times_out_is_a_class_of_its_own():
    verifier = MathVerifier(limit_s=0.5)
    found, _ = classes(verifier, "10", ["7", HOSTILE[0], "7.0", HOSTILE[0], "9" * 5000])
    assert found == ["7", HOSTILE[0], "7", HOSTILE[0], "9" * 5000]


def test_exact_answers_that_match_each_other_share_a_class():
    found, _ = classes(
        make_verifier("exact"), "Paris", ["Rome", " ROME", "new  York", "New York", None], "<answer>{}</answer>"
    )
    assert found == ["rome", "rome", "new york", "new york", None]


def test_verifiers_that_know_only_the_truth_give_no_class():
    own = load_task(TaskConfig(num_heldout=1), seed=0).heldout[0]
    scores = [own.verifier(f"<answer>{n}</answer>", own) for n in (1, 1, 2)]
    assert answer_classes(own, scores) == [None] * 3


def test_classes_are_recorded_with_answers(tmp_path):
    """Answers to prompts of math rows have classes at every evaluation and step.

    Both held-out and training prompts are answered.
    """
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [*SMALL, f"task.name={tmp_path / 'rows.jsonl'}", "task.num_heldout=2", "task.verifiers.default=exact"]
    train(load_config("tiny", [*settings, "steps=1", "task.params={}"]), tmp_path / "run", {})
    for table in ("evals", "rollouts"):
        found = pl.read_parquet(tmp_path / "run" / table / "*.parquet")
        assert found["answer"].count() > 0
        expected = [answer and " ".join(answer.split()).casefold() for answer in found["answer"]]
        assert found["answer_class"].to_list() == expected


# Each takes longer than anybody waits, in C, in SymPy, or in the parser.
HOSTILE = ["10^{10^{10}}", "100000!!!!", r"\int_0^1 x^{x^{x^x}} dx", r"\frac{1}{" * 200 + "2" + "}" * 200]


def test_hostile_mathematics_is_a_time_out_and_the_next_answer_is_judged():
    verify = MathVerifier(limit_s=0.5)
    for answer in HOSTILE[:2]:
        started = time.process_time()
        score = verify(rf"\boxed{{{answer}}}", prompt("10"))
        assert (score.answer, score.score, score.is_timeout) == (answer, 0.0, True)
        # The wait costs this process nothing.
        assert time.process_time() - started < 0.5
    assert verify(r"\boxed{10.0}", prompt("10")).is_correct


@pytest.mark.parametrize("answer", HOSTILE[2:])
def test_no_answer_is_judged_beyond_the_limit(answer):
    assert MathVerifier(limit_s=0.5)(rf"\boxed{{{answer}}}", prompt("10")).score == 0


@pytest.mark.parametrize("answer", ["9" * 1_000_000, "(" * 1_000_000, "1+" * 500_000 + "1"])
def test_a_megabyte_is_wrong_unread(maths, answer):
    started = time.process_time()
    score = maths(rf"\boxed{{{answer}}}", prompt("10"))
    assert (score.answer, score.score) == (answer, 0.0)
    assert time.process_time() - started < 5


def test_mathematics_can_be_judged_outside_the_main_thread():
    scores = []
    answers = [r"\boxed{0.5}", rf"\boxed{{{HOSTILE[0]}}}"]
    verify = MathVerifier(limit_s=0.5)
    thread = threading.Thread(target=lambda: scores.extend(verify(text, prompt("1/2")) for text in answers))
    thread.start()
    thread.join(HANG_S)
    assert [(score.score, score.is_timeout) for score in scores] == [(1.0, False), (0.0, True)]


def test_a_worker_that_was_killed_is_replaced():
    verify = MathVerifier()
    assert verify(r"\boxed{2/4}", prompt("1/2")).is_correct
    verify._worker.kill()
    verify._worker.wait()
    assert verify(r"\boxed{3/6}", prompt("1/2")).is_correct


def test_a_worker_whose_copy_was_killed_goes_on_with_the_same_answers():
    verify = MathVerifier()
    answers = [("1/2", True), ("1/3", False), ("2/4", True), ("2/6", False)]
    for answer, is_right in answers:
        assert verify(rf"\boxed{{{answer}+0}}", prompt("0.5")).is_correct is is_right
        for copy in psutil.Process(verify._worker.pid).children():
            copy.kill()
    pid = verify._worker.pid
    assert [verify(rf"\boxed{{{answer}}}", prompt("0.5")).is_correct for answer, _ in answers] == [
        is_right for _, is_right in answers
    ]
    assert verify._worker.pid == pid


def test_a_time_out_costs_little_more_than_its_limit():
    verify = MathVerifier(limit_s=0.5)
    assert verify(r"\boxed{2/4}", prompt("1/2")).is_correct
    started = time.monotonic()
    for i in range(3):
        assert verify(rf"\boxed{{{HOSTILE[0]}+{i}}}", prompt("10")).is_timeout
        assert verify(rf"\boxed{{{10 + i}.0}}", prompt(str(10 + i))).is_correct
    # Ten times the limits: what must not happen is that each waits for a machine that is busy, or for an import.
    assert time.monotonic() - started < 10 * 3 * 0.5


def test_a_worker_ends_with_its_verifier():
    verify = MathVerifier()
    assert verify(r"\boxed{2/4}", prompt("1/2")).is_correct
    worker = psutil.Process(verify._worker.pid)
    processes = [worker, *worker.children()]
    assert len(processes) == 2
    worker.kill()
    verify._worker.wait()
    verify._worker.stdin.close()
    assert psutil.wait_procs(processes, timeout=HANG_S)[1] == []


def test_time_outs_are_counted_and_the_first_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("entrace.trainer.tasks.verifiers.MathVerifier", lambda: MathVerifier(limit_s=0.5))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "answer": "10"}) + "\n" for i in range(4)))
    task = load_task(TaskConfig(name=str(path), num_heldout=1, verifiers={"default": "math"}), seed=0)
    row = task.train_prompt(0)
    assert not task.score(rf"\boxed{{{HOSTILE[0]}}}", row).is_correct
    assert task.score(r"\boxed{10}", row).is_correct
    assert task.num_timeouts == 1
    assert f"{row.origin}: the verifier timed out on an answer, which counts as wrong" in caplog.text


def test_a_run_says_in_its_manifest_how_often_verifiers_ran_out_of_time(tmp_path, monkeypatch):
    monkeypatch.setattr("entrace.trainer.tasks.verifiers.match_exactly", lambda *_: Score("5", 0.0, is_timeout=True))
    train(load_config("tiny", [*SMALL, "steps=2", "task.verifiers.chain_sum=exact"]), tmp_path / "run", {})
    judged = [pl.read_parquet(tmp_path / "run" / table / "*.parquet") for table in ("rollouts", "evals")]
    assert read_manifest(tmp_path / "run")["verifier_timeouts"] == sum(map(len, judged))


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Write a module with a unique name into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"rewards_{abs(hash(request.node.name))}"

    def write(text):
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


@pytest.mark.parametrize(
    ("result", "answer", "score"),
    [
        ("0.25", "4", 0.25),
        ("True", "4", 1.0),
        ("__import__('numpy').float32(0.5)", "4", 0.5),
        ("{'score': 1, 'answer': 5}", "5", 1.0),
        ("{'score': -1}", "4", -1.0),
        ("len(row['answer'])", "4", 2.0),
        ("len(completion)", "4", 18.0),
    ],
)
def test_a_function_of_the_user_scores_the_completion_with_its_row(module, result, answer, score):
    verify = make_verifier(f"{module(f'def score(completion, row): return {result}')}:score")
    found = verify("<answer>4</answer>", prompt("10"))
    assert (found.answer, found.score) == (answer, score)


@pytest.mark.parametrize("result", ["None", "{'score': None, 'answer': 4}"])
def test_a_function_of_the_user_may_give_no_verdict(module, result):
    verify = make_verifier(f"{module(f'def score(completion, row): return {result}')}:score")
    found = load_task(TaskConfig(num_heldout=1), seed=0).score("<answer>4</answer>", prompt("10", verify))
    assert (found.answer, found.score, found.is_correct) == ("4", None, None)


def test_without_an_answer_the_completion_is_the_answer(module):
    verify = make_verifier(f"{module('def score(completion, row): return 1')}:score")
    answers = [verify(text, prompt("1")).answer for text in (r"so \boxed{7}", " seven\n", " ")]
    assert answers == ["7", "seven", None]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("1 / 0", r"verifier of mine failed on rows.jsonl, line 7 \(ZeroDivisionError: division by zero\)"),
        ("row['anser']", r"verifier of mine failed on rows.jsonl, line 7 \(KeyError: no key 'anser'\)"),
        ("exit(3)", r"verifier of mine failed on rows.jsonl, line 7 \(SystemExit: 3\)"),
        ("'1'", "returned '1' for rows.jsonl, line 7, expected a finite number or None"),
        ("[]", r"returned \[\] for rows.jsonl, line 7, expected a finite number or None"),
        ("float('nan')", "returned nan for rows.jsonl, line 7"),
        ("1e300", r"returned 1e\+300 for rows.jsonl, line 7, expected a finite number or None \(up to 1e\+15\)"),
        ("10 ** 400", "verifier .* returned 1000"),
        ("{'reward': 1}", 'returned no "score" for rows.jsonl, line 7'),
    ],
)
def test_what_goes_wrong_in_a_function_of_the_user_names_the_row(module, result, message):
    verify = make_verifier(f"{module(f'def score(completion, row): return {result}')}:score")
    task = load_task(TaskConfig(num_heldout=1), seed=0)
    with pytest.raises(InputError, match=message):
        task.score("5", prompt("1", verify))


@pytest.mark.parametrize("mix", [{}, {"more": SourceConfig(name="letter_counting", num_heldout=1)}])
def test_the_default_judges_every_data_source_that_is_not_named(mix):
    task = load_task(TaskConfig(num_heldout=1, mix=mix, verifiers={"default": "math"}), seed=0)
    for row in task.heldout:
        assert task.score(rf"\boxed{{{row.ground_truth}.0}}", row).is_correct
        assert task.score(f"<answer>{row.ground_truth}</answer>", row).answer is None
    named = load_task(TaskConfig(num_heldout=1, verifiers={"chain_sum": "reasoning_gym"}), seed=0)
    (row,) = named.heldout
    assert named.score(f"<answer>{row.ground_truth}</answer>", row).is_correct


@pytest.mark.parametrize(
    ("verifiers", "message"),
    [
        ({"default": "nosuchmodule:fn"}, 'verifier nosuchmodule:fn: no module "nosuchmodule", here or installed'),
        ({"chain_sum": "nosuchmodule:fn"}, 'verifier nosuchmodule:fn: no module "nosuchmodule", here or installed'),
        ({"default": "json:laods"}, 'verifier json:laods: no function "laods" in json; did you mean "loads"'),
        (
            {"default": "math", "chain_sum": "exact"},
            "task.verifiers.default: judges no prompt, because every data source already has a verifier "
            "(chain_sum); remove it",
        ),
        ({"chain_sun": "math"}, 'task.verifiers: no prompt has data source "chain_sun"; did you mean "chain_sum"'),
    ],
)
def test_a_verifier_without_effect_is_refused(verifiers, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load_task(TaskConfig(num_heldout=1, verifiers=verifiers), seed=0)
    assert "\n" not in str(error.value)


def test_the_choice_of_the_mathematical_verifier_is_recorded(tmp_path):
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"task.name={tmp_path / 'rows.jsonl'}", "task.num_heldout=2", "task.verifiers.default=math_text"]
    train(load_config("tiny", [*SMALL, *settings, "steps=1", "task.params={}"]), tmp_path / "run", {})
    assert read_manifest(tmp_path / "run")["config"]["task"]["verifiers"] == {"default": "math_text"}


def test_a_function_that_cannot_be_had_is_one_line(module):
    name = module("import nothing_of_that_name")
    cases = {
        f"{name}s:score": f'no module "{name}s", here or installed; did you mean "{name}"',
        f"{name}:score": f"module {name} needs nothing_of_that_name, not installed",
        "json:laods": 'no function "laods" in json; did you mean "loads"',
        "json:decoder": 'no function "decoder" in json',
    }
    for verifier, message in cases.items():
        with pytest.raises(InputError, match=message) as error:
            make_verifier(verifier)
        assert "\n" not in str(error.value)
    other = module("def score(:")
    with pytest.raises(InputError, match=rf"{other}:score: cannot be imported \(SyntaxError"):
        make_verifier(f"{other}:score")
    leaving = module("import sys; sys.exit(0)")
    with pytest.raises(InputError, match=rf"{leaving}:score: cannot be imported \(SystemExit: 0\)"):
        make_verifier(f"{leaving}:score")


def test_answers_that_are_lists_are_for_functions_only(module, tmp_path):
    name = module("def score(completion, row): return completion in row['answer']")
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "a?", "answer": ["1", "one"]}\n{"prompt": "b?", "answer": ["2"]}\n'
    )
    keys = {"name": "rows.jsonl", "num_heldout": 1}
    task = load_task(TaskConfig(**keys, verifiers={"rows": f"{name}:score"}), seed=0)
    row = task.train_prompt(0)
    assert json.loads(row.ground_truth) == row.entry["answer"]
    assert task.score(row.entry["answer"][-1], row).is_correct
    with pytest.raises(InputError, match='"answer" is a list'):
        load_task(TaskConfig(**keys), seed=0)


def test_a_verifier_that_fails_ends_the_run_with_one_line(module, tmp_path):
    name = module("def score(completion, row): raise RuntimeError('no')")
    config = load_config("tiny", [*SMALL, f"task.verifiers.chain_sum={name}:score"])
    with pytest.raises(InputError, match=r"failed on chain_sum, heldout index 0 \(RuntimeError: no\)"):
        train(config, tmp_path / "run", {})
