"""Test texts and marks of vocabularies.

The vocabularies are byte-level BPE and SentencePiece with bytes, both with special tokens.
"""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from entrace.analysis.trace import Lexicon, Vocabulary
from entrace.analysis.trace.vocabulary import show_bytes
from entrace.trainer.resources import find_base_policy

# Names of bytes in GPT-2's alphabet: space F0, F0 9F, 98 80.
SPACE_F0, F0_9F, GRIN_END = "Ġð", "ðŁ", "ĺĢ"
EOS = "<｜end▁of▁sentence｜>"


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(EOS, special=True), AddedToken("[INST]", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


@pytest.fixture
def byte_level() -> PreTrainedTokenizerFast:
    entries = ["the", "Ġthe", "ð", SPACE_F0, F0_9F, F0_9F + GRIN_END, "að", "ï¿½", "<b>", "[PAD]", "Ċ", "Ġ.", "."]
    tokenizer = Tokenizer(models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return fast(tokenizer)


@pytest.fixture
def sentencepiece() -> PreTrainedTokenizerFast:
    entries = ["<unk>", "<0x0A>", "<0x0D>", "<0xE2>", "\n", "▁the", "the", "▁", "▁▁", "<b>", "é"]
    model = models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=[], byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return fast(tokenizer)


def test_byte_level_entries_show_the_bytes_of_incomplete_characters(byte_level: PreTrainedTokenizerFast):
    vocabulary = Vocabulary.of(byte_level, 18)
    assert vocabulary.texts == [
        *("the", " the", "<0xF0>", " <0xF0>", "<0xF0><0x9F>", "😀", "a<0xF0>", "\ufffd", "<b>", "[PAD]", "\n", " ."),
        *(".", EOS, "[INST]", "<think>", "", ""),
    ]
    assert vocabulary.is_special == [False] * 13 + [True, True, False, False, False]


def test_sentencepiece_entries_keep_blanks_and_bytes(sentencepiece: PreTrainedTokenizerFast):
    vocabulary = Vocabulary.of(sentencepiece, 14)
    assert vocabulary.texts == [
        # The line feed is an entry of its own, the carriage return is not.
        *("<unk>", "<0x0A>", "\r", "<0xE2>", "\n", " the", "the", " ", "  ", "<b>", "é"),
        *(EOS, "[INST]", "<think>"),
    ]
    assert vocabulary.is_special == [False] * 11 + [True, True, False]


def test_categories_follow_the_marks_and_not_the_looks(byte_level: PreTrainedTokenizerFast):
    vocabulary = Vocabulary.of(byte_level, 16)
    found = dict(zip(vocabulary.texts, Lexicon.load().categorize(vocabulary.texts, vocabulary.is_special), strict=True))
    special = [text for text, category in found.items() if category == "special"]
    assert special == ["<0xF0>", " <0xF0>", "<0xF0><0x9F>", "\ufffd", "\n", EOS, "[INST]"]
    assert {found[text] for text in ("<b>", "[PAD]", "<think>", "a<0xF0>")} == {"semantic_support"}


def test_fewer_rows_than_entries(byte_level: PreTrainedTokenizerFast):
    assert Vocabulary.of(byte_level, 2) == Vocabulary(["the", " the"], [False, False])


def test_the_embedded_policy_shows_128_bytes_one_by_one():
    tokenizer = AutoTokenizer.from_pretrained(find_base_policy())
    vocabulary = Vocabulary.of(tokenizer, 512)
    assert len(set(vocabulary.texts)) == 512
    assert [vocabulary.texts[i] for i in tokenizer("🤗", add_special_tokens=False)["input_ids"]] == [
        *("<0xF0>", "<0x9F>", "<0xA4>", "<0x97>")
    ]
    assert sum(text.startswith("<0x") for text in vocabulary.texts) == 128
    assert [text for text, mark in zip(vocabulary.texts, vocabulary.is_special or [], strict=True) if mark] == [
        *("<pad>", "<eos>", "<system>", "<user>", "<assistant>")
    ]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""),
        (b"so", "so"),
        ("é≤😀".encode(), "é≤😀"),
        (b"\x80", "<0x80>"),
        (b"\xe2\x89", "<0xE2><0x89>"),
        (b" \xe2\x89\xa4\xf0", " ≤<0xF0>"),
        (b"\xa4x\xc3", "<0xA4>x<0xC3>"),
        # Half a surrogate pair is not a character.
        (b"\xed\xa0\x80", "<0xED><0xA0><0x80>"),
    ],
)
def test_bytes_that_are_not_characters_are_shown(data: bytes, text: str):
    assert show_bytes(data) == text
