"""Sequences read together without padding, what several of them begin with once.

Everything that works on each token by itself (projections, feed-forward layers, norms) sees one row of all tokens. Only
attention lays the sequences out side by side again, as ``Packing.layout`` says; see ``kernels.attention``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Prompts with their responses, side by side, padded on the right, where causal attention never looks.

    The last token of each is left out, since nothing is predicted from it.

    Attributes:
        ids: Tokens, (B, L).
        is_read: True at tokens, (B, L).
        prompt_lengths: (B,).
        targets: The tokens of all responses, end to end, (N,).
    """

    ids: Tensor
    is_read: Tensor
    prompt_lengths: Tensor
    targets: Tensor

    @classmethod
    def of(cls, prompts: Sequence[list[int]], responses: Sequence[Tensor]) -> Sequences:
        """Of B prompts and as many responses, none empty."""
        prompt_lengths, lengths = (torch.tensor([len(row) for row in rows]) for rows in (prompts, responses))
        targets, ends = torch.cat(list(responses)), (prompt_lengths + lengths)[:, None]
        places = torch.arange(int(ends.max()))
        is_prompt = places < prompt_lengths[:, None]
        ids = torch.zeros(is_prompt.shape, dtype=torch.int64)
        ids[is_prompt] = torch.tensor(list(chain.from_iterable(prompts)))
        ids[~is_prompt & (places < ends)] = targets
        return cls(ids[:, :-1], (places < ends - 1)[:, :-1], prompt_lengths, targets)

    @property
    def predicts(self) -> Tensor:
        """Whether the token that follows belongs to a response, (B, L); in this order they are ``targets``."""
        return self.is_read & (torch.arange(self.ids.shape[1]) >= self.prompt_lengths[:, None] - 1)


@dataclass(frozen=True)
class Packing:
    """``Sequences`` as a model reads them in one row of M tokens.

    Attributes:
        ids: (1, M).
        positions: Of each token in its sequence, (1, M).
        layout: What takes the place of an attention mask, (1, 2, R, L) int64, for each sequence with a token that is
            read there, shorter ones first: which of the M tokens stands at each of its places, and which of them are
            read there, its last ones; -1 beyond.
        predictors: Which of the M tokens predicts each target, (N,).
    """

    ids: Tensor
    positions: Tensor
    layout: Tensor
    predictors: Tensor

    @classmethod
    def of(cls, sequences: Sequences) -> Packing:
        """A token that several sequences share, with all before it, is read once; so is a sequence equal to another."""
        # Shorter ones first, so that few places stay empty in a part of them.
        by_length = sequences.is_read.sum(1).argsort(stable=True)
        ids, is_read = sequences.ids[by_length], sequences.is_read[by_length]
        batch, length = ids.shape
        marked = ids.masked_fill(~is_read, -1)
        # In alphabetical order, what a sequence shares with any before it, it shares with the one right before it.
        order = torch.tensor(sorted(range(batch), key=marked.tolist().__getitem__))
        ordered = marked[order]
        is_new = torch.ones_like(is_read)
        is_new[1:] = (ordered[1:] != ordered[:-1]).cumsum(1) > 0
        reads = torch.arange(batch)[:, None].where(is_new, 0).cummax(0).values
        is_first, reader = torch.empty_like(is_new), torch.empty_like(reads)
        is_first[order] = is_new & is_read[order]
        reader[order] = order[reads]
        own = (is_first.flatten().cumsum(0) - 1).view(batch, length)
        slots = own.gather(0, reader).where(is_read, -1)
        places = torch.arange(length).expand(batch, length)
        counts = is_first.sum(1, keepdim=True)
        read_here = torch.where(places < counts, counts.cumsum(0) - counts + places, -1)
        return cls(
            ids[is_first][None],
            places[is_first][None],
            torch.stack((slots, read_here))[None, :, counts.squeeze(1) > 0],
            slots[by_length.argsort()][sequences.predicts],
        )


@dataclass(frozen=True)
class Pairs:
    """The distinct among N pairs of whole numbers, in ascending order.

    Attributes:
        first: (C,).
        second: (C,).
        index: Which of them each given pair is, (N,).
    """

    first: Tensor
    second: Tensor
    index: Tensor

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Pairs:
        """Of numbers >= 0, (N,) each."""
        base = int(second.max()) + 1 if len(second) else 1
        distinct, index = torch.unique(first * base + second, return_inverse=True)
        return cls(distinct // base, distinct % base, index)


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (N, ...) by their indices, of any shape; the gradient of a row that is taken twice is added up.

    What ``rows[index]`` does, but for a backward pass that is many times faster on a CPU.
    """
    taken = rows.flatten(1).index_select(0, index.flatten())
    return taken.view(*index.shape, *rows.shape[1:])


def cut_by_tokens(lengths: Tensor, max_tokens: int, *, is_padded: bool, rank: int = 0, size: int = 1) -> list[Tensor]:
    """Cuts sequences into parts of at most ``max_tokens`` tokens; one longer than that makes a part of its own.

    Where padding is read, it counts, and sequences are sorted by length, so that there is little; else those that stand
    together stay together. The parts hold places in ``lengths``. Of ``size`` processes, each takes every ``size``-th
    sequence, the one of ``rank`` from place ``rank`` on.
    """
    order = lengths.argsort(stable=True) if is_padded else torch.arange(len(lengths))
    parts: list[list[int]] = [[]]
    filled = 0
    for index in order[rank::size].tolist():
        length = int(lengths[index])
        filled = length * (len(parts[-1]) + 1) if is_padded else filled + length
        if parts[-1] and filled > max_tokens:
            parts.append([])
            filled = length
        parts[-1].append(index)
    return [torch.tensor(part) for part in parts if part]
