"""Hold the responses of a generation batch while a trainer consumes its slices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entrace.trainer.algorithm.method import RolloutView
from entrace.trainer.algorithm.shaping import ShapingConfig, shape
from entrace.trainer.kernels.token_stats import lm_head_grad_norm
from entrace.trainer.seeding import Stream, generator


@dataclass(frozen=True)
class Pass:
    """Hold statistics of tokens from one forward pass, (B, T) each.

    A statistic is None if the pass did not compute it.

    Attributes:
        logprob: Log-probability of each token, nats.
        entropy: Entropy of the distribution at each token, nats.
        log_sum_p2: ln sum_v p_v^2 of that distribution.
        hidden_norm: |h| of the input of the LM head.
    """

    logprob: Tensor
    entropy: Tensor | None = None
    log_sum_p2: Tensor | None = None
    hidden_norm: Tensor | None = None

    @classmethod
    def join(cls, parts: Sequence[Pass]) -> Pass:
        """Concatenate passes; a statistic that any of them lacks is None."""
        names = [name for name in vars(parts[0]) if all(getattr(part, name) is not None for part in parts)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def take(self, rows: Tensor) -> Pass:
        """Return the statistics of ``rows``."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        return Pass(**{name: value[rows.to(value.device)] for name, value in known.items()})


@dataclass
class Generation:
    """Hold the responses that this process generated for one training step.

    Order: that of generation. B responses, T tokens at most.

    Attributes:
        step: Step of the trace, from 1.
        policy_step: Completed steps of the sampling policy.
        policy_version: Optimizer steps of the sampling policy.
        responses: Values per response by name, as ``Recorder.record`` takes them.
        ids: Token ids of each response.
        group: Group of each response, numbered over all processes, (B,).
        rewards: Reward of each response, (B,); NaN without a verdict.
        is_correct: Verdict on each response.
        loss_mask: True at tokens that the policy generated, (B, T) bool.
        is_masked: Responses that the trainer masks from its loss, (B,) bool.
        advantage: Advantage of each response as the trainer computed it, (B,).
        tensors: Prompts and responses as the trainer padded them.
        slices: Loss passes that the trainer takes over the batch, all iterations together.
        temperature: Sampling temperature.
        can_score: ``tensors`` suffice for a forward pass; false with images.
        token: Further values per token, (B, T), by name.
        stats: Statistics under the sampling policy, (B, T), by name; NaN where unknown.
        after: Statistics under the updated policy, (B, T), by name; NaN where unknown.
        shaped: Shaped advantages, (B, T); None if they equal the trainer's.
        in_loss: Responses that a loss has used, (B,) bool.
        known: Responses whose statistics under the sampling policy are known, (B,) bool.
        is_clipped: Tokens whose gradient the ratio clip removed, (B, T) bool; None if unknown.
        updates: Optimizer steps since the generation.
        pending: A loss was computed since the last optimizer step.
        losses: Loss of each pass, rescaled to a full gradient-accumulation window.
        metrics: Values of each loss pass or optimizer step, by column of table ``steps``.
        seconds: Durations, by column of table ``steps``.
    """

    step: int
    policy_step: int
    policy_version: int
    responses: dict[str, list[Any]]
    ids: list[list[int]]
    group: np.ndarray
    rewards: np.ndarray
    is_correct: list[bool | None]
    loss_mask: Tensor
    is_masked: np.ndarray
    advantage: Tensor
    tensors: dict[str, Tensor]
    slices: int
    temperature: float
    can_score: bool = True
    token: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    shaped: Tensor | None = None
    in_loss: np.ndarray = field(init=False)
    known: np.ndarray = field(init=False)
    is_clipped: Tensor | None = None
    updates: int = 0
    pending: bool = False
    losses: list[Tensor] = field(default_factory=list)
    metrics: dict[str, list[Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"rollout_s": 0.0, "reward_s": 0.0, "update_s": 0.0})

    def __post_init__(self) -> None:
        """Start with no statistics and no response in a loss."""
        self.in_loss = np.zeros(len(self.ids), bool)
        self.known = np.zeros(len(self.ids), bool)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each response, (B,)."""
        return np.array([len(ids) for ids in self.ids], np.int64)

    @cached_property
    def is_token(self) -> Tensor:
        """True at the tokens of the responses, false at padding, (B, T) bool."""
        return torch.arange(self.loss_mask.shape[1]) < torch.from_numpy(self.lengths)[:, None]

    @property
    def is_shaped(self) -> bool:
        """Return whether a shaping method was on."""
        return self.shaped is not None

    @property
    def is_complete(self) -> bool:
        """Return True once all losses and the optimizer step after them were taken."""
        return len(self.losses) >= self.slices and not self.pending

    def add(self, found: Pass, rows: Tensor) -> None:
        """Keep the statistics of ``rows`` under the sampling policy."""
        _place(self.stats, found, rows, self.loss_mask)
        self.known[rows.numpy()] = True

    def add_own(self, found: Pass, rows: Tensor) -> None:
        """Keep the statistics of the trainer's own pass over ``rows``.

        Responses whose statistics are known, or that the trainer masks, are excluded.
        """
        places = torch.from_numpy(np.flatnonzero(~(self.is_masked | self.known)[rows.numpy()]))
        if len(places):
            self.add(found.take(places), rows[places])

    def add_after(self, found: Pass, rows: Tensor) -> None:
        """Keep the statistics of ``rows`` under the updated policy."""
        _place(self.after, found, rows, self.loss_mask)

    def add_metric(self, name: str, value: Any) -> None:
        """Add a value to the mean of a column of table ``steps``."""
        if value is not None:
            self.metrics.setdefault(name, []).append(value)

    def payload(self) -> dict[str, Any]:
        """Return all values to record; token values are NumPy arrays, (N,).

        N counts the tokens of all responses.
        """
        shaped = self.advantage[:, None].expand(self.loss_mask.shape) if self.shaped is None else self.shaped
        grids = {"loss_mask": self.loss_mask, "shaped_advantage": shaped, **self.token}
        grids |= {name: self.stats[name] for name in ("logprob", "entropy") if name in self.stats}
        grids |= {f"{name}_after": self.after[name] for name in ("logprob", "entropy") if name in self.after}
        if self.is_clipped is not None:
            grids["is_clipped"] = self.is_clipped
        if "log_sum_p2" in self.stats and "hidden_norm" in self.stats:
            sum_p2 = self.stats["log_sum_p2"].exp()
            hidden_norm = self.stats["hidden_norm"]
            grids["grad_norm"] = lm_head_grad_norm(shaped, self.stats["logprob"], sum_p2, hidden_norm, self.temperature)
        return {
            "lengths": self.lengths,
            "ids": np.concatenate([np.array(ids, np.int64) for ids in self.ids]),
            "token": {name: grid[self.is_token].numpy() for name, grid in grids.items()},
            "response": self.responses,
            "group": self.group,
            "reward": self.rewards,
            "is_correct": self.is_correct,
            "advantage": self.advantage.numpy(),
            "is_masked": self.is_masked,
            "in_loss": self.in_loss,
            "loss": torch.stack(self.losses).double().mean().item() if self.losses else None,
        }


def _place(grids: dict[str, Tensor], found: Pass, rows: Tensor, loss_mask: Tensor) -> None:
    for name, values in vars(found).items():
        if values is None:
            continue
        if name not in grids:
            grids[name] = torch.full(loss_mask.shape, torch.nan)
        width = min(values.shape[1], loss_mask.shape[1])
        grids[name][rows, :width] = values[:, :width].float().cpu()


def join(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the payloads of all processes as one, in order of rank."""
    first = parts[0]
    joined: dict[str, Any] = {
        name: np.concatenate([part[name] for part in parts])
        for name, value in first.items()
        if isinstance(value, np.ndarray)
    }
    joined["is_correct"] = [value for part in parts for value in part["is_correct"]]
    joined["response"] = {
        name: [value for part in parts for value in part["response"][name]] for name in first["response"]
    }
    # Whether a process scored any response after the update may differ.
    names = dict.fromkeys(name for part in parts for name in part["token"])
    joined["token"] = {
        name: np.concatenate([part["token"].get(name, np.full(part["ids"].shape, np.nan)) for part in parts])
        for name in names
    }
    losses = [part["loss"] for part in parts if part.get("loss") is not None]
    joined["loss"] = sum(losses) / len(losses) if losses else None
    return joined


def split_by_response(values: np.ndarray, lengths: np.ndarray) -> list[Any]:
    """Split values of tokens by response.

    None replaces a response without known values, and a single unknown value.

    Args:
        values: Values of the tokens of all responses, (N,); NaN or infinite where unknown.
        lengths: Tokens of each response, (B,).
    """
    rows = np.split(values, np.cumsum(lengths)[:-1])
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return rows
    return [_with_none(row) for row in rows]


def _with_none(row: np.ndarray) -> Any:
    is_known = np.isfinite(row)
    if is_known.all():
        return row
    if not is_known.any():
        return None
    return [value if known else None for value, known in zip(row.tolist(), is_known, strict=True)]


def none_for_nan(values: Iterable[float]) -> list[float | None]:
    """Return numbers as a list, with None for NaN."""
    return [None if value != value else float(value) for value in values]


def shape_all(
    parts: Sequence[Mapping[str, Any]],
    config: ShapingConfig,
    seed: int,
    step: int,
    plateau_step: int | None,
) -> tuple[Tensor, bool]:
    """Shape the advantages of the responses of all processes.

    Also return whether a shaping method was on. Methods see generated tokens only; context between them is removed.

    Args:
        parts: Of each process ``logprob``, ``entropy``, and ``loss_mask``, (B, T), ``group``, ``correct``, and
            ``reward``, (B,), and ``advantage``, (B,) or (B, T).
        config: Methods, parameters, and windows.
        seed: Seed of the run.
        step: Step of the trace.
        plateau_step: First step of the plateau, if it has been detected.

    Returns:
        Advantages (B, T) over all processes; tokens of context keep the trainer's.
    """
    width = max(part["loss_mask"].shape[1] for part in parts)
    logprob, entropy, mask = (
        torch.cat([torch.nn.functional.pad(part[name], (0, width - part[name].shape[1])) for part in parts])
        for name in ("logprob", "entropy", "loss_mask")
    )
    if parts[0]["advantage"].dim() == 1:
        advantage = torch.cat([part["advantage"] for part in parts])[:, None].expand(mask.shape)
    else:
        advantage = torch.cat(
            [torch.nn.functional.pad(p["advantage"], (0, width - p["advantage"].shape[1])) for p in parts]
        )
    order = (~mask).int().argsort(dim=1, stable=True)
    is_token = torch.arange(width) < mask.sum(1, keepdim=True)
    view = RolloutView(
        torch.where(is_token, logprob.gather(1, order), 0),
        torch.where(is_token, entropy.gather(1, order), 0),
        torch.tensor([value for part in parts for value in part["correct"]]),
        is_token,
        torch.from_numpy(np.concatenate([part["group"] for part in parts])),
        torch.from_numpy(np.concatenate([part["reward"] for part in parts])).float(),
        generator(seed, Stream.SHAPING, step),
    )
    shaped, is_on = shape(advantage.gather(1, order), view, config, step, plateau_step)
    placed = torch.empty_like(shaped).scatter_(1, order, shaped)
    return torch.where(mask, placed, advantage), is_on
