import json
import logging

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from entrace.trainer.model.loading import load_tokenizer
from entrace.trainer.tasks import load_task
from entrace.trainer.tasks.characters import describe_lost, find_lost, task_texts, warn_of_lost
from entrace.trainer.tasks.config import TaskConfig

WORDS = ["<unk>", "what", "is", "2", "3", "+", "?", "a", "b", "é"]


def word_level(normalizer=None, unk="<unk>"):
    """Return a tokenizer of a few words; all other words are unknown."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    if normalizer:
        made.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unk)


def test_unknown_characters_are_found_and_others_of_their_word_are_not():
    tokenizer = word_level()
    assert find_lost(tokenizer, ["what is 2 + 3?", " 3 + 2 "]) == []
    assert find_lost(tokenizer, ["2×3", "中 + 2"]) == ["×", "中"]
    # An unknown word of known characters is unknown all the same.
    assert find_lost(tokenizer, ["ab"]) == ["a", "b"]
    assert find_lost(tokenizer, ["what\nis"]) == ["\n"]
    # The text of the unknown token holds letters of its own.
    assert find_lost(tokenizer, ["u"]) == ["u"]


def test_characters_that_do_not_come_back_are_found():
    assert find_lost(word_level(normalizers.Lowercase()), ["What is 2?"]) == ["W"]
    assert find_lost(word_level(normalizers.NFKC()), ["2 + ３", "²"]) == ["²", "３"]
    # Canonically equivalent forms are one character.
    assert find_lost(word_level(normalizers.NFC()), ["e\u0301"]) == []


def test_a_tokenizer_of_bytes_encodes_everything():
    texts = [chr(i) for i in range(0x3000) if not 0xD800 <= i < 0xE000]
    assert find_lost(load_tokenizer("embedded"), ["".join(texts), *texts, "👩‍🔬 𝔸"]) == []


def test_only_what_is_new_in_a_text_is_encoded(monkeypatch):
    tokenizer = word_level()
    tried = []
    monkeypatch.setattr("entrace.trainer.tasks.characters._lost_in", lambda _, text: tried.append(text) or set())
    find_lost(tokenizer, ["ab", "ba", "abc", "cab"])
    assert tried == ["ab", "abc"]


def test_all_rows_and_answers_of_a_task_are_tried(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"what is {i}?", "answer": i} for i in range(3)]
    rows[2] = {"prompt": "what is ö?", "answer": "ü"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(TaskConfig(name=str(path), num_heldout=1), seed=0)
    texts = set(task_texts(task, "Q: {question}"))
    assert texts == {
        "Q: {question}",
        *("what is 0?", "<answer>0</answer>", "what is 1?", "<answer>1</answer>", "what is ö?", "<answer>ü</answer>"),
    }
    maths = load_task(TaskConfig(name=str(path), num_heldout=1, verifiers={"default": "math"}), seed=0)
    assert {r"\boxed{0}", r"\boxed{ü}"} <= set(task_texts(maths, None))
    free = load_task(TaskConfig(name=str(path), num_heldout=1, verifiers={"default": "builtins:len"}), seed=0)
    assert {"0", "1", "ü"} <= set(task_texts(free, None))
    warn_of_lost(load_tokenizer("embedded"), task, "embedded")
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        warn_of_lost(word_level(), task, "mine")
    message = caplog.records[0].getMessage()
    assert message.startswith("entrace: policy.path: the tokenizer of mine cannot encode ")
    assert '"ö" (U+00F6), "ü" (U+00FC)' in message
    assert "\n" not in message


def test_the_first_twenty_characters_are_named():
    line = describe_lost([chr(i) for i in range(0x4E00, 0x4E00 + 23)], "mine")
    assert 'cannot encode 23 characters of the task, "一" (U+4E00), ' in line
    assert "(U+4E13), and 3 more;" in line


@pytest.mark.parametrize("character", ["\n", "\u200b"])
def test_characters_that_are_not_seen_are_named_by_their_code(character):
    assert f"task, U+{ord(character):04X};" in describe_lost([character], "mine")
    assert "\n" not in describe_lost([character], "mine")
