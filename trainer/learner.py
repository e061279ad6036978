"""The optimiser's part of a step: epochs, mini-batches with one objective each, micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from entrace.trainer.algorithm.losses import kl_penalty
from entrace.trainer.algorithm.objectives import Objective
from entrace.trainer.config import UPDATE_MEMORY, Config, OptimConfig
from entrace.trainer.faults import TrainingError, memory_advice
from entrace.trainer.kernels.packing import cut_by_tokens
from entrace.trainer.kernels.token_stats import TokenStats
from entrace.trainer.model.policy import Policy
from entrace.trainer.parallel.ranks import ALONE, Ranks
from entrace.trainer.parallel.sharding import full_tensor
from entrace.trainer.rollouts import Batch, view_rollouts
from entrace.trainer.sampling.samples import Rollouts, SamplingParams
from entrace.trainer.seeding import Stream, generator

# What the loss is multiplied by on the way back: in float16, small gradients would vanish without. Should they overflow
# instead, the next is tried, within the same update, so that none is skipped and nothing needs to be remembered.
LOSS_SCALES = {torch.float16: (2.0**12, 2.0**8, 2.0**4, 1.0)}


@dataclass
class UpdateMetrics:
    """Means over a step's updates; ``kl`` is None without a reference policy. Zeros if no group was kept.

    ``is_clipped`` (B, T): a bound on the ratio took the token's gradient in at least one of the updates.
    """

    is_clipped: Tensor
    loss: float = 0.0
    grad_norm: float = 0.0
    kl: float | None = None
    clip_frac_low: float = 0.0
    clip_frac_high: float = 0.0
    clip_frac_dual: float = 0.0


@dataclass
class AfterUpdate:
    """What an update did to the tokens it was made of.

    Attributes:
        is_scored: Responses that were scored again, (B,) bool.
        logprob_after: logprob under the updated weights, nats; (B, T), 0 in all others.
        entropy_after: Entropy under the updated weights, nats; (B, T), 0 in all others.
        is_clipped: As in ``UpdateMetrics``.
    """

    is_scored: Tensor
    logprob_after: Tensor
    entropy_after: Tensor
    is_clipped: Tensor


class Learner:
    """Policy, optimiser and, if the loss has a KL term, the frozen reference policy."""

    def __init__(self, config: Config, policy: Policy, ranks: Ranks = ALONE) -> None:
        """Build AdamW; weight decay spares vectors (norms and biases) unless ``optim.decay_all`` is set."""
        self.config, self.policy, self.ranks = config, policy, ranks
        self.sampling = SamplingParams.of(config.rollout)
        parameters = [p for p in policy.model.parameters() if p.requires_grad]
        optim = config.optim
        decayed = [p for p in parameters if p.ndim > 1 or optim.decay_all]
        spared = [p for p in parameters if p.ndim <= 1 and not optim.decay_all]
        groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)
        self.reference = Policy.load(config.policy) if config.loss.kl_coef else None

    def update(self, batch: Batch, advantages: Tensor, step: int) -> UpdateMetrics:
        """Trains on the kept responses of a batch.

        Args:
            batch: The step's responses.
            advantages: Shaped advantages, (B, T).
            step: Current step, from 1; decides the learning rate and the order of mini-batches.

        Raises:
            TrainingError: the loss or the gradient is NaN or infinite, or memory ran out; the weights are those before
                that update.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optim, step, self.config.steps)
        is_clipped = torch.zeros_like(batch.rollouts.response_mask)
        tokens = view_rollouts(batch, self.config.seed, Stream.LOSS, step)
        tokens = replace(tokens, response_mask=tokens.response_mask & batch.is_kept[:, None])
        max_tokens = self.config.rollout.max_response_tokens
        updates = []
        with memory_advice(self.config, f"updating at step {step}", UPDATE_MEMORY):
            for rows in mini_batches(self.config, batch, step):
                objective = Objective.of(self.config.loss, advantages[rows], tokens.take(rows), max_tokens)
                updates.append(self._step_optimizer(batch.rollouts, objective, rows, step, is_clipped))
        if not updates:
            return UpdateMetrics(is_clipped)
        is_clipped = torch.stack(self.ranks.all_gather_object(is_clipped)).any(0)
        mean = torch.tensor(updates, dtype=torch.float64).mean(0).tolist()
        loss, grad_norm, kl, *clipped = mean
        return UpdateMetrics(is_clipped, loss, grad_norm, kl if self.reference else None, *clipped)

    @torch.no_grad()
    def capture(self, batch: Batch, metrics: UpdateMetrics, step: int) -> AfterUpdate:
        """Scores this process's part of ``captured_responses`` under the weights that ``update`` left."""
        samples = batch.rollouts
        logprob, entropy = torch.zeros(samples.response_ids.shape), torch.zeros(samples.response_ids.shape)
        is_scored = torch.zeros_like(batch.is_own)
        is_scored[captured_responses(self.config, batch, step)] = True
        is_scored &= batch.is_own
        scored = torch.nonzero(is_scored).squeeze(1)
        with memory_advice(self.config, "capturing what an update did", UPDATE_MEMORY), self.policy.unsharded():
            for micro in self._micro_batches(samples, scored):
                rows = scored[micro]
                stats = self._score(self.policy, samples, rows)
                logprob[rows] = samples.place(stats.logprob, rows)
                entropy[rows] = samples.place(stats.entropy, rows)
        return AfterUpdate(is_scored, logprob, entropy, metrics.is_clipped)

    def _step_optimizer(
        self, samples: Rollouts, objective: Objective, rows: Tensor, step: int, is_clipped: Tensor
    ) -> list[float]:
        """Update once; return loss, gradient norm, KL, and the clipped shares, and mark tokens in ``is_clipped``."""
        loss = kl = grad_norm = math.nan
        counts: list[float] = []
        for scale in LOSS_SCALES.get(self.policy.dtype, (1.0,)):
            loss, kl, *counts = self._backward(samples, objective, rows, is_clipped, scale)
            norm = clip_grad_norm_(self.policy.model.parameters(), self.config.optim.grad_clip)
            grad_norm = float(full_tensor(norm))
            if math.isfinite(loss) and math.isfinite(grad_norm):
                break
        else:
            raise TrainingError(f"step {step}: loss {loss}, gradient norm {grad_norm}; lower optim.lr or check rewards")
        self.optimizer.step()
        num_tokens = int(objective.mask.sum())
        return [loss, grad_norm, kl, *(count / num_tokens for count in counts)]

    def _backward(
        self, samples: Rollouts, objective: Objective, rows: Tensor, is_clipped: Tensor, scale: float
    ) -> list[float]:
        """Fills in gradients; returns loss, KL and the numbers of clipped tokens, and marks these in ``is_clipped``."""
        sums = torch.zeros(5, dtype=torch.float64)
        self.optimizer.zero_grad(set_to_none=True)
        places, ranks = self._places_with_gradient(objective), self.ranks
        own = [places[part] for part in self._micro_batches(samples, rows[places], ranks.rank, ranks.size)]
        # Weights in parts are gathered by all processes at once: one that is done reads a response again, for nothing.
        idle = max(ranks.all_gather_object(len(own))) - len(own) if self.policy.is_sharded else 0
        for micro in own:
            loss, kl, *clips = self._loss_sums(samples, objective, rows, micro)
            (loss * scale).backward()
            sums += torch.stack([loss.detach(), kl, *(clip.sum() for clip in clips)]).cpu().double()
            is_clipped[rows[micro]] |= samples.place(torch.stack(clips).any(0), rows[micro])
        for _ in range(idle):
            (self._loss_sums(samples, objective, rows, places[:1])[0] * 0).backward()
        sums = self._add_up(sums)
        for parameter in self.policy.model.parameters():
            if scale != 1 and parameter.grad is not None:
                parameter.grad /= scale
        return sums.tolist()

    def _micro_batches(self, samples: Rollouts, rows: Tensor, rank: int = 0, size: int = 1) -> list[Tensor]:
        """Places in ``rows`` of the responses that are read at once."""
        lengths = samples.lengths[rows] + torch.tensor([len(samples.prompt_ids[row]) for row in rows])
        budget = self.config.optim.micro_batch_tokens
        return cut_by_tokens(lengths, budget, is_padded=not self.policy.uses_packing, rank=rank, size=size)

    def _places_with_gradient(self, objective: Objective) -> Tensor:
        """Which responses of a mini-batch need to be read: none without an advantage, unless another term has a say."""
        config = self.config.loss
        if config.kl_coef or config.entropy_coef:
            return torch.nonzero(objective.mask.any(1)).squeeze(1)
        places = torch.nonzero(objective.has_gradient).squeeze(1)
        # Where there is none, one will do for a gradient of 0, with which weight decay and moments continue.
        return places if len(places) else torch.nonzero(objective.mask.any(1)).squeeze(1)[:1]

    def _add_up(self, sums: Tensor) -> Tensor:
        """Adds up over all processes what each has of the gradients, and of ``sums``, which are returned."""
        parameters = list(self.policy.model.parameters())
        answers = self.ranks.all_gather_object((sums, [parameter.grad is not None for parameter in parameters]))
        for parameter, *has_grad in zip(parameters, *(has_grad for _, has_grad in answers), strict=True):
            if parameter.grad is None and any(has_grad):
                parameter.grad = torch.zeros_like(parameter)
        if not self.policy.is_sharded:
            self.ranks.all_reduce(parameter.grad for parameter in parameters if parameter.grad is not None)
        return torch.stack([sums for sums, _ in answers]).sum(0)

    def _loss_sums(self, samples: Rollouts, objective: Objective, rows: Tensor, micro: Tensor) -> list[Tensor]:
        """Return what places ``micro`` of ``rows`` add to loss and KL, and the tokens that each bound clips, (N,)."""
        config, chosen = self.config.loss, rows[micro]
        stats = self._score(self.policy, samples, chosen)
        log_ratio = stats.logprob - objective.take(samples.stats.logprob[rows], micro).to(self.policy.device)
        result = objective.evaluate(log_ratio, micro)
        share = objective.take(objective.token_scale, micro).to(self.policy.device)
        loss = (result.loss - config.entropy_coef * share * stats.entropy).sum()
        kl = torch.zeros_like(loss.detach())
        if self.reference:
            with torch.no_grad():
                reference = self._score(self.reference, samples, chosen).logprob
            penalty = (share * kl_penalty(stats.logprob, reference, config.kl_estimator, config.kl_clamp)).sum()
            loss, kl = loss + config.kl_coef * penalty, penalty.detach()
        return [loss, kl, result.is_clipped_low, result.is_clipped_high, result.is_clipped_dual]

    def _score(self, policy: Policy, samples: Rollouts, rows: Tensor) -> TokenStats:
        """Statistics of the responses of ``rows`` under a policy's current weights, as it samples, end to end."""
        prompts = [samples.prompt_ids[row] for row in rows]
        return policy.token_stats(prompts, samples.responses(rows), self.sampling.temperature, self.sampling.truncation)


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of ``step``, from 1, in a run of ``steps``.

    With w warm-up steps and n ``schedule_steps``, ``lr`` times step / w, or (step - 1) / w with ``warmup_from_zero``,
    up to step w; then 1, 1 - x, or (1 + cos(pi x)) / 2 with x = (step - 1 - w) / (n - w). With ``warmup_from_zero``
    these are transformers' ``get_{constant,linear,cosine}_schedule_with_warmup``.
    """
    done, warmup = step - 1, optim.warmup_steps
    if done < warmup:
        return optim.lr * (done if optim.warmup_from_zero else step) / warmup
    total = optim.schedule_steps or steps
    x = min(1.0, (done - warmup) / max(1, total - warmup))
    return optim.lr * {"constant": 1.0, "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2}[optim.schedule]


def mini_batches(config: Config, batch: Batch, step: int) -> Iterator[Tensor]:
    """Yield row indices of each mini-batch of each epoch: whole groups, shuffled, in parts of nearly equal size.

    Responses without a verdict are left out. Truncated ones are in, since they count in constant denominators, though
    not in the loss.
    """
    groups = batch.group_ids[batch.is_kept].unique().numpy()
    for epoch in range(config.optim.epochs):
        rng = generator(config.seed, Stream.MINI_BATCH, step, epoch)
        for part in np.array_split(rng.permutation(groups), config.optim.mini_batches):
            if len(part):
                is_in = torch.isin(batch.group_ids, torch.from_numpy(part)) & batch.has_verdict
                yield torch.nonzero(is_in).squeeze(1)


def captured_responses(config: Config, batch: Batch, step: int) -> Tensor:
    """Kept responses whose after-update values are captured, drawn without regard to anything but the step.

    Not whole groups: what an update does differs more between prompts than between the responses to one.
    """
    kept = torch.nonzero(batch.is_kept).squeeze(1).numpy()
    rng = generator(config.seed, Stream.CAPTURE, step)
    return torch.from_numpy(rng.permutation(kept)[: config.record.after_update_responses])
