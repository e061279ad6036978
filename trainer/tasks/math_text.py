r"""Find the answer in a text, and rewrite it for math-verify.

math-verify remains the parser. These rules rewrite notation that it cannot parse (Unicode, thin spaces, ``3 1/4``) or
misreads (``52_8`` as 52, ``8\,178`` as 8 + 178), in ground truths and answers alike.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from entrace.trainer.tasks.prompt import find_boxes

# Text between two boxes of one answer: separators, "and", "or", the name of the next unknown, math delimiters.
BETWEEN = re.compile(
    r"""(?:[\s,;$&]|\*\*|\\[()\[\],;:! \\]|\\q?quad\b|\b(?:and|or)\b|\\text\s*\{[\s,;]*(?:and|or)?[\s,;]*\}
    |\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?(?:\(\w+\))?\s*=)*+""",
    re.VERBOSE,
)
# GSM8K marks an answer this way, and Markdown a heading.
HASH_LINE = re.compile(r"^[ \t]*####(?!#)[ \t]*(\S.*)$", re.MULTILINE)
WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{2,}")

# Characters without meaning at the end of an answer. A lone backslash remains after "\ " was stripped.
PUNCTUATION = " \t\r\n.,;:~\\"
MATH_PAIRS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
MATH_WRAPPER = re.compile(
    r"(?:\\(?:boxed|fbox|mathbf|boldsymbol|bm|displaystyle|textcolor\s*\{\w+\})\s*)?\{"
    r"|\\(?:displaystyle|textstyle|bf|rm|it|large|Large)(?![A-Za-z])"
)
TEXT_WRAPPER = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mbox)\s*\{")

SYMBOLS = {
    **dict.fromkeys("−–‒—―﹣", "-"),
    **dict.fromkeys("⋅·∙•", r"\cdot "),
    **dict.fromkeys("\u2009\u202f\u200a\u2006\u2008", r"\,"),
    **{"×": r"\times ", "÷": r"\div ", "∞": r"\infty ", "±": r"\pm ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne "},
    **{"⩽": r"\le ", "⩾": r"\ge ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in "},
    **{"√": r"\surd ", "∛": r"\surd[3]", "∜": r"\surd[4]", "°": r"^\circ ", "º": r"^\circ ", "∘": r"\circ "},
    **{"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}"},
    **{"٫": ".", "٬": ",", "。": ".", "、": ",", "⁄": "/", "∕": "/", "′": "'"},
}
GREEK_CAPITALS = {"Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega"}

THIN = r"(?:\\[,!]|\\thinspace\s*|\{\\,\})"
WIDE = r"(?:\\[;: ]|~| )"
GROUPED = re.compile(
    rf"(?<![\d.^_])(?:\d{{1,3}}(?:{THIN}\d{{2,3}}){{0,9}}{THIN}\d{{3}}|\d{{1,3}}(?:{WIDE}\d{{3}}){{1,9}})(?!\d)"
)
DECIMALS = re.compile(rf"\.\d{{3}}(?:{THIN}\d{{1,3}}){{1,9}}")
SEPARATOR = re.compile(f"{THIN}|{WIDE}")
SPACE = re.compile(r"(?<!\\)(?:\\[,;: ]|\\(?:q?quad|thinspace|medspace|thickspace)(?![A-Za-z])|~(?!=))")
NEGATIVE_SPACE = re.compile(r"(?<!\\)\\!")
# Digits of one argument each, as TeX reads them.
TWO_DIGITS = re.compile(r"\\([dtc]?frac|[dt]?binom)\s*(\d)\s*(\d)")
MIXED = re.compile(
    # The whole number of 1,234 1/2 is not 234.
    rf"(?<![\w./^_}})\\])(?:(?<!\d,)|(?!\d{{3}}(?!\d)))(\d{{1,9}})(?:(?:{THIN}|{WIDE})+([1-9]\d{{0,8}})"
    rf" */ *(\d{{1,9}})(?![\w/(^]|\.\d)|(?:{THIN}|{WIDE})*\\[dtc]?frac\{{(\d{{1,9}})\}}\{{(\d{{1,9}})\}})"
)
# A period after digits, without decimals.
BARE_POINT = re.compile(r"(?<=\d)\.(?![\d.\\])")
ONLY_NUMBERS = re.compile(r"((?:.*=)?\s*)(-?\d+(?:\.\d+)?(?: +-?\d+(?:\.\d+)?)++)")
DEGREES = re.compile(
    r"\s*(?:\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![A-Za-z]))|\\(?:text)?degree(?![A-Za-z]))"
    r"(?:\s*(?:\\(?:text|mathrm)\s*\{\s*[CF]\s*\}|[CF]\b))?"
)
INFINITY = re.compile(
    r"\\(?:text|mathrm|operatorname)\s*\{\s*(positive|negative|plus|minus|[+-])?\s*infinity\s*\}"
    r"|(?<![A-Za-z\\])(positive|negative|plus|minus|[+-])?\s*infinity(?![A-Za-z])",
    re.IGNORECASE,
)
EMPTY_SET = re.compile(r"\\(?:varnothing|O)(?![A-Za-z])|\\\{\s*\\\}")
ROOT = re.compile(r"(?:\\surd|(?<![\\A-Za-z])sqrt|\\sqrt(?=\s*[(\\]))(?![A-Za-z])\s*(\[\d+\])?\s*")
ROOT_OF = re.compile(r"\\root\s*\{?(\w)\}?\s*\\of\s*(\w)|\\sqrt\s*\[(\w+)\]\s*(\w)")
RADICAND = re.compile(r"\d+(?:\.\d+)?|\\[dtc]?frac\{[^{}]*\}\{[^{}]*\}|\\(?!surd|sqrt)[A-Za-z]+|[A-Za-z]")
BRACKET = re.compile(r"\\.|[(){}]", re.DOTALL)
REPEATING = re.compile(r"(?<![\d.])(\d{0,9})\.(\d{0,9})\\(?:overline|bar|dot)\s*\{(\d{1,9})\}")
BASE_NAMES = "two three four five six seven eight nine ten eleven twelve sixteen"
BASE_WORDS: dict[str, int] = dict(zip(BASE_NAMES.split(), (*range(2, 13), 16), strict=True))
BASED = re.compile(
    r"(?<![\w.\\}^])(?:\(\s*(\d[\dA-Z.]*)\s*\)|(?:\\(?:text|mathrm)\s*)?\{\s*(\d[\dA-Z.]*)\s*\}|(\d[\dA-Z.]*))\s*"
    r"(?:_\s*(\d+|(?:\\(?:text|mathrm)\s*)?\{(?:[^{}]|\{[^{}]*\})*\})"
    r"|(?:\\text\s*\{)?[\s(]*base[ -]*\}?\s*(\w+)(?:\s*\)?\s*\})?)"
)

BASED_NAME = re.compile(r"b_\{([\dA-Zp]+)x(\d+)\}")


def find_answer(completion: str) -> str | None:
    r"""Return the last answer in a box or a line ``#### 42``, or None.

    Boxes separated only by separators are one answer, joined by commas: ``\boxed{2} and \boxed{3}`` is ``2, 3``. After
    other words, such as "wait", a box replaces earlier ones. A line with words after ``####`` is a heading, unless it
    ends the text.
    """
    found: list[str] = []
    end = -1
    for box in find_boxes(completion):
        if _is_blank(box.content):
            continue
        if not (found and BETWEEN.fullmatch(completion, end, box.start)):
            found = []
        if box.content not in found:
            found.append(box.content)
        end = box.end
    lines = [line for line in HASH_LINE.finditer(completion, max(end, 0)) if not _is_blank(line[1])]
    answers = [line for line in lines if not WORD.search(line[1])]
    if not answers and lines and _is_blank(completion[lines[-1].end() :]):
        answers = lines
    return answers[-1][1].strip() if answers else ", ".join(found) or None


def _is_blank(text: str) -> bool:
    """Return True if a text has only white space and punctuation, of any script."""
    return not _to_ascii(text).strip(PUNCTUATION)


@lru_cache(maxsize=4096)
def normalize(answer: str) -> str:
    """Return the answer rewritten for math-verify.

    Final punctuation and wrappers of the whole are removed.
    """
    return BARE_POINT.sub("", _strip(rewrite(_strip(_to_ascii(answer))))).strip(" ")


def normalize_formulas(text: str) -> str:
    """Return a text with its formulas rewritten for math-verify.

    The period that ends a formula is removed.
    """
    text = _to_ascii(text).rstrip(PUNCTUATION)
    return rewrite(re.sub(r"(?<!\.)\.++(?=\s*(?:[$}]|\\\)|\\\]))", "", text))


def rewrite(text: str) -> str:
    """Replace all notation that math-verify cannot parse or misreads."""
    text = MIXED.sub(_add_mixed, TWO_DIGITS.sub(r"\\\1{\2}{\3}", text))
    for pattern in (GROUPED, DECIMALS):
        text = pattern.sub(lambda match: SEPARATOR.sub("", match[0]), text)
    text = SPACE.sub(" ", NEGATIVE_SPACE.sub("", text))
    text = REPEATING.sub(_add_repeating, text)
    text = DEGREES.sub("", text)
    text = INFINITY.sub(_sign_infinity, text)
    text = EMPTY_SET.sub(r"\\emptyset", text)
    text = ROOT_OF.sub(lambda match: rf"\sqrt[{match[1] or match[3]}]{{{match[2] or match[4]}}}", text)
    text = BASED.sub(_name_based, _brace_roots(text))
    # math-verify would add adjacent numbers.
    if match := ONLY_NUMBERS.fullmatch(text):
        text = match[1] + ", ".join(match[2].split())
    return text


def restore(answer: str) -> str:
    """Restore numbers in other bases in an answer of ``rewrite``.

    For example, ``b_{52x8}`` becomes ``52_{8}``.
    """
    return BASED_NAME.sub(lambda match: f"{match[1].replace('p', '.')}_{{{match[2]}}}", answer)


def count_words(text: str) -> int:
    """Return the number of words of two or more letters, without LaTeX commands."""
    return len(WORD.findall(text))


def _to_ascii(text: str) -> str:
    return text if text.isascii() else re.sub(r"[^\x00-\x7f]+", _convert_run, text)


def _convert_run(match: re.Match[str]) -> str:
    # Adjacent superscripts are one exponent.
    return re.sub(r"\}[\^_]\{", "", "".join(map(_convert, match[0])))


@lru_cache(maxsize=4096)
def _convert(char: str) -> str:
    """Return the ASCII or LaTeX equivalent of a character, else the character itself."""
    if char.isascii():
        return char
    if char in SYMBOLS:
        return SYMBOLS[char]
    if (digit := unicodedata.decimal(char, None)) is not None:
        return str(digit)
    category = unicodedata.category(char)
    if category in ("Cf", "Zs", "Zl", "Zp"):
        return "" if category == "Cf" else " "
    kind, *codes = unicodedata.decomposition(char).split() or [""]
    if kind.startswith("<"):
        plain = "".join(_convert(chr(int(code, 16))) for code in codes)
        # The space before a fraction makes a mixed number with preceding digits.
        return {"<super>": f"^{{{plain}}}", "<sub>": f"_{{{plain}}}", "<fraction>": f" {plain}"}.get(kind, plain)
    if name := re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", unicodedata.name(char, "")):
        letter = name[2].lower().replace("lamda", "lambda")
        if name[1] == "SMALL" and letter != "omicron":
            return rf"\{letter} "
        if letter.capitalize() in GREEK_CAPITALS:
            return rf"\{letter.capitalize()} "
    return char


def _strip(text: str) -> str:
    r"""Remove wrappers such as ``$...$``, and final punctuation.

    ``\text{...}`` is removed around digits and non-ASCII words.
    """
    before = None
    while text != before:
        before = text
        text = _unwrap(_strip_end(text).lstrip(" \t\r\n~"))
    return text


def _strip_end(text: str) -> str:
    """Remove final punctuation and spacing, also inside braces that close at the end."""
    before = None
    while text != before:
        before = text
        text = text.rstrip(PUNCTUATION)
        for command in ("quad", "qquad", "thinspace", "medspace", "thickspace"):
            text = text.removesuffix(rf"\{command}")
        text = text.removesuffix(r"\!")
        closed = text.rstrip("}")
        if closed != text and not closed.endswith("\\"):
            text = closed.rstrip(" .,;:") + text[len(closed) :]
    return text


def _unwrap(text: str) -> str:
    for start, end in MATH_PAIRS:
        inner = text[len(start) : -len(end)]
        if len(text) > len(start + end) and text.startswith(start) and text.endswith(end) and start not in inner:
            return inner
    if (match := MATH_WRAPPER.match(text)) and not match[0].endswith("{"):
        return text[match.end() :]
    match = match or TEXT_WRAPPER.match(text)
    if match and _match_brackets(text).get(match.end() - 1) == len(text) - 1:
        inner = text[match.end() : -1]
        # ASCII words stay text: as a formula, they would be products of letters.
        if not TEXT_WRAPPER.match(text) or re.search(r"\d", inner) or not inner.isascii():
            return inner
    return text


def _match_brackets(text: str) -> dict[int, int]:
    """Return the position of the closing partner of each opening bracket with one.

    Brackets are parentheses and braces.
    """
    opened: dict[str, list[int]] = {"(": [], "{": []}
    closed: dict[int, int] = {}
    for match in BRACKET.finditer(text):
        if match[0] in opened:
            opened[match[0]].append(match.start())
        elif match[0] in (")", "}") and (stack := opened["(" if match[0] == ")" else "{"]):
            closed[stack.pop()] = match.start()
    return closed


def _brace_roots(text: str) -> str:
    """Put the radicand of each root, such as ``√2`` or ``sqrt(x+1)``, in braces."""
    closed = _match_brackets(text)
    edits: list[tuple[int, int, str]] = []
    for match in ROOT.finditer(text):
        start = match.end()
        if (end := closed.get(start)) is not None:
            edits += [(match.start(), start + 1, rf"\sqrt{match[1] or ''}{{"), (end, end + 1, "}")]
        elif radicand := RADICAND.match(text, start):
            edits += [(match.start(), start, rf"\sqrt{match[1] or ''}{{"), (radicand.end(), radicand.end(), "}")]
    parts, position = [], 0
    for start, end, replacement in sorted(edits):
        parts += [text[position:start], replacement]
        position = end
    return "".join([*parts, text[position:]])


def _add_mixed(match: re.Match[str]) -> str:
    whole, numerator, denominator = (int(number) for number in match.groups() if number)
    return rf"\frac{{{whole * denominator + numerator}}}{{{denominator}}}" if numerator < denominator else match[0]


def _add_repeating(match: re.Match[str]) -> str:
    whole, digits, period = match.groups()
    scale = 10 ** len(digits)
    numerator = (int(whole or 0) * scale + int(digits or 0)) * (10 ** len(period) - 1) + int(period)
    return rf"\frac{{{numerator}}}{{{scale * (10 ** len(period) - 1)}}}"


def _sign_infinity(match: re.Match[str]) -> str:
    sign = (match[1] or match[2] or "").lower()
    return {"": "", "+": "+", "positive": "", "plus": ""}.get(sign, "-") + r"\infty"


def _name_based(match: re.Match[str]) -> str:
    """Return a number in a base other than ten as a symbol, which equals only itself."""
    number = next(filter(None, match.groups()[:3]))
    name = re.sub(r"\\[a-z]+|\bbase\b|\W", "", match[4] or match[5]).lower()
    base = BASE_WORDS.get(name) or (int(name) if re.fullmatch(r"\d{1,3}", name) else None)
    digits = number.replace(".", "")
    if base is None or (not digits.isdigit() and not all(int(digit, 36) < base for digit in digits)):
        return match[0]
    return number if base == 10 and digits.isdigit() else f"b_{{{number.replace('.', 'p')}x{base}}}"
