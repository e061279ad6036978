"""The text by which prompts are compared, so that no training prompt repeats a held-out one in other characters."""

from __future__ import annotations

import re
import unicodedata

# Unicode's Default_Ignorable_Code_Point, which `unicodedata` lacks: nothing is drawn for these characters, such as
# zero-width spaces and joiners, soft hyphens, marks of direction, byte order marks, and variation selectors.
IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f-\u1160\u17b4-\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def normalize_text(text: str) -> str:
    """Return the text in NFKC, with invisible characters removed, white space collapsed, and the ends stripped.

    White space is what ``str.isspace`` calls so, no-break spaces and line breaks included. Letter case counts.
    """
    # Most prompts are ASCII, which is in NFKC and has no invisible characters.
    if not text.isascii():
        # In this order: an invisible character between a letter and its accent keeps them from becoming one character.
        text = unicodedata.normalize("NFKC", IGNORABLE.sub("", text))
    return " ".join(text.split())
