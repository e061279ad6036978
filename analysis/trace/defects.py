"""Defects of a response, by documented rules that need only its text."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np

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

REPEATS = 3
MIN_REPEATED_WORDS = 6
MAX_BLOCK_WORDS = 100
MIN_SENTENCE_WORDS = 3
IRRELEVANT_SHARE = 0.25


def find_defects(prompt: str, completion: str, *, has_answer: bool, is_truncated: bool) -> list[str]:
    """Names every defect of one response (claim S4).

    - ``format_violation``: no answer could be parsed.
    - ``truncated``: stopped by the length limit.
    - ``repetition``: a block of 1 to 100 words stands three times or more in a row and fills at least 6 words.
    - ``irrelevant``: at least a quarter of the words stand in sentences of three or more words with no digit or
      operator, no word of the lexicon and no content word of the prompt.

    Args:
        prompt: The question.
        completion: The response.
        has_answer: An answer could be parsed.
        is_truncated: The response reached the length limit.

    Returns:
        The defects that apply, in the order above.
    """
    applies = {
        FORMAT_VIOLATION: not has_answer,
        TRUNCATED: is_truncated,
        REPETITION: is_repetitive(completion),
        IRRELEVANT: is_irrelevant(prompt, completion),
    }
    return [name for name in DEFECTS if applies[name]]


def is_repetitive(completion: str) -> bool:
    """Whether a block of words is repeated back to back; see ``find_defects``."""
    words = WORD.findall(completion.lower())
    # A repeated block repeats its first two words; most responses end here, at a tenth of the cost.
    if max(Counter(pairwise(words)).values(), default=0) < REPEATS:
        return False
    index: dict[str, int] = {}
    ids = np.array([index.setdefault(word, len(index)) for word in words])
    for block in range(1, min(MAX_BLOCK_WORDS, len(ids) // REPEATS) + 1):
        # A block stands REPEATS times in a row where ids agree with themselves shifted by one block throughout
        # (REPEATS - 1) blocks.
        needed = max((REPEATS - 1) * block, MIN_REPEATED_WORDS - block)
        same = ids[:-block] == ids[block:]
        if np.count_nonzero(same) < needed:
            continue
        edges = np.flatnonzero(np.diff(same, prepend=False, append=False))
        if (edges[1::2] - edges[::2]).max() >= needed:
            return True
    return False


def is_irrelevant(prompt: str, completion: str) -> bool:
    """Whether a quarter of the words is off the subject; see ``find_defects``."""
    on_topic = _lexicon_words() | (set(ALPHABETIC.findall(prompt.lower())) - STOP_WORDS)
    total = off = 0
    for sentence in SENTENCE_END.split(completion.lower()):
        words = ALPHABETIC.findall(sentence)
        total += len(words)
        if len(words) >= MIN_SENTENCE_WORDS and not FORMAL_SIGN.search(sentence) and on_topic.isdisjoint(words):
            off += len(words)
    return off > 0 and off >= IRRELEVANT_SHARE * total


@cache
def _lexicon_words() -> frozenset[str]:
    return frozenset(Lexicon.load().words)
