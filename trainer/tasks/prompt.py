"""Define prompts and scores, and extract answers from completions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from entrace.analysis.importers.chat import Question, as_text

OPEN, CLOSE = "<answer>", "</answer>"
# Escaped characters are skipped, so that \{ and \} of a set do not count as braces. Some models write \\boxed.
BRACES = re.compile(r"\\{1,2}(?:boxed|fbox)(?![A-Za-z])\s*\{?|\\.|[{}]", re.DOTALL)
BOX_COMMANDS = (r"\boxed", r"\fbox")
# The content of a box without braces: numbers, operators, and commands with their arguments, up to a space.
BARE = re.compile(
    r"(?:[\w+*/^_=()!|<>°√∞-]|[.,:](?=\d)| (?=\d+/\d)|\\(?!boxed|fbox|[()\[\]\s])(?:[A-Za-z]++\s?|.)"
    r"|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*+\})*+\})*+\})+"
)


@dataclass(frozen=True)
class Box:
    r"""The stripped content of a ``\boxed{...}``, and its span, braces included."""

    content: str
    start: int
    end: int


@dataclass(frozen=True)
class Score:
    """Verdict on one completion.

    Attributes:
        answer: None for a format violation.
        score: Usually from 0 (wrong) to 1 (right); None without a verdict.
        is_timeout: Whether the verifier timed out; the score is then 0.
        correct_at: Lowest score of a correct completion.
    """

    answer: str | None
    score: float | None
    is_timeout: bool = False
    correct_at: float = 1.0

    @property
    def is_correct(self) -> bool | None:
        """Return whether the score reaches ``correct_at``; None without a verdict."""
        return None if self.score is None else self.score >= self.correct_at

    def reward(self, values: tuple[float, float]) -> float | None:
        """Return the score on the scale of ``task.reward_values``.

        None without a verdict.
        """
        wrong, right = values
        return None if self.score is None else wrong + (right - wrong) * self.score


@dataclass(frozen=True)
class Prompt:
    """One problem.

    Attributes:
        prompt_id: Unique within the task.
        split: ``train`` or ``heldout``.
        task: Data source, or benchmark of the held-out file.
        question: Input of the chat template.
        ground_truth: The correct answer; None if a user's function judges the prompt without one.
        difficulty: The task's own description, as JSON.
        origin: File and row, or task and index, for messages.
        entry: The row as read or generated.
        verifier: Judges completions of the prompt.
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
        """Return the question as text; see ``as_text``."""
        return as_text(self.question)


Verifier = Callable[[str, Prompt], Score]


def extract_answer(completion: str) -> str | None:
    """Return the stripped content of the last ``<answer>...</answer>``, or None.

    Empty answers do not count.
    """
    found = None
    start = completion.find(OPEN)
    while start >= 0 and (end := completion.find(CLOSE, start)) >= 0:
        found = completion[start + len(OPEN) : end].strip() or found
        start = completion.find(OPEN, end)
    return found


def extract_boxed(completion: str) -> str | None:
    r"""Return the stripped content of the last ``\boxed{...}``, or None.

    Braces must match. Empty boxes do not count.
    """
    boxes = find_boxes(completion, r"\boxed")
    return boxes[-1].content if boxes else None


def find_boxes(completion: str, *commands: str) -> list[Box]:
    r"""Return the non-empty boxes of a text, in order.

    Of nested boxes, the outermost closed one counts. Without braces, as in ``\boxed 73``, a box extends to the next
    space or the end of the formula. ``commands`` default to ``\boxed`` and ``\fbox``.
    """
    commands = commands or BOX_COMMANDS
    found: list[Box] = []
    # For each open brace, the starts of its box and of the content; None for other braces.
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
