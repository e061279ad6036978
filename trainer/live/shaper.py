"""Shape the advantages of TRL's batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from entrace.analysis.trace.errors import InputError
from entrace.trainer.algorithm.shaping import NONE, waits_for_plateau
from entrace.trainer.live.arguments import Arguments
from entrace.trainer.live.generation import Generation, shape_all


class Shaper:
    """Shape advantages, and detect the plateau that shaping may wait for.

    Attributes:
        plateau: Detector that has seen the recorded steps.
        is_on: A shaping method is configured.
        is_early: It needs a whole batch before the first of several slices.
        waits: It starts at the plateau.
    """

    def __init__(self, trainer: Any, arguments: Arguments) -> None:
        """Start without any step seen."""
        self._trainer, self._config = trainer, arguments.shaping
        self.plateau = arguments.detector([])
        self.is_on = self._config.method != NONE
        self.is_early = self.is_on and trainer.args.steps_per_generation > 1
        self.waits = waits_for_plateau(self._config)

    def end_step(self, row: Mapping[str, Any]) -> None:
        """Pass a step to the plateau detector.

        ``row`` is the step's row of the table ``steps`` on the main process, and empty on the others.
        """
        ((entropy, accuracy),) = broadcast_object_list([(row.get("entropy_token_mean"), row.get("accuracy"))])
        self.plateau.update(entropy or 0.0, accuracy or 0.0)

    def shape(self, batch: Generation, output: Any, rows: Tensor) -> None:
        """Shape the advantages of a batch whose statistics are known.

        ``rows`` are the responses of ``output``.
        """
        own = {name: batch.stats[name].nan_to_num(0.0) for name in ("logprob", "entropy")}
        own |= {"loss_mask": batch.loss_mask, "advantage": batch.advantage}
        own |= {"correct": [bool(c) for c in batch.is_correct], "group": batch.group, "reward": batch.rewards}
        parts = gather_object([own])
        # The methods see the groups of all processes.
        shaped, is_on = shape_all(parts, self._config, self._trainer.args.seed, batch.step, self.plateau.plateau_step)
        if not is_on:
            return
        start = sum(len(part["advantage"]) for part in parts[: self._trainer.accelerator.process_index])
        batch.shaped = shaped[start : start + len(batch.ids), : batch.loss_mask.shape[1]].contiguous()
        given = batch.shaped[rows.cpu()].to(output["advantages"])
        if _is_sequence_level(self._trainer):
            given = self._per_response(batch, given, rows)
        output["advantages"] = given

    def _per_response(self, batch: Generation, shaped: Tensor, rows: Tensor) -> Tensor:
        """Return one advantage per response, for a trainer that has no other.

        Raises:
            InputError: a method shapes the tokens of a response differently.
        """
        mask = batch.loss_mask[rows.cpu()].to(shaped.device)
        low = torch.where(mask, shaped, torch.inf).amin(1)
        high = torch.where(mask, shaped, -torch.inf).amax(1)
        if not bool(((high == low) | ~mask.any(1)).all()):
            raise InputError(
                f"shaping: {self._config.method} gives the tokens of a response different advantages, and "
                f"{type(self._trainer).__name__} has one per response; choose a method such as ppl, or GRPO"
            )
        return torch.where(mask.any(1), high, 0.0)


def _is_sequence_level(trainer: Any) -> bool:
    from trl.trainer.rloo_trainer import RLOOTrainer

    return isinstance(trainer, RLOOTrainer)
