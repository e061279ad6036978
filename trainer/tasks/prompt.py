"""A problem, what the policy is asked, and the verdict on what it answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Plain text, or the turns of a chat as {"role": ..., "content": ...}.
Question = str | list[dict[str, str]]

OPEN, CLOSE = "<answer>", "</answer>"
# An escaped character is skipped whole, so that \{ and \} of a set do not count as braces. Some models escape \\boxed.
BRACES = re.compile(r"\\{1,2}(?:boxed|fbox)(?![A-Za-z])\s*\{?|\\.|[{}]", re.DOTALL)
BOX_COMMANDS = (r"\boxed", r"\fbox")
# The content of a box without braces: numbers, operators, and commands with their arguments, up to a space.
BARE = re.compile(
    r"(?:[\w+*/^_=()!|<>°√∞-]|[.,:](?=\d)| (?=\d+/\d)|\\(?!boxed|fbox|[()\[\]\s])(?:[A-Za-z]++\s?|.)"
    r"|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*+\})*+\})*+\})+"
)


@dataclass(frozen=True)
class Box:
    r"""The content of a ``\boxed{...}``, stripped, and its place in the text, braces included."""

    content: str
    start: int
    end: int


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
        """Return whether the score reaches ``correct_at``; None without a verdict."""
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
    r"""Return the content of the last non-empty ``\boxed{...}``, braces matched, stripped; None if there is none."""
    boxes = find_boxes(completion, r"\boxed")
    return boxes[-1].content if boxes else None


def find_boxes(completion: str, *commands: str) -> list[Box]:
    r"""Return the non-empty boxes of a text in order; of nested ones the outermost that is closed.

    Without braces, as in ``\boxed 73``, a box holds what follows up to a space or the end of the formula. ``commands``
    are ``\boxed`` and ``\fbox`` unless given.
    """
    commands = commands or BOX_COMMANDS
    found: list[Box] = []
    # Where each open brace's box starts, and its content; None for other braces.
    opened: list[tuple[int, int] | None] = []
    position = 0
    while match := BRACES.search(completion, position):
        position = match.end()
        is_box = match[0].rstrip("{ \t\r\n").replace("\\\\", "\\") in commands
        if match[0] == "}":
            if opened and (begin := opened.pop()):
                _add_box(found, Box(completion[begin[1] : match.start()].strip(), begin[0], match.end()))
        elif match[0].endswith("{") and match[0] != r"\{":
            opened.append((match.start(), match.end()) if is_box else None)
        elif is_box and (bare := BARE.match(completion, position)):
            position = bare.end()
            _add_box(found, Box(bare[0].strip(), match.start(), bare.end()))
    return found


def _add_box(found: list[Box], box: Box) -> None:
    if box.content:
        while found and found[-1].start > box.start:
            found.pop()
        found.append(box)
