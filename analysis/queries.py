"""The shipped SQL: one file a question, one folder a level."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from analysis.trace.errors import InputError, nearest

SQL_ROOT = Path(__file__).with_name("sql")
LEVELS = ("stage", "instance", "token", "ablation", "cluster")
# In the order in which they build on each other.
STAGING = ("macros", "staged_steps", "staged_responses", "staged_tokens", "eval_prompts")
HEADERS = ("question", "grain", "params", "units")


@cache
def paths() -> dict[str, Path]:
    """File of each question by its stem."""
    return {path.stem: path for level in LEVELS for path in sorted((SQL_ROOT / level).glob("*.sql"))}


def read(stem: str) -> str:
    """Returns the SQL of one question.

    Raises:
        InputError: no such question.
    """
    if stem not in paths():
        raise InputError(f'unknown query "{stem}"{nearest(stem, paths())}')
    return paths()[stem].read_text()


def headers(text: str) -> dict[str, str]:
    """Returns the header lines ``-- key: value`` of a query."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("-- "):
            break
        key, _, value = line[3:].partition(": ")
        found[key] = value
    return found


def staging() -> list[str]:
    """SQL of the shared views and macros, each after what it builds on."""
    return [(SQL_ROOT / "staging" / f"{name}.sql").read_text() for name in STAGING]
