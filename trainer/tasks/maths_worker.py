"""Judges pairs of truth and answer, one JSON list a line, and prints true or false for each.

A program of its own: the processor's timer ends it, inside a computation in C too, and its end is the verdict.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

MEMORY = 2 << 30


def main(limit_s: float) -> None:
    """Answers until its input ends."""
    # What libraries print must not pass for a verdict.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # macOS knows no such limit.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    from math_verify import verify

    print("ready", file=out, flush=True)
    for line in sys.stdin:
        truth, answer = json.loads(line)
        # Nobody handles SIGPROF, so that it ends the process. Time on the processor: a busy machine is no reason.
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        verdict = verify(parse_boxed(truth), parse_boxed(answer), timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=out, flush=True)


@lru_cache(maxsize=1000)
def parse_boxed(text: str) -> list[Any]:
    """The expression as SymPy sees it, and its text."""
    from math_verify import LatexExtractionConfig, parse

    boxed = f"\\boxed{{{text}}}"
    return parse(boxed, [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main(float(sys.argv[1]))
