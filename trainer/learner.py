"""Update the policy over epochs, mini-batches, and micro-batches.

Each mini-batch has one objective per optimizer step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from entrace.trainer.algorithm.losses import kl_penalty
from entrace.trainer.algorithm.mini_batch import Objective
from entrace.trainer.config import UPDATE_MEMORY, Config, OptimConfig
from entrace.trainer.faults import TrainingError, memory_advice
from entrace.trainer.kernels.packing import cut_by_tokens
from entrace.trainer.kernels.token_stats import TokenStats, VocabularySums
from entrace.trainer.model.policy import Policy
from entrace.trainer.parallel.gradients import sum_gradients
from entrace.trainer.parallel.ranks import ALONE, Ranks
from entrace.trainer.parallel.sharding import full_tensor
from entrace.trainer.rollouts import Batch, view_rollouts
from entrace.trainer.sampling.samples import Rollouts, SamplingParams
from entrace.trainer.seeding import Stream, generator

log = logging.getLogger("entrace")

# Loss scales of the backward pass: in float16, small gradients would underflow without. If gradients overflow, the next
# scale is tried within the same update, so that no update is skipped and no state is kept.
LOSS_SCALES = {torch.float16: (2.0**12, 2.0**8, 2.0**4, 1.0)}

# Fields of statistics that are recorded of passes besides sampling.
RECORDED = ("logprob", "entropy")
VOCABULARY_SUMS = tuple(field.name for field in fields(VocabularySums))


@dataclass
class UpdateMetrics:
    """Means over the optimizer steps of a training step; 0 if no group was kept.

    Attributes:
        is_clipped: Tokens whose gradient was cut off by a bound on the ratio in at least one optimizer step, (B, T).
        loss: Policy loss, with its KL and entropy terms.
        grad_norm: Gradient norm before clipping.
        kl: KL estimate, nats; None without a reference policy.
        clip_frac_low: Share of tokens clipped at the lower bound.
        clip_frac_high: Share of tokens clipped at the upper bound.
        clip_frac_dual: Share of tokens clipped at the dual bound.
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
    """Statistics of a step's tokens under the updated weights.

    Attributes:
        is_evaluated: Responses that were evaluated again, (B,) bool.
        logprob_after: Log-probabilities under the updated weights, nats, (B, T); 0 in all other responses.
        entropy_after: Entropies under the updated weights, nats, (B, T); 0 in all other responses.
        is_clipped: As in ``UpdateMetrics``.
    """

    is_evaluated: Tensor
    logprob_after: Tensor
    entropy_after: Tensor
    is_clipped: Tensor


class Learner:
    """Policy, optimizer, and the frozen reference policy.

    The reference exists only if the loss has a KL term or the reference policy's values are recorded.
    """

    def __init__(self, config: Config, policy: Policy, ranks: Ranks = ALONE) -> None:
        """Build AdamW.

        Weight decay excludes vectors (norms and biases) unless ``optim.decay_all`` is set.
        """
        self.config, self.policy, self.ranks = config, policy, ranks
        self.sampling = SamplingParams.of(config.rollout)
        parameters = [p for p in policy.model.parameters() if p.requires_grad]
        optim = config.optim
        decayed = [p for p in parameters if p.ndim > 1 or optim.decay_all]
        spared = [p for p in parameters if p.ndim <= 1 and not optim.decay_all]
        groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)
        needs_reference = config.loss.kl_coef or config.record.reference
        self.reference = Policy.load(config.policy) if needs_reference else None
        if config.record.vocabulary_sums:
            log.info("record.vocabulary_sums: one more forward pass per step, in plain torch on every device")

    @property
    def lr(self) -> float:
        """Learning rate of the latest update."""
        return self.optimizer.param_groups[0]["lr"]

    def update(self, batch: Batch, objectives: Iterable[tuple[Tensor, Objective]], step: int) -> UpdateMetrics:
        """Take one optimizer step per objective.

        Args:
            batch: The step's responses.
            objectives: Rows of each mini-batch and the loss to minimize on them, as from ``make_objectives``.
            step: Current step, from 1; decides the learning rate.

        Returns:
            Means over the optimizer steps.

        Raises:
            TrainingError: the loss or the gradient is NaN or infinite, or memory ran out; the weights are those before
                that optimizer step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optim, step, self.config.steps)
        is_clipped = torch.zeros_like(batch.rollouts.response_mask)
        with memory_advice(self.config, f"updating at step {step}", UPDATE_MEMORY):
            updates = [
                self._step_optimizer(batch.rollouts, objective, rows, step, is_clipped)
                for rows, objective in objectives
            ]
        if not updates:
            return UpdateMetrics(is_clipped)
        is_clipped = torch.stack(self.ranks.all_gather_object(is_clipped)).any(0)
        mean = torch.tensor(updates, dtype=torch.float64).mean(0).tolist()
        loss, grad_norm, kl, *clipped = mean
        return UpdateMetrics(is_clipped, loss, grad_norm, kl if self.config.loss.kl_coef else None, *clipped)

    @torch.no_grad()
    def capture(self, batch: Batch, metrics: UpdateMetrics, rows: Tensor) -> AfterUpdate:
        """Evaluate responses ``rows``, (n,), under the updated weights.

        Each process evaluates its own responses.
        """
        is_evaluated = torch.zeros_like(batch.is_own)
        is_evaluated[rows] = True
        is_evaluated &= batch.is_own
        with memory_advice(self.config, "capturing after-update values", UPDATE_MEMORY):
            found = self._evaluate(self.policy, batch.rollouts, is_evaluated, self._token_stats, RECORDED)
        return AfterUpdate(is_evaluated, found["logprob"], found["entropy"], metrics.is_clipped)

    @torch.no_grad()
    def measure(self, batch: Batch, is_stored: Tensor) -> dict[str, Tensor]:
        """Evaluate the recorded values that sampling does not give.

        Call this before the update.

        Args:
            batch: The step's responses.
            is_stored: Responses whose tokens are stored, (B,) bool; each process evaluates its own.

        Returns:
            Columns of table ``tokens`` by name, (B, T); 0 in all other responses.
        """
        rollouts, rows, found = batch.rollouts, is_stored & batch.is_own, {}
        if self.config.record.vocabulary_sums:
            with memory_advice(self.config, "summing over the vocabulary", UPDATE_MEMORY):
                found |= self._evaluate(self.policy, rollouts, rows, self._vocabulary_sums, VOCABULARY_SUMS)
        if self.config.record.reference and self.reference:
            with memory_advice(self.config, "evaluating the reference policy", UPDATE_MEMORY):
                of = self._evaluate(self.reference, rollouts, rows, self._token_stats, RECORDED)
            found |= {f"reference_{name}": values for name, values in of.items()}
        return found

    def _evaluate(
        self,
        policy: Policy,
        rollouts: Rollouts,
        is_evaluated: Tensor,
        statistics: Callable[[Policy, Rollouts, Tensor], TokenStats | VocabularySums],
        names: Sequence[str],
    ) -> dict[str, Tensor]:
        """Return the fields ``names`` of the statistics of responses, by name, (B, T).

        Responses outside ``is_evaluated``, (B,) bool, get 0.
        """
        chosen = torch.nonzero(is_evaluated).squeeze(1)
        placed = {name: torch.zeros(rollouts.response_ids.shape) for name in names}
        with policy.unsharded():
            for micro in self._micro_batches(rollouts, chosen):
                rows = chosen[micro]
                found = statistics(policy, rollouts, rows)
                for name, values in placed.items():
                    values[rows] = rollouts.place(getattr(found, name), rows)
        return placed

    def _step_optimizer(
        self, rollouts: Rollouts, objective: Objective, rows: Tensor, step: int, is_clipped: Tensor
    ) -> list[float]:
        """Take one optimizer step, and mark clipped tokens in ``is_clipped``.

        Return loss, gradient norm, KL, and the shares of tokens clipped at the lower, upper, and dual bound.
        """
        loss = kl = grad_norm = math.nan
        counts: list[float] = []
        for scale in LOSS_SCALES.get(self.policy.dtype, (1.0,)):
            loss, kl, *counts = self._backward(rollouts, objective, rows, is_clipped, scale)
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
        self, rollouts: Rollouts, objective: Objective, rows: Tensor, is_clipped: Tensor, scale: float
    ) -> list[float]:
        """Accumulate gradients, and mark clipped tokens in ``is_clipped``.

        Return loss, KL, and the numbers of tokens clipped at the lower, upper, and dual bound.
        """
        sums = torch.zeros(5, dtype=torch.float64)
        self.optimizer.zero_grad(set_to_none=True)
        places, ranks = self._places_with_gradient(objective), self.ranks
        own = [places[part] for part in self._micro_batches(rollouts, rows[places], ranks.rank, ranks.size)]
        # All processes gather sharded weights together: one that has finished repeats a response without effect.
        idle = max(ranks.all_gather_object(len(own))) - len(own) if self.policy.is_sharded else 0
        for micro in own:
            loss, kl, *clips = self._loss_sums(rollouts, objective, rows, micro)
            (loss * scale).backward()
            sums += torch.stack([loss.detach(), kl, *(clip.sum() for clip in clips)]).cpu().double()
            is_clipped[rows[micro]] |= rollouts.place(torch.stack(clips).any(0), rows[micro])
        for _ in range(idle):
            (self._loss_sums(rollouts, objective, rows, places[:1])[0] * 0).backward()
        parameters = self.policy.model.parameters()
        sums = sum_gradients(parameters, sums, ranks, is_sharded=self.policy.is_sharded)
        for parameter in self.policy.model.parameters():
            if scale != 1 and parameter.grad is not None:
                parameter.grad /= scale
        return sums.tolist()

    def _micro_batches(self, rollouts: Rollouts, rows: Tensor, rank: int = 0, size: int = 1) -> list[Tensor]:
        """Split ``rows`` into micro-batches; return positions in ``rows``."""
        lengths = rollouts.lengths[rows] + torch.tensor([len(rollouts.prompt_ids[row]) for row in rows])
        budget = self.config.optim.micro_batch_tokens
        return cut_by_tokens(lengths, budget, is_padded=not self.policy.uses_packing, rank=rank, size=size)

    def _places_with_gradient(self, objective: Objective) -> Tensor:
        """Return the positions of responses that can have a gradient.

        If the loss has a KL or entropy term, these are all responses with tokens.
        """
        config = self.config.loss
        if config.kl_coef or config.entropy_coef or objective.weights.entropy_coef:
            return torch.nonzero(objective.mask.any(1)).squeeze(1)
        places = torch.nonzero(objective.has_gradient).squeeze(1)
        # If there is none, one response gives a gradient of 0, with which weight decay and moments continue.
        return places if len(places) else torch.nonzero(objective.mask.any(1)).squeeze(1)[:1]

    def _loss_sums(self, rollouts: Rollouts, objective: Objective, rows: Tensor, micro: Tensor) -> list[Tensor]:
        """Return sums of loss and KL over some rows, and the clipped tokens, (N,).

        The rows are at positions ``micro`` of ``rows``. There is one mask of clipped tokens per bound: lower, upper,
        dual.
        """
        config, chosen = self.config.loss, rows[micro]
        stats = self._token_stats(self.policy, rollouts, chosen)
        log_ratio = stats.logprob - objective.take(rollouts.old_logprobs[rows], micro).to(self.policy.device)
        result = objective.evaluate(log_ratio, micro, stats.entropy.detach())
        token_scale, regularized_scale, entropy_weights = (
            objective.take(values, micro).to(self.policy.device)
            for values in (objective.token_scale, objective.regularized_scale, objective.entropy_weights)
        )
        loss = (result.loss - entropy_weights * stats.entropy).sum()
        kl = torch.zeros_like(loss.detach())
        if config.kl_coef and self.reference:
            with torch.no_grad():
                reference = self._token_stats(self.reference, rollouts, chosen).logprob
            penalty = kl_penalty(stats.logprob, reference, config.kl_estimator, config.kl_clamp)
            loss = loss + config.kl_coef * (regularized_scale * penalty).sum()
            kl = (token_scale * penalty).sum().detach()
        return [loss, kl, result.is_clipped_low, result.is_clipped_high, result.is_clipped_dual]

    def _token_stats(self, policy: Policy, rollouts: Rollouts, rows: Tensor) -> TokenStats:
        """Return statistics of response tokens under a policy's current weights, (N,)."""
        prompts, sampling = [rollouts.prompt_ids[row] for row in rows], self.sampling
        return policy.token_stats(prompts, rollouts.responses(rows), sampling.temperature, sampling.truncation)

    def _vocabulary_sums(self, policy: Policy, rollouts: Rollouts, rows: Tensor) -> VocabularySums:
        """Return vocabulary sums in the layout of ``_token_stats``, without gradient."""
        prompts, sampling = [rollouts.prompt_ids[row] for row in rows], self.sampling
        return policy.vocabulary_sums(prompts, rollouts.responses(rows), sampling.temperature, sampling.truncation)


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


def make_objectives(
    config: Config, batch: Batch, advantages: Tensor, step: int, past_entropy: Sequence[float] = ()
) -> list[tuple[Tensor, Objective]]:
    """Return the rows of each mini-batch of a step, with the objective.

    The objective is sum_t c_t (w_t L_t + v_t |ln rho_t|). A method with several objectives per mini-batch takes all
    mini-batches with the first, then all with the second.

    Args:
        config: Its ``loss`` chooses w, v, and c; see ``algorithm.mini_batch``.
        batch: The step's responses.
        advantages: Shaped advantages, (B, T).
        step: Current step, from 1; decides the order of mini-batches and the random numbers of methods that draw.
        past_entropy: Mean token entropy of each earlier step, nats.
    """
    view = view_rollouts(batch, config.seed, Stream.LOSS, step)
    mask = view.response_mask & batch.is_kept[:, None]
    view = replace(view, response_mask=mask, past_entropy=tuple(past_entropy))
    longest = config.rollout.max_response_tokens
    built = [
        [(rows, objective) for objective in Objective.of(config.loss, advantages[rows], view.take(rows), longest)]
        for rows in mini_batches(config, batch, step)
    ]
    return [pair for of_pass in zip(*built, strict=True) for pair in of_pass]


def mini_batches(config: Config, batch: Batch, step: int) -> Iterator[Tensor]:
    """Yield the rows of each mini-batch of each epoch.

    Groups stay whole. They are shuffled and divided into parts of nearly equal size. Responses without a verdict are
    excluded. Truncated responses are included: with ``loss.mask_truncated`` they count in constant denominators, but
    not in the loss.
    """
    groups = batch.group_ids[batch.is_kept].unique().numpy()
    for epoch in range(config.optim.epochs):
        rng = generator(config.seed, Stream.MINI_BATCH, step, epoch)
        for part in np.array_split(rng.permutation(groups), config.optim.mini_batches):
            if len(part):
                is_in = torch.isin(batch.group_ids, torch.from_numpy(part)) & batch.has_verdict
                yield torch.nonzero(is_in).squeeze(1)
