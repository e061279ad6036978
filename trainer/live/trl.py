"""Record TRL's trainers while they train.

``Traced`` is a mix-in over ``GRPOTrainer``, ``RLOOTrainer``, and their subclasses.

TRL samples a generation batch, scores it, shuffles it, and cuts it into slices; each slice passes through the loss once
per iteration. A step of the trace is one generation batch, whatever ``global_step`` counts. Statistics of tokens come
from forward passes that TRL makes anyway: the one that it takes for the old log-probabilities, or else the first pass
of the loss, which precedes every update if TRL needs no old log-probabilities. An extra pass is made only

- over responses that ``mask_truncated_completions`` hides from both,
- over everything, if a shaping method needs the whole batch before the first slice, or if dropout is on.

Nothing here draws from the random generators of torch, so that without shaping the weights equal those of plain TRL.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from entrace.analysis.trace.errors import InputError
from entrace.trainer.algorithm.shaping import ShapingConfig
from entrace.trainer.live.arguments import Arguments, check_version, shaping_config
from entrace.trainer.live.tracer import Tracer

# Placeholder for type checkers: at run time a trainer of TRL follows in the MRO.
_Base: Any = object


class Traced(_Base):
    """Record a trainer of TRL: ``class Mine(Traced, GRPOTrainer)``.

    Every argument of the trainer stays as it is; the keyword arguments below are added.
    """

    def __init__(
        self,
        *args: Any,
        trace: str | Path,
        shaping: str | Sequence[str] | Mapping[str, Any] | ShapingConfig | None = None,
        correct: str | float | None = None,
        after_update_every: int = 5,
        after_update_responses: int | None = None,
        flush_every: int = 10,
        arm: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the trainer; the trace is opened when training begins.

        Args:
            *args: Arguments of the trainer.
            trace: Folder of the trace; its name is the run id.
            shaping: Methods of advantage shaping, applied in order, by name or as ``module:function``; or a mapping
                like section ``[shaping]`` of a config, with parameters (default: none).
            correct: Name of the reward function whose full score of 1 means correct, or the total reward from which a
                response is correct (default: ``accuracy_reward``, or the only reward function).
            after_update_every: Steps between captures of log-probability and entropy after the update (default 5; 0 =
                none). Each takes a forward pass.
            after_update_responses: Responses per capture, chosen at random (default: an eighth of the batch, 24 at
                most, so that recording stays cheap).
            flush_every: Steps per Parquet file (default 10); a checkpoint flushes as well.
            arm: Name of the arm, to compare runs (default: the shaping methods).
            **kwargs: Arguments of the trainer.

        Raises:
            InputError: an argument is invalid.
        """
        check_version()
        chosen = Arguments(
            run_dir=Path(trace),
            shaping=shaping_config(shaping),
            correct=correct,
            after_update_every=after_update_every,
            after_update_responses=after_update_responses,
            flush_every=flush_every,
            arm=arm,
        )
        self._entrace: Tracer | None = None
        super().__init__(*args, **kwargs)
        if self.args.auto_find_batch_size:
            raise InputError("auto_find_batch_size: not supported, because it starts training again; set a batch size")
        self._entrace = Tracer(self, chosen)
        self.add_callback(_Callback(self._entrace))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and close the trace however training ends."""
        if self._entrace is None:
            return super().train(*args, **kwargs)
        with self._entrace.closing():
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take one pass, and keep its loss and duration."""
        if self._entrace is None:
            return super().training_step(*args, **kwargs)
        with self._entrace.timed_pass() as losses:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.detach() * self.current_gradient_accumulation_steps)
        return loss

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Evaluate, and record the responses."""
        named = eval_dataset if eval_dataset is not None else self.eval_dataset
        # Trainer calls this method again for every set of a dictionary.
        if self._entrace is None or isinstance(named, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset = self.eval_dataset[named] if isinstance(named, str) and isinstance(self.eval_dataset, dict) else named
        with self._entrace.evaluation(metric_key_prefix, dataset):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if self._entrace is None:
            return super()._generate_and_score_completions(inputs)
        with self._entrace.generation() as scored:
            scored.output = super()._generate_and_score_completions(inputs)
        return scored.output

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        started = time.perf_counter()
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._entrace is not None:
            self._entrace.keep_rewards(inputs, prompts, completions, completion_ids_list, rewards, started)
        return rewards

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._entrace is None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        with self._entrace.passes.following(model, kwargs) as kept:
            found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            kept.extend(found[:2])
        return found

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        if self._entrace is None:
            return super()._compute_loss(model, inputs)
        with self._entrace.loss_pass(inputs):
            return super()._compute_loss(model, inputs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # The trace first: a checkpoint whose steps are not durable could not resume.
        if self._entrace is not None:
            self._entrace.before_checkpoint()
        super()._save_checkpoint(model, trial)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if self._entrace is not None:
            self._entrace.finish_steps(grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)


class _Callback(TrainerCallback):
    """Tell the tracer about the beginning of training and about optimizer steps."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tracer.open()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:
            self._tracer.lr = float(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tracer.count_update()
