"""Represent a prompt as text or as the turns of a chat."""

from __future__ import annotations

# Plain text, or the turns of a chat as {"role": ..., "content": ...}.
Question = str | list[dict[str, str]]


def as_text(question: Question) -> str:
    """Return a question as text.

    One user turn is unchanged; several turns are ``role: content``, separated by blank lines.
    """
    if isinstance(question, str):
        return question
    if [turn["role"] for turn in question] == ["user"]:
        return question[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in question)


def as_chat(question: Question) -> list[dict[str, str]]:
    """Return a question as turns; plain text becomes one user turn."""
    return [{"role": "user", "content": question}] if isinstance(question, str) else question
