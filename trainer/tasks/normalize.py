"""Normalize texts for comparison.

No training prompt may repeat a held-out prompt in other characters.
"""

from __future__ import annotations

import re
import unicodedata

# Unicode's Default_Ignorable_Code_Point, which `unicodedata` lacks: invisible characters, such as zero-width spaces and
# joiners, soft hyphens, direction marks, byte order marks, and variation selectors.
IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f-\u1160\u17b4-\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def normalize_text(text: str) -> str:
    """Return the text in NFKC, with white space collapsed and the ends stripped.

    Invisible characters are removed. White space is defined by ``str.isspace``, including no-break spaces and line
    breaks. Case is kept.
    """
    # ASCII, hence most prompts, is already in NFKC and has no invisible characters.
    if not text.isascii():
        # Invisible characters go first: between a letter and its accent, one would keep NFKC from composing them.
        text = unicodedata.normalize("NFKC", IGNORABLE.sub("", text))
    return " ".join(text.split())
