"""Detect defects of a response by rules that need only its text."""

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
# Words too common to relate a sentence to its prompt.
COMMON_WORDS = (
    "a an and are as at be by do does for from has have how i in is it its of on or that the this to was we what "
    "which who why will with you your my me"
)
STOP_WORDS = frozenset(COMMON_WORDS.split())

SIX_TIMES = re.compile(r"(.)\1{5}", re.DOTALL)
THREE_TIMES = re.compile(r"(.)\1\1", re.DOTALL)
MAX_BLOCK_WORDS = 100
# Separators of words, which become blanks, and the letters that _cannot_repeat drops: all except "a", which is frequent
# and rarely doubled.
GAPS = "".join(sign for sign in map(chr, range(128)) if sign.isspace() or sign == "_")
BLANKS = bytes.maketrans(GAPS.encode(), b" " * len(GAPS))
DROPPED = string.ascii_lowercase.replace("a", "").encode()
MIN_SENTENCE_WORDS = 3
IRRELEVANT_SHARE = 0.25
# A sentence without digits or operators: at least 8 characters (three words of two letters), up to a sentence end.
INFORMAL = re.compile(rf"[.!?\n](?=[^{FORMAL}]{{8}})[^{FORMAL}.!?\n]*(?:[.!?\n]|\Z)")


def find_defects(prompt: str, completion: str, *, has_answer: bool | None, is_truncated: bool | None) -> list[str]:
    """Return the defects of one response (claim S4).

    - ``format_violation``: no answer could be parsed.
    - ``truncated``: generation stopped at the length limit.
    - ``repetition``: a block of 1 to 100 words occurs at least three times in a row and covers at least 6 words.
    - ``irrelevant``: at least a quarter of the words belong to sentences of three or more words that contain no digit,
      no operator, no word of the lexicon, and no content word of the prompt.

    Args:
        prompt: The question.
        completion: The response.
        has_answer: True if an answer could be parsed; None if unknown, which counts as no defect.
        is_truncated: True if the response reached the length limit; None if unknown, which counts as no defect.

    Returns:
        The defects that apply, in the order above.
    """
    applies = (has_answer is False, is_truncated is True, is_repetitive(completion), is_irrelevant(prompt, completion))
    return list(compress(DEFECTS, applies))


def is_repetitive(completion: str) -> bool:
    """Return whether a block of words repeats back to back; see ``find_defects``."""
    text = completion.lower()
    if _cannot_repeat(text):
        return False
    letters: dict[str, str] = {}
    words = "".join([letters.setdefault(word, chr(len(letters))) for word in WORD.findall(text)])
    return SIX_TIMES.search(words) is not None or _occurs_thrice(words, 2, MAX_BLOCK_WORDS)


def _cannot_repeat(text: str) -> bool:
    """Return True for most texts without repetition, without splitting into words.

    Every letter except "a" is dropped, which maps equal words to equal remainders. A block that occurs three times in a
    row therefore still does, unless nothing remains of it; six empty words then leave five blanks in a row.
    """
    if not text.isascii():
        return False
    remainder = text.encode().translate(BLANKS, DROPPED)
    if b" " * 5 in remainder:
        return False
    remainder = remainder.replace(b" ", b"").decode()
    return not _occurs_thrice(remainder, 1, len(remainder))


def _occurs_thrice(text: str, smallest: int, largest: int) -> bool:
    """Return whether a substring occurs three times in a row.

    Only substrings of ``smallest`` to ``largest`` characters count. A substring of length n can occur three times in a
    row only if one character does so among every n-th character; that search is much faster.
    """
    for size in range(smallest, min(largest, len(text) // 3) + 1):
        if THREE_TIMES.search(text[::size]) and re.search(rf"(?s)(.{{{size}}})\1\1", text):
            return True
    return False


def is_irrelevant(prompt: str, completion: str) -> bool:
    """Return whether 25% or more of the words are off topic; see ``find_defects``."""
    text = completion.lower()
    if not INFORMAL.search(f"\n{text}"):
        return False
    suspects = map(_suspect_words, SENTENCE_END.split(text))
    off = sum(len(words) for words in suspects if _content_words(prompt).isdisjoint(words))
    return off > 0 and off >= IRRELEVANT_SHARE * len(ALPHABETIC.findall(text))


# Responses of one policy share many sentences.
@lru_cache(maxsize=1 << 12)
def _suspect_words(sentence: str) -> list[str]:
    """Return the words of a sentence that may be off topic; empty for others.

    The sentence is off topic unless the prompt shares one of its words.
    """
    words = [] if FORMAL_SIGN.search(sentence) else ALPHABETIC.findall(sentence)
    return words if len(words) >= MIN_SENTENCE_WORDS and _lexicon_words().isdisjoint(words) else []


# The responses to one prompt arrive consecutively.
@lru_cache(maxsize=1)
def _content_words(prompt: str) -> set[str]:
    return set(ALPHABETIC.findall(prompt.lower())) - STOP_WORDS


@cache
def _lexicon_words() -> frozenset[str]:
    return frozenset(Lexicon.load().words)
