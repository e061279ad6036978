"""A problem, what the policy is asked, and the verdict on what it answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Plain text, or the turns of a chat as {"role": ..., "content": ...}.
Question = str | list[dict[str, str]]

OPEN, CLOSE = "<answer>", "</answer>"
# An escaped character is skipped whole, so that \{ and \} of a set do not count as braces.
BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True)
class Score:
    """Verdict on one completion.

    Attributes:
        answer: None for a format violation.
        score: From 0 (wrong) to 1 (right) as a rule; None where the verifier gives no verdict.
        is_timeout: The verifier ran out of time; the score is 0.
        correct_at: Score from which the completion is correct.
    """

    answer: str | None
    score: float | None
    is_timeout: bool = False
    correct_at: float = 1.0

    @property
    def is_correct(self) -> bool | None:
        """Whether the score reaches ``correct_at``; None without a verdict."""
        return None if self.score is None else self.score >= self.correct_at


@dataclass(frozen=True)
class Prompt:
    """One problem.

    Attributes:
        prompt_id: Unique within the task.
        split: ``train`` or ``heldout``.
        task: Its data source, or the benchmark whose held-out file it is from.
        question: What is put to the chat template.
        ground_truth: The right answer; None if only a function of the user's judges the prompt.
        difficulty: The task's own description, JSON.
        origin: Where it comes from, for messages.
        entry: The row as it was read or generated.
        verifier: Judges completions of it.
    """

    prompt_id: str
    split: str
    task: str
    question: Question
    ground_truth: str | None
    difficulty: str | None
    origin: str
    entry: dict[str, Any] = field(repr=False)
    verifier: Verifier = field(repr=False, compare=False)

    @property
    def text(self) -> str:
        """The question to read; see ``as_text``."""
        return as_text(self.question)


Verifier = Callable[[str, Prompt], Score]


def as_text(question: Question) -> str:
    """A question to read: a single user turn as it is, several turns as ``role: content`` with blank lines between."""
    if isinstance(question, str):
        return question
    if [turn["role"] for turn in question] == ["user"]:
        return question[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in question)


def as_chat(question: Question) -> list[dict[str, str]]:
    """A question as turns: plain text is one of the user's."""
    return [{"role": "user", "content": question}] if isinstance(question, str) else question


def extract_answer(completion: str) -> str | None:
    """The content of the last non-empty ``<answer>...</answer>``, stripped; None if there is none."""
    found = None
    start = completion.find(OPEN)
    while start >= 0 and (end := completion.find(CLOSE, start)) >= 0:
        found = completion[start + len(OPEN) : end].strip() or found
        start = completion.find(OPEN, end)
    return found


def extract_boxed(completion: str) -> str | None:
    r"""The content of the last non-empty ``\boxed{...}``, braces matched, stripped; None if there is none."""
    found: str | None = None
    starts: list[int | None] = []
    for match in BRACES.finditer(completion):
        if match[0] == "}" and starts:
            if (start := starts.pop()) is not None:
                found = completion[start : match.start()].strip() or found
        elif match[0].endswith("{") and match[0] != r"\{":
            starts.append(match.end() if len(match[0]) > 1 else None)
    return found
