import pytest

from tests.style.__main__ import SHORTER, check_text, load_rules, tracked_files


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("The run goes on after that.", ["goes on"]),  # style: ignore
        ("# equal but for rounding", ["but for"]),  # style: ignore
        ("Nobody is in charge, but forests are.", []),
        ("values are standardised", ["standardised"]),  # style: ignore
        ("an otherwise precise surprise", []),
        ('    """Whether a step is captured."""', ["Whether"]),
        ('    """Return whether a step is captured."""', []),
        ('    raise ValueError("reward is no number")', ["is no number"]),  # style: ignore
        ("there is no number", []),
        ("it goes on  # style: ignore", []),
    ],
)
def test_a_phrase_is_found_where_it_counts(line, found):
    assert [each.found for each in check_text(line, "module.py", load_rules())] == found


def test_a_finding_names_file_and_line():
    (finding,) = check_text("a\nb but for c\n", "docs/page.md", load_rules())  # style: ignore
    assert str(finding) == 'docs/page.md:2: "but for": except for'  # style: ignore


def test_docstring_openings_matter_in_python_only():
    assert check_text('"""What it does."""', "page.md", load_rules()) == []


def test_the_first_line_of_a_docstring_is_short():
    first = f'    """Return {"x" * 73}'
    assert [each.suggestion for each in check_text(first, "module.py", load_rules())] == [SHORTER]
    assert check_text(first[:-1] + '"""', "module.py", load_rules()) == []
    assert check_text(f'"""w = {"x" * 73}: a method (arXiv 1707.06347)."""', "module.py", load_rules()) == []


def test_checked_files_leave_committed_reports_and_fixtures_aside():
    files = tracked_files()
    assert "README.md" in files
    assert "reports/verdicts.md" in files
    assert not [name for name in files if name.startswith(("reports/tiny-study/", "tests/fixtures/"))]
