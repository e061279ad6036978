"""Sequences read together without padding, a prompt that several of them begin with once.

Everything that works on each token by itself (projections, feed-forward layers, norms) sees one row of all tokens. Only
attention lays the sequences out side by side again, as ``Packing.layout`` says; see ``trainer.attention``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


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
    def of(cls, prompts: list[list[int]], responses: list[Tensor]) -> Sequences:
        """Of B prompts and as many responses, none empty."""
        rows = [torch.cat((torch.tensor(p), r[:-1])) for p, r in zip(prompts, responses, strict=True)]
        lengths = torch.tensor([len(row) for row in rows])
        ids = pad_sequence(rows, batch_first=True)
        is_read = torch.arange(ids.shape[1]) < lengths[:, None]
        return cls(ids, is_read, torch.tensor([len(p) for p in prompts]), torch.cat(responses))

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
        layout: What takes the place of an attention mask, (1, 2, B, L) int64: which of the M tokens stands at each
            place of the padded sequences, -1 at padding; and whether it does so first, in which order they are read.
        predictors: Which of the M tokens predicts each target, (N,).
    """

    ids: Tensor
    positions: Tensor
    layout: Tensor
    predictors: Tensor

    @classmethod
    def of(cls, sequences: Sequences, prompts: list[list[int]]) -> Packing:
        """Equal prompts are read once, with the first of the responses to them."""
        first_rows: dict[tuple[int, ...], int] = {}
        first = torch.tensor([first_rows.setdefault(tuple(prompt), row) for row, prompt in enumerate(prompts)])
        batch, length = sequences.ids.shape
        columns = torch.arange(length).expand(batch, length)
        is_shared = (columns < sequences.prompt_lengths[:, None]) & (first < torch.arange(batch))[:, None]
        is_first = sequences.is_read & ~is_shared
        own = (is_first.flatten().cumsum(0) - 1).view(batch, length)
        slots = torch.where(is_shared, own[first], own).where(sequences.is_read, -1)
        return cls(
            sequences.ids[is_first][None],
            columns[is_first][None],
            torch.stack((slots, is_first))[None],
            slots[sequences.predicts],
        )


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (N, ...) by their indices, of any shape; the gradient of a row that is taken twice is added up.

    What ``rows[index]`` does, but for a backward pass that is several times faster on a CPU.
    """
    return torch.nn.functional.embedding(index, rows.flatten(1)).unflatten(-1, rows.shape[1:])
