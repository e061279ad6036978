import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from entrace.trainer.tasks.normalize import IGNORABLE, normalize_text

SAME = [
    "What is 2 + 3?",
    "What is 2 + 3? ",
    "\n\tWhat  is 2 +\r\n3?",
    "What\u00a0is\u20092\u202f+\u30003?",
    "What\u2028is 2 +\u0085 3?",
    "\ufeffWhat is 2 + 3?",
    "Wh\u200bat is\u200d 2\u2060 + 3?\u200e",
    "What i\u00ads 2 + 3?",
    "What is 2 + 3?\ufe0f",
    "What is \uff12 \uff0b 3\uff1f",
    "\U0001d54e\u210eat is \u00b2 + 3?",
]
OTHERS = ["what is 2 + 3?", "What is 2 + 4?", "What is 2+3?", "What is 2 + 3", "What is 23?"]


@pytest.mark.parametrize("text", SAME)
def test_texts_that_look_alike_are_equal(text):
    assert normalize_text(text) == "What is 2 + 3?"


@pytest.mark.parametrize("text", OTHERS)
def test_texts_that_read_otherwise_are_not(text):
    assert normalize_text(text) == text != "What is 2 + 3?"


def test_composed_and_decomposed_letters_are_equal():
    assert normalize_text("cafe\u0301") == normalize_text("caf\u00e9") == "caf\u00e9"
    assert normalize_text("cafe\u200b\u0301") == "caf\u00e9"
    assert normalize_text("\u1112\u1161\u11ab") == normalize_text("\ud55c") == "\ud55c"
    assert normalize_text("\ufb01nd") == "find"


def test_blank_text_is_empty():
    assert normalize_text(" \u00a0\u200b\ufeff\n") == ""


SPACES = st.text("\t\n\r\x0b\x0c \u0085\u00a0\u1680\u2003\u2028\u202f\u3000", min_size=1, max_size=3)
INVISIBLE = st.text("\u00ad\u034f\u200b\u200c\u200d\u200e\u2060\u3164\ufe0f\ufeff\uffa0\U000e0020", max_size=3)


@given(st.text())
@example("\u00b4\u00a8 \u3164a\u0301\uffa0\u0323")
def test_normalizing_twice_changes_nothing(text):
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert not IGNORABLE.search(once)
    assert once.split() == (once.split(" ") if once else [])


@given(st.text(), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_forms_of_unicode_are_equal(text, form):
    visible = IGNORABLE.sub("", text)
    assert normalize_text(unicodedata.normalize(form, visible)) == normalize_text(text)


@given(st.lists(st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1), min_size=1), st.data())
def test_the_kind_and_width_of_spaces_and_invisible_characters_do_not_count(words, data):
    spaced = "".join(
        data.draw(INVISIBLE) + word + data.draw(INVISIBLE) + data.draw(SPACES) + data.draw(INVISIBLE) for word in words
    )
    assert normalize_text(data.draw(SPACES) + spaced) == normalize_text(" ".join(words))


@given(st.lists(st.text("abAB123+-=?", min_size=1, max_size=4), min_size=1, max_size=6))
def test_plain_words_stay_as_they_are(words):
    assert normalize_text(" ".join(words)) == " ".join(words)
