r"""Test verdicts on mathematical answers.

Each row is a ground truth, a completion, and True if the completion is right.
"""

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from entrace.analysis.trace import InputError
from entrace.trainer.tasks import answer_classes, load_task
from entrace.trainer.tasks.config import TaskConfig
from entrace.trainer.tasks.math_text import find_answer, normalize, normalize_formulas
from entrace.trainer.tasks.math_verifier import MAX_PARSED, MathVerifier, fault_of
from entrace.trainer.tasks.prompt import Prompt

MATH = MathVerifier()
MATH_TEXT = MathVerifier(reads_text=True)


def judge(verifier, truth, completion):
    score = verifier(completion, Prompt("p", "train", "maths", "?", truth, None, "rows.jsonl, line 1", {}, verifier))
    assert not score.is_timeout
    return score


def boxed(truth, answer, is_right):
    return (truth, rf"so $\boxed{{{answer}}}$", is_right)


MARKS = [
    ("73", r"\boxed 73", True),
    ("73", r"\boxed73", True),
    ("-73", r"$\boxed -73$.", True),
    ("73", "\\boxed 73. That is all", True),
    ("1234", r"\boxed 1,234, as said", True),
    ("13/4", r"\boxed 3 1/4", True),
    ("1/2", r"$\boxed\frac12$", True),
    (r"\sqrt{2}", r"\boxed \sqrt{2} metres", True),  # style: ignore
    ("73", r"\boxed{ 73 \ }", True),
    ("73", r"\boxed{\,73\,}", True),
    ("73", r"\boxed{\quad 73~\quad}", True),
    ("73", r"\\boxed{73}", True),
    ("73", r"\boxed{\boxed{73}}", True),
    ("73", r"\boxed{{73}}", True),
    ("73", r"\fbox{73}", True),
    ("73", r"\boxed{\text{73}}", True),
    ("73", r"\boxed{\text{x = 73}}", True),
    ("73", r"\boxed{\mathbf{73}}", True),
    ("73", r"\boxed{\textcolor{blue}{73}}", True),
    ("73", r"\boxed{$73$}", True),
    ("42", "#### 42", True),
    ("42", "It is 41.\n#### 42\n", True),
    ("1234", "#### $1,234.", True),
    ("42", "#### 42 apples", True),
    ("42", "#### 42 apples\n.", True),
    ("42", "#### 42 apples\n.。", True),
    ("42", "#### 42 apples\n．", True),
    ("42", "\\boxed{41}\n#### 42", True),
    ("42", "#### Step 2\nwe see\n#### 42\n#### That is all", True),
    ("42", "#### Final answer\n\\boxed{42}", True),
    ("42", "#### \\boxed{42}", True),
    ("2", "#### Step 2\nI give up", False),
    ("42", "It is 42.", False),
]

SEVERAL = [
    ("2, 3", r"\boxed{2} and \boxed{3}", True),
    ("2, 3", r"$x=\boxed{2}$ or $x=\boxed{3}$.", True),
    ("2, 3", r"\(\boxed{2}\); \(\boxed{3}\)", True),
    ("2, 3", r"\[ \boxed{2} \quad \text{and} \quad \boxed{3} \]", True),
    ("2, 3", r"**$\boxed{2}$** and **$\boxed{3}$**", True),
    ("2, 3", "\\boxed{2}\n\\boxed{3}", True),
    ("2, 3", r"\boxed 2 and \boxed 3", True),
    ("1, 2, 3", r"$\boxed{1}$, $\boxed{2}$, and $\boxed{3}$", True),
    ("2, 3, 4", r"\boxed{2, 3}, \boxed{4}", True),
    (r"\{2, 3\}", r"\boxed{3} and \boxed{2}", True),
    ("(2, 3)", r"(\boxed{2}, \boxed{3})", True),
    ("(2, 3)", r"(\boxed{3}, \boxed{2})", False),
    ("3", r"\boxed{2} and \boxed{3}", False),
    ("5", r"\boxed{5} and \boxed{5.}", True),
    ("1/2", r"$\boxed{\frac12}$ or $\boxed{0.5}$", True),
    ("6", r"\boxed{5} wait, \boxed{6}", True),
    ("5, 6", r"\boxed{5} wait, \boxed{6}", False),
    ("6", r"\boxed{5} is wrong. \boxed{6}", True),
    ("4", r"$x=\boxed{3}$, so $x+1=\boxed{4}$", True),
]

SPACES = [
    *(boxed("12345", f"12{space}345", True) for space in (r"\,", r"\;", r"\:", r"\!", r"\ ", "~", " ", r"\thinspace ")),
    *(boxed("12345", f"12{space}345", True) for space in "\u2009\u202f\u200a\u2005\u2006\u00a0"),
    *(boxed("12345", f"12{space}345", True) for space in (",", "{,}", r",\!", r"{\,}")),
    boxed("1234567.5", r"1\,234\,567.5", True),
    boxed("1234567", r"12\,34\,567", True),
    boxed("3.14159", r"3.141\,59", True),
    boxed("-12345", r"-12\,345", True),
    boxed(r"12\,345", "12345", True),
    boxed("12345/2", r"\frac{12\,345}{2}", True),
    boxed("12345/2", r"12\,345/2", True),
    boxed("1000/3", "1 000/3", True),
    boxed("(1000, 2000)", r"(1\,000,\,2\,000)", True),
    boxed("8178", r"8\,178", True),
    boxed("186", r"8\,178", False),
    boxed("25", "8 17", False),
    boxed("136", r"8\ 17", False),
    boxed("25", "x = 8 17", False),
    boxed("2x", r"2\,x", True),
    boxed("3, 4", r"3,\;4", True),
    boxed("5", r"5~\text{cm}", True),
]

MIXED = [
    *(boxed("13/4", answer, True) for answer in ("3 1/4", r"3\frac{1}{4}", r"3 \frac14", r"3\ 1/4", r"3\;\tfrac14")),
    *(boxed("13/4", answer, True) for answer in ("3¼", r"3 1/4 \text{ cups}", "3.25", r"3+\frac14")),
    *(boxed("-13/4", answer, True) for answer in ("-3 1/4", r"-3\frac14", "−3¼")),
    boxed("3 1/4", "3.25", True),
    boxed(r"\frac{5x}{2}", r"2\frac12x", True),
    boxed("3/2, 5/2", "1 1/2,2 1/2", True),
    boxed("9/8", r"1\,125/1000", True),
    boxed("3/4", "3 1/4", False),
    boxed("11/4", "-3 1/4", False),
    boxed("1/3", r"0.\overline{3}", True),
    boxed(r"1.2\overline{3}", "37/30", True),
]

DEGREES = [
    *(boxed("90", f"90{sign}", True) for sign in (r"^\circ", r"^{\circ}", "°", "º", r"\degree", r"\text{ degrees}")),
    boxed(r"90^\circ", "90", True),
    boxed("20", r"20^\circ\text{C}", True),
    boxed("-40", "-40 °F", True),
    boxed("30, 60", r"30^\circ, 60^\circ", True),
    boxed(r"90^\circ", r"91^\circ", False),
    boxed(r"\frac{\pi}{4}", r"45^\circ", False),
]

CHARACTERS = [
    boxed("12", "１２", True),
    boxed("12", "١٢", True),
    boxed("12", "१२", True),
    boxed("12", "𝟏𝟐", True),
    boxed("12", "1\u200b2", True),
    boxed("１２", "12", True),
    boxed("1234.5", "١٬٢٣٤٫٥", True),
    boxed("-5", "−5", True),
    boxed("-5", "–5", True),
    boxed("x^{10}", "x¹⁰", True),
    boxed("x^{-1}", "x⁻¹", True),
    boxed("x_{12}", "x₁₂", True),
    boxed("3/4", "¾", True),
    boxed("1/2", "1⁄2", True),
    boxed("(1, 2)", "（1，2）", True),
    boxed(r"\frac{\pi}{2}", "𝜋/2", True),
    boxed(r"\theta+\Delta", "θ+Δ", True),
    boxed("6", "2×3", True),
    boxed(r"x \le 3", "x≤3", True),
    boxed(r"\mathbb{R}", "ℝ", True),
    boxed("Zürich", r"\text{Zürich}", True),
    boxed("12", "２１", False),
]

ROOTS = [
    *(boxed(r"\sqrt{2}", root, True) for root in (r"\sqrt2", r"\sqrt 2", "√2", "√(2)", "√{2}", r"\surd 2", "sqrt(2)")),
    boxed(r"\sqrt{12}", "√12", True),
    boxed(r"\sqrt{12}", "2√3", True),
    boxed(r"\frac{\sqrt3}{2}", "√3/2", True),
    boxed(r"\sqrt{x^2+(y+1)^2}", "sqrt(x^2+(y+1)^2)", True),
    boxed(r"\sqrt{\sqrt{2}}", "√(√2)", True),
    boxed(r"\sqrt{\pi}", "√π", True),
    boxed(r"\sqrt{\frac12}", r"\sqrt\frac12", True),
    boxed(r"\sqrt[3]{2}", "∛2", True),
    boxed(r"\sqrt[3]{5}", r"\sqrt[3]5", True),
    boxed(r"\sqrt[3]{5}", r"\root 3 \of 5", True),
    boxed(r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}", True),
    boxed(r"\sqrt{2}", r"\sqrt{3}", False),
]

INFINITY = [
    *(boxed(r"\infty", sign, True) for sign in ("∞", r"+\infty", "+∞", "infinity", r"\text{Infinity}", r"\infty.")),
    *(boxed(r"-\infty", sign, True) for sign in ("-∞", r"-\infty", "-infinity", r"\text{negative infinity}")),
    boxed(r"(-\infty, 5]", "(-∞, 5]", True),
    boxed(r"(-\infty, 0) \cup (0, \infty)", "(-∞,0)∪(0,+∞)", True),
    boxed(r"-\infty", r"\infty", False),
    boxed(r"\infty", "5", False),
    boxed(r"(-\infty, 5]", r"(-\infty, 5)", False),
    boxed("[0, ∞)", "(0, ∞)", False),
]

BASES = [
    *(boxed("52_8", base, True) for base in ("52_8", "52_{8}", "(52)_8", r"\text{52}_8", r"52_{\text{eight}}")),
    *(boxed("52_8", base, True) for base in (r"52_\text{eight}", r"52_{\text{base }8}", r"52\text{ (base 8)}")),
    *(boxed("52", base, False) for base in ("52_8", "52_{8}", "(52)_8", r"52_{\text{eight}}", "52 base 8")),
    *(boxed("52_8", base, False) for base in ("52", "42", "52_9", "53_8")),
    boxed("52", "52_{10}", True),
    boxed("1A3_{16}", "1A3_{16}", True),
    boxed("1A3_{16}", "1A4_{16}", False),
    boxed("12_3, 21_3", "21_3, 12_3", True),
    boxed("3", r"\log_2 8", True),
    boxed("a_1", "a_2", False),
]

SIZES = [
    boxed("2^{-70}", "2^{-70}", True),
    boxed("2^{-70}", r"\frac{1}{2^{70}}", True),
    boxed("2^{-70}", "4^{-35}", True),
    boxed("2^{-70}", "2^{-71}", False),
    boxed("2^{-70}", "0", False),
    boxed("10^{-20}", "10^{-21}", False),
    boxed("e^{-60}", "e^{-61}", False),
    boxed("0.0000001", "0.0000002", False),
    boxed(r"6.02 \times 10^{-23}", r"6.02 \times 10^{-24}", False),
    boxed(r"2^{-70}\sqrt{2}", r"2^{-71}\sqrt{2}", False),
    boxed("2^{-70}x", "2^{-71}x", False),
    boxed("2^{-70}x", r"\frac{x}{2^{70}}", True),
    boxed("x > 2^{-70}", "x > 2^{-71}", False),
    boxed("(2^{-70}, 1)", "(2^{-71}, 1)", False),
    boxed("[0, 2^{-70}]", "[0, 2^{-71}]", False),
    boxed("2^{200}", "2^{200}+1", False),
    boxed("1/3", "0.333333", True),
    boxed("1/3", "0.33", False),
    boxed("50", r"50\%", True),
]

EMPTY = [
    *(boxed(r"\emptyset", empty, True) for empty in (r"\varnothing", "∅", r"\{\}", r"\{ \}")),
    boxed(r"\varnothing", r"\emptyset", True),
    boxed(r"\emptyset", "0", False),
    boxed(r"\emptyset", r"\{0\}", False),
]

TRUTHS = [
    ("It has 19.\n#### 1,019", r"\boxed{1019}", True),
    (r"so $\boxed{1019}$.", r"\boxed{1019}", True),
    (r"$\boxed{2}$ or $\boxed{3}$", r"\boxed{2, 3}", True),
    ("$1019$", r"\boxed{1019}", True),
    (r"\(1019\)", r"\boxed{1019}", True),
    ("1019.", r"\boxed{1019}", True),
    (r"\text{even}", r"\boxed{\text{even}.}", True),
    (r"\text{even}", r"\boxed{\text{neve}}", False),
    ("C", r"\boxed{\text{(C)}}", True),
    (r"\$5", r"\boxed{5.00}", True),
]

VERDICTS = [
    *MARKS,
    *SEVERAL,
    *SPACES,
    *MIXED,
    *DEGREES,
    *CHARACTERS,
    *ROOTS,
    *INFINITY,
    *BASES,
    *SIZES,
    *EMPTY,
    *TRUTHS,
]


@pytest.mark.parametrize(("truth", "completion", "is_right"), VERDICTS)
def test_verdicts(truth, completion, is_right):
    assert judge(MATH, truth, completion).is_correct is is_right


@pytest.mark.parametrize(("truth", "completion", "is_right"), [row for row in VERDICTS if find_answer(row[1])])
def test_a_marked_answer_has_one_verdict_whether_texts_are_read_or_not(truth, completion, is_right):
    assert judge(MATH_TEXT, truth, completion).is_correct is is_right


# Ground truth, completion, and the answer that is recorded.
TEXTS = [
    ("73", "The answer is 73.", "73", True),
    ("73", "so x = 73", "73", True),
    ("5", "Therefore, $x=5$.", "x=5", True),
    ("1/2", "The final answer is 1/2. I hope it is correct.", "1/2", True),
    ("42", "I get 41, no wait, 42", "42", True),
    ("0.5", "It is 50%.", "50%", True),
    ("2, 3", "The solutions are $x=2$ and $x=3$.", "x=2 and x=3", True),
    ("1/2", r"We get \(\frac{1}{2}\).", r"\frac{1}{2}", True),
    ("70", "So $70.$", "70", True),
    ("12345", "The answer is 12\u2009345.", "12345", True),
    ("13/4", "The answer is 3 1/4.", r"\frac{13}{4}", True),
    ("13/4", "It is 3 1/4. I am sure.", r"\frac{13}{4}", True),
    ("90", "The angle is 90°.", "90", True),
    ("12", "It is １２.", "12", True),
    (r"\infty", "The limit is $∞$.", r"\infty", True),
    ("7", r"$7$ is it, for $\text{all others fail$ and so on", "7", True),
    ("52", "It is $52_8$.", "52_{8}", False),
    ("2^{-70}", "It is $2^{-71}$.", "2^{-71}", False),
    ("42", r"\boxed{41}, or rather 42", "41", False),
    ("42", "I do not know.", None, False),
]


@pytest.mark.parametrize(("truth", "completion", "answer", "is_right"), TEXTS)
def test_a_text_without_a_marked_answer_is_read_if_the_configuration_says_so(truth, completion, answer, is_right):
    score = judge(MATH_TEXT, truth, completion)
    assert (score.answer, score.is_correct) == (answer, is_right)
    if find_answer(completion) is None:
        assert judge(MATH, truth, completion).answer is None


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([(truth, text) for truth, text, _ in VERDICTS]),
    st.sampled_from([".", "..", " .", ". ", r"\,.", "。", "．"]),
)
@example(("70", r"\boxed{70}"), ".")
def test_a_trailing_period_never_changes_a_verdict(row, period):
    truth, text = row
    for verifier in (MATH, MATH_TEXT):
        expected = judge(verifier, truth, text).is_correct
        assert judge(verifier, truth, text + period.strip(" \\,")).is_correct is expected
        assert judge(verifier, f"{truth}{period}", text).is_correct is expected
        if text.startswith(r"so $\boxed{"):
            assert judge(verifier, truth, text.removesuffix("}$") + period + "}$").is_correct is expected
            marked = text.replace("{", "{$", 1).removesuffix("}$") + period + "$}"
            assert judge(verifier, truth, marked).is_correct is expected


@given(st.text(st.sampled_from("12. ,;x/{}$()\\^_√½\u2009°"), max_size=20))
def test_normalized_answers_end_without_punctuation(text):
    found = normalize(text)
    assert normalize(text + ".") == found
    assert not found.endswith((".", " ", ","))


def classes(truth, answers):
    row = Prompt("p", "train", "maths", "?", truth, None, "rows.jsonl, line 1", {}, MATH)
    return answer_classes(row, [MATH(text, row) for text in answers])


def test_wrong_answers_share_a_class_by_the_equality_of_verdicts():
    texts = [r"\boxed{3 1/4}", r"\boxed{52_8}", r"\boxed{13/4.}", r"\boxed{52}", r"\boxed{52_{8}}", r"\boxed 52", "x"]
    assert classes("1", texts) == ["3 1/4", "52_8", "3 1/4", "52", "52_8", "52", None]
    texts = [r"\boxed{2^{-70}}", r"\boxed{2^{-71}}", r"\boxed{2} and \boxed{3}", r"\boxed{\{3, 2\}}", r"\boxed{70.}"]
    assert classes("70", texts) == ["2^{-70}", "2^{-71}", "2, 3", "2, 3", "70."]


def write_rows(path, answers):
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "answer": a}) + "\n" for i, a in enumerate(answers)))
    return str(path)


GSM8K = "A box has {}, another {}.\nTogether {}+{}=<<{}+{}={}>>{}.\n#### {}"


@pytest.mark.parametrize("verifier", ["math", "math_text"])
def test_gsm8k_is_read_as_it_is_published(tmp_path, verifier):
    sums = [(a, a + 3, 2 * a + 3) for a in range(8)]
    golds = [GSM8K.format(a, b, a, b, a, b, c, c, f"1,{c:03d}") for a, b, c in sums]
    path = write_rows(tmp_path / "gsm8k.jsonl", golds)
    task = load_task(TaskConfig(name=path, num_heldout=2, verifiers={"default": verifier}), seed=0)
    for prompt in [*task.heldout, *map(task.train_prompt, range(6))]:
        right = int(prompt.ground_truth.rpartition("=")[2].partition(">>")[0]) + 1000
        assert task.score(rf"So \boxed{{{right}}}.", prompt).is_correct
        assert not task.score(rf"So \boxed{{{right + 1}}}.", prompt).is_correct


def test_ground_truths_that_cannot_be_read_are_one_line_before_the_run_starts(tmp_path):
    prose = "One box has 5, the other 8.\nTogether 5+8=<<5+8=13>>13."
    path = write_rows(tmp_path / "rows.jsonl", ["13", prose, r"5\frac{1}", r"\frac12", "none of these"])
    config = {"name": path, "num_heldout": 1, "verifiers": {"default": "math"}}
    with pytest.raises(InputError) as error:
        load_task(TaskConfig(**config), seed=0)
    assert str(error.value) == (
        f'{path}: 2 of 5 rows are malformed (line 2: "answer" is unreadable, "One box has 5, the other 8.'
        r'\nTogether ..."; line 3: "answer" is unreadable, "5\\frac{1}"); fix them, or set task.on_bad_rows = "skip"; '
        r"math and math_text read a number, a formula, or a text that marks one as \boxed{42} or, on its last line, as "
        "#### 42"
    )
    task = load_task(TaskConfig(**config, on_bad_rows="skip"), seed=0)
    assert task.describe()["data"][path]["bad_rows"] == 2
    # Other verifiers compare texts.
    load_task(TaskConfig(**{**config, "verifiers": {"default": "exact"}}), seed=0)


READABLE = ["7", "-1,234", "3 1/4", r"\frac{1}{2}", "x=1, y=2", r"(-\infty, 5]", r"1 < x \le 2", "10:30", "52_8", "90°"]
READABLE += [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"0.\overline{3}", r"\text{Evelyn}", "no solution", "Zürich"]
UNREADABLE = ["5\\frac{1}", "x" * 2001, r"\begin{pmatrix", "It is clear that no such number exists on the whole line"]


def test_readable_ground_truths():
    assert {truth: fault_of(MATH, truth) for truth in READABLE} == dict.fromkeys(READABLE)
    assert all(fault_of(MATH, truth) for truth in UNREADABLE)
    assert fault_of(lambda *_: None, "5\\frac{1}") is None


def test_no_more_ground_truths_are_parsed_than_a_start_has_time_for(monkeypatch):
    verifier = MathVerifier()
    asked = []
    monkeypatch.setattr(verifier, "_ask", lambda *question: asked.append(question) or [True])
    for i in range(MAX_PARSED + 5):
        verifier.fault_of(f"x+{i}")
        verifier.fault_of(f"{i}")
    assert len(asked) == MAX_PARSED
    assert verifier.fault_of("one two three four five six seven eight nine ten") is not None


def test_answers_of_tasks_that_draw_prompts_are_checked_too():
    with pytest.raises(InputError, match=r'n_queens, heldout index 0: answer ".*", expected a number, a formula'):
        load_task(TaskConfig(name="n_queens", num_heldout=1, verifiers={"default": "math"}), seed=0)


@pytest.mark.parametrize("text", [r"\boxed", r"\boxed x{", r"\boxed{1} and ", "√(", "52_{{", "#### a\n", "$", "1 1/"])
def test_reading_takes_time_linear_in_the_text(text):
    started = time.process_time()
    find_answer(text * 50_000)
    normalize_formulas(text * 50_000)
    assert time.process_time() - started < 20
