"""Defects of a response, by documented rules that need only its text."""

from __future__ import annotations

import re
import string
from functools import cache, lru_cache
from itertools import compress

from entrace.analysis.trace.lexicon import Lexicon

FORMAT_VIOLATION, TRUNCATED, REPETITION, IRRELEVANT = DEFECTS = (
    "format_violation",
    "truncated",
    "repetition",
    "irrelevant",
)

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+|[^\w\s]")
SENTENCE_END = re.compile(r"[.!?\n]\s+|\n")
ALPHABETIC = re.compile(r"[^\W\d_]{2,}")
FORMAL = r"\d=+*/^<>\\"
FORMAL_SIGN = re.compile(f"[{FORMAL}]")
# Words too common to tie a sentence to its prompt.
COMMON_WORDS = (
    "a an and are as at be by do does for from has have how i in is it its of on or that the this to was we what "
    "which who why will with you your my me"
)
STOP_WORDS = frozenset(COMMON_WORDS.split())

SIX_TIMES = re.compile(r"(.)\1{5}", re.DOTALL)
THREE_TIMES = re.compile(r"(.)\1\1", re.DOTALL)
MAX_BLOCK_WORDS = 100
# What stands between words, made blanks, and what is left out where words are cut short: all letters but one, which is
# frequent and hardly ever doubled.
GAPS = "".join(sign for sign in map(chr, range(128)) if sign.isspace() or sign == "_")
BLANKS = bytes.maketrans(GAPS.encode(), b" " * len(GAPS))
LEFT_OUT = string.ascii_lowercase.replace("a", "").encode()
MIN_SENTENCE_WORDS = 3
IRRELEVANT_SHARE = 0.25
# After the end of a sentence, as much as three words of two letters take, and then all up to a possible end.
INFORMAL = re.compile(rf"[.!?\n](?=[^{FORMAL}]{{8}})[^{FORMAL}.!?\n]*(?:[.!?\n]|\Z)")


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
    applies = (has_answer is False, is_truncated is True, is_repetitive(completion), is_irrelevant(prompt, completion))
    return list(compress(DEFECTS, applies))


def is_repetitive(completion: str) -> bool:
    """Whether a block of words is repeated back to back; see ``find_defects``."""
    text = completion.lower()
    if _cannot_repeat(text):
        return False
    letters: dict[str, str] = {}
    words = "".join([letters.setdefault(word, chr(len(letters))) for word in WORD.findall(text)])
    return SIX_TIMES.search(words) is not None or _stands_thrice(words, 2, MAX_BLOCK_WORDS)


def _cannot_repeat(text: str) -> bool:
    """Rules most texts of sums out, without a look at their words.

    Words are cut short, each always to the same, so that a block that stands three times still does, or nothing is left
    of it: then six words of which nothing is left stand in a row, with five gaps.
    """
    if not text.isascii():
        return False
    short = text.encode().translate(BLANKS, LEFT_OUT)
    if b" " * 5 in short:
        return False
    short = short.replace(b" ", b"").decode()
    return not _stands_thrice(short, 1, len(short))


def _stands_thrice(text: str, smallest: int, largest: int) -> bool:
    """Whether a part of a size within these bounds stands three times in a row.

    Then of the letters at multiples of its size, which are much faster to search, one does.
    """
    for size in range(smallest, min(largest, len(text) // 3) + 1):
        if THREE_TIMES.search(text[::size]) and re.search(rf"(?s)(.{{{size}}})\1\1", text):
            return True
    return False


def is_irrelevant(prompt: str, completion: str) -> bool:
    """Whether a quarter of the words is off the subject; see ``find_defects``."""
    text = completion.lower()
    if not INFORMAL.search(f"\n{text}"):
        return False
    suspects = map(_suspect_words, SENTENCE_END.split(text))
    off = sum(len(words) for words in suspects if _content_words(prompt).isdisjoint(words))
    return off > 0 and off >= IRRELEVANT_SHARE * len(ALPHABETIC.findall(text))


# A policy says the same again and again.
@lru_cache(maxsize=1 << 12)
def _suspect_words(sentence: str) -> list[str]:
    """Words of a sentence that is off the subject unless it shares one of them with the prompt; none of others."""
    words = [] if FORMAL_SIGN.search(sentence) else ALPHABETIC.findall(sentence)
    return words if len(words) >= MIN_SENTENCE_WORDS and _lexicon_words().isdisjoint(words) else []


# The responses to a prompt follow each other.
@lru_cache(maxsize=1)
def _content_words(prompt: str) -> set[str]:
    return set(ALPHABETIC.findall(prompt.lower())) - STOP_WORDS


@cache
def _lexicon_words() -> frozenset[str]:
    return frozenset(Lexicon.load().words)
