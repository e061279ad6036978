"""Flatten per-token and per-response values from the layouts that trainers use.

A trainer holds values per token as one list or array per response, or as one padded array ``(B, T)`` with a mask, and
tensors of torch as well as arrays of numpy. Nothing here imports torch.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from entrace.analysis.trace.errors import InputError, in_one_line


@dataclass(frozen=True)
class Responses:
    """Hold the tokens of several responses one after the other.

    Attributes:
        ids: Token ids, (N,).
        lengths: Tokens of each response, (B,).
        mask: Places of the tokens in the padded array that they came from, (B, T) bool; None for one list per response.
    """

    ids: np.ndarray
    lengths: np.ndarray
    mask: np.ndarray | None = None

    @classmethod
    def of(cls, response_ids: Any, response_mask: Any = None) -> Responses:
        """Read token ids.

        Args:
            response_ids: One list or array per response, without padding, or a padded array ``(B, T)``.
            response_mask: For a padded array, true at the tokens of the response, ``(B, T)``.

        Raises:
            InputError: a padded array has no mask or one of another shape, a mask has gaps, or an id is not an integer.
        """
        ids = as_array(response_ids)
        if response_mask is not None:
            mask = as_array(response_mask)
            if ids is None or mask is None or ids.ndim != 2 or mask.shape != ids.shape:
                shapes = " and ".join("lists" if a is None else str(a.shape) for a in (ids, mask))
                raise InputError(f"response_mask: expected the shape (B, T) of response_ids, found {shapes}")
            rows = np.repeat(np.arange(len(mask)), mask.shape[1])
            mask = as_flags("response_mask", mask.ravel(), rows).reshape(mask.shape)
            # A response is one stretch of its row: its mask rises at most once.
            rises = (np.diff(mask.astype(np.int8), axis=1, prepend=0) == 1).sum(1)
            if (rises > 1).any():
                row = int(np.argmax(rises > 1))
                raise InputError(f"response_mask: response {row} has gaps; mark context in loss_mask instead")
            return cls(_integers(ids[mask]), mask.sum(1), mask)
        if ids is not None and ids.ndim == 2 and not isinstance(response_ids, list | tuple):
            raise InputError(
                "response_mask: missing; a padded array of response_ids needs it, a list of responses does not"
            )
        rows = [_row("response_ids", i, row) for i, row in enumerate(_rows("response_ids", response_ids))]
        flat = _integers(np.concatenate(rows)) if rows else np.empty(0, np.int64)
        return cls(flat, np.array([len(row) for row in rows], np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def rows(self) -> np.ndarray:
        """Response of each token, (N,)."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def flatten(self, name: str, values: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return values per token, (N,), and where they are unknown, (N,) bool.

        Args:
            name: Name of the values, for errors.
            values: One list or array per response; None marks an unknown value or a wholly unknown response. Or an
                array ``(B, T)``: masked like the ids, or right-padded if the ids came as lists.

        Raises:
            InputError: a length or shape differs from that of the ids.
        """
        array = None if isinstance(values, list | tuple) else as_array(values)
        if array is not None and array.ndim == 2:
            flat = self._select(name, array)
            return flat, np.zeros(len(flat), bool)
        rows = _rows(name, values)
        if len(rows) != len(self):
            raise InputError(f"{name}: {len(rows)} responses, expected {len(self)} as in response_ids")
        parts: list[np.ndarray] = []
        unknown: list[np.ndarray] = []
        for i, (row, length) in enumerate(zip(rows, self.lengths.tolist(), strict=True)):
            part = np.zeros(length) if row is None else _row(name, i, row)
            if len(part) != length:
                raise InputError(f"{name}: response {i} has {len(part)} values, expected {length} as in response_ids")
            missing = np.full(length, row is None)
            if part.dtype == object:
                missing = np.array([value is None for value in part], bool)
                part = np.where(missing, 0, part)
            parts.append(part)
            unknown.append(missing)
        if not parts:
            return np.empty(0), np.empty(0, bool)
        return np.concatenate(parts), np.concatenate(unknown)

    def _select(self, name: str, array: np.ndarray) -> np.ndarray:
        if self.mask is not None:
            if array.shape != self.mask.shape:
                raise InputError(f"{name}: shape {array.shape}, expected {self.mask.shape} as in response_ids")
            return array[self.mask]
        longest = int(self.lengths.max(initial=0))
        if len(array) != len(self) or array.shape[1] < longest:
            raise InputError(f"{name}: shape {array.shape}, expected ({len(self)}, {longest}) or wider")
        return array[np.arange(array.shape[1]) < self.lengths[:, None]]

    def is_per_token(self, values: Any) -> bool:
        """Return whether values are per token rather than per response.

        A list of lists is per token.
        """
        array = None if isinstance(values, list | tuple) else as_array(values)
        if array is not None:
            return array.ndim >= 2
        return hasattr(values, "__iter__") and any(
            hasattr(row, "__len__") and not isinstance(row, str) and np.ndim(row) > 0 for row in values
        )


def as_array(values: Any) -> np.ndarray | None:
    """Return an array or tensor as an array of numpy; None for lists and others."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        # Numpy has no bfloat16.
        values = (values.float() if values.is_floating_point() and values.element_size() < 4 else values).numpy()
    return values if isinstance(values, np.ndarray) else None


def as_list(values: Any) -> list[Any]:
    """Return the elements of a list, array, or tensor, numbers as numbers of Python."""
    array = as_array(values)
    if array is not None:
        return array.tolist()
    return [value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value for value in values]


def as_flags(name: str, flat: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return Booleans per token, (N,).

    Args:
        name: Name of the values, for errors.
        flat: Booleans, or numbers that are 0 or 1, (N,).
        rows: Response of each value, (N,), in ascending order.

    Raises:
        InputError: a value is neither a Boolean nor 0 or 1.
    """
    if flat.dtype.kind in "biuf":
        bad = np.flatnonzero((flat != 0) & (flat != 1))
    else:
        bad = np.array([i for i, value in enumerate(flat) if not is_flag(value)], np.int64)
    if len(bad):
        row = rows[bad[0]]
        place = f"response {row}, position {bad[0] - np.searchsorted(rows, row)}"
        raise InputError(f"{name}: {reprlib.repr(flat[bad].tolist()[0])} at {place}, expected true or false")
    return flat == 1


def is_flag(value: Any) -> bool:
    """Return whether a value is a Boolean, or a number that is 0 or 1."""
    return isinstance(value, int | float | np.number | np.bool_) and value in (0, 1)


def _rows(name: str, values: Any) -> Sequence[Any]:
    array = as_array(values)
    if array is not None and array.ndim in (1, 2):
        return list(array)
    if array is not None or isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        raise InputError(f"{name}: expected one list per response or an array (B, T), found {type(values).__name__}")
    return values


def _row(name: str, i: int, row: Any) -> np.ndarray:
    array = as_array(row)
    if array is None:
        try:
            array = np.asarray(row if len(row) else np.empty(0, np.int64))
            if array.dtype.kind == "f" and None in row:
                array = np.asarray(row, object)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name}: response {i} is not a list of numbers ({in_one_line(error)})") from None
    if array.ndim != 1 or array.dtype.kind not in "biufO":
        raise InputError(f"{name}: response {i} is not a list of numbers")
    return array


def _integers(ids: np.ndarray) -> np.ndarray:
    if ids.dtype.kind not in "iu":
        raise InputError(f"response_ids: token ids must be integers, found {ids.dtype}")
    return ids.astype(np.int64)
