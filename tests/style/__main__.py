"""Report phrases that project style rules out.

Usage: ``python -m tests.style [FILE...]``.

The phrases are in ``phrases.toml``. Without files, all text files that git tracks or would track are checked, except
committed reports and fixtures. The exit code is 1 if there are findings.
"""

from __future__ import annotations

import re
import string
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = {".py", ".md", ".toml", ".sql", ".jinja", ".yaml", ".yml"}
EXEMPT = re.compile(r"reports/[^/]+/|tests/fixtures/|tests/style/phrases.toml")
MARKER = "style: ignore"

# Openings of docstrings and the word that follows; strings of one line.
DOCSTRING = re.compile(r'^[ \t]*"""(?=\w)(?P<opening>[^\n"]{1,40})', re.MULTILINE)
# First lines of docstrings that are too long. That of a method is its entry in the list of methods, with its source.
LONG_FIRST = re.compile(r'^[ \t]*"""(?P<first>\w(?![^\n]*\((?:arXiv|this toolkit))(?:(?!""")[^\n]){79,})', re.MULTILINE)
SHORTER = "first line of a docstring: under 80 characters"
STRING = re.compile(r'"(?P<text>[^"\n]+)"')

# Lower case without a change of length, which str.lower does not promise.
LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)

Phrases = Mapping[str, str]


class Finding(NamedTuple):
    """A phrase in a line; ``line`` counts from 1."""

    path: str
    line: int
    found: str
    suggestion: str

    def __str__(self) -> str:
        """Return the finding in the form that editors follow."""
        return f'{self.path}:{self.line}: "{self.found}": {self.suggestion}'


class Rules:
    """The phrases of ``phrases.toml``, compiled."""

    def __init__(self, phrases: Mapping[str, Phrases]) -> None:
        """Compile one expression per section, with a group per phrase."""
        self._hints = {section: list(entries.values()) for section, entries in phrases.items()}
        self._patterns = {section: re.compile(_union(entries)) for section, entries in phrases.items()}

    def search(self, section: str, text: str) -> Iterator[tuple[int, int, str]]:
        """Yield start, end, and suggestion of each phrase of ``section``.

        ``text`` is in lower case.
        """
        for match in self._patterns[section].finditer(text):
            yield *match.span(), self._hints[section][int(str(match.lastgroup)[1:])]


def _union(phrases: Iterable[str]) -> str:
    # Groups inside a phrase must not count, so that lastgroup names the phrase.
    plain = (re.sub(r"(?<!\\)\((?!\?)", "(?:", phrase) for phrase in phrases)
    return r"\b(?:" + "|".join(f"(?P<p{i}>{phrase})" for i, phrase in enumerate(plain)) + r")(?![\w-])"


def check_text(text: str, path: str, rules: Rules) -> list[Finding]:
    """Return the findings in the text of one file, in order."""
    lines = text.split("\n")
    lower = text.translate(LOWER)
    spans = list(rules.search("anywhere", lower))
    if path.endswith(".py"):
        for match in DOCSTRING.finditer(lower):
            start = match.start("opening")
            found = rules.search("docstrings", match["opening"])
            spans += [(start, start + b, hint) for a, b, hint in found if a == 0]
        spans += [(*match.span("first"), SHORTER) for match in LONG_FIRST.finditer(text)]
        for match in STRING.finditer(lower):
            start = match.start("text")
            spans += [(start + a, start + b, hint) for a, b, hint in rules.search("messages", match["text"])]
    findings = []
    for start, end, hint in sorted(spans):
        number = text.count("\n", 0, start)
        if MARKER not in lines[number] and not text[start:end].isupper():
            findings.append(Finding(path, number + 1, " ".join(text[start:end].split()), hint))
    return findings


def tracked_files() -> list[str]:
    """Return the files to check, relative to the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if Path(name).suffix in SUFFIXES and not EXEMPT.match(name)]


def load_rules() -> Rules:
    """Return the rules of ``phrases.toml``."""
    return Rules(tomllib.loads(Path(__file__).with_name("phrases.toml").read_text(encoding="utf-8")))


def main(names: list[str]) -> int:
    """Print the findings in the named files, or in all; return the exit code."""
    rules = load_rules()
    findings = [
        finding
        for name in names or tracked_files()
        if (ROOT / name).is_file()
        for finding in check_text((ROOT / name).read_text(encoding="utf-8"), name, rules)
    ]
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
