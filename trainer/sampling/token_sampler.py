"""Draw next tokens, with the statistics of their distributions."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from entrace.trainer.kernels.packing import Pairs
from entrace.trainer.kernels.token_stats import Softmax, Sums
from entrace.trainer.model.policy import Policy
from entrace.trainer.sampling.samples import Rollouts, SamplingParams


class TokenSampler:
    """Draw tokens with given random numbers, and keep their statistics.

    Attributes:
        rollouts: The responses; complete after ``finish``, until then only their tokens are set.
    """

    def __init__(
        self, policy: Policy, prompts: list[list[int]], uniforms: np.ndarray, limits: list[int], params: SamplingParams
    ) -> None:
        """Take the arguments of ``sample_at``."""
        num_samples = len(uniforms) // len(prompts)
        self.rollouts = Rollouts.empty([prompt for prompt in prompts for _ in range(num_samples)], params.max_tokens)
        self._policy, self._params = policy, params
        self._head = policy.head.for_hidden(policy.dtype)
        self._numbers = torch.from_numpy(uniforms)
        self._limits = torch.tensor(limits).repeat_interleave(num_samples)
        self._lengths = torch.zeros_like(self._limits)
        self._drawn: list[tuple[Tensor, Tensor, Tensor, Sums, Tensor]] = []

    def draw(self, hidden: Tensor, sequences: Tensor, rows: Tensor) -> tuple[Pairs, Tensor]:
        """Draw the next token of some responses.

        Args:
            hidden: Inputs of the LM head of S sequences, (S, H).
            sequences: Index of the sequence that each response continues, (N,).
            rows: Indices of the responses, (N,).

        Returns:
            The distinct pairs of a sequence and a drawn token; and a mask of the responses that continue, (N,).
        """
        policy, params, rollouts = self._policy, self._params, self.rollouts
        logits = params.truncation.apply(self._head.logits(hidden), params.temperature)
        softmax = Softmax.of(logits, params.temperature)
        places = self._lengths[rows]
        numbers = self._numbers[rows, places]
        tokens = invert_cdf(softmax.weights, sequences.to(policy.device), numbers.to(policy.device)).cpu()
        # Responses that draw the same token from the same sequence share its statistics.
        drawn = Pairs.of(sequences, tokens)
        first, second = drawn.first.to(policy.device), drawn.second.to(policy.device)
        sums = softmax.take(first).sums(second)
        self._drawn.append((rows, places, drawn.index, sums, hidden.float().norm(dim=-1)[first]))
        rollouts.response_ids[rows, places] = tokens
        self._lengths[rows] += 1
        has_ended = ends_response(policy, rollouts.response_ids, rows, places, params.stop)
        rollouts.is_truncated[rows[has_ended]] = False
        return drawn, ~has_ended & (places + 1 < self._limits[rows])

    def finish(self) -> Rollouts:
        """Return the responses with their statistics."""
        rollouts = self.rollouts
        rollouts.response_mask[:] = torch.arange(rollouts.response_ids.shape[1]) < self._lengths[:, None]
        rows, places, index, sums, norms = zip(*self._drawn, strict=True)
        starts = accumulate((len(part.own) for part in sums), initial=0)
        index = torch.cat([part + start for part, start in zip(index, starts, strict=False)])
        rows, places = torch.cat(rows), torch.cat(places)
        stats = Sums.concatenate(list(sums)).stats(self._params.temperature)
        for name, values in vars(stats).items():
            getattr(rollouts.stats, name)[rows, places] = values.cpu()[index]
        rollouts.hidden_norm[rows, places] = torch.cat(norms).cpu()[index]
        return rollouts


def ends_response(policy: Policy, tokens: Tensor, rows: Tensor, places: Tensor, stop: tuple[str, ...]) -> Tensor:
    """Return a mask of the responses that their last token ends, (N,) bool.

    The token is a stop token or completes a stop text.

    Args:
        policy: The model.
        tokens: Tokens of all responses, (B, T).
        rows: Indices of the responses to check, (N,).
        places: Positions of their last tokens, (N,); no earlier token ends the response.
        stop: Texts that end a response.
    """
    has_ended = torch.isin(tokens[rows, places], policy.stop_ids)
    if stop:
        # A token decodes to at least one byte. One more token, since some tokenizers strip a leading space.
        size = 1 + max(len(text.encode()) for text in stop)
        ends = (places + 1).tolist()
        tails = [row[max(0, end - size) : end] for row, end in zip(tokens[rows].tolist(), ends, strict=True)]
        has_ended |= torch.tensor(
            [any(text in tail for text in stop) for tail in policy.decode(tails)], dtype=torch.bool
        )
    return has_ended


def invert_cdf(p: Tensor, rows: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first tokens whose cumulative probability exceeds a number, (N,).

    Args:
        p: Unnormalized probabilities, (S, V).
        rows: Row of ``p`` that each token is drawn from, (N,).
        uniforms: Random numbers in [0, 1), (N,).
    """
    cdf = p.cumsum(-1).index_select(0, rows)
    # Scaled to the rounded total and kept below it, so that a token of probability 0 is never drawn.
    target = torch.minimum(uniforms * cdf[:, -1], cdf[:, -1].nextafter(torch.zeros((), device=p.device)))
    return torch.searchsorted(cdf, target[:, None], right=True).squeeze(1)
