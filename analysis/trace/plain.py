"""Text of unknown origin, made so that a terminal, a picture and a reader see what it is and nothing acts on it."""

from __future__ import annotations

import re

# C0 and C1 controls, lone surrogates, and signs that are not seen but hide, split or reorder what is. Joiners
# (U+200C, U+200D) stay, words of some languages need them.
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
SURROGATES = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Characters of a text that stands in a line of others, an error say.
LONGEST = 2000


def well_formed(text: str) -> str:
    """``text`` with U+FFFD for lone surrogates, which Python and JSON can name but no file or database holds."""
    return SURROGATES.sub(REPLACEMENT, text)


def escape(text: str) -> str:
    r"""``text`` on one line, with escapes such as ``\x1b`` in place of signs that are not seen."""
    return UNSEEN.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


def plain(text: str, length: int = LONGEST) -> str:
    """``text`` escaped, and with its middle left out if it is longer than ``length`` characters."""
    # Cut first as well: escaping what is left out of a long text would take its time.
    return _cut(escape(_cut(text, length)), length)


def _cut(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"
