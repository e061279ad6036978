"""Compare mathematical answers with math-verify, in a process that can be killed."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from entrace.analysis.trace import InputError
from entrace.trainer.tasks.math_text import (
    PUNCTUATION,
    count_words,
    find_answer,
    normalize,
    normalize_formulas,
    restore,
)
from entrace.trainer.tasks.prompt import Prompt, Score, Verifier

LIMIT_S = 3.0
# Longer than any answer; a policy that repeats itself inside the braces exceeds it.
MAX_CHARACTERS = 2000
# math-verify reads words as products of letters; no response repeats more than a few of them exactly.
MAX_WORDS = 8
# Ground truths to parse before a run starts; each takes milliseconds.
MAX_PARSED = 1000
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:/\d+)?")
PLAIN_WORDS = re.compile(r"(?:\\text\s*\{)?[^\W\d_]+(?:[ '.-]+[^\W_]+)*\}?")
EXPECTED = r"a number, a formula, or a text that marks one as \boxed{42} or, on its last line, as #### 42"
WORKER = Path(__file__).with_name("math_worker.py")


class MathVerifier:
    r"""Score 1 if math-verify finds the answer equal to the truth, else 0.

    Both are compared after ``normalize``. The answer is the content of the last ``\boxed{...}``, of several boxes that
    belong together, or of a line ``#### 42``; see ``find_answer``. Without any, a verifier that ``reads_text`` takes
    the answer that math-verify finds in the whole text, as the reward of arXiv 2508.02260 does. Otherwise the
    completion has no answer.

    A verdict is a timeout if it takes more than ``limit_s`` of processor time, or one second more of wall-clock time,
    or if the worker dies. Answers of more than ``MAX_CHARACTERS`` are wrong without being parsed. math-verify's own
    limit is not used: it is an alarm, which needs the main thread and cannot interrupt a computation in C.
    """

    def __init__(self, limit_s: float = LIMIT_S, *, reads_text: bool = False) -> None:
        """Check that math-verify is installed.

        The worker starts with the first comparison.

        Raises:
            InputError: math-verify is not installed.
        """
        if importlib.util.find_spec("math_verify") is None:
            name = "math_text" if reads_text else "math"
            raise InputError(f'verifier "{name}" needs math-verify: pip install "entrace[train]"')
        self._limit_s, self._reads_text = limit_s, reads_text
        self._worker: subprocess.Popen[str] | None = None
        # The distinct answers to one prompt are few; each is judged once.
        self._judge = lru_cache(maxsize=10_000)(self._ask_equal)
        self._num_parsed = 0

    def __call__(self, completion: str, prompt: Prompt) -> Score:
        """Compare the answer in a completion with the ground truth."""
        answer = find_answer(completion)
        if answer is None and self._reads_text:
            reply = self._ask("find", normalize_formulas(completion))
            if reply is None:
                return Score(None, 0.0, is_timeout=True)
            answer = reply[0] and restore(reply[0])
        if answer is None:
            return Score(None, 0.0)
        truth = prompt.ground_truth or ""
        verdict = self._are_equal(find_answer(truth) or truth, answer)
        return Score(answer, float(bool(verdict)), is_timeout=verdict is None)

    def fault_of(self, truth: str) -> str | None:
        """Return the shortened ground truth if math-verify cannot parse it, else None.

        No answer would equal it. Of ground truths that are neither numbers nor long texts, the first ``MAX_PARSED`` are
        parsed.
        """
        if NUMBER.fullmatch(truth) or NUMBER.fullmatch(text := normalize(find_answer(truth) or truth)):
            return None
        if len(text) <= MAX_CHARACTERS and count_words(text) <= MAX_WORDS:
            if self._num_parsed >= MAX_PARSED or PLAIN_WORDS.fullmatch(text):
                return None
            self._num_parsed += 1
            if self._ask("is_readable", text) == [True]:
                return None
        return json.dumps(truth if len(truth) <= 40 else f"{truth[:37]}...", ensure_ascii=False)

    def classes(self, scores: Sequence[Score]) -> list[str | None]:
        """Return the class of each answer: the first answer that equals it.

        math-verify compares the answers, which belong to one prompt. Correct answers equal the ground truth and hence
        each other. An answer that was not parsed, or whose comparison timed out, forms its own class. A missing answer
        has no class.
        """
        right = next((score.answer for score in scores if score.is_correct), None)
        found: dict[str | None, str | None] = {None: None}
        wrong: list[str] = []
        for score in scores:
            if score.answer is None or score.answer in found:
                continue
            found[score.answer] = right if score.is_correct else self._first_equal(wrong, score)
            if not score.is_correct and found[score.answer] == score.answer:
                wrong.append(score.answer)
        return [found[score.answer] for score in scores]

    def _first_equal(self, answers: Sequence[str], score: Score) -> str | None:
        if score.answer is None or score.is_timeout:
            return score.answer
        for answer in answers:
            verdict = self._are_equal(answer, score.answer)
            if verdict is None:
                break
            if verdict:
                return answer
        return score.answer

    def _are_equal(self, truth: str, answer: str) -> bool | None:
        """Return whether two answers are equal; None after a timeout."""
        if max(len(text.rstrip(PUNCTUATION)) for text in (truth, answer)) > MAX_CHARACTERS:
            return False
        truth, answer = normalize(truth), normalize(answer)
        return bool(truth) and (truth == answer or self._judge(truth, answer))

    def _ask_equal(self, truth: str, answer: str) -> bool | None:
        reply = self._ask("are_equal", truth, answer)
        return None if reply is None else reply[0]

    def _ask(self, *question: str) -> list[Any] | None:
        """Return the worker's answer in a list; None after a timeout."""
        if self._worker is None or self._worker.poll() is not None:
            self._worker = self._start()
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        print(json.dumps(question), file=self._worker.stdin, flush=True)
        line = self._worker.stdout.readline()
        if not line:
            self._worker.wait()
        return json.loads(line) if line else None

    def _start(self) -> subprocess.Popen[str]:
        # -P, because the worker's folder holds modules with common names.
        command = [sys.executable, "-P", str(WORKER), str(self._limit_s)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert worker.stdout
        if not worker.stdout.readline():
            raise RuntimeError(f"math-verify did not start: exit code {worker.wait()}")
        return worker


def fault_of(verifier: Verifier, truth: str | None) -> str | None:
    """Return the shortened ground truth if its verifier cannot parse it, else None."""
    return verifier.fault_of(truth) if isinstance(verifier, MathVerifier) and truth is not None else None
