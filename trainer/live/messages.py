"""Read rows of TRL datasets: texts or messages, and further columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from entrace.analysis.trace.recorder import prompt_hash


def text_of(message: Any) -> str:
    """Return the text of a prompt or completion.

    Texts of several messages are joined by blank lines.
    """
    if isinstance(message, str):
        return message
    if isinstance(message, Mapping):
        content = message.get("content")
        return content if isinstance(content, str) else text_of(content or [])
    parts = [
        part.get("text", "") if part.get("type") == "text" else text_of(part)
        for part in message
        if "type" not in part or part["type"] == "text"
    ]
    return "\n\n".join(part for part in parts if part)


def identify(prompt: Any) -> str:
    """Return an identifier of a prompt: a hash of its text, or of its messages."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    return prompt_hash(text)


def first_of(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first column that holds a text or a number, as text, or None."""
    return next((str(row[name]) for name in names if isinstance(row.get(name), str | int | float)), None)


def number_repeats(names: Sequence[str]) -> list[str]:
    """Return names of reward functions, with a number where one repeats."""
    counts: dict[str, int] = {}
    found = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        found.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
    return found
