"""Batched sampling with a KV cache, recording the distribution that every token is drawn from."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from itertools import accumulate
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from analysis.trace import InputError
from trainer.config import Engine, RolloutConfig
from trainer.decoder import Decoder
from trainer.packing import Pairs
from trainer.policy import Policy
from trainer.token_stats import WHOLE, Softmax, Sums, TokenStats, Truncation


@dataclass(frozen=True)
class SamplingParams:
    """What tokens are drawn from, and what ends a response besides the stop tokens.

    ``truncation`` cuts the distribution before anything is recorded of it. ``stop`` holds texts: the token that
    completes one of them is the response's last. ``cache_tokens`` bounds memory, and ``engine`` says how ``sample``
    computes; neither changes what is drawn but for rounding.
    """

    max_tokens: int
    temperature: float = 1.0
    truncation: Truncation = WHOLE
    stop: tuple[str, ...] = ()
    cache_tokens: int = sys.maxsize
    engine: Engine = "cache"

    @classmethod
    def of(cls, config: RolloutConfig) -> SamplingParams:
        """Those of a training step."""
        truncation = Truncation(config.top_p, config.top_k)
        return cls(
            config.max_response_tokens, config.temperature, truncation, config.stop, config.cache_tokens, config.engine
        )


@dataclass
class Samples:
    """Responses, one a row; on the CPU, padded to T; a value outside ``response_mask`` means nothing.

    Attributes:
        prompts: Prompt tokens of each response, B lists.
        tokens: (B, T) int64.
        response_mask: (B, T) bool, True at generated tokens, the end of sequence included.
        stats: ``logprob``, ``entropy``, ``sum_p2``, each (B, T), of the distribution sampled from.
        hidden_norm: Norm of the LM head's input, (B, T).
        is_truncated: (B,) bool, stopped by the length limit.
    """

    prompts: list[list[int]]
    tokens: Tensor
    response_mask: Tensor
    stats: TokenStats
    hidden_norm: Tensor
    is_truncated: Tensor

    @classmethod
    def empty(cls, prompts: list[list[int]], max_tokens: int) -> Samples:
        """Nothing sampled yet."""
        shape = (len(prompts), max_tokens)
        stats = TokenStats(*(torch.zeros(shape) for _ in fields(TokenStats)))
        return cls(
            prompts,
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.bool),
            stats,
            torch.zeros(shape),
            torch.ones(len(prompts), dtype=torch.bool),
        )

    @classmethod
    def concatenate(cls, parts: list[Samples]) -> Samples:
        """Rows of all parts, which share T."""
        return cls(
            [prompt for part in parts for prompt in part.prompts],
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.response_mask for part in parts]),
            TokenStats(*(torch.cat([getattr(part.stats, f.name) for part in parts]) for f in fields(TokenStats))),
            torch.cat([part.hidden_norm for part in parts]),
            torch.cat([part.is_truncated for part in parts]),
        )

    @property
    def lengths(self) -> Tensor:
        """Response lengths in tokens, (B,)."""
        return self.response_mask.sum(1)

    @property
    def entropy_mean(self) -> Tensor:
        """Mean token entropy of each response, nats, (B,)."""
        return (self.stats.entropy * self.response_mask).sum(1) / self.lengths

    def responses(self, rows: Tensor | slice = slice(None)) -> list[Tensor]:
        """Token ids of each response, or of each of some."""
        return list(self.tokens[rows][self.response_mask[rows]].split(self.lengths[rows].tolist()))

    def place(self, values: Tensor, rows: Tensor) -> Tensor:
        """Puts values (N,) of the tokens of ``rows``, end to end, at their places, (len(rows), T); 0 elsewhere."""
        mask = self.response_mask[rows]
        placed = torch.zeros(mask.shape, dtype=values.dtype)
        placed[mask] = values.cpu()
        return placed


def check_engine(policy: Policy, config: RolloutConfig) -> None:
    """Refuses an engine that does not sample from this model what it should.

    Raises:
        InputError: it does not, or the transformers installed has no such engine.
    """
    if config.engine == "continuous":
        _continuous().check(policy)


def _continuous() -> ModuleType:
    # It draws as is done here, and needs parts of transformers that older ones lack.
    try:
        from trainer import continuous
    except ImportError as error:
        raise InputError(f'rollout.engine = "continuous" needs transformers >= 5.23 ({error})') from None
    return continuous


def sample(
    policy: Policy,
    prompts: list[list[int]],
    num_samples: int,
    params: SamplingParams,
    rng: np.random.Generator,
    part: slice = slice(None),
) -> Samples:
    """Draws ``num_samples`` responses to each prompt, or to each of a part of them.

    Equal policies sampled with equal generators give equal responses; see ``sample_at``.

    Args:
        policy: The model.
        prompts: Token ids of each prompt, P lists.
        num_samples: Responses to each.
        params: Limits and temperature.
        rng: Source of the random numbers, which are drawn for all prompts.
        part: The prompts that are answered here.

    Returns:
        ``Samples`` of ``num_samples`` rows a prompt of the part, the responses of one prompt adjacent.
    """
    uniforms = rng.random((len(prompts) * num_samples, params.max_tokens), dtype=np.float32)
    longest = max(len(prompt) for prompt in prompts) + params.max_tokens
    size = max(1, params.cache_tokens // (longest * num_samples))
    chosen = prompts[part]
    sample_part = sample_at
    if params.engine == "continuous":
        # It keeps to ``cache_tokens`` by itself.
        size, sample_part = max(1, len(chosen)), _continuous().sample_at
    numbers = uniforms.reshape(len(prompts), num_samples, params.max_tokens)[part]
    drawn = [Samples.empty([], params.max_tokens)]
    with policy.whole():
        for start in range(0, len(chosen), size):
            some = slice(start, start + size)
            limits = [params.max_tokens] * len(chosen[some])
            some_numbers = numbers[some].reshape(-1, params.max_tokens)
            drawn.append(sample_part(policy, chosen[some], some_numbers, limits, params))
    return Samples.concatenate(drawn)


@torch.no_grad()
def sample_at(
    policy: Policy, prompts: list[list[int]], uniforms: np.ndarray, limits: list[int], params: SamplingParams
) -> Samples:
    """Draws responses at given random numbers.

    What responses have in common from the prompt on is computed once: they part where they differ, and leave where they
    end. Every token is drawn by inverting the distribution function at the random number of its response and position,
    so that what a response draws depends neither on its batch nor on when others end.

    Args:
        policy: The model.
        prompts: Token ids of each prompt, P lists.
        uniforms: Random numbers in [0, 1), (B, params.max_tokens) float32; B is a multiple of P.
        limits: Longest response to each prompt, at least 1 and at most ``params.max_tokens``, P numbers.
        params: Temperature and top-p.

    Returns:
        ``Samples`` of B rows, the responses of one prompt adjacent.
    """
    drawing = Drawing(policy, prompts, uniforms, limits, params)
    rows = torch.arange(len(uniforms))
    stands_at = rows // (len(uniforms) // len(prompts))
    # Weights that are cast are cast once for all tokens.
    with policy.autocast():
        decoder = Decoder(
            policy,
            prompts,
            len(uniforms),
            policy.step_graph,
            max_tokens=params.max_tokens,
            replays=policy.replays,
        )
        while True:
            drawn, goes_on = drawing.draw(decoder.hidden, stands_at, rows)
            if not goes_on.any():
                return drawing.finish()
            # Responses that draw the same from the same go on together, or end together.
            is_left = torch.zeros_like(drawn.first, dtype=torch.bool).index_put((drawn.index,), goes_on)
            decoder.append(drawn.second[is_left], drawn.first[is_left])
            rows, stands_at = rows[goes_on], (is_left.cumsum(0) - 1)[drawn.index[goes_on]]


class Drawing:
    """Tokens drawn at given random numbers, each recorded with the distribution that it is drawn from.

    Attributes:
        samples: What they belong to; all but the tokens is there once it is finished.
    """

    def __init__(
        self, policy: Policy, prompts: list[list[int]], uniforms: np.ndarray, limits: list[int], params: SamplingParams
    ) -> None:
        """Arguments are those of ``sample_at``."""
        num_samples = len(uniforms) // len(prompts)
        self.samples = Samples.empty([prompt for prompt in prompts for _ in range(num_samples)], params.max_tokens)
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
        samples.tokens[rows, places] = tokens
        self._lengths[rows] += 1
        has_ended = ends_response(policy, samples.tokens, rows, places, params.stop)
        samples.is_truncated[rows[has_ended]] = False
        return drawn, ~has_ended & (places + 1 < self._limits[rows])

    def finish(self) -> Samples:
        """All that was drawn, with its statistics."""
        samples = self.samples
        samples.response_mask[:] = torch.arange(samples.tokens.shape[1]) < self._lengths[:, None]
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
