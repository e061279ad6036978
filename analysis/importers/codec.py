"""Define the tokenizer interface of imports, and texts of dumps without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from entrace.analysis.importers.chat import Question, as_text
from entrace.analysis.trace.vocabulary import Vocabulary

# Stands for a response, to find the tokens that the chat template writes after it.
PROBE = "entrace"


class Codec(Protocol):
    """A tokenizer with its chat template."""

    @property
    def name(self) -> str:
        """Return where it was loaded from, for messages."""
        ...

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Return the most tokens of prompt and response together; None without a limit."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Return the tokens that end a response."""
        ...

    @property
    def turn_end(self) -> int | None:
        """Return the stop token that the template writes after a response, if known."""
        ...

    @property
    def markers(self) -> tuple[str, ...]:
        """Return the texts of the special tokens."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Return whether there is a chat template that ``template`` does not replace."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without tokens that the tokenizer would add."""
        ...

    def encode_prompt(self, question: Question) -> list[int]:
        """Return the token ids of a question in ``template`` or in the chat template.

        Raises:
            InputError: the chat template rejects the question's turns.
        """
        ...

    def encode_whole(self, text: str) -> list[int]:
        """Return the token ids of a prompt that needs no template.

        The ids begin with the beginning of sequence once.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        ...

    def render(self, turns: list[dict[str, str]], *, is_answered: bool = False) -> str:
        """Return turns in the chat template.

        The beginning of a response follows, unless the last turn is a response.

        Raises:
            InputError: the chat template rejects the turns.
        """
        ...

    def vocabulary(self) -> Vocabulary:
        """Return the texts of all tokens."""
        ...


class DumpTexts:
    """Texts of the tokens that a dump itself holds.

    A token with an id keeps it. A token that has only a text gets the number of its text, in order of appearance.
    """

    def __init__(self) -> None:
        """Start without texts."""
        self._texts: dict[int, str] = {}
        self._ids: dict[str, int] = {}

    def __len__(self) -> int:
        return max(self._texts, default=-1) + 1

    def learn(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Remember the texts of tokens with ids."""
        self._texts.update(zip(ids, texts, strict=True))

    def number(self, texts: Sequence[str]) -> list[int]:
        """Return ids of tokens without ids."""
        ids = [self._ids.setdefault(text, len(self._ids)) for text in texts]
        self._texts.update(zip(ids, texts, strict=True))
        return ids

    def text_of(self, ids: Sequence[int]) -> str | None:
        """Return the text of tokens, None if one of them has no known text."""
        if all(token in self._texts for token in ids):
            return "".join(self._texts[token] for token in ids)
        return None

    def vocabulary(self, size: int) -> Vocabulary:
        """Return a vocabulary of ``size`` entries.

        An entry without a known text is shown as its number, such as ``<42>``.
        """
        texts = [self._texts.get(token, placeholder([token])) for token in range(size)]
        return Vocabulary(texts, has_text=[token in self._texts for token in range(size)])


def placeholder(ids: Sequence[int]) -> str:
    """Return what stands for the text of tokens without a known text."""
    return "".join(f"<{token}>" for token in ids)


def fill_template(template: str, question: Question) -> str:
    """Return a question in a template of text."""
    return template.replace("{question}", as_text(question))


def probe_turns() -> list[dict[str, str]]:
    """Return a dialog whose response is ``PROBE``."""
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]


def after_response(rendered: str) -> str:
    """Return the text after the response of rendered ``probe_turns``.

    The text is empty if the template dropped the response.
    """
    _, found, rest = rendered.rpartition(PROBE)
    return rest if found else ""


def opening_of(bare: list[int], whole: list[int]) -> list[int]:
    """Return the tokens that a tokenizer puts before a text.

    ``bare`` and ``whole`` are the tokens of the text without and with special tokens.
    """
    return whole[: next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)]


def with_opening(ids: list[int], opening: list[int]) -> list[int]:
    """Return tokens that begin with ``opening`` once."""
    return ids if ids[: len(opening)] == opening else [*opening, *ids]
