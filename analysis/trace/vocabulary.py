"""The vocabulary of a tokenizer: the text of every entry, and which entries are special."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from entrace.analysis.trace.plain import REPLACEMENT

WORD_START = "\u2581"
# How SentencePiece names the entry of a single byte, and how every byte that is not a character is shown.
BYTE_ENTRY = re.compile(r"<0x[0-9A-F]{2}>")


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character stands for in the entries of a byte-level BPE, as in GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


@dataclass(frozen=True)
class Vocabulary:
    """The entries of a tokenizer, indexed by token id.

    Attributes:
        texts: Text of each entry; bytes of a character that is incomplete are shown one by one, as ``<0xF0>``.
        is_special: Which entries the tokenizer marks as special, such as an end of sequence or a role; None if unknown.
    """

    texts: list[str]
    is_special: list[bool] | None = None

    @classmethod
    def of(cls, tokenizer: Any, size: int) -> Vocabulary:
        """Read the vocabulary of a tokenizer of transformers.

        Distinct entries keep distinct texts: a leading blank stays, and a byte entry whose character is an entry of its
        own is shown as a byte.

        Args:
            tokenizer: The tokenizer.
            size: Rows of the LM head; those that the tokenizer lacks get an empty text.
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
    """Return UTF-8 as text, with every byte that is not part of a whole character as ``<0xF0>``."""
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
    """Return the text of an ordinary entry from its name in the vocabulary and from what it decodes to, alone."""
    if REPLACEMENT not in decoded:
        # The decoder of SentencePiece drops the blank that a text begins with.
        blanks = len(entry) - len(entry.lstrip(WORD_START))
        return " " * blanks + decoded.lstrip(" ") if blanks else decoded
    if BYTE_ENTRY.fullmatch(entry):
        return entry
    if all(sign in BYTE_ALPHABET for sign in entry):
        return show_bytes(bytes(BYTE_ALPHABET[sign] for sign in entry))
    return decoded
