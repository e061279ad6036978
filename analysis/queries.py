"""The shipped SQL: one file a question, one folder a level."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from entrace.analysis.trace.errors import InputError, nearest
from entrace.analysis.trace.schema import TABLES

SQL_ROOT = Path(__file__).with_name("sql")
LEVELS = ("stage", "instance", "token", "ablation", "cluster")
# In the order in which they build on each other.
STAGING = (
    "macros",
    "staged_steps",
    "staged_responses",
    "staged_tokens",
    "staged_movements",
    "responses_at_length",
    "response_fifths",
    "entropy_thresholds",
    "eval_prompts",
    "vocab_words",
)
HEADERS = ("question", "grain", "params", "units", "needs")
WORD = re.compile(r"\w+")
CREATED = re.compile(r"^create (?:view|macro) (\w+)", re.MULTILINE)
# Header "needs": how to see whether a trace holds it, what to do where it does not, and the table or column that
# ``unknown`` in run.json gives a reason for where nothing can be done.
NEEDS = {
    "steps": ("select 1 from steps", "no step is durable yet", "steps"),
    "responses": ("select 1 from rollouts", "no response is durable yet", "rollouts"),
    "tokens": ("select 1 from tokens", "no token is durable yet", "tokens"),
    "evaluations": ("select 1 from evals", "no held-out evaluation was recorded", "evals"),
    "after-update values": (
        "select 1 from tokens where logprob_after is not null",
        "no after-update values were recorded; train with record.after_update_every=5",
        "tokens.logprob_after",
    ),
    "interventions": (
        "select 1 from interventions",
        "no interventions were recorded; run `entrace intervene RUN`",
        "interventions",
    ),
}


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


def location(stem: str) -> str:
    """File of a question as the documentation names it, such as ``analysis/sql/stage/stage_dynamics.sql``."""
    return f"analysis/sql/{paths()[stem].parent.name}/{stem}.sql"


def need(stem: str) -> str:
    """What a trace must hold for a question to have rows, a key of ``NEEDS``."""
    return headers(read(stem))["needs"]


def staging() -> list[str]:
    """SQL of the shared views and macros, each after what it builds on."""
    return [(SQL_ROOT / "staging" / f"{name}.sql").read_text() for name in STAGING]


def tables_in(text: str) -> set[str]:
    """Return the tables of the trace that a query may read, directly or through the shared views and macros."""
    behind = _tables_behind()
    return set().union(*(behind.get(word, ()) for word in WORD.findall(text.lower())))


@cache
def _tables_behind() -> dict[str, set[str]]:
    behind = {name: {name} for name in TABLES}
    for text in staging():
        behind |= dict.fromkeys(CREATED.findall(text), set().union(*(behind.get(w, ()) for w in WORD.findall(text))))
    return behind
