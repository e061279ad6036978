"""Check the values of a row."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from entrace.analysis.importers.row_files import BadRowError, kind_of, text_of
from entrace.analysis.trace.plain import well_formed

MAX_INT = 2**31 - 1
# Largest vocabulary without a tokenizer; the trace has an entry for each id up to the largest.
MAX_VOCABULARY = 1 << 20
# Products of larger numbers may overflow float32.
MAX_NUMBER = 1e30
# Rounding of other trainers' softmax may put a logprob slightly above 0.
MAX_LOGPROB = 1e-3
# Some JSON writers store the Booleans and numbers of other libraries as text.
FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
NUMBER = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*", re.ASCII)
# Text that verifiers write if they find no answer: verl's [INVALID], lm-eval's [invalid].
NO_ANSWER = re.compile(r"\s*(?:\[(?:invalid|(?:invalid|no)[ _-]?answer)\]\s*)?", re.IGNORECASE)
# Reasons for which engines stop at the length limit.
LENGTH_REASONS = {"length", "max_tokens", "max_length"}


def number_of(value: Any, key: str) -> float:
    """Return a finite number, which may be text."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)
    if not isinstance(value, int | float | Decimal):
        raise BadRowError(f'"{key}" is {kind_of(value)}, expected a number')
    # Also false for NaN.
    if not abs(value) <= MAX_NUMBER:
        raise BadRowError(f'"{key}" is {reprlib.repr(value)}, expected a finite number up to {MAX_NUMBER:g}')
    return float(value)


def flag_of(value: Any, key: str, field: str = "") -> bool:
    """Return a Boolean, which may be written as text.

    ``field`` names an optional field for the error message.
    """
    if (flag := FLAGS.get(str(value).strip().lower())) is None:
        remedy = f"; ignore it with --field {field}=" if field else ""
        raise BadRowError(f'"{key}" is {reprlib.repr(value)}, expected true or false{remedy}')
    return flag


def step_of(value: Any, key: str) -> int:
    """Return an integer, which may be text or have a decimal point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not 0 <= number <= MAX_INT:
        raise BadRowError(f'"{key}" is {reprlib.repr(value)}, expected an integer from 0 to {MAX_INT}')
    return number


def group_of(value: Any, key: str) -> str | int:
    """Return the identifier of a group."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        found = reprlib.repr(value) if isinstance(value, float) else kind_of(value)
        raise BadRowError(f'"{key}" is {found}, expected text or an integer')
    return value


def answer_of(value: Any) -> str | None:
    """Return an answer as text; None if blank, NaN, or marked as missing."""
    is_nan = isinstance(value, float) and math.isnan(value)
    return None if is_nan or (isinstance(value, str) and NO_ANSWER.fullmatch(value)) else plain_text(value)


def plain_text(value: Any) -> str | None:
    """Return text unchanged, None if it is empty, and other values as JSON."""
    if value is None or isinstance(value, str):
        return well_formed(value) if value else None
    return json.dumps(value, default=str)


def truncated_of(value: Any) -> bool | None:
    """Return whether a response stopped at the length limit.

    The result is None if its finish reason does not say.
    """
    if not isinstance(value, str) or value in ("", "abort", "error"):
        return None
    return value.lower() in LENGTH_REASONS


def response_text(value: Any, key: str) -> str:
    """Return text, given as such or as a list of one assistant turn."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value, key = value[0].get("content"), f"{key}.content"
    if not isinstance(value, str):
        raise BadRowError(f'"{key}" is {kind_of(value)}, expected text or one turn of the assistant')
    # A policy may sample nothing but white space.
    return text_of(value, f'"{key}"') if value.strip() else value


def ids_of(value: Any, key: str, size: int | None) -> list[int]:
    """Return token ids below ``size``, the size of the vocabulary if it is known."""
    if not isinstance(value, list):
        raise BadRowError(f'"{key}" is {kind_of(value)}, expected a list of token ids')
    if not value:
        raise BadRowError(f'"{key}" is empty')
    limit = MAX_VOCABULARY if size is None else size
    for place, token in enumerate(value):
        if type(token) is not int or not 0 <= token < limit:
            raise BadRowError(
                f'"{key}" holds {reprlib.repr(token)} at index {place}, expected a token id from 0 to {limit - 1}'
            )
    return value


def mask_of(given: Mapping[str, Any], keys: Mapping[str, str], num_prompt: int, num_response: int) -> list[bool] | None:
    """Return which tokens of a response were generated, or None if all were.

    The mask may also cover the prompt.
    """
    if "loss_mask" not in keys:
        return None
    value, key = given["loss_mask"], keys["loss_mask"]
    if not isinstance(value, list):
        raise BadRowError(f'"{key}" is {kind_of(value)}, expected a list of 0 and 1')
    for place, mark in enumerate(value):
        if not isinstance(mark, int | float) or mark not in (0, 1):
            raise BadRowError(f'"{key}" holds {reprlib.repr(mark)} at index {place}, expected 0 or 1')
    mask = [bool(mark) for mark in value]
    if "response_ids" not in keys:
        if all(mask):
            return None
        raise BadRowError(f'"{key}" excludes tokens of a text; add "response_ids" to identify them')
    if len(mask) == num_prompt + num_response and not any(mask[:num_prompt]):
        mask = mask[num_prompt:]
    if len(mask) != num_response:
        raise BadRowError(f'"{key}" has {len(mask)} entries, "{keys["response_ids"]}" has {num_response}')
    if not any(mask):
        raise BadRowError(f'"{key}" excludes every token of the response')
    return None if all(mask) else mask


def floats_of(
    value: Any, key: str, num_prompt: int, num_response: int, *, low: float = -MAX_NUMBER, high: float = MAX_NUMBER
) -> list[float | None]:
    """Return one number or None per token of a response.

    The list may also cover the prompt.

    Raises:
        BadRowError: the length differs, or a value is not a finite number in [``low``, ``high``].
    """
    values = _per_token(value, key, num_prompt, num_response)
    for place, entry in enumerate(values):
        is_number = isinstance(entry, int | float) and not isinstance(entry, bool)
        if entry is not None and not (is_number and low <= entry <= high):
            expected = "a finite number" if high == MAX_NUMBER else f"a number up to {high:g}"
            expected = "a number of at least 0" if low == 0 else expected
            raise BadRowError(f'"{key}" holds {reprlib.repr(entry)} at index {place}, expected {expected} or null')
    return [None if entry is None else float(entry) for entry in values]


def integers_of(value: Any, key: str, num_prompt: int, num_response: int) -> list[int | None]:
    """Return one integer or None per token of a response.

    The value has one integer per token, or is one integer for all.
    """
    if type(value) is int:
        value = [value] * num_response
    values = _per_token(value, key, num_prompt, num_response)
    for place, entry in enumerate(values):
        if entry is not None and (type(entry) is not int or not 0 <= entry <= MAX_INT):
            raise BadRowError(f'"{key}" holds {reprlib.repr(entry)} at index {place}, expected an integer or null')
    return list(values)


def _per_token(value: Any, key: str, num_prompt: int, num_response: int) -> Sequence[Any]:
    if not isinstance(value, list):
        raise BadRowError(f'"{key}" is {kind_of(value)}, expected one number per token')
    if len(value) == num_prompt + num_response:
        return value[num_prompt:]
    if len(value) != num_response:
        raise BadRowError(f'"{key}" has {len(value)} entries, the response has {num_response} tokens')
    return value


def components_of(value: Any, key: str) -> list[tuple[str, float]] | None:
    """Return the scores of the reward functions by name.

    A function that gave no score is left out. The result is None if none gave one.
    """
    if not isinstance(value, Mapping):
        raise BadRowError(f'"{key}" is {kind_of(value)}, expected an object of numbers by name')
    scores = [(str(name), number_of(score, f"{key}.{name}")) for name, score in value.items() if score is not None]
    return scores or None
