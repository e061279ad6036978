"""Sequence packing without padding, with shared prefixes computed once.

Layers that act on each token alone (projections, feed-forward layers, norms) receive one row of all tokens. Only
attention separates the sequences again, according to ``Packing.layout``; see ``kernels.attention``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Hold prompts with their responses, right-padded.

    Causal attention never reaches the padding. The last token of each sequence is dropped, since it predicts nothing.

    Attributes:
        ids: Token ids, (B, L).
        is_token: True at tokens, False at padding, (B, L).
        prompt_lengths: Prompt tokens of each sequence, (B,).
        targets: Tokens of all responses, concatenated, (N,).
    """

    ids: Tensor
    is_token: Tensor
    prompt_lengths: Tensor
    targets: Tensor

    @classmethod
    def of(cls, prompts: Sequence[list[int]], responses: Sequence[Tensor]) -> Sequences:
        """Build from B prompts and their B responses, none empty."""
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
        """Mark the tokens whose next token belongs to a response, (B, L).

        In row order, these predict ``targets``.
        """
        return self.is_token & (torch.arange(self.ids.shape[1]) >= self.prompt_lengths[:, None] - 1)


@dataclass(frozen=True)
class Packing:
    """Hold ``Sequences`` packed into one row of M tokens.

    Attributes:
        ids: Token ids, (1, M).
        positions: Position of each token in its sequence, (1, M).
        layout: Replaces the attention mask, (1, 2, R, L) int64, one row per sequence that owns a token, shorter
            sequences first. ``layout[0, 0]``: index among the M tokens at each position. ``layout[0, 1]``: indices of
            the tokens that the sequence owns, which are its last ones. -1 after the end.
        predictors: Index among the M tokens of the predictor of each target, (N,).
    """

    ids: Tensor
    positions: Tensor
    layout: Tensor
    predictors: Tensor

    @classmethod
    def of(cls, sequences: Sequences) -> Packing:
        """Pack sequences; a shared prefix or a repeated sequence is included once."""
        # Shorter sequences first, so that batches of neighbors contain little padding.
        by_length = sequences.is_token.sum(1).argsort(stable=True)
        ids, is_token = sequences.ids[by_length], sequences.is_token[by_length]
        batch, length = ids.shape
        marked = ids.masked_fill(~is_token, -1)
        # In lexicographic order, a prefix shared with any earlier sequence is shared with the previous one.
        order = torch.tensor(sorted(range(batch), key=marked.tolist().__getitem__))
        ordered = marked[order]
        is_new = torch.ones_like(is_token)
        is_new[1:] = (ordered[1:] != ordered[:-1]).cumsum(1) > 0
        sources = torch.arange(batch)[:, None].where(is_new, 0).cummax(0).values
        is_first, owner = torch.empty_like(is_new), torch.empty_like(sources)
        is_first[order] = is_new & is_token[order]
        owner[order] = order[sources]
        own = (is_first.flatten().cumsum(0) - 1).view(batch, length)
        slots = own.gather(0, owner).where(is_token, -1)
        places = torch.arange(length).expand(batch, length)
        counts = is_first.sum(1, keepdim=True)
        own_slots = torch.where(places < counts, counts.cumsum(0) - counts + places, -1)
        return cls(
            ids[is_first][None],
            places[is_first][None],
            torch.stack((slots, own_slots))[None, :, counts.squeeze(1) > 0],
            slots[by_length.argsort()][sequences.predicts],
        )


@dataclass(frozen=True)
class Pairs:
    """Hold the distinct pairs among N pairs of integers, in ascending order.

    Attributes:
        first: First numbers of the C distinct pairs, (C,).
        second: Second numbers of the C distinct pairs, (C,).
        index: Index among the distinct pairs of each given pair, (N,).
    """

    first: Tensor
    second: Tensor
    index: Tensor

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Pairs:
        """Find the distinct pairs of numbers >= 0, (N,) each."""
        base = int(second.max()) + 1 if len(second) else 1
        distinct, index = torch.unique(first * base + second, return_inverse=True)
        return cls(distinct // base, distinct % base, index)


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Return ``rows[index]``; gradients of repeated rows add up.

    Rows are (N, ...), and ``index`` has any shape. The backward pass is many times faster on a CPU than that of
    ``rows[index]``.
    """
    taken = rows.flatten(1).index_select(0, index.flatten())
    return taken.view(*index.shape, *rows.shape[1:])


def cut_by_tokens(lengths: Tensor, max_tokens: int, *, is_padded: bool, rank: int = 0, size: int = 1) -> list[Tensor]:
    """Split sequences into parts of at most ``max_tokens`` tokens.

    A longer sequence is a part of its own.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Most tokens per part; a longest sequence times the number of sequences if ``is_padded``.
        is_padded: Padding counts. Sequences are then sorted by length, which minimizes padding; otherwise they keep
            their order.
        rank: This process takes every ``size``-th sequence, from index ``rank``.
        size: Number of processes.

    Returns:
        Indices into ``lengths``, one tensor per part.
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
