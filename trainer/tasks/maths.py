"""Mathematical answers, compared by math-verify in a process that can be ended at any moment."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
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
