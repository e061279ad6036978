"""Read completions of TRL: ``completions/completions_*.parquet``.

The files are written with ``log_completions=True``. Prompts and completions are turns of a chat, or text. TRL up to
0.2x logs the text of a templated prompt without special tokens. There is one column of scores per reward function;
their weights are not logged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from entrace.analysis.importers.formats.base import Convert, Format, Row, Session, folder_of

KNOWN = ("step", "prompt", "completion", "advantage", "completion_ids", "prompt_ids", "image", "images")
WEIGHTS = "the weights of the reward functions are not logged; --field reward=KEY chooses one, KEY+KEY adds several"


def _is_row(row: Mapping[str, Any], path: Path) -> bool:
    return path.suffix == ".parquet" and row.keys() >= {"step", "prompt", "completion", "advantage"}


def _open(session: Session) -> Convert:
    return lambda row, path: _convert(row, session)


def _convert(row: Row, session: Session) -> Iterable[Row]:
    yield with_rewards(row, KNOWN, session)


def with_rewards(row: Row, known: Iterable[str], session: Session) -> Row:
    """Return a row with its reward and the scores of all reward functions.

    The reward is added only if there is one reward function.
    """
    scores = _scores(row, known)
    if len(scores) > 1 and "reward" not in session.fields and not session.remarks:
        session.remarks.append(f"reward is null: {', '.join(scores)} may all be rewards, and {WEIGHTS}")
    total = {"reward": next(iter(scores.values()))} if len(scores) == 1 else {}
    return {**row, **total, "reward_components": scores or None}


def _scores(row: Row, known: Iterable[str]) -> dict[str, float | None]:
    """Return the scores of reward functions: numeric columns not in ``known``."""
    names = set(known)
    numbers = {
        name: None if value is None or value != value else value
        for name, value in row.items()
        if name not in names and (value is None or (isinstance(value, int | float) and not isinstance(value, bool)))
    }
    return {name: value for name, value in numbers.items() if name.endswith("reward") or value is not None}


FORMAT = Format(
    "trl",
    "TRL completions",
    ("**/completions_*.parquet",),
    _is_row,
    _open,
    prompts="stripped",
    run_of=folder_of,
)
