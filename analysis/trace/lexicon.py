"""Token categories by function, for any tokenizer, from a lexicon and four rules."""

from __future__ import annotations

import re
import reprlib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entrace.analysis.trace.errors import InputError, in_one_line, nearest, reason_of

FORMAL, LOGICAL, META, SEMANTIC, SPECIAL = CATEGORIES = (
    "formal_reasoning",
    "logical_structuring",
    "metacognitive",
    "semantic_support",
    "special",
)

SHIPPED = Path(__file__).with_name("lexicon.toml")
# Word starts, line ends and tabs as SentencePiece and byte-level BPE write them.
MARKS_TO_BLANKS = dict.fromkeys(map(ord, "\u2581\u0120\u010a\u0109\u010d"), " ")
# Looks like a special token, for vocabularies of which nobody says what is special.
MARKUP = re.compile(r"<[^<>\s]+>|\[[A-Z]{3,}\]")
NO_TEXT = re.compile(r"\ufffd+|(?:<0x[0-9A-F]{2}>)+")
RULER = re.compile(r"\*\*+|([-_/=])\1\1+")
PUNCTUATION = ".,:;!?\"'`"
FORMAL_TEXT = re.compile(r"[\d+\-*/^=<>%×÷±√∑∫≤≥≠≈∞(){}\[\]|\\_]+|[a-zA-Z]'?|[\d.,]*\d[\d.,]*|\\[a-zA-Z]+")
SINGLE_LETTER_WORDS = {"a", "i"}


@dataclass(frozen=True)
class Lexicon:
    """Maps words to categories; ``categorize`` adds the rules for everything that is not a listed word."""

    words: dict[str, str]

    @classmethod
    def load(cls, path: Path | None = None) -> Lexicon:
        """Reads a lexicon.

        Raises:
            InputError: no such file, not TOML, or a category that does not exist.
        """
        path = path or SHIPPED
        try:
            lists = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: no such lexicon") from None
        except OSError as error:
            raise InputError(f"{path}: {reason_of(error)}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not TOML ({in_one_line(error)})") from None
        for category, entries in lists.items():
            if category not in CATEGORIES:
                raise InputError(f'{path}: unknown category "{category}"{nearest(category, CATEGORIES)}')
            if not isinstance(entries, list) or not all(isinstance(word, str) for word in entries):
                raise InputError(f"{path}: {category} is {reprlib.repr(entries)}, expected a list of words")
        # The earlier category in CATEGORIES order never wins by accident: the file's order decides.
        words: dict[str, str] = {}
        for category, entries in lists.items():
            for word in entries:
                words.setdefault(word, category)
        return cls(words)

    def categorize(self, vocab: Sequence[str], is_special: Sequence[bool] | None = None) -> np.ndarray:
        """Return the category of every vocabulary entry.

        Rules, first match, punctuation around a word left out: what the tokenizer marks as special, blanks, and bytes
        of incomplete characters are ``special``; a listed word has its listed category; digits, operators, brackets,
        LaTeX commands and single letters other than the words a and i are ``formal_reasoning``; anything else,
        punctuation, rulers, markup and word pieces included, is ``semantic_support``.

        Args:
            vocab: Texts, one per entry; word-start marks of byte-level BPE and SentencePiece are understood.
            is_special: What the tokenizer marks, one per entry; if unknown, what looks like it, such as ``<eos>``,
                ``</answer>`` or ``[PAD]``, counts as marked.

        Returns:
            Array of category names, dtype object, shape ``(V,)``.
        """
        marks = [None] * len(vocab) if is_special is None else is_special
        return np.array([self._categorize_one(t, mark) for t, mark in zip(vocab, marks, strict=True)], dtype=object)

    def _categorize_one(self, text: str, is_special: bool | None) -> str:
        text = text.translate(MARKS_TO_BLANKS).strip()
        if is_special is None:
            is_special = MARKUP.fullmatch(text) is not None
        if is_special or not text or NO_TEXT.fullmatch(text):
            return SPECIAL
        text = text.strip(PUNCTUATION).strip() or text
        word = text.lower()
        if word in self.words:
            return self.words[word]
        if FORMAL_TEXT.fullmatch(text) and not RULER.fullmatch(text) and word not in SINGLE_LETTER_WORDS:
            return FORMAL
        return SEMANTIC
