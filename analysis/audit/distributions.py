"""Summarize a model's logits for values at any temperature and truncation.

The values follow from this summary without the logits.

For logits z with max z = 0, temperature T, b = 1 / T, and token o, in nats::

    L(b)    = ln sum_v exp(b z_v)
    logprob = b z_o - L(b)
    entropy = L(b) - b L'(b)

L' is the mean and L'' the variance of z under softmax(b z). L, L', and L'' at a few temperatures determine the values
in between by cubic Hermite interpolation in ln T. A truncation keeps the n likeliest entries of mass S, and gives
logprob - ln S; n and S follow from the largest logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

# Temperatures at which a pass computes L, L', and L'': 0.25 to 4, eight per octave.
TEMPERATURES = tuple(float(2 ** (i / 8)) for i in range(16, -17, -1))
NODES = -np.log(TEMPERATURES)
# Largest logits that are kept per token.
NUM_TOP = 128
TOP_P, TOP_K, MIN_P = "top-p", "top-k", "min-p"


@dataclass(frozen=True)
class Truncation:
    """Restrict sampling to a part of the vocabulary.

    Attributes:
        kind: ``TOP_P``, ``TOP_K``, or ``MIN_P``.
        limit: Mass, number of entries, or probability relative to the largest.
    """

    kind: str
    limit: float

    def __str__(self) -> str:
        return f"{self.kind} {self.limit:.3g}"


@dataclass(frozen=True)
class Distributions:
    """Hold the distributions of a model at N tokens.

    Logits have the largest of their distribution subtracted.

    Attributes:
        top: Largest logits, descending, (N, ``NUM_TOP`` or the vocabulary).
        own: Logit of the token, (N,).
        rank: Number of larger logits, (N,).
        following: Logit of the token in the distribution of the next token, (N,); NaN at the last token.
        preceding: Logit of the token in the distribution of the token before, (N,); NaN at the first token.
        log_sum: L at ``TEMPERATURES``, (N, K).
        mean: L' at ``TEMPERATURES``, (N, K).
        variance: L'' at ``TEMPERATURES``, (N, K).
        num_entries: Entries of the vocabulary.
    """

    top: np.ndarray
    own: np.ndarray
    rank: np.ndarray
    following: np.ndarray
    preceding: np.ndarray
    log_sum: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    num_entries: int

    def __len__(self) -> int:
        return len(self.own)

    @classmethod
    def join(cls, parts: Sequence[Distributions]) -> Distributions:
        """Concatenate distributions of the same model."""
        names = [entry.name for entry in fields(cls) if entry.name != "num_entries"]
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return cls(**joined, num_entries=parts[0].num_entries)

    def take(self, rows: np.ndarray) -> Distributions:
        """Select tokens by index or mask."""
        chosen = {e.name: getattr(self, e.name)[rows] for e in fields(self) if e.name != "num_entries"}
        return Distributions(**chosen, num_entries=self.num_entries)

    def log_sums(self, x: float) -> np.ndarray:
        """Return L(b) at x = ln b, (N,)."""
        return _interpolate(self.log_sum, self._slope_of_sum, x)

    def means(self, x: float) -> np.ndarray:
        """Return L'(b) at x = ln b, (N,)."""
        return _interpolate(self.mean, self._slope_of_mean, x)

    def logprob(self, x: float) -> np.ndarray:
        """Return the log-probability of each token at x = ln b, (N,)."""
        return np.exp(x) * self.own - self.log_sums(x)

    def slope(self, x: float) -> np.ndarray:
        """Return the derivative of ``logprob`` with respect to x, (N,)."""
        return np.exp(x) * (self.own - self.means(x))

    def entropy(self, x: float) -> np.ndarray:
        """Return the entropy at x = ln b, (N,)."""
        return _interpolate(self._entropies, self._slope_of_entropy, x)

    def masses(self, x: float) -> np.ndarray:
        """Return the mass of the n likeliest entries at x = ln b for n from 1 on, (N, M)."""
        p = np.exp(np.exp(x) * self.top - self.log_sums(x)[:, None])
        return np.minimum(p.cumsum(1), 1.0)

    def kept(self, x: float, truncation: Truncation, masses: np.ndarray | None = None) -> np.ndarray:
        """Return how many entries a truncation keeps, (N,).

        The number is NaN if more than ``top`` holds.
        """
        size = self.top.shape[1]
        if truncation.kind == TOP_K:
            return np.full(len(self), min(truncation.limit, self.num_entries))
        if truncation.kind == MIN_P:
            number = (np.exp(x) * self.top >= np.log(truncation.limit)).sum(1).astype(float)
        else:
            masses = self.masses(x) if masses is None else masses
            number = 1.0 + (masses < truncation.limit).sum(1)
        return np.where(number > size if size < self.num_entries else False, np.nan, np.minimum(number, size))

    def log_mass(self, x: float, truncation: Truncation, masses: np.ndarray | None = None) -> np.ndarray:
        """Return the logarithm of the mass that a truncation keeps, (N,); NaN if unknown."""
        masses = self.masses(x) if masses is None else masses
        number = self.kept(x, truncation, masses)
        is_known = np.isfinite(number) & (number <= masses.shape[1])
        chosen = np.where(is_known, number, 1).astype(int) - 1
        return np.where(is_known, np.log(masses[np.arange(len(self)), chosen]), np.nan)

    def truncated_entropy(self, x: float, truncation: Truncation) -> np.ndarray:
        """Return the entropy of the truncated distribution, (N,); NaN if unknown.

        ``x`` is ln b.
        """
        number, log_mass = self.kept(x, truncation), self.log_mass(x, truncation)
        logp = np.exp(x) * self.top - self.log_sums(x)[:, None] - log_mass[:, None]
        inside = np.arange(self.top.shape[1]) < number[:, None]
        found = -np.where(inside, np.exp(logp) * logp, 0.0).sum(1)
        return np.where(np.isfinite(log_mass), found, np.nan)

    @cached_property
    def _slope_of_sum(self) -> np.ndarray:
        return np.exp(NODES) * self.mean

    @cached_property
    def _slope_of_mean(self) -> np.ndarray:
        return np.exp(NODES) * self.variance

    @cached_property
    def _entropies(self) -> np.ndarray:
        return self.log_sum - np.exp(NODES) * self.mean

    @cached_property
    def _slope_of_entropy(self) -> np.ndarray:
        return -np.exp(2 * NODES) * self.variance


def _interpolate(values: np.ndarray, slopes: np.ndarray, x: float) -> np.ndarray:
    """Return cubic Hermite interpolation at x of values (N, K) at ``NODES``.

    ``x`` is clipped to the range of the nodes.
    """
    x = float(np.clip(x, NODES[0], NODES[-1]))
    left = int(np.clip(np.searchsorted(NODES, x, side="right") - 1, 0, len(NODES) - 2))
    width = NODES[left + 1] - NODES[left]
    t = (x - NODES[left]) / width
    low, high = values[:, left].astype(np.float64), values[:, left + 1].astype(np.float64)
    rise, fall = slopes[:, left] * width, slopes[:, left + 1] * width
    return (
        (1 + 2 * t) * (1 - t) ** 2 * low + t * (1 - t) ** 2 * rise + t**2 * (3 - 2 * t) * high - t**2 * (1 - t) * fall
    )
