"""Read given responses with one teacher-forced pass of a model.

The pass keeps what determines values at other temperatures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entrace.trainer.external.teacher_forcing import PassSettings
from entrace.trainer.faults import TrainingError, memory_advice
from entrace.trainer.kernels.packing import cut_by_tokens
from entrace.trainer.model.policy import Policy

# Logits in memory at once.
BLOCK = 1 << 24


@dataclass(frozen=True)
class VocabularyPass:
    """Describe the distributions of a model at the tokens of responses.

    Attributes:
        policy: The model.
        settings: ``batch_tokens`` bounds the tokens of a forward pass.
        temperatures: Temperatures at which sums over the vocabulary are computed, K of them.
        num_top: Number of largest logits to keep.
    """

    policy: Policy
    settings: PassSettings
    temperatures: Sequence[float]
    num_top: int

    def parts(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        """Yield indices of responses and values of their tokens, per forward pass.

        Values are concatenated. Memory is bounded by ``batch_tokens``, not by the number of responses.

        Args:
            prompts: Prompt tokens of each response.
            responses: Response tokens, none empty.

        Returns:
            Per part, the indices and, by name, the arrays of ``analysis.audit.distributions.Distributions``.

        Raises:
            TrainingError: memory ran out, or the model returned NaN or infinity.
        """
        lengths = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
        is_padded = not self.policy.uses_packing
        for part in cut_by_tokens(lengths, self.settings.batch_tokens, is_padded=is_padded):
            chosen = part.tolist()
            with memory_advice(self.settings, "reading responses", "batch_tokens"):
                found = self._read([prompts[i] for i in chosen], [torch.tensor(responses[i]) for i in chosen])
            yield chosen, found

    @torch.no_grad()
    def _read(self, prompts: list[list[int]], responses: list[Tensor]) -> dict[str, np.ndarray]:
        hidden, targets, index = self.policy.forward_unique(prompts, responses)
        distinct = self._describe(hidden, targets)
        found = {name: values[index.cpu()].numpy() for name, values in distinct.items()}
        found |= self._shifted(hidden[index], targets[index], distinct["peak"][index.cpu()], responses)
        del found["peak"]
        if not all(np.isfinite(found[name]).all() for name in ("own", "log_sum", "mean", "variance")):
            raise TrainingError(f"{self.policy.name} gives a response a probability that is NaN or infinite")
        return found

    def _describe(self, hidden: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the values of C distinct pairs of distribution and token."""
        parts: list[dict[str, Tensor]] = []
        size = max(1, BLOCK // self.policy.vocab_size)
        for start in range(0, len(hidden), size):
            logits = self.policy.head.logits(hidden[start : start + size])
            peak = logits.amax(-1, keepdim=True)
            logits = logits - peak
            own = logits.gather(1, targets[start : start + size, None])
            top = logits.topk(min(self.num_top, logits.shape[1]), -1).values
            part = {"top": top, "own": own[:, 0], "rank": (logits > own).sum(-1), "peak": peak[:, 0]}
            part |= self._sums(logits)
            parts.append({name: values.cpu() for name, values in part.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _sums(self, logits: Tensor) -> dict[str, Tensor]:
        """Return log-sum, mean, and variance of logits at each temperature, (n, K) each."""
        sums = []
        for temperature in self.temperatures:
            weights = (logits / temperature).exp()
            total = weights.sum(-1)
            weights /= total[:, None]
            mean = (weights * logits).sum(-1)
            variance = (weights * (logits - mean[:, None]) ** 2).sum(-1)
            sums.append(torch.stack([total.log(), mean, variance]))
        log_sum, mean, variance = torch.stack(sums, -1)
        return {"log_sum": log_sum, "mean": mean, "variance": variance}

    def _shifted(self, hidden: Tensor, targets: Tensor, peak: Tensor, responses: list[Tensor]) -> dict[str, np.ndarray]:
        """Return each token's logit in the two neighboring distributions.

        The two are those of the next token and of the token before.
        """
        head = self.policy.head.for_hidden(hidden.dtype)
        following, preceding = (torch.full(targets.shape, torch.nan) for _ in range(2))
        start = 0
        for response in responses:
            end = start + len(response)
            rows, own = hidden[start:end].to(head.weight.dtype), targets[start:end]
            weight = head.weight[own]
            bias = torch.zeros_like(weight[:, 0]) if head.bias is None else head.bias[own]
            after = ((rows[1:] * weight[:-1]).sum(-1) + bias[:-1]).float().cpu()
            before = ((rows[:-1] * weight[1:]).sum(-1) + bias[1:]).float().cpu()
            following[start : end - 1] = after - peak[start + 1 : end]
            preceding[start + 1 : end] = before - peak[start : end - 1]
            start = end
        return {"following": following.numpy(), "preceding": preceding.numpy()}
