"""Categories of tokens and defects of responses, by example."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.trace import InputError, Lexicon, find_defects


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
    ],
)
def test_category(text: str, category: str):
    assert Lexicon.load().categorize([text])[0] == category


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
