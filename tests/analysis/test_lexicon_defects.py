"""Test token categories and defects of responses."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrace.analysis.trace import InputError, Lexicon, find_defects
from entrace.analysis.trace.defects import ALPHABETIC, FORMAL_SIGN, STOP_WORDS, WORD, is_irrelevant, is_repetitive


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("7", "formal_reasoning"),
        ("12.5", "formal_reasoning"),
        (" +", "formal_reasoning"),
        ("x", "formal_reasoning"),
        ("Ġequals", "formal_reasoning"),
        ("▁So", "logical_structuring"),
        ("because", "logical_structuring"),
        (" wait", "metacognitive"),
        ("dog", "semantic_support"),
        ("a", "semantic_support"),
        ("I", "semantic_support"),
        (",", "semantic_support"),
        ("<eos>", "special"),
        ("</answer>", "special"),
        ("", "special"),
        ("Ċ", "special"),
        ("ĊĊĠĠ", "special"),
        ("[PAD]", "special"),
        ("<|im_end|>", "special"),
        ("\ufffd", "special"),
        (".ĠSo", "logical_structuring"),
        (", wait", "metacognitive"),
        ("Hmm", "metacognitive"),
        (r"\frac", "formal_reasoning"),
        ("Ġ\\(", "formal_reasoning"),
        ("):", "formal_reasoning"),
        ("==", "formal_reasoning"),
        ("**", "semantic_support"),
        ("-----", "semantic_support"),
        ("aturday", "semantic_support"),
    ],
)
def test_category(text: str, category: str):
    assert Lexicon.load().categorize([text])[0] == category


@pytest.mark.parametrize(
    ("text", "is_special", "category"),
    [
        ("[INST]", True, "special"),
        ("<｜end▁of▁sentence｜>", True, "special"),
        ("7", True, "special"),
        ("[INST]", False, "semantic_support"),
        ("<b>", False, "semantic_support"),
        ("</answer>", False, "special"),
        ("</div>", False, "semantic_support"),
        (" answer", False, "semantic_support"),
        ("system", False, "semantic_support"),
        ("<0xF0>", False, "special"),
        (" <0xF0><0x9F>", False, "special"),
        ("<0xf0>", False, "semantic_support"),
        ("\ufffd", False, "special"),
        (" \n", False, "special"),
        ("==", False, "formal_reasoning"),
        (" wait", False, "metacognitive"),
    ],
)
def test_category_where_the_tokenizer_marks_special_tokens(text: str, is_special: bool, category: str):
    assert list(Lexicon.load().categorize([text], [is_special])) == [category]


@pytest.mark.parametrize(
    ("content", "message"),
    [("logic = ['so']", 'unknown category "logic"'), ("= 1", "not TOML"), (None, "no such lexicon")],
)
def test_lexicon_that_cannot_be_used(tmp_path: Path, content: str | None, message: str):
    path = tmp_path / "lexicon.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        Lexicon.load(path)


def test_own_lexicon(tmp_path: Path):
    path = tmp_path / "lexicon.toml"
    path.write_text('metacognitive = ["dog"]')
    assert list(Lexicon.load(path).categorize([" Dog", "wait"])) == ["metacognitive", "semantic_support"]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("3 + 4 = 7, so <answer>7</answer>", []),
        ("so 7 so 7 so 7 so 7", ["repetition"]),
        ("one two three one two three one two three", ["repetition"]),
        ("7 7 7", []),
        ("1 1 1 1 1 1", ["repetition"]),
        ("The weather outside looks lovely today. 3 + 4 = 7.", ["irrelevant"]),
        ("My dog barked loudly yesterday evening.", ["irrelevant"]),
        ("The marbles are counted.", []),
        ("", []),
    ],
)
def test_defects_by_text(completion: str, expected: list[str]):
    found = find_defects("How many marbles are 3 + 4?", completion, has_answer=True, is_truncated=False)
    assert found == expected


def test_defects_known_from_outside_the_text():
    assert find_defects("1 + 1", "2", has_answer=False, is_truncated=True) == ["format_violation", "truncated"]


def repeats_naively(words: list[str]) -> bool:
    for block in range(1, len(words) // 3 + 1):
        for start in range(len(words) - 3 * block + 1):
            times = 1
            while words[start + times * block : start + (times + 1) * block] == words[start : start + block]:
                times += 1
            if times >= 3 and times * block >= 6:
                return True
    return False


def test_repetition_equals_the_naive_search() -> None:
    rng = random.Random(0)
    texts = [[rng.choice("abc") for _ in range(rng.randint(0, 24))] for _ in range(3000)]
    expected = [repeats_naively(words) for words in texts]
    assert 100 < sum(expected) < 2900
    assert [is_repetitive(" ".join(words)) for words in texts] == expected


# Words that become equal or empty without letters other than a, sentence ends, and separators of all kinds.
PIECES = st.sampled_from(["a", "bc", "my", "dog", "Dog", "an", "sum", "don't", "é", "x²", "7", "77", *"'+=.!?,"])
SPACES = st.sampled_from(["", " ", " ", "  ", "_", "\n", "\n\n", ". ", "\x1c", "\u00a0", "\t", "\r\n"])
BLOCKS = st.lists(st.tuples(PIECES, SPACES), min_size=1, max_size=6)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Draw blocks of words, some repeated.

    Gaps may differ between repeats. Half of the texts are ASCII.
    """
    written = []
    for block in draw(st.lists(BLOCKS, max_size=5)):
        for _ in range(draw(st.integers(1, 6))):
            gap = draw(st.none() | SPACES)
            written += [word + (space if gap is None else gap) for word, space in block]
    text = "".join(written)
    return text if draw(st.booleans()) else text.encode("ascii", "ignore").decode()


@settings(max_examples=200, deadline=None)
@given(texts())
def test_the_fast_search_for_repetition_equals_the_definition(text: str) -> None:
    assert is_repetitive(text) == repeats_naively(WORD.findall(text.lower()))


LEXICON_WORDS = set(Lexicon.load().words)


def is_irrelevant_plainly(prompt: str, text: str) -> bool:
    words_of_prompt = set(ALPHABETIC.findall(prompt.lower())) - STOP_WORDS
    on_subject = words_of_prompt | LEXICON_WORDS
    sentences = [part for part in re.split(r"(?<=[.!?])\s+|\n+", text.lower()) if not FORMAL_SIGN.search(part)]
    words = [ALPHABETIC.findall(sentence) for sentence in sentences]
    off = sum(len(found) for found in words if len(found) >= 3 and on_subject.isdisjoint(found))
    return off > 0 and off >= 0.25 * len(ALPHABETIC.findall(text.lower()))


@settings(max_examples=200, deadline=None)
@given(texts())
def test_the_fast_search_for_irrelevant_text_equals_the_definition(text: str) -> None:
    assert is_irrelevant("Is my dog old?", text) == is_irrelevant_plainly("Is my dog old?", text)
