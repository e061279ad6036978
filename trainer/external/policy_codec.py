"""Present the tokenizer of a model to the readers of dumps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from entrace.analysis.importers.chat import Question
from entrace.analysis.importers.codec import with_opening
from entrace.analysis.trace import InputError, Vocabulary, in_one_line
from entrace.trainer.model.policy import Policy
from entrace.trainer.settings import MAX_INT


@dataclass(frozen=True)
class PolicyCodec:
    """The tokenizer of ``policy``; see ``codec.Codec``."""

    policy: Policy

    @property
    def name(self) -> str:
        """Return where the model was loaded from."""
        return self.policy.name

    @property
    def vocab_size(self) -> int:
        """Return the number of rows of the LM head."""
        return self.policy.vocab_size

    @property
    def max_tokens(self) -> int:
        """Return the most tokens that fit; the last one is predicted but never read."""
        return getattr(self.policy.model.config, "max_position_embeddings", MAX_INT) + 1

    @property
    def stop_ids(self) -> frozenset[int]:
        """Return the tokens that end a response."""
        return frozenset(self.policy.stop_ids.tolist())

    @property
    def turn_end(self) -> int | None:
        """Return the stop token that the chat template writes after a response."""
        return self.policy.turn_end

    @property
    def markers(self) -> tuple[str, ...]:
        """Return the texts of the special tokens."""
        return tuple(self.policy.tokenizer.all_special_tokens)

    @property
    def has_chat_template(self) -> bool:
        """Return whether there is a chat template that ``template`` does not replace."""
        return self.policy.template is None and self.policy.tokenizer.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without tokens that the tokenizer would add."""
        return self.policy.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_prompt(self, question: Question) -> list[int]:
        """Return the token ids of a question in ``template`` or in the chat template."""
        return self.policy.encode_prompt(question)

    def encode_whole(self, text: str) -> list[int]:
        """Return the token ids of a prompt that needs no template.

        The ids begin with the beginning of sequence once.
        """
        return with_opening(self.encode(text), self.policy.opening)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self.policy.decode([list(ids)])[0]

    def render(self, turns: list[dict[str, str]], *, is_answered: bool = False) -> str:
        """Return turns in the chat template."""
        try:
            rendered: Any = self.policy.tokenizer.apply_chat_template(
                turns, add_generation_prompt=not is_answered, tokenize=False
            )
        except TemplateError as error:
            raise InputError(f"{self.name}: the chat template rejects a prompt ({in_one_line(error)})") from None
        return rendered

    def vocabulary(self) -> Vocabulary:
        """Return the texts of all tokens."""
        return self.policy.vocab()
