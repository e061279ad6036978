"""Read a tokenizer's vocabulary: text of every entry, and special entries."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from entrace.analysis.trace.arguments import checked
from entrace.analysis.trace.plain import REPLACEMENT

WORD_START = "\u2581"
# The name of a single-byte entry in SentencePiece; all bytes of incomplete characters are shown this way.
BYTE_ENTRY = re.compile(r"<0x[0-9A-F]{2}>")


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character in entries of a byte-level BPE (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


@checked
@dataclass(frozen=True)
class Vocabulary:
    """Hold the entries of a tokenizer, indexed by token id.

    Attributes:
        texts: Text of each entry; each byte of an incomplete character is shown as ``<0xF0>``.
        is_special: True for entries that the tokenizer marks as special, such as end of sequence or a role; None if
            unknown.
        has_text: False for entries whose text is unknown, and stands for its number; None if all texts are known.
    """

    texts: list[str]
    is_special: list[bool] | None = None
    has_text: list[bool] | None = None

    @classmethod
    @checked
    def of(cls, tokenizer: Any, size: int) -> Vocabulary:
        """Read the vocabulary of a transformers tokenizer.

        Distinct entries keep distinct texts: leading blanks are kept, and a byte entry is shown as a byte if its
        character has an entry of its own.

        Args:
            tokenizer: The tokenizer.
            size: Number of rows of the LM head; rows without a tokenizer entry get an empty text.
        """
        known = min(max(tokenizer.get_vocab().values(), default=-1) + 1, size)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        decoded = tokenizer.batch_decode([[i] for i in range(known)], clean_up_tokenization_spaces=False)
        entries = [entry or "" for entry in tokenizer.convert_ids_to_tokens(list(range(known)))]
        texts = [
            added[i].content if i in added else _text(entry, text)
            for i, (entry, text) in enumerate(zip(entries, decoded, strict=True))
        ]
        shared = Counter(texts)
        texts = [
            entry if shared[text] > 1 and BYTE_ENTRY.fullmatch(entry) else text
            for entry, text in zip(entries, texts, strict=True)
        ]
        return cls(texts + [""] * (size - known), [i in special for i in range(size)])


def show_bytes(data: bytes) -> str:
    """Decode UTF-8, and show every byte outside a complete character as ``<0xF0>``."""
    shown = ""
    while data:
        try:
            return shown + data.decode()
        except UnicodeDecodeError as error:
            shown += data[: error.start].decode()
            shown += "".join(f"<0x{byte:02X}>" for byte in data[error.start : error.end])
            data = data[error.end :]
    return shown


def _text(entry: str, decoded: str) -> str:
    """Return the text of an ordinary entry from its name and its decoded text."""
    if REPLACEMENT not in decoded:
        # The decoder of SentencePiece drops leading blanks of a text.
        blanks = len(entry) - len(entry.lstrip(WORD_START))
        return " " * blanks + decoded.lstrip(" ") if blanks else decoded
    if BYTE_ENTRY.fullmatch(entry):
        return entry
    if all(character in BYTE_ALPHABET for character in entry):
        return show_bytes(bytes(BYTE_ALPHABET[character] for character in entry))
    return decoded
