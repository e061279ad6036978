"""Completions of TRL: ``completions/completions_*.parquet``, written with ``log_completions=True``.

Prompts and completions are turns of a chat, or text. TRL up to 0.2x logs the text of a templated prompt without special
tokens. There is one column of scores per reward function; their weights are not logged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from entrace.analysis.importers.formats.base import Convert, Format, Row, Session, folder_of, reward_columns

KNOWN = ("step", "prompt", "completion", "advantage", "completion_ids", "prompt_ids", "image", "images")
WEIGHTS = "the weights of the reward functions are not logged; --field reward=KEY chooses one, KEY+KEY adds several"


def _is_row(row: Mapping[str, Any], path: Path) -> bool:
    return path.suffix == ".parquet" and row.keys() >= {"step", "prompt", "completion", "advantage"}


def _open(session: Session) -> Convert:
    return lambda row, path: _convert(row, session)


def _convert(row: Row, session: Session) -> Iterable[Row]:
    yield with_rewards(row, KNOWN, session)


def with_rewards(row: Row, known: Iterable[str], session: Session) -> Row:
    """Return a row with its reward, if there is one reward function, and the scores of all of them."""
    scores = reward_columns(row, known)
    if len(scores) > 1 and not session.remarks:
        session.remarks.append(f"reward is null: {', '.join(scores)} may all be rewards, and {WEIGHTS}")
    found: Row = {name: value for name, value in row.items() if name not in scores}
    if len(scores) == 1:
        found["reward"] = next(iter(scores.values()))
    return {**row, **found, "reward_components": scores or None}


FORMAT = Format(
    "trl",
    "TRL completions",
    ("**/completions_*.parquet",),
    _is_row,
    _open,
    prompts="stripped",
    run_of=folder_of,
)
