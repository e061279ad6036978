"""Answer questions about mathematics: a JSON list per line, answered by a list of one, or null if time ran out.

A program of its own: the kernel's timers end a computation in C too. The first process imports math-verify once and
passes questions on to a copy of itself. A copy that ended is replaced in milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import resource
import signal
import sys
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

MEMORY = 2 << 30
# Wall-clock time that a question may take beyond the limit of processor time, on a busy machine.
GRACE_S = 1.0
# Below this size, six decimals are fewer than three digits.
SMALL = 1e-3
MAX_RATIO = 1e-3


def main(limit_s: float) -> None:
    """Answer until the input ends."""
    # Output of libraries must not pass for a verdict.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # macOS knows no such limit.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    tell_small_numbers_apart()
    # Copies inherit what the first question loads.
    answer(["are_equal", "1", "1.0"])
    print("ready", file=out, flush=True)
    copy = Copy(limit_s)
    for line in sys.stdin:
        question = json.loads(line)
        found = copy.ask(question)
        if found is None and not copy.ran_out_of_time:
            # Killed from outside, perhaps before it was asked.
            copy = Copy(limit_s)
            found = copy.ask(question)
        if found is None:
            copy = Copy(limit_s)
        print(json.dumps(found), file=out, flush=True)


class Copy:
    """A copy of this process that answers questions until one takes too long."""

    def __init__(self, limit_s: float) -> None:
        """Fork."""
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._connection, limit_s), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def ran_out_of_time(self) -> bool:
        """Return whether a timer ended it."""
        return self._process.exitcode in (-signal.SIGPROF, -signal.SIGALRM)

    def ask(self, question: list[str]) -> list[Any] | None:
        """Return the answer in a list, None if the copy ended without one."""
        try:
            self._connection.send(question)
            return [self._connection.recv()]
        except (EOFError, OSError):
            self._process.join()
            return None


def _serve(connection: Connection, parents: Connection, limit_s: float) -> None:
    # While it is open here too, the end of the first process goes unnoticed.
    parents.close()
    with contextlib.suppress(EOFError):
        while True:
            question = connection.recv()
            # Nobody handles these signals, so that they end the process.
            signal.setitimer(signal.ITIMER_PROF, limit_s)
            signal.setitimer(signal.ITIMER_REAL, limit_s + GRACE_S)
            found = answer(question)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(found)


def answer(question: list[str]) -> Any:
    """Return the answer to a question: the name of one of three functions, and its arguments."""
    name, *arguments = question
    return {"are_equal": are_equal, "is_readable": is_readable, "find": find}[name](*arguments)


def are_equal(truth: str, text: str) -> bool:
    """Return whether math-verify finds an answer equal to the truth."""
    from math_verify import verify

    return verify(parse_answer(truth), parse_answer(text), timeout_seconds=None)


def is_readable(text: str) -> bool:
    """Return whether math-verify reads an answer as an expression."""
    return any(not isinstance(part, str) for part in parse_answer(text))


def find(text: str) -> str | None:
    """Return the answer that math-verify finds in a text, extracted as for the study's reward; None without any."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from math_verify.grader import get_pct_val
    from sympy import latex

    found = parse(text, [ExprExtractionConfig(), LatexExtractionConfig()], parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not found or isinstance(found[0], str):
        return found[0] if found else None
    # The text of a percentage is the number alone, and that of a second choice is the first choice's.
    sign = "" if get_pct_val(found[0]) is None else "%"
    words = str(found[-1]).rstrip(" .") + sign
    return words if verify(found[0], parse_answer(words), timeout_seconds=None) else latex(found[0])


@lru_cache(maxsize=1000)
def parse_answer(text: str) -> list[Any]:
    """Return the expression as SymPy sees it, and its text; the text alone if math-verify cannot read it."""
    from math_verify import LatexExtractionConfig, parse

    boxed = f"\\boxed{{{text}}}"
    return parse(boxed, [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def tell_small_numbers_apart() -> None:
    """Make math-verify, which compares numbers by their difference, compare small ones by their ratio as well."""
    from math_verify import grader

    agree = grader.sympy_numeric_eq
    grader.sympy_numeric_eq = lambda a, b, *precision: agree(a, b, *precision) and not differ(a, b)


def differ(a: Any, b: Any) -> bool:
    """Return whether two expressions differ by more than a thousandth, although their difference is almost 0."""
    from sympy import Expr, Float

    if not isinstance(a, Expr) or not isinstance(b, Expr):
        return False
    difference = (a - b).evalf()
    if a.free_symbols or b.free_symbols:
        # math-verify goes on to simplify the difference, which is exact.
        return difference != 0 and not a.has(Float) and not b.has(Float)
    sizes = [abs(value).evalf() for value in (a, b, difference)]
    # A percentage is not: math-verify keeps its hundredth unevaluated.
    if not all(size.is_Number for size in sizes):
        return False
    return bool(max(sizes[:2]) < SMALL and sizes[2] > max(sizes[:2]) * MAX_RATIO)


if __name__ == "__main__":
    main(float(sys.argv[1]))
