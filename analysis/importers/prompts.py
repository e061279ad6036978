"""Turn prompts and responses of a dump into text and tokens."""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from typing import Any, Literal

from entrace.analysis.importers.chat import Question, as_text
from entrace.analysis.importers.codec import Codec
from entrace.analysis.importers.rebuild import Rebuilder
from entrace.analysis.importers.row_files import BadRowError
from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.plain import plain

# Forms of a text prompt: a question for the chat template, a templated prompt without special tokens, or one with them.
PromptText = Literal["question", "stripped", "whole"]

ENCODINGS_KEPT = 256


class PromptReader:
    """Restore the prompts that the policy read from those that a dump logged.

    Attributes:
        counts: Prompts by what was done to them: ``rebuilt``, ``as question``, ``not rebuilt``.
    """

    def __init__(self, codec: Codec, kind: PromptText, *, has_model: bool) -> None:
        """Read prompts for ``codec``.

        Args:
            codec: The tokenizer.
            kind: What a prompt of text is in the dump.
            has_model: A model reads the prompts, so that a prompt that is not exact must be refused.
        """
        self.counts: Counter[str] = Counter()
        self._codec, self._kind, self._has_model = codec, kind, has_model
        self._encode = lru_cache(ENCODINGS_KEPT)(self._encode_json)
        self._restore = lru_cache(ENCODINGS_KEPT)(self._restore_text)
        self._rebuilder: Rebuilder | None = None

    def read(self, question: Question) -> tuple[Question, list[int]]:
        """Return a prompt and its tokens.

        Raises:
            BadRowError: the prompt cannot be restored, or the chat template rejects it.
        """
        kind = "whole" if self._kind == "whole" else "question"
        if isinstance(question, str) and self._codec.has_chat_template and self._kind != "whole":
            question, kind, done = self._restore(question)
            self.counts[done] += 1
        try:
            return question, list(self._encode(json.dumps(question), kind))
        except InputError as error:
            raise BadRowError(str(error)) from None

    def _encode_json(self, question: str, kind: str) -> list[int]:
        value = json.loads(question)
        is_whole = kind == "whole" and isinstance(value, str)
        return self._codec.encode_whole(value) if is_whole else self._codec.encode_prompt(value)

    def _restore_text(self, text: str) -> tuple[Question, str, str]:
        """Return what a text stands for, how to encode it, and what was done to it."""
        if marker := next((marker for marker in self._codec.markers if marker in text), None):
            if self._has_model:
                raise BadRowError(
                    f"prompt {plain(text, 60)!r} holds the special token {marker}, and the chat template of "
                    f"{self._codec.name} would be applied to it; if it is whole, pass --template '{{question}}'"
                )
            return text, "whole", "as is"
        self._rebuilder = self._rebuilder or Rebuilder(self._codec)
        if turns := self._rebuilder.find(text, is_sure=self._kind == "question"):
            return turns, "question", "as question" if as_text(turns) == text else "rebuilt"
        if self._kind == "question":
            return text, "question", "question"
        if not self._has_model:
            return text, "whole", "not rebuilt"
        raise BadRowError(
            f"prompt {plain(text, 60)!r} is not what the chat template of {self._codec.name} leaves without special "
            "tokens; add \"prompt_ids\", name the model that sampled, or pass --template '{question}' if it is whole"
        )


def matches(codec: Codec, ids: list[int], text: str) -> bool:
    """Return whether token ids are the tokens of a text.

    Special tokens, and white space around the text, do not count.
    """
    decoded = codec.decode(ids).strip()
    return decoded == text.strip() or decoded == _without_markers(codec, text).strip()


def holds(codec: Codec, ids: list[int], question: Any) -> bool:
    """Return whether the tokens of a prompt hold the texts of its turns."""
    decoded = codec.decode(ids)
    texts = [question] if isinstance(question, str) else [turn["content"] for turn in question]
    return all(_without_markers(codec, text).strip() in decoded for text in texts)


def _without_markers(codec: Codec, text: str) -> str:
    for marker in codec.markers:
        text = text.replace(marker, "")
    return text
