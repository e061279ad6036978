r"""Rebuild a prompt that was logged without its template's special tokens.

Decoding with ``skip_special_tokens`` leaves only the plain text of a template, as in ``user\nWhat is 3 + 5?\n``. Such a
text is not the question, and tokenizing it does not give the prompt. The dialogs of ``SHAPES`` are rendered with
placeholders, which yields a pattern for each. Turns that the pattern finds count only if rendering them and leaving out
the special tokens gives exactly the text.
"""

from __future__ import annotations

import re

from entrace.analysis.importers.chat import Question
from entrace.analysis.importers.codec import Codec
from entrace.analysis.importers.row_files import BadRowError
from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.plain import plain

SHAPES = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
# Letters that no chat template treats specially.
PROBES = ("Qzero", "Qone", "Qtwo", "Qthree", "Qfour", "Qfive")


class Rebuilder:
    """Find the turns behind prompts without special tokens."""

    def __init__(self, codec: Codec) -> None:
        """Learn the plain text of the chat template."""
        self._codec = codec
        found = ((shape, _pattern(shape, codec)) for shape in SHAPES)
        self._patterns = [(shape, pattern) for shape, pattern in found if pattern]

    def find(self, text: str, *, is_sure: bool = False) -> Question | None:
        """Return the turns that the template renders as ``text``, or None.

        Special tokens are left out of the rendered text.

        Args:
            text: The prompt as logged.
            is_sure: Require that the template has plain text, such as ``user``, which a question would hardly have.

        Raises:
            BadRowError: several dialogs render as this text.
        """
        dialogs: dict[tuple[int, ...], Question] = {}
        for shape, (pattern, has_words) in self._patterns:
            if (is_sure and not has_words) or not (match := pattern.fullmatch(text)):
                continue
            turns = [{"role": role, "content": match[f"p{n}"]} for n, role in enumerate(shape)]
            try:
                rendered = self._codec.encode(self._codec.render(turns))
            except InputError:
                continue
            if self._codec.decode(rendered) == text:
                dialogs.setdefault(tuple(rendered), turns)
        if len(dialogs) > 1:
            counts = " or ".join(str(len(turns)) for turns in dialogs.values())
            raise BadRowError(
                f"prompt {plain(text, 60)!r} may have been {counts} turns before its special tokens were stripped; "
                'add "prompt_ids"'
            )
        return next(iter(dialogs.values()), None)


def _pattern(shape: tuple[str, ...], codec: Codec) -> tuple[re.Pattern[str], bool] | None:
    """Return the pattern of a dialog, and whether it has words of the template.

    The pattern leaves out special tokens. The result is None if the template rejects the dialog, or writes two turns
    without plain text between them.
    """
    turns = [{"role": role, "content": probe} for role, probe in zip(shape, PROBES, strict=False)]
    try:
        text = codec.decode(codec.encode(codec.render(turns)))
    except InputError:
        return None
    places = [text.find(turn["content"]) for turn in turns]
    ends = [place + len(turn["content"]) for place, turn in zip(places, turns, strict=True)]
    if -1 in places or any(start <= end for end, start in zip(ends, places[1:], strict=False)):
        return None
    parts = [text[: places[0]], *(text[end:start] for end, start in zip(ends, [*places[1:], None], strict=True))]
    groups = [f"(?P<p{n}>.*?)" for n in range(len(shape))]
    source = re.escape(parts[0]) + "".join(
        group + re.escape(part) for group, part in zip(groups, parts[1:], strict=True)
    )
    return re.compile(source, re.DOTALL), any(part.strip() for part in parts)
