"""Answer questions about mathematics, one JSON list per line.

Each answer is a list of one, or null after a timeout. This is a separate program, because the kernel's timers end
computations in C too. The first process imports math-verify once and forwards questions to a fork of itself. A fork
that died is replaced in milliseconds.
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
# Wall-clock seconds beyond the limit of processor time, for a busy machine.
GRACE_S = 1.0
# Numbers below this size have fewer than three digits in six decimals.
SMALL = 1e-3
MAX_RATIO = 1e-3


def main(limit_s: float) -> None:
    """Answer questions until the input ends."""
    # Output of libraries must not be read as a verdict.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # macOS does not support this limit.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    tell_small_numbers_apart()
    # Forks inherit the modules that the first question loads.
    answer(["are_equal", "1", "1.0"])
    print("ready", file=out, flush=True)
    copy = Copy(limit_s)
    for line in sys.stdin:
        question = json.loads(line)
        found = copy.ask(question)
        if found is None and not copy.ran_out_of_time:
            # The fork was killed from outside, perhaps before the question.
            copy = Copy(limit_s)
            found = copy.ask(question)
        if found is None:
            copy = Copy(limit_s)
        print(json.dumps(found), file=out, flush=True)


class Copy:
    """A fork of this process that answers questions until one takes too long."""

    def __init__(self, limit_s: float) -> None:
        """Fork."""
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._connection, limit_s), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def ran_out_of_time(self) -> bool:
        """Return whether a timer ended the fork."""
        return self._process.exitcode in (-signal.SIGPROF, -signal.SIGALRM)

    def ask(self, question: list[str]) -> list[Any] | None:
        """Return the answer in a list, or None if the fork died."""
        try:
            self._connection.send(question)
            return [self._connection.recv()]
        except (EOFError, OSError):
            self._process.join()
            return None


def _serve(connection: Connection, parents: Connection, limit_s: float) -> None:
    # While this end is open too, the fork cannot notice the end of its parent.
    parents.close()
    with contextlib.suppress(EOFError):
        while True:
            question = connection.recv()
            # The signals of these timers have no handler and end the process.
            signal.setitimer(signal.ITIMER_PROF, limit_s)
            signal.setitimer(signal.ITIMER_REAL, limit_s + GRACE_S)
            found = answer(question)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(found)


def answer(question: list[str]) -> Any:
    """Return the answer to a question, a function name with its arguments.

    The functions are ``are_equal``, ``is_readable``, and ``find``.
    """
    name, *arguments = question
    return {"are_equal": are_equal, "is_readable": is_readable, "find": find}[name](*arguments)


def are_equal(truth: str, text: str) -> bool:
    """Return whether math-verify finds the answer equal to the ground truth."""
    from math_verify import verify

    return verify(parse_answer(truth), parse_answer(text), timeout_seconds=None)


def is_readable(text: str) -> bool:
    """Return whether math-verify parses an answer as an expression."""
    return any(not isinstance(part, str) for part in parse_answer(text))


def find(text: str) -> str | None:
    """Return the answer that math-verify finds in a text, or None.

    The extraction is that of arXiv 2508.02260.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from math_verify.grader import get_pct_val
    from sympy import latex

    found = parse(text, [ExprExtractionConfig(), LatexExtractionConfig()], parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not found or isinstance(found[0], str):
        return found[0] if found else None
    # math-verify gives a percentage the text of its number, and a second choice the text of the first.
    sign = "" if get_pct_val(found[0]) is None else "%"
    words = str(found[-1]).rstrip(" .") + sign
    return words if verify(found[0], parse_answer(words), timeout_seconds=None) else latex(found[0])


@lru_cache(maxsize=1000)
def parse_answer(text: str) -> list[Any]:
    """Return the SymPy expression and its text, or the text alone.

    The text stands alone if math-verify cannot parse it.
    """
    from math_verify import LatexExtractionConfig, parse

    boxed = f"\\boxed{{{text}}}"
    return parse(boxed, [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def tell_small_numbers_apart() -> None:
    """Make math-verify compare small numbers by ratio as well as by difference."""
    from math_verify import grader

    agree = grader.sympy_numeric_eq
    grader.sympy_numeric_eq = lambda a, b, *precision: agree(a, b, *precision) and not differ(a, b)


def differ(a: Any, b: Any) -> bool:
    """Return True if two almost equal expressions are different.

    Small numbers are different if they differ by more than a thousandth of the larger one. Expressions with free
    symbols are different if their difference is not 0 and neither has a float.
    """
    from sympy import Expr, Float

    if not isinstance(a, Expr) or not isinstance(b, Expr):
        return False
    difference = (a - b).evalf()
    if a.free_symbols or b.free_symbols:
        # math-verify then simplifies the difference, which is exact.
        return difference != 0 and not a.has(Float) and not b.has(Float)
    sizes = [abs(value).evalf() for value in (a, b, difference)]
    # math-verify leaves the hundredth of a percentage unevaluated.
    if not all(size.is_Number for size in sizes):
        return False
    return bool(max(sizes[:2]) < SMALL and sizes[2] > max(sizes[:2]) * MAX_RATIO)


if __name__ == "__main__":
    main(float(sys.argv[1]))
