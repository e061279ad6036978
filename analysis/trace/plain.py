"""Make untrusted text safe to print, draw, and store."""

from __future__ import annotations

import re

# C0 and C1 controls, lone surrogates, and invisible characters that hide, split, or reorder text. The joiners U+200C
# and U+200D are kept, because words of some languages need them.
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
SURROGATES = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Longest text within a line, such as an error message, in characters.
LONGEST = 2000


def well_formed(text: str) -> str:
    """Replace lone surrogates by U+FFFD: no file or database can store them."""
    return SURROGATES.sub(REPLACEMENT, text)


def escape(text: str) -> str:
    r"""Return ``text`` on one line, with invisible characters escaped (``\x1b``)."""
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def plain(text: str, length: int = LONGEST) -> str:
    """Escape ``text``, and cut its middle if it exceeds ``length`` characters."""
    # The first cut avoids the time to escape a long text; escapes then require the second.
    return _cut(escape(_cut(text, length)), length)


def _cut(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"
