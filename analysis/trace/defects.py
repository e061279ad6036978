"""Defects of a response, by documented rules that need only its text."""

from __future__ import annotations

import re
from functools import cache

from analysis.trace.lexicon import Lexicon

FORMAT_VIOLATION, TRUNCATED, REPETITION, IRRELEVANT = DEFECTS = (
    "format_violation",
    "truncated",
    "repetition",
    "irrelevant",
)

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+|[^\w\s]")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
ALPHABETIC = re.compile(r"[^\W\d_]{2,}")
FORMAL_SIGN = re.compile(r"[\d=+*/^<>\\]")
# Words too common to tie a sentence to its prompt.
COMMON_WORDS = (
    "a an and are as at be by do does for from has have how i in is it its of on or that the this to was we what "
    "which who why will with you your my me"
)
STOP_WORDS = frozenset(COMMON_WORDS.split())

# With a letter in each word's place: one word six times, or 2 to 100 words three times.
REPEATED_BLOCK = re.compile(r"(.)\1{5}|(.{2,100})\2\2", re.DOTALL)
MIN_SENTENCE_WORDS = 3
IRRELEVANT_SHARE = 0.25


def find_defects(prompt: str, completion: str, *, has_answer: bool | None, is_truncated: bool | None) -> list[str]:
    """Names every defect of one response (claim S4).

    - ``format_violation``: no answer could be parsed.
    - ``truncated``: stopped by the length limit.
    - ``repetition``: a block of 1 to 100 words stands three times or more in a row and fills at least 6 words.
    - ``irrelevant``: at least a quarter of the words stand in sentences of three or more words with no digit or
      operator, no word of the lexicon and no content word of the prompt.

    Args:
        prompt: The question.
        completion: The response.
        has_answer: An answer could be parsed; None where that is not known, which is no defect.
        is_truncated: The response reached the length limit; None likewise.

    Returns:
        The defects that apply, in the order above.
    """
    applies = {
        FORMAT_VIOLATION: has_answer is False,
        TRUNCATED: is_truncated is True,
        REPETITION: is_repetitive(completion),
        IRRELEVANT: is_irrelevant(prompt, completion),
    }
    return [name for name in DEFECTS if applies[name]]


def is_repetitive(completion: str) -> bool:
    """Whether a block of words is repeated back to back; see ``find_defects``."""
    letters: dict[str, str] = {}
    words = WORD.findall(completion.lower())
    return REPEATED_BLOCK.search("".join([letters.setdefault(word, chr(len(letters))) for word in words])) is not None


def is_irrelevant(prompt: str, completion: str) -> bool:
    """Whether a quarter of the words is off the subject; see ``find_defects``."""
    text = completion.lower()
    off = 0
    for sentence in SENTENCE_END.split(text):
        if FORMAL_SIGN.search(sentence):
            continue
        words = ALPHABETIC.findall(sentence)
        if len(words) >= MIN_SENTENCE_WORDS and _lexicon_words().isdisjoint(words):
            off += len(words) * _content_words(prompt).isdisjoint(words)
    return off > 0 and off >= IRRELEVANT_SHARE * len(ALPHABETIC.findall(text))


def _content_words(prompt: str) -> set[str]:
    return set(ALPHABETIC.findall(prompt.lower())) - STOP_WORDS


@cache
def _lexicon_words() -> frozenset[str]:
    return frozenset(Lexicon.load().words)
