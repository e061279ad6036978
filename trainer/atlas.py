"""Weigh recorded tokens as each method would, without training.

The weight of a token is w = -d loss / d ln p, taken from the registered shaping and loss by automatic differentiation.
A step is one mini-batch, and each method has its own settings on top of the defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entrace.trainer.ablation.arms import describe_methods, method_settings
from entrace.trainer.algorithm.advantages import group_relative_advantage
from entrace.trainer.algorithm.method import NotRecordedError, RolloutView
from entrace.trainer.algorithm.mini_batch import Objective
from entrace.trainer.algorithm.shaping import NONE, shape
from entrace.trainer.config import Config, build_config
from entrace.trainer.seeding import Stream, generator
from entrace.trainer.settings import merge

# Sections of a config that change how recorded tokens are weighed. Others change which tokens are sampled.
WEIGHING = {"shaping", "loss"}
# Difference of advantages that rounding to float32 explains.
SAME_ADVANTAGE = 1e-4


@dataclass(frozen=True)
class RecordedStep:
    """Responses of one step and their tokens, concatenated in response order.

    Attributes:
        step: The step, from 1.
        row: Response of each token, (N,), not decreasing.
        group_ids: Group of each response, (B,), integers from 0.
        is_correct: (B,) bool; False without a verdict.
        is_kept: Responses in the update, (B,) bool.
        rewards: Reward plus length penalty, (B,); NaN without a verdict.
        advantage: Before shaping, (N,).
        logprob: (N,), nats.
        entropy: (N,), nats; None if it was not recorded.
        log_ratio: ln p after the update - ln p, (N,); NaN where it was not recorded.
        entropy_after: After the update, (N,), nats; NaN where it was not recorded.
    """

    step: int
    row: np.ndarray
    group_ids: np.ndarray
    is_correct: np.ndarray
    is_kept: np.ndarray
    rewards: np.ndarray
    advantage: np.ndarray
    logprob: np.ndarray
    entropy: np.ndarray | None
    log_ratio: np.ndarray
    entropy_after: np.ndarray


@dataclass(frozen=True)
class _RecordedView(RolloutView):
    """A view that raises an error if a method reads what the trace does not hold.

    Attributes:
        lacks_entropy: Entropies were not recorded.
        lacks_responses: Tokens of some responses are not stored.
        read: What the method has read.
    """

    lacks_entropy: bool = False
    lacks_responses: bool = False
    read: set[str] = field(default_factory=set)

    def __getattribute__(self, name: str) -> Any:
        find = super().__getattribute__
        read = find("read")
        read.add(name)
        if name == "entropy" and find("lacks_entropy"):
            raise NotRecordedError("needs tokens.entropy, which was not recorded")
        if find("lacks_responses") and "group_ids" in read and read & {"logprobs", "entropy"}:
            raise NotRecordedError("compares the tokens of whole groups, of which only some responses are stored")
        return find(name)


@dataclass
class Method:
    """A method as the atlas weighs it.

    Attributes:
        name: Name of the method.
        kind: Where it acts.
        equation: From its docstring.
        config: Settings that select it.
        lacks: Reason why recorded tokens cannot be weighed; empty if they can.
        acts_through_ratio: Whether its loss differs from that of plain GRPO only where probabilities have moved.
        passes: Optimizer steps per mini-batch.
    """

    name: str
    kind: str
    equation: str
    config: Config
    lacks: str = ""
    acts_through_ratio: bool = False
    passes: int = 1


def find_methods(own: Iterable[str] = (), overrides: Mapping[str, Any] | None = None) -> list[Method]:
    """Return every registered method, plain GRPO first, and the user's ``own``.

    ``overrides`` are nested config values.

    Raises:
        InputError: a method is unknown, or the overrides do not fit it.
    """
    found = []
    for name, entry in sorted(describe_methods(own).items(), key=lambda item: item[0] != NONE):
        settings = method_settings(name)
        config = build_config(merge(dict(overrides or {}), settings), source=f"method {name}")
        changed = ", ".join(sorted(settings.keys() - WEIGHING))
        lacks = f"changes which responses are sampled or kept ({changed})" if changed else ""
        found.append(Method(name, entry["kind"], entry["equation"], config, lacks))
    return found


class Weigher:
    """Weigh tokens, one step at a time, by each method that can be represented."""

    def __init__(self, methods: Sequence[Method]) -> None:
        """Start with all methods.

        A method is marked as not representable at the first step that shows it.
        """
        self.methods = list(methods)
        self._plain = next(method.config.loss for method in methods if method.name == NONE)

    def weigh(self, recorded: RecordedStep) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return the weights of all tokens, (N,), by method.

        Returns:
            Weights at ratio 1, and at the recorded ratios, which are NaN where there is none; the latter is empty if
            the step has no values after its update.
        """
        batch = _Padded(recorded)
        sampled, after = {}, {}
        for method in self.methods:
            if method.lacks:
                continue
            try:
                objectives = self._build(method, batch)
            except NotRecordedError as error:
                method.lacks = str(error)
                continue
            if method.lacks:
                continue
            sampled[method.name] = batch.differentiate(objectives, torch.zeros(batch.size, dtype=torch.float64), None)
            if batch.has_after:
                log_ratio = batch.log_ratio.nan_to_num(0.0)
                weights = batch.differentiate(objectives, log_ratio, batch.entropy_after)
                after[method.name] = np.where(np.isnan(recorded.log_ratio), np.nan, weights)
        return sampled, after

    def _build(self, method: Method, batch: _Padded) -> list[Objective]:
        config, step = method.config, batch.recorded.step
        advantages = batch.advantages(config.loss.normalize_std)
        # A window that starts at the plateau is open.
        shaped, _ = shape(advantages, batch.view(Stream.SHAPING), config.shaping, step, plateau_step=step)
        view = batch.view(Stream.LOSS, is_kept=True)
        objectives = Objective.of(config.loss, shaped, view, config.rollout.max_response_tokens)
        loss, plain = config.loss, self._plain
        method.passes = len(objectives)
        method.acts_through_ratio = any(not objective.weights.is_plain for objective in objectives) or any(
            getattr(loss, key) != getattr(plain, key) for key in ("ratio", "clip_low", "clip_high", "dual_clip")
        )
        if any(objective.weights.entropy_coef is not None for objective in objectives):
            method.lacks = "acts on the entropy of the whole distribution, not on the tokens"
        return objectives


class _Padded:
    """A recorded step as padded tensors."""

    def __init__(self, recorded: RecordedStep) -> None:
        self.recorded = recorded
        count = len(recorded.group_ids)
        lengths = np.bincount(recorded.row, minlength=count)
        place = np.arange(len(recorded.row)) - np.repeat(lengths.cumsum() - lengths, lengths)
        self._at = torch.from_numpy(recorded.row), torch.from_numpy(place)
        self._shape = count, max(1, int(lengths.max(initial=0)))
        self.mask = self._pad(np.ones(len(place), bool))
        self.is_kept = torch.from_numpy(recorded.is_kept)
        # The order in which ``Objective.take`` gives the tokens of all kept responses.
        self._is_kept_token = recorded.is_kept[recorded.row]
        self.size = int(self._is_kept_token.sum())
        self.log_ratio, self.entropy_after = (
            torch.from_numpy(values[self._is_kept_token].astype(float))
            for values in (recorded.log_ratio, recorded.entropy_after)
        )
        self.has_after = bool(self.log_ratio.isfinite().any())
        if self.has_after and recorded.entropy is not None:
            entropy = torch.from_numpy(recorded.entropy[self._is_kept_token].astype(float))
            self.entropy_after = torch.where(self.entropy_after.isnan(), entropy, self.entropy_after)

    def view(self, stream: Stream, is_kept: bool = False) -> RolloutView:
        """Return the view that methods receive.

        ``is_kept`` excludes the tokens of responses outside the update.
        """
        recorded = self.recorded
        entropy = recorded.logprob if recorded.entropy is None else recorded.entropy
        return _RecordedView(
            self._pad(recorded.logprob.astype(float)),
            self._pad(entropy.astype(float)),
            torch.from_numpy(recorded.is_correct),
            self.mask & self.is_kept[:, None] if is_kept else self.mask,
            torch.from_numpy(recorded.group_ids),
            torch.from_numpy(recorded.rewards.astype(float)),
            generator(0, stream, recorded.step),
            lacks_entropy=recorded.entropy is None,
            lacks_responses=not self.mask.any(1).all(),
        )

    def advantages(self, normalize_std: bool) -> Tensor:
        """Return the advantages before shaping, (B, T).

        They are the recorded ones, unless the run normalized them otherwise; then they are those of the rewards.
        """
        recorded = self._pad(self.recorded.advantage.astype(float))
        rewards = torch.from_numpy(self.recorded.rewards.astype(float))
        is_counted = rewards.isfinite()
        if not is_counted.any():
            if normalize_std:
                return recorded
            raise NotRecordedError("needs rollouts.reward, which was not recorded")
        groups = torch.from_numpy(self.recorded.group_ids)
        normalized, centered = (
            group_relative_advantage(rewards.nan_to_num(0.0), groups, normalize_std=choice, is_counted=is_counted)
            for choice in (True, False)
        )
        if not normalize_std:
            return centered[:, None].expand(self._shape)
        distances = [((recorded - values[:, None]) * self.mask).abs().max() for values in (normalized, centered)]
        is_centered = distances[1] < SAME_ADVANTAGE < distances[0]
        return normalized[:, None].expand(self._shape) if is_centered else recorded

    def differentiate(self, objectives: Sequence[Objective], log_ratio: Tensor, entropy: Tensor | None) -> np.ndarray:
        """Return -d loss / d ln p of all tokens, (N,), summed over passes.

        Tokens outside the update get 0.
        """
        log_ratio = log_ratio.requires_grad_()
        rows = torch.arange(self._shape[0])
        for objective in objectives:
            objective.evaluate(log_ratio, rows, entropy).loss.sum().backward()
        weights = np.zeros(len(self._is_kept_token))
        if log_ratio.grad is not None:
            weights[self._is_kept_token] = -log_ratio.grad.numpy()
        return weights

    def _pad(self, values: np.ndarray) -> Tensor:
        padded = torch.zeros(self._shape, dtype=torch.from_numpy(values).dtype)
        padded[self._at] = torch.from_numpy(values)
        return padded
