"""Load a tokenizer without torch or transformers.

The tokenizer is read from ``tokenizer.json`` and the files beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from entrace.analysis.importers.chat import Question, as_chat
from entrace.analysis.importers.codec import after_response, fill_template, opening_of, probe_turns, with_opening
from entrace.analysis.trace.errors import InputError, in_one_line, reason_of
from entrace.analysis.trace.vocabulary import Vocabulary

TOKENIZER, CONFIG, TEMPLATE, GENERATION = (
    *("tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "generation_config.json"),
)


class TokenizerFile:
    """A tokenizer in the format of the ``tokenizers`` package; see ``codec.Codec``.

    The chat template is that of ``chat_template.jinja`` or ``tokenizer_config.json``, and the tokens that end a
    response are those of ``generation_config.json`` and ``tokenizer_config.json``, in the folder of the file.
    """

    max_tokens: int | None = None

    def __init__(self, path: Path, template: str | None = None) -> None:
        """Load the tokenizer.

        Args:
            path: ``tokenizer.json``, or the folder that holds it.
            template: Text of a prompt with placeholder ``{question}``; replaces the chat template.

        Raises:
            InputError: the file is missing or damaged, or the package is not installed.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise InputError("--tokenizer needs the package tokenizers: pip install tokenizers") from None
        file = path / TOKENIZER if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"{file}: no such file; name a tokenizer.json or the folder that holds one")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:
            raise InputError(f"{file}: not a tokenizer of the tokenizers package ({in_one_line(error)})") from None
        # Files may store padding and truncation for training.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.name = str(path)
        self.template = template
        self.path = file
        self._config = _read_json(file.with_name(CONFIG))
        self._chat_template = _chat_template(file, self._config)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token: entry.content for token, entry in added.items() if entry.special}
        self.markers = tuple(self._special.values())
        self.stop_ids = self._find_stop_ids()
        self.turn_end = self._find_turn_end()

    @property
    def has_chat_template(self) -> bool:
        """Return whether there is a chat template that ``template`` does not replace."""
        return self.template is None and self._chat_template is not None

    def _find_stop_ids(self) -> frozenset[int]:
        """Return the tokens that end a response."""
        configured = _read_json(self.path.with_name(GENERATION)).get("eos_token_id")
        ids = configured if isinstance(configured, list) else [configured]
        eos = self._tokenizer.token_to_id(_content(self._config.get("eos_token")) or "")
        return frozenset(token for token in [*ids, eos] if isinstance(token, int))

    def _find_turn_end(self) -> int | None:
        """Return the stop token that the template writes after a response, if known."""
        eos = self._tokenizer.token_to_id(_content(self._config.get("eos_token")) or "")
        otherwise = next(iter(self.stop_ids)) if len(self.stop_ids) == 1 else eos
        if self._chat_template is None:
            return otherwise
        try:
            text = self.render(probe_turns(), is_answered=True)
        except InputError:
            return otherwise
        after = self.encode(after_response(text))
        return next((token for token in after if token in self.stop_ids), otherwise)

    @cached_property
    def opening(self) -> list[int]:
        """Return the special tokens put before a text, such as a beginning of sequence."""
        return opening_of(self.encode("a"), self._tokenizer.encode("a").ids)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without tokens that the tokenizer would add."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, question: Question) -> list[int]:
        """Return the token ids of a question in ``template`` or in the chat template."""
        if not self.has_chat_template:
            return self.encode_whole(fill_template(self.template or "{question}", question))
        # The template writes the special tokens itself.
        return self.encode(self.render(as_chat(question)))

    def encode_whole(self, text: str) -> list[int]:
        """Return the token ids of a prompt that needs no template.

        The ids begin with the beginning of sequence once.
        """
        return with_opening(self.encode(text), self.opening)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def render(self, turns: list[dict[str, str]], *, is_answered: bool = False) -> str:
        """Return turns in the chat template."""
        from jinja2 import TemplateError

        try:
            return self._compiled.render(
                messages=turns, add_generation_prompt=not is_answered, tools=None, documents=None, **self._named
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"{self.name}: the chat template rejects a prompt ({in_one_line(error)})") from None

    def vocabulary(self) -> Vocabulary:
        """Return the texts of all tokens."""
        return Vocabulary.of(_AsTransformers(self._tokenizer, self._special), self.vocab_size)

    @cached_property
    def _compiled(self) -> Any:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self._chat_template or "")
        except TemplateError as error:
            raise InputError(f"{self.name}: the chat template is damaged ({in_one_line(error)})") from None

    @property
    def _named(self) -> dict[str, str]:
        """Return the special tokens that a template may name, such as ``bos_token``."""
        entries = {key: _content(value) for key, value in self._config.items() if key.endswith("_token")}
        return {key: value for key, value in entries.items() if value is not None}


class _AsTransformers:
    """Present a tokenizer with the methods that ``Vocabulary.of`` calls."""

    def __init__(self, tokenizer: Any, special: dict[int, str]) -> None:
        self._tokenizer = tokenizer
        self.all_special_ids = list(special)
        self.added_tokens_decoder = tokenizer.get_added_tokens_decoder()

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def batch_decode(self, ids: list[list[int]], **options: Any) -> list[str]:
        del options
        return self._tokenizer.decode_batch(ids, skip_special_tokens=False)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [self._tokenizer.id_to_token(token) for token in ids]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({in_one_line(error)})") from None
    return found if isinstance(found, dict) else {}


def _chat_template(file: Path, config: dict[str, Any]) -> str | None:
    path = file.with_name(TEMPLATE)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _content(token: Any) -> str | None:
    """Return the text of a token of the configuration, which is text or an object."""
    return token.get("content") if isinstance(token, dict) else token
