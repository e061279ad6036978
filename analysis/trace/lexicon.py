"""Assign tokens of any tokenizer to functional categories.

A lexicon and four rules decide; see ``Lexicon.categorize``.
"""

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

# Category of an entry whose text is unknown, in traces that were imported without a tokenizer.
OTHER = "other"

SHIPPED = Path(__file__).with_name("lexicon.toml")
# Characters by which SentencePiece and byte-level BPE mark word starts, line ends, and tabs.
MARKS_TO_BLANKS = dict.fromkeys(map(ord, "\u2581\u0120\u010a\u0109\u010d"), " ")
# Texts that look like special tokens, for vocabularies that do not mark their special tokens.
MARKUP = re.compile(r"<[^<>\s]+>|\[[A-Z]{3,}\]")
NO_TEXT = re.compile(r"\ufffd+|(?:<0x[0-9A-F]{2}>)+")
RULER = re.compile(r"\*\*+|([-_/=])\1\1+")
PUNCTUATION = ".,:;!?\"'`"
FORMAL_TEXT = re.compile(r"[\d+\-*/^=<>%×÷±√∑∫≤≥≠≈∞(){}\[\]|\\_]+|[a-zA-Z]'?|[\d.,]*\d[\d.,]*|\\[a-zA-Z]+")
SINGLE_LETTER_WORDS = {"a", "i"}


@dataclass(frozen=True)
class Lexicon:
    """Map words to categories; ``categorize`` applies rules to all other texts."""

    words: dict[str, str]

    @classmethod
    def load(cls, path: Path | None = None) -> Lexicon:
        """Read a lexicon (default: the shipped one).

        Raises:
            InputError: the file does not exist or is not TOML, or a category is unknown.
        """
        path = path or SHIPPED
        try:
            lists = tomllib.loads(path.read_text(encoding="utf-8-sig"))
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
        # A word in several lists gets the category that comes first in the file, whatever the order of CATEGORIES.
        words: dict[str, str] = {}
        for category, entries in lists.items():
            for word in entries:
                words.setdefault(word, category)
        return cls(words)

    def categorize(self, vocab: Sequence[str], is_special: Sequence[bool] | None = None) -> np.ndarray:
        """Return the category of every vocabulary entry.

        The first matching rule decides; punctuation around a word is ignored.

        1. Marked special tokens, blanks, and bytes of incomplete characters are ``special``.
        2. A word of the lexicon has its category there.
        3. Digits, operators, brackets, LaTeX commands, and single letters except the words a and i are
           ``formal_reasoning``.
        4. Everything else, including punctuation, rulers, markup, and word pieces, is ``semantic_support``.

        Args:
            vocab: Text of each entry, length V; word-start marks of byte-level BPE and SentencePiece are recognized.
            is_special: Special-token flag of each entry, length V. If omitted, texts that look special count as
                marked, such as ``<eos>``, ``</answer>``, or ``[PAD]``.

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
