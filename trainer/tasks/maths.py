"""Mathematical answers, compared by math-verify in a process that can be ended at any moment."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from analysis.trace import InputError
from trainer.tasks.prompt import Prompt, Score, extract_boxed

LIMIT_S = 3.0
# No answer is as long; a policy that repeats itself inside the braces is.
MAX_CHARACTERS = 2000
WORKER = Path(__file__).with_name("maths_worker.py")


class MathVerifier:
    r"""1 if the last ``\boxed{...}`` equals the ground truth, as math-verify sees it.

    A verdict that takes more than ``limit_s`` of processor time, or ends the worker otherwise, is a time-out. Answers
    of more than ``MAX_CHARACTERS`` are wrong unread. math-verify's own limit is an alarm, which needs the main thread
    and waits for the end of a computation in C.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        """Starts nothing yet.

        Raises:
            InputError: math-verify is not installed.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise InputError('verifier "math" needs math-verify: pip install "entrace[train]"')
        self._limit_s = limit_s
        self._worker: subprocess.Popen[str] | None = None
        # The answers to one prompt are few; each is judged once.
        self._judge = lru_cache(maxsize=10_000)(self._ask)

    def __call__(self, completion: str, prompt: Prompt) -> Score:
        """Compares."""
        answer = extract_boxed(completion)
        if answer is None or len(answer) > MAX_CHARACTERS:
            return Score(answer, 0.0)
        truth = extract_boxed(prompt.ground_truth) or prompt.ground_truth.strip()
        verdict = truth == answer or self._judge(truth, answer)
        return Score(answer, float(bool(verdict)), is_timeout=verdict is None)

    def classes(self, scores: Sequence[Score]) -> list[str | None]:
        """Return the class of each answer to one prompt: the first answer that math-verify considers equal to it.

        Correct answers equal the ground truth and hence each other. An answer that was not read, or whose comparison
        timed out, is a class of its own. A missing answer has none.
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
        if score.answer is None or score.is_timeout or len(score.answer) > MAX_CHARACTERS:
            return score.answer
        for answer in answers:
            verdict = len(answer) <= MAX_CHARACTERS and self._judge(answer, score.answer)
            if verdict is None:
                break
            if verdict:
                return answer
        return score.answer

    def _ask(self, truth: str, answer: str) -> bool | None:
        """The worker's verdict; None if it ended without one."""
        if self._worker is None or self._worker.poll() is not None:
            self._worker = self._start()
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        print(json.dumps([truth, answer]), file=self._worker.stdin, flush=True)
        line = self._worker.stdout.readline()
        if not line:
            self._worker.wait()
        return json.loads(line) if line else None

    def _start(self) -> subprocess.Popen[str]:
        # -P: its folder holds modules of common names.
        command = [sys.executable, "-P", str(WORKER), str(self._limit_s)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert worker.stdout
        if not worker.stdout.readline():
            raise RuntimeError(f"math-verify did not start: exit code {worker.wait()}")
        return worker
