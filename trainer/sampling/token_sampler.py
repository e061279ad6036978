"""Draws the next token of each response and records the distribution that it is drawn from."""

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
    """Tokens drawn at given random numbers, each recorded with the distribution that it is drawn from.

    Attributes:
        samples: What they belong to; all but the tokens is there once it is finished.
    """

    def __init__(
        self, policy: Policy, prompts: list[list[int]], uniforms: np.ndarray, limits: list[int], params: SamplingParams
    ) -> None:
        """Arguments are those of ``sample_at``."""
        num_samples = len(uniforms) // len(prompts)
        self.samples = Rollouts.empty([prompt for prompt in prompts for _ in range(num_samples)], params.max_tokens)
        self._policy, self._params = policy, params
        self._head = policy.head.for_hidden(policy.dtype)
        self._numbers = torch.from_numpy(uniforms)
        self._limits = torch.tensor(limits).repeat_interleave(num_samples)
        self._lengths = torch.zeros_like(self._limits)
        self._drawn: list[tuple[Tensor, Tensor, Tensor, Sums, Tensor]] = []

    def draw(self, hidden: Tensor, stands_at: Tensor, rows: Tensor) -> tuple[Pairs, Tensor]:
        """Draws the next token of some responses.

        Args:
            hidden: Inputs of the LM head, (S, H).
            stands_at: Which of them each token is drawn from, (N,).
            rows: The responses, (N,).

        Returns:
            What was drawn, pairs of an input and a token; and whether each response goes on after it, (N,).
        """
        policy, params, samples = self._policy, self._params, self.samples
        logits = params.truncation.apply(self._head.logits(hidden), params.temperature)
        softmax = Softmax.of(logits, params.temperature)
        places = self._lengths[rows]
        numbers = self._numbers[rows, places]
        tokens = invert_cdf(softmax.weights, stands_at.to(policy.device), numbers.to(policy.device)).cpu()
        # Responses that draw the same from the same share its statistics.
        drawn = Pairs.of(stands_at, tokens)
        first, second = drawn.first.to(policy.device), drawn.second.to(policy.device)
        sums = softmax.take(first).sums(second)
        self._drawn.append((rows, places, drawn.index, sums, hidden.float().norm(dim=-1)[first]))
        samples.response_ids[rows, places] = tokens
        self._lengths[rows] += 1
        has_ended = ends_response(policy, samples.response_ids, rows, places, params.stop)
        samples.is_truncated[rows[has_ended]] = False
        return drawn, ~has_ended & (places + 1 < self._limits[rows])

    def finish(self) -> Rollouts:
        """All that was drawn, with its statistics."""
        samples = self.samples
        samples.response_mask[:] = torch.arange(samples.response_ids.shape[1]) < self._lengths[:, None]
        rows, places, index, sums, norms = zip(*self._drawn, strict=True)
        starts = accumulate((len(part.own) for part in sums), initial=0)
        index = torch.cat([part + start for part, start in zip(index, starts, strict=False)])
        rows, places = torch.cat(rows), torch.cat(places)
        stats = Sums.concatenate(list(sums)).stats(self._params.temperature)
        for name, values in vars(stats).items():
            getattr(samples.stats, name)[rows, places] = values.cpu()[index]
        samples.hidden_norm[rows, places] = torch.cat(norms).cpu()[index]
        return samples


def ends_response(policy: Policy, tokens: Tensor, rows: Tensor, places: Tensor, stop: tuple[str, ...]) -> Tensor:
    """Whether tokens end their responses, by themselves or as the end of a stop text; none before does.

    Args:
        policy: The model.
        tokens: Of all responses, (B, T).
        rows: The responses that are asked about, (N,).
        places: Their last tokens, (N,).
        stop: Texts that end a response.

    Returns:
        (N,) bool.
    """
    has_ended = torch.isin(tokens[rows, places], policy.stop_ids)
    if stop:
        # No token writes less than a byte; one more, for the space that some tokenizers take off a text's beginning.
        size = 1 + max(len(text.encode()) for text in stop)
        ends = (places + 1).tolist()
        tails = [row[max(0, end - size) : end] for row, end in zip(tokens[rows].tolist(), ends, strict=True)]
        has_ended |= torch.tensor(
            [any(text in tail for text in stop) for tail in policy.decode(tails)], dtype=torch.bool
        )
    return has_ended


def invert_cdf(p: Tensor, rows: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens whose cumulative probability first exceeds a uniform number.

    Args:
        p: Probabilities, or numbers in proportion to them, (S, V).
        rows: Which row of ``p`` each token is drawn from, (N,).
        uniforms: In [0, 1), (N,).

    Returns:
        Token ids, (N,).
    """
    cdf = p.cumsum(-1).index_select(0, rows)
    # Scaled to the rounded total, and kept below it, so that no token of probability 0 can be drawn.
    target = torch.minimum(uniforms * cdf[:, -1], cdf[:, -1].nextafter(torch.zeros((), device=p.device)))
    return torch.searchsorted(cdf, target[:, None], right=True).squeeze(1)
