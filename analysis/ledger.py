"""Read the ledger: the claims, and the evidence for or against each."""

from __future__ import annotations

import math
import reprlib
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from entrace.analysis.effects import training
from entrace.analysis.queries import BUILT_IN, Questions
from entrace.analysis.trace.arguments import checked
from entrace.analysis.trace.errors import InputError, in_one_line, nearest, reason_of

Ledger = Mapping[str, Mapping[str, Any]]

# Keys that every claim, and every part of a claim, must have. Parts inherit those of PART_KEYS from their claim.
CLAIM_KEYS = ("question", "test", "figure", "parts")
PART_KEYS = ("statistic", "null", "unit", "direction", "smallest_effect", "limit")
# Keys that they may have as well; DECLARED are those of an effect that a user's ledger declares.
DECLARED = ("sql", "values", "over")
OTHER_CLAIM_KEYS = (*PART_KEYS, "family", "arms", "reference")
OTHER_PART_KEYS = ("figure", *DECLARED)
DIRECTIONS = ("positive", "negative")


@checked
def load_ledger(path: str | Path | None = None, questions: Questions = BUILT_IN) -> dict[str, dict[str, Any]]:
    """Return the claims by id.

    Args:
        path: A ledger; None for ``claims.toml`` beside this module, followed by the claims of ``questions``.
        questions: The questions that claims may refer to.

    Raises:
        InputError: the file is missing, is not TOML, or has no claims; a claim or part lacks a key, such as its null,
            or has an unknown one; the smallest effect or direction is not valid; or a claim is defined twice.
    """
    if path is not None:
        return _read_ledger(Path(path), questions)
    shipped = _shipped_ledger()
    if questions.ledger is None:
        return shipped
    own = _read_ledger(questions.ledger, questions)
    for claim in own:
        if claim in shipped:
            raise InputError(f"{questions.ledger}: claim {claim} is built in; choose another id")
    return {**shipped, **own}


@cache
def _shipped_ledger() -> dict[str, dict[str, Any]]:
    return _read_ledger(Path(__file__).with_name("claims.toml"), BUILT_IN)


def _read_ledger(path: Path, questions: Questions) -> dict[str, dict[str, Any]]:
    try:
        ledger = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not a ledger ({in_one_line(error)})") from None
    if not ledger:
        raise InputError(f"{path}: no claims")
    for claim, entry in ledger.items():
        _require(entry, CLAIM_KEYS, f"{path}: claim {claim}")
        _refuse_others(entry, (*CLAIM_KEYS, *OTHER_CLAIM_KEYS), f"{path}: claim {claim}")
        _require(entry["parts"], (), f"{path}: claim {claim}, parts")
        known = training.PARTS.get(claim)
        shared = {key: entry.pop(key) for key in PART_KEYS if key in entry}
        parts = entry["parts"]
        parts |= {part: {**shared, **spec} for part, spec in parts.items() if isinstance(spec, dict)}
        is_declared = any("sql" in spec for spec in parts.values() if isinstance(spec, dict))
        if known is None and "arms" not in entry and not is_declared:
            raise InputError(f'{path}: unknown claim "{claim}"{nearest(claim, training.PARTS)}')
        for part, spec in parts.items():
            name = f'{path}: claim {claim}, part "{part}"'
            _require(spec, PART_KEYS, name)
            _refuse_others(spec, (*PART_KEYS, *OTHER_PART_KEYS), name)
            _check_effect(spec, name)
            if "sql" in spec:
                _check_declared(spec, name, questions)
            elif "arms" not in entry and part not in (known or ()):
                raise InputError(f"{name}: unknown part{nearest(part, known or ())}")
        for stem in (entry["figure"], *(spec["figure"] for spec in parts.values() if "figure" in spec)):
            if stem not in questions.paths:
                raise InputError(f'{path}: claim {claim}: unknown figure "{stem}"{nearest(stem, questions.paths)}')
    return ledger


def _check_declared(spec: Mapping[str, Any], name: str, questions: Questions) -> None:
    """Refuse a declared effect that cannot be computed; see ``training.declared``."""
    _require(spec, DECLARED, name)
    if spec["sql"] not in questions.paths:
        raise InputError(f'{name}: sql: unknown question "{spec["sql"]}"{nearest(str(spec["sql"]), questions.paths)}')
    if spec["over"] not in training.SPANS:
        raise InputError(f'{name}: over: unknown value "{spec["over"]}"{nearest(str(spec["over"]), training.SPANS)}')
    values = spec["values"]
    if not (isinstance(values, list) and len(values) in (2, 4) and all(isinstance(value, str) for value in values)):
        raise InputError(f"{name}: values: expected two columns (sum, number) or four, found {values!r}")


def _check_effect(spec: Mapping[str, Any], name: str) -> None:
    smallest, direction = spec["smallest_effect"], spec["direction"]
    if isinstance(smallest, bool) or not isinstance(smallest, int | float) or not 0 <= smallest < math.inf:
        raise InputError(f"{name}: smallest_effect is {smallest!r}; expected a number, 0 or above")
    if direction not in DIRECTIONS:
        raise InputError(f'{name}: direction is {direction!r}; expected "positive" or "negative"')


def _require(entry: Any, keys: Sequence[str], name: str) -> None:
    if not isinstance(entry, dict):
        expected = f"a table with {', '.join(keys)}" if keys else "a table"
        raise InputError(f"{name}: expected {expected}; found {reprlib.repr(entry)}")
    for key in keys:
        if entry.get(key) in (None, ""):
            hint = "; it must say what the effect is compared with" if key == "null" else ""
            raise InputError(f'{name}: "{key}" is {"empty" if key in entry else "missing"}{hint}')


def _refuse_others(entry: Mapping[str, Any], known: Sequence[str], name: str) -> None:
    if unknown := next((key for key in entry if key not in known), None):
        raise InputError(f'{name}: unknown key "{unknown}"{nearest(unknown, known)}')
