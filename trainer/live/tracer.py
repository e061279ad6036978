"""Follow a trainer of TRL, and record each generation batch as a step.

A batch is complete once every slice has passed through the loss in every iteration and the optimizer step after that
was taken. Statistics of tokens come from TRL's own forward passes where these see the sampling policy; see
``entrace.trainer.live.trl``.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entrace.analysis.trace.batch import mean_of_known
from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.groups import rows_by_group
from entrace.analysis.trace.manifest import MANIFEST, read_manifest
from entrace.analysis.trace.recorder import Recorder
from entrace.analysis.trace.schema import TRUNCATED
from entrace.trainer.algorithm.plateau import PlateauDetector
from entrace.trainer.algorithm.shaping import NONE, waits_for_plateau
from entrace.trainer.live.arguments import HELDOUT, Arguments, choose_correct, trl_version
from entrace.trainer.live.generation import Generation, Pass, join, shape_all, split_by_response
from entrace.trainer.live.head_probe import HeadProbe, ask_reference_for_entropy
from entrace.trainer.live.messages import first_of, identify, number_repeats, text_of
from entrace.trainer.seeding import Stream, generator

log = logging.getLogger("entrace")

# Key of the row number that travels with each response through TRL's shuffling and slicing.
ROW = "entrace_row"
# Key of run.json: last step of the trace by optimizer step of a checkpoint.
CHECKPOINTS = "checkpoints"
GROUND_TRUTH = ("ground_truth", "solution", "answer")
TASK = ("task", "data_source")
CLIPPING_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
METRICS = {"kl": "kl", "clip_ratio/low_mean": "clip_frac_low", "clip_ratio/high_mean": "clip_frac_high"}
# Relative rounding error of the mean of equal rewards, divided by the 1e-4 that TRL adds to a standard deviation of 0.
UNIFORM_ROUNDING = 4 * torch.finfo(torch.float32).eps / 1e-4


@dataclass
class _Scored:
    """Hold the inputs, rewards, and output of one batch while TRL builds it."""

    output: Any = None
    inputs: Any = None
    prompts: Any = None
    completions: Any = None
    ids: Any = None
    rewards: Any = None
    reward_s: float = 0.0


class Tracer:
    """Follow a trainer and record what it does; only the main process writes."""

    def __init__(self, trainer: Any, arguments: Arguments) -> None:
        """Follow ``trainer``."""
        self.trainer, self.arguments = trainer, arguments
        self._said: set[str] = set()
        self.run_dir, self.config = arguments.run_dir, arguments.shaping
        self.accelerator = trainer.accelerator
        self.reward_names = number_repeats(trainer.reward_func_names)
        self.correct, self.correct_note = choose_correct(arguments.correct, self.reward_names)
        self.has_dropout = _has_dropout(trainer.model)
        self.probe = HeadProbe.attach(trainer)
        self.has_reference_entropy = ask_reference_for_entropy(trainer)
        self._warn_of_truncated_sampling()
        self.plateau = PlateauDetector(self.config.plateau)
        self.lr: float | None = None
        self._recorder: Recorder | None = None
        self._open: list[Generation] = []
        self._last = 0
        self._scored: _Scored | None = None
        # Passes that TRL makes while it builds a batch, and the consumer of the pass inside the running loss; None
        # outside.
        self._passes: list[tuple[Any, Pass]] | None = None
        self._in_loss: Callable[[Pass], None] | None = None
        self._eval_rows: list[dict[str, Any]] | None = None
        self._evals: dict[tuple[int, str], dict[str, Any]] = {}
        self._has_trained = False
        # Seconds that recording took so far, and those that a step has been charged with.
        self._overhead = self._charged = 0.0

    def _warn_of_truncated_sampling(self) -> None:
        defaults = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
        found = {name: getattr(self.trainer, name, default) for name, default in defaults.items()}
        changed = ", ".join(
            f"{name}={value}" for name, value in found.items() if value not in (defaults[name], None, -1)
        )
        if changed:
            self._say(f"{changed}: TRL's log-probabilities and entropies, as recorded, are those without it")

    # The trace

    @property
    def is_main(self) -> bool:
        """Return True in the process that writes the trace."""
        return self.accelerator.is_main_process

    def open(self) -> None:
        """Open a new trace, or the trace of the checkpoint that training resumes from."""
        with self._together():
            if self.is_main:
                self._recorder = self._make_recorder()
                self._last = self._recorder.last_step
                history = self._recorder.past_metrics()
            else:
                history = []
        self._last, history = self._broadcast((self._last, history))
        self.plateau = self.arguments.detector(history)
        self._open.clear()

    def _make_recorder(self) -> Recorder:
        trainer, state = self.trainer, self.trainer.state
        generate_every = trainer.args.steps_per_generation * trainer.num_iterations
        manifest = {
            "seed": trainer.args.seed,
            "arm": self.arguments.arm or self.config.method,
            "model": str(getattr(trainer.model.config, "_name_or_path", "") or type(trainer.model).__name__),
            "task": " + ".join(self.reward_names),
            "total_steps": -(-state.max_steps * trainer.args.gradient_accumulation_steps // generate_every),
            "num_processes": self.accelerator.num_processes,
            "config": {
                "trainer": type(trainer).__name__,
                "shaping": self.config.model_dump(mode="json"),
                "correct": self.correct_note,
                "trl": _plain(trainer.args.to_dict()),
            },
        }
        resume_after = None
        if state.global_step and (self.run_dir / MANIFEST).exists():
            steps = read_manifest(self.run_dir).get(CHECKPOINTS) or {}
            if str(state.global_step) not in steps:
                raise InputError(
                    f"{self.run_dir}: holds no step that ends at the checkpoint of optimizer step {state.global_step}; "
                    "choose another folder for trace"
                )
            resume_after = steps[str(state.global_step)]
            manifest[CHECKPOINTS] = {saved: step for saved, step in steps.items() if int(saved) <= state.global_step}
        elif self.run_dir.exists() and any(self.run_dir.iterdir()):
            raise InputError(
                f"{self.run_dir}: already holds files; choose another folder for trace, or resume with "
                "train(resume_from_checkpoint=...)"
            )
        recorder = Recorder(
            self.run_dir,
            trainer._tokenizer,
            vocab_size=trainer.model.config.get_text_config().vocab_size,
            temperature=trainer.temperature,
            correct_at=None,
            manifest=manifest,
            unknown=self._reasons(),
            flush_every=self.arguments.flush_every,
            resume_after=resume_after,
        )
        recorder.manifest["versions"] = {**recorder.manifest.get("versions", {}), "trl": trl_version()}
        return recorder

    def _reasons(self) -> dict[str, str]:
        """Return why columns are null, by table and column."""
        args = self.trainer.args
        reasons: dict[str, str] = {}
        for name in ("rollouts.answer", "rollouts.has_answer", "steps.format_rate", "evals.answer"):
            reasons[name] = "TRL's reward functions return scores, not answers"
        if self.correct is None:
            judged = ("rollouts.is_correct", "tokens.is_correct", "steps.accuracy", "evals.is_correct")
            reasons |= dict.fromkeys(judged, self.correct_note)
        if not self.arguments.after_update_every:
            never = "after_update_every is 0"
            reasons |= dict.fromkeys(("tokens.logprob_after", "tokens.entropy_after"), never)
        if self.probe is None:
            reasons["tokens.grad_norm"] = (
                "this version of TRL, or this model, does not give sums of squared probabilities"
            )
        if not args.beta:
            reasons |= dict.fromkeys(
                ("tokens.reference_logprob", "tokens.reference_entropy", "steps.kl"),
                "there is no reference policy: beta is 0",
            )
        elif getattr(self.trainer, "ref_model", None) is not None and not self.has_reference_entropy:
            reasons["tokens.reference_entropy"] = "this version of TRL computes no entropies of the reference model"
        if not getattr(args, "use_vllm", False):
            reasons["tokens.sampling_logprob"] = "the policy sampled without an inference engine"
        reasons["evals"] = "no evaluation ran while training was recorded"
        reasons["steps.clip_frac_dual"] = "TRL does not report it"
        reasons["prompts.difficulty"] = "datasets of TRL do not say"
        return reasons

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close the trace after the block.

        Its status is complete after success and failed after an error; an interrupted trace stays as it is.
        """
        try:
            yield
            self.finish_steps(None, is_end=True)
            self._flush_evals()
        except BaseException as error:
            if self._recorder is not None:
                self._recorder.__exit__(type(error), error, error.__traceback__)
                self._recorder = None
            raise
        finally:
            self._open.clear()
        self._has_trained = True
        if self._recorder is not None:
            # Windows of gradient accumulation may be cut short by the end of an epoch.
            self._recorder.manifest["total_steps"] = self._last
            self._recorder.close()
            self._recorder = None

    def before_checkpoint(self) -> None:
        """Make the steps durable that a checkpoint contains."""
        with self._together():
            self._flush_evals()
            if self._recorder is not None:
                checkpoints = self._recorder.manifest.setdefault(CHECKPOINTS, {})
                checkpoints[str(self.trainer.state.global_step)] = self._last
                self._recorder.flush()

    # Generation

    @contextmanager
    def generation(self) -> Iterator[_Scored]:
        """Follow TRL while the block builds a generation batch or evaluation batch."""
        is_training = self.trainer.model.training
        if is_training:
            self.finish_steps(None)
            self._flush_evals()
        started = time.perf_counter()
        scored = _Scored()
        passes: list[tuple[Any, Pass]] = []
        self._scored, self._passes = scored, passes
        try:
            yield scored
        finally:
            self._scored = self._passes = None
        output = scored.output
        output[ROW] = torch.arange(len(scored.ids), device=output["completion_ids"].device)
        if not is_training:
            if self._eval_rows is not None:
                self._eval_rows.append(self._describe(scored))
            return
        batch = self._begin(scored)
        rollout_s = time.perf_counter() - started - scored.reward_s
        batch.seconds |= {"rollout_s": rollout_s, "reward_s": scored.reward_s}
        with self._costing():
            self._take_passes(batch, output, passes)
            self._extra_passes(batch, output)
            if self._shapes and not self._any(not batch.known.all()):
                self._shape(batch, output, torch.arange(len(batch.ids)))
        self._open.append(batch)

    def keep_rewards(
        self, inputs: Any, prompts: Any, completions: Any, ids: Any, rewards: Tensor, started: float
    ) -> None:
        """Keep the inputs and scores of the reward functions."""
        if self._scored is not None:
            found = self._scored
            found.inputs, found.prompts, found.completions, found.ids = inputs, prompts, completions, ids
            found.rewards = rewards.detach().float().cpu()
            found.reward_s = time.perf_counter() - started

    @contextmanager
    def forward_pass(self, model: Any, arguments: dict[str, Any]) -> Iterator[list[Any]]:
        """Keep the log-probabilities and entropies that TRL computes in the block.

        Passes of the policy and of the reference policy count.
        """
        kept: list[Any] = []
        if self._passes is None and self._in_loss is None:
            yield kept
            return
        is_policy = self._in_loss is not None or model is self.trainer.model
        if is_policy or (self.has_reference_entropy and model is self.trainer.ref_model):
            # TRL computes it in any case, and returns it only if asked.
            arguments["compute_entropy"] = True
        with self.probe.listening() if self.probe and is_policy else nullcontext([]) as heard:
            yield kept
        logprob, entropy = kept
        sums = norms = None
        if heard:
            sums, norms = (torch.cat(part)[:, -logprob.shape[1] :] for part in zip(*heard, strict=True))
        found = Pass(logprob.detach(), None if entropy is None else entropy.detach(), sums, norms)
        if self._in_loss is not None:
            self._in_loss(found)
        elif self._passes is not None:
            self._passes.append((logprob, found))

    def _begin(self, scored: _Scored) -> Generation:
        """Return the batch that TRL has built, before its statistics are known."""
        trainer, output = self.trainer, scored.output
        count = len(scored.ids)
        width = output["completion_ids"].shape[1]
        lengths = torch.tensor([len(ids) for ids in scored.ids])
        loss_mask = torch.arange(width) < lengths[:, None]
        described = self._describe(scored)
        is_truncated = np.array(described["response"]["is_truncated"])
        is_masked = is_truncated & bool(trainer.mask_truncated_completions)
        if "tool_mask" in output:
            # TRL clears the mask of truncated responses, so that their context is unknown.
            tool_mask = output["tool_mask"].cpu().bool()
            loss_mask &= tool_mask | torch.from_numpy(is_masked)[:, None]
        token = {}
        for name, key in (
            ("sampling_logprob", "sampling_per_token_logps"),
            ("reference_logprob", "ref_per_token_logps"),
        ):
            if output.get(key) is not None:
                token[name] = output[key].detach().float().cpu()
        group = (self.accelerator.process_index * count + np.arange(count)) // trainer.num_generations
        step = (self._open[-1].step if self._open else self._last) + 1
        kept = ("prompt_ids", "prompt_mask", "completion_ids")
        return Generation(
            step=step,
            policy_step=self._last,
            policy_version=trainer.state.global_step,
            responses=described["response"],
            ids=scored.ids,
            group=group,
            rewards=described["reward"],
            is_correct=described["is_correct"],
            loss_mask=loss_mask,
            is_masked=is_masked,
            advantage=output["advantages"].detach().float().cpu(),
            tensors={name: output[name] for name in kept},
            slices=trainer.args.steps_per_generation * trainer.num_iterations,
            temperature=trainer.temperature,
            can_score="pixel_values" not in output,
            token=token,
        )

    def _describe(self, scored: _Scored) -> dict[str, Any]:
        """Return values per response that do not depend on the policy's probabilities."""
        trainer = self.trainer
        ends = {*_eos_ids(trainer), trainer._tokenizer.pad_token_id}
        start = self.accelerator.process_index * len(scored.ids)
        scores = scored.rewards[start : start + len(scored.ids)]
        weighted = (scores * trainer.reward_weights.to(scores.device)).nansum(1)
        weighted[scores.isnan().all(1)] = torch.nan
        components = [
            {name: score for name, score in zip(self.reward_names, row, strict=True) if score == score}
            for row in scores.tolist()
        ]
        prompts = [text_of(prompt) for prompt in scored.prompts]
        response = {
            "prompt": prompts,
            "prompt_id": [identify(prompt) for prompt in scored.prompts],
            "completion": [text_of(completion) for completion in scored.completions],
            "is_truncated": [not ids or ids[-1] not in ends for ids in scored.ids],
            "reward_components": components,
            "ground_truth": [first_of(row, GROUND_TRUTH) for row in scored.inputs],
            "task": [first_of(row, TASK) or " + ".join(self.reward_names) for row in scored.inputs],
        }
        return {
            "response": response,
            "reward": weighted.double().numpy(),
            "is_correct": [self._judge(*pair) for pair in zip(components, weighted.tolist(), strict=True)],
            "length": [len(ids) for ids in scored.ids],
            "entropy_mean": [None] * len(scored.ids),
        }

    def _judge(self, components: Mapping[str, float], reward: float) -> bool | None:
        if self.correct is None:
            return None
        if isinstance(self.correct, str):
            score = components.get(self.correct)
            return None if score is None else score >= 1
        return None if reward != reward else reward >= self.correct

    def _take_passes(self, batch: Generation, output: Mapping[str, Any], passes: list[tuple[Any, Pass]]) -> None:
        """Keep the statistics of TRL's passes over sampling and reference policies."""
        old, reference = output.get("old_per_token_logps"), output.get("ref_per_token_logps")
        own = [found for logprob, found in passes if logprob is old]
        if "old_logps" in output and passes:
            # RLOO keeps the sum per response; its first pass is that of the policy, its second that of the reference.
            own = [passes[0][1]]
            if len(passes) > 1 and reference is None:
                reference = passes[1][0]
                batch.token["reference_logprob"] = passes[1][1].logprob.float().cpu()
        for logprob, found in passes:
            if reference is not None and logprob is reference and found.entropy is not None:
                batch.token["reference_entropy"] = found.entropy.float().cpu()
        if own and not self.has_dropout:
            self._add(batch, own[0], torch.arange(len(batch.ids)))

    @staticmethod
    def _add(batch: Generation, found: Pass, rows: Tensor) -> None:
        """Keep the statistics of TRL's pass over ``rows``.

        Responses whose statistics are known, or that TRL masks, are excluded.
        """
        places = torch.from_numpy(np.flatnonzero(~(batch.is_masked | batch.known)[rows.numpy()]))
        if len(places):
            batch.add(found.take(places), rows[places])

    def _extra_passes(self, batch: Generation, output: Mapping[str, Any]) -> None:
        """Run an extra pass over responses for which TRL's own passes are unusable."""
        early = bool(self._shapes) and self.trainer.args.steps_per_generation > 1
        if self.has_dropout:
            rows, reason = np.arange(len(batch.ids)), "dropout is on, which is random in TRL's own passes"
        elif early and not batch.known.all():
            rows = np.flatnonzero(~batch.known)
            reason = "shaping needs the whole generation batch before its first slice"
        else:
            rows = np.flatnonzero(batch.is_masked & ~batch.known)
            reason = "mask_truncated_completions hides truncated responses from TRL's own passes"
        if not self._any(len(rows) > 0):
            return
        if not batch.can_score:
            self._say(f"images: no extra forward pass is made, although {reason}; the values are null")
            return
        self._say(f"an extra forward pass is made where {reason}")
        found = self._score(batch, rows)
        if len(rows):
            batch.add(found, torch.from_numpy(rows))

    @torch.no_grad()
    def _score(self, batch: Generation, rows: np.ndarray) -> Pass:
        """Return the statistics of responses under the present weights, without dropout."""
        trainer = self.trainer
        size = trainer.args.per_device_train_batch_size
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        # Sharded weights are gathered by all processes together: one that has finished repeats a response.
        num_chunks = max(self._gather_all(len(chunks)))
        chunks += [rows[:1] if len(rows) else np.array([0])] * (num_chunks - len(chunks))
        found: list[Pass] = []
        model = trainer.model
        width = batch.tensors["completion_ids"].shape[1]
        was_training = model.training
        model.eval()
        passes, in_loss = self._passes, self._in_loss
        try:
            for chunk in chunks:
                index = torch.from_numpy(chunk).to(batch.tensors["completion_ids"].device)
                ids = torch.cat([batch.tensors["prompt_ids"][index], batch.tensors["completion_ids"][index]], 1)
                prompt_mask = batch.tensors["prompt_mask"][index]
                attention = torch.cat([prompt_mask, batch.is_token[chunk].to(prompt_mask)], 1)
                self._passes, self._in_loss = [], None
                logprob, _, *_ = trainer._get_per_token_logps_and_entropies(model, ids, attention, width)
                found.append(next(kept for own, kept in self._passes if own is logprob))
        finally:
            self._passes, self._in_loss = passes, in_loss
            model.train(was_training)
        return Pass.join(found).take(torch.arange(len(rows)))

    # Shaping

    @property
    def _shapes(self) -> bool:
        return self.config.method != NONE

    def _shape(self, batch: Generation, output: Any, rows: Tensor) -> None:
        """Shape the advantages of a batch whose statistics are known.

        ``rows`` are the responses of ``output``.
        """
        own = {name: batch.stats[name].nan_to_num(0.0) for name in ("logprob", "entropy")}
        own |= {"loss_mask": batch.loss_mask, "advantage": batch.advantage}
        own |= {"correct": [bool(c) for c in batch.is_correct], "group": batch.group, "reward": batch.rewards}
        parts = self._gather_all(own)
        # Both trainers average over the prompts of a step; the methods see groups from 0.
        shaped, is_on = shape_all(parts, self.config, self.trainer.args.seed, batch.step, self.plateau.plateau_step)
        if not is_on:
            return
        start = sum(len(part["advantage"]) for part in parts[: self.accelerator.process_index])
        batch.shaped = shaped[start : start + len(batch.ids), : batch.loss_mask.shape[1]].contiguous()
        advantages = output["advantages"]
        given = batch.shaped[rows.cpu()].to(advantages)
        if _is_sequence_level(self.trainer):
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
                f"shaping: {self.config.method} gives the tokens of a response different advantages, and "
                f"{type(self.trainer).__name__} has one per response; choose a method such as ppl, or GRPO"
            )
        return torch.where(mask.any(1), high, 0.0)

    # Updates

    @contextmanager
    def timed_pass(self) -> Iterator[list[Tensor]]:
        """Keep the loss of the pass in the block, and its duration without generation."""
        started, before = time.perf_counter(), self._overhead
        latest = self._open[-1] if self._open else None
        losses: list[Tensor] = []
        yield losses
        if not self._open:
            return
        batch = self._open[-1]
        elapsed = time.perf_counter() - started - (self._overhead - before)
        if batch is not latest:
            elapsed -= batch.seconds["rollout_s"] + batch.seconds["reward_s"]
        batch.seconds["update_s"] += elapsed
        batch.losses += losses
        batch.pending = True

    @contextmanager
    def loss_pass(self, inputs: Any) -> Iterator[None]:
        """Follow the loss over a slice of the latest batch, or over an evaluation batch."""
        rows = inputs[ROW].cpu()
        batch = self._open[-1] if self.trainer.model.training else None
        before = {name: len(self._metric(name)) for name in METRICS}
        if batch is None:
            self._in_loss = functools.partial(self._take_evaluation, inputs, rows)
        else:
            self._in_loss = functools.partial(self._take_loss, batch, inputs, rows)
        try:
            yield
        finally:
            self._in_loss = None
        if batch is None:
            return
        batch.in_loss[rows.numpy()] = True
        for name, column in METRICS.items():
            values = self._metric(name)
            # RLOO reports the KL estimate once per batch, before the loss.
            if len(values) > before[name] or (name == "kl" and values and not batch.losses):
                batch.add_metric(column, values[-1])

    def _metric(self, name: str) -> list[float]:
        return self.trainer._metrics["train"].get(name, [])

    def _take_loss(self, batch: Generation, inputs: Any, rows: Tensor, found: Pass) -> None:
        """Take statistics, shaping, and ratio clipping from the loss's forward pass."""
        with self._costing():
            if batch.updates == 0 and not self.has_dropout:
                self._add(batch, found, rows)
                waits = self._shapes and not batch.is_shaped and not batch.losses
                if waits and self.trainer.args.steps_per_generation == 1:
                    self._shape(batch, inputs, rows)
            self._take_clipping(batch, inputs, rows, found)

    def _take_clipping(self, batch: Generation, inputs: Any, rows: Tensor, found: Pass) -> None:
        trainer = self.trainer
        is_token_level = getattr(trainer, "importance_sampling_level", None) == "token"
        if not is_token_level or getattr(trainer, "loss_type", None) not in CLIPPING_LOSSES:
            return
        if batch.is_clipped is None:
            batch.is_clipped = torch.zeros_like(batch.loss_mask)
        old = inputs.get("old_per_token_logps")
        if old is None:
            return
        ratio = (found.logprob - old).exp()
        advantage = inputs["advantages"]
        advantage = advantage[:, None] if advantage.dim() == 1 else advantage
        low = (ratio < 1 - trainer.epsilon_low) & (advantage < 0)
        high = (ratio > 1 + trainer.epsilon_high) & (advantage > 0)
        batch.is_clipped[rows] |= (low | high).cpu() & batch.loss_mask[rows]

    def count_update(self) -> None:
        """Count an optimizer step for the batches whose losses it contains."""
        for batch in self._open:
            if batch.pending:
                batch.updates += 1
                batch.pending = False
                batch.add_metric("lr", self.lr)

    def finish_steps(self, grad_norm: Any, *, is_end: bool = False) -> None:
        """Record completed batches.

        At the end of training, also record incomplete batches that a loss has used.
        """
        if grad_norm is not None:
            for batch in self._open:
                if batch.updates and len(batch.metrics.get("grad_norm", [])) < batch.updates:
                    batch.add_metric("grad_norm", grad_norm)
        while self._open and (self._open[0].is_complete or (is_end and self._open[0].in_loss.any())):
            self._record(self._open[0])
            self._last = self._open.pop(0).step
        if is_end:
            self._open.clear()

    def _record(self, batch: Generation) -> None:
        with self._costing():
            if (
                self.arguments.after_update_every
                and batch.step % self.arguments.after_update_every == 0
                and batch.updates
            ):
                self._capture_after(batch)
            parts = self._gather_all(batch.payload())
        cost, self._charged = self._overhead - self._charged, self._overhead
        row: dict[str, Any] = {}
        with self._costing(), self._together():
            if self._recorder is not None:
                row = self._write(self._recorder, batch, join(parts), cost)
        if waits_for_plateau(self.config):
            entropy, accuracy = self._broadcast((row.get("entropy_token_mean"), row.get("accuracy")))
            self.plateau.update(entropy or 0.0, accuracy or 0.0)
            if self._recorder is not None:
                self._recorder.manifest["plateau_step"] = self.plateau.plateau_step

    def _capture_after(self, batch: Generation) -> None:
        """Evaluate sampled responses again under the updated weights.

        Every process takes an equal number of its own responses.
        """
        wanted = self.arguments.num_after(len(batch.ids) * self.accelerator.num_processes)
        number = -(-wanted // self.accelerator.num_processes)
        drawn = generator(self.trainer.args.seed, Stream.CAPTURE, batch.step, self.accelerator.process_index)
        candidates = np.flatnonzero(batch.in_loss & ~batch.is_masked)
        rows = np.sort(drawn.permutation(candidates)[:number])
        if not batch.can_score or not self._any(len(rows) > 0):
            return
        found = self._score(batch, rows)
        if len(rows):
            batch.add_after(found, torch.from_numpy(rows))

    def _write(self, recorder: Recorder, batch: Generation, joined: dict[str, Any], cost: float) -> dict[str, Any]:
        lengths = joined["lengths"]
        token = {name: split_by_response(values, lengths) for name, values in joined["token"].items()}
        loss_mask = token.pop("loss_mask")
        response = dict(joined["response"])
        kept = joined["in_loss"] & ~joined["is_masked"]
        metrics = {name: mean_of_known(values) for name, values in batch.metrics.items()}
        metrics["loss"] = joined["loss"]
        return recorder.record(
            batch.step,
            prompt=response.pop("prompt"),
            completion=response.pop("completion"),
            response_ids=split_by_response(joined["ids"], lengths),
            loss_mask=loss_mask,
            reward=_none_for_nan(joined["reward"]),
            group=joined["group"],
            advantage=exact_zeros(joined["advantage"], joined["reward"], joined["group"]),
            is_correct=joined["is_correct"],
            is_kept=kept,
            drop_reason=[TRUNCATED if masked else None for masked in joined["is_masked"]],
            policy_step=batch.policy_step,
            policy_version=batch.policy_version,
            metrics={
                **{name: value for name, value in metrics.items() if value is not None and np.isfinite(value)},
                **batch.seconds,
                "record_s": cost,
                "is_shaped": batch.is_shaped,
            },
            **response,
            **token,
        )

    # Evaluations

    @contextmanager
    def evaluation(self, prefix: str, dataset: Any) -> Iterator[None]:
        """Record the responses of an evaluation, which the block runs."""
        self._eval_rows = []
        try:
            yield
            rows = self._eval_rows
        finally:
            self._eval_rows = None
        # A batch that has begun to change the policy counts; a later evaluation of the same step replaces this one.
        started = [batch.step for batch in self._open if batch.updates]
        step = started[-1] if started else self._last
        parts = self._gather_all(rows)
        in_order = [part for of_batch in zip(*parts, strict=False) for part in of_batch]
        if not self.is_main or not in_order:
            return
        joined = {
            name: [value for part in in_order for value in part[name]]
            for name in ("reward", "is_correct", "length", "entropy_mean")
        }
        for name in ("prompt", "prompt_id", "ground_truth", "task"):
            joined[name] = [value for part in in_order for value in part["response"][name]]
        # The last batch repeats rows of the first one, so that every process has equally many.
        count = len(joined["length"])
        if hasattr(dataset, "__len__"):
            count = min(count, len(dataset) * self.trainer.num_generations_eval)
        benchmark = prefix.removeprefix("eval").lstrip("_") or HELDOUT
        self._evals[step, benchmark] = {name: values[:count] for name, values in joined.items()}
        if self._has_trained:
            self._append_evals()

    def _take_evaluation(self, inputs: Any, rows: Tensor, found: Pass) -> None:
        if self._eval_rows and found.entropy is not None:
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            means = (found.entropy.float() * mask).sum(1) / mask.sum(1)
            for row, mean in zip(rows.tolist(), means.tolist(), strict=True):
                # NaN if the loss masks the whole response.
                self._eval_rows[-1]["entropy_mean"][row] = mean if np.isfinite(mean) else None

    def _flush_evals(self) -> None:
        """Record the evaluations of finished steps."""
        if self._recorder is None:
            return
        for step, benchmark in sorted(self._evals):
            if step <= self._last:
                self._write_eval(self._recorder, step, benchmark, self._evals.pop((step, benchmark)))

    def _write_eval(self, recorder: Recorder, step: int, benchmark: str, rows: Mapping[str, Any]) -> None:
        if recorder.has_eval(step, benchmark):
            self._say(f"evaluation of {benchmark} at step {step} is already in the trace and is not recorded again")
            return
        if step < recorder.last_step:
            return
        recorder.record_eval(
            step,
            benchmark=benchmark,
            prompt=rows["prompt"],
            prompt_id=rows["prompt_id"],
            ground_truth=rows["ground_truth"],
            task=rows["task"],
            response_length=rows["length"],
            reward=_none_for_nan(rows["reward"]),
            is_correct=rows["is_correct"],
            entropy_mean=rows["entropy_mean"],
        )

    def _append_evals(self) -> None:
        """Add an evaluation that ran after training to the finished trace."""
        with Recorder(
            self.run_dir,
            self.trainer._tokenizer,
            vocab_size=self.trainer.model.config.get_text_config().vocab_size,
            temperature=self.trainer.temperature,
            correct_at=None,
            resume_after="last",
        ) as recorder:
            for step, benchmark in sorted(self._evals):
                self._write_eval(recorder, step, benchmark, self._evals.pop((step, benchmark)))

    # Processes. trainer.parallel.ranks would take over the signals and errors of the user's process.

    def _gather_all(self, value: Any) -> list[Any]:
        """Return the values of all processes, in order of rank."""
        if self.accelerator.num_processes == 1:
            return [value]
        found: list[Any] = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(found, value)
        return found

    def _any(self, value: bool) -> bool:
        return any(self._gather_all(value))

    def _broadcast(self, value: Any) -> Any:
        """Return the value of the main process."""
        if self.accelerator.num_processes == 1:
            return value
        found = [value]
        torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Raise an error of the block, which only the main process may meet, everywhere."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        if self.accelerator.num_processes > 1:
            message = self._broadcast(None if error is None else str(error))
            if error is None and message is not None:
                raise InputError(f"the main process cannot record: {message}")
        if error is not None:
            raise error

    @contextmanager
    def _costing(self) -> Iterator[None]:
        """Add the time of the block to the time that recording takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._overhead += time.perf_counter() - started

    def _say(self, text: str) -> None:
        """Log a message once, in the main process."""
        if self.is_main and text not in self._said:
            self._said.add(text)
            log.warning("%s", text)


def exact_zeros(advantages: np.ndarray, rewards: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Set advantages to exactly 0 in groups with equal rewards.

    TRL leaves rounding errors there. The mean of equal numbers may differ from them in the last bit, and TRL divides by
    a standard deviation of 0 plus 1e-4. Larger advantages of such a group have another source, such as a penalty, and
    stay.
    """
    result = advantages.copy()
    for rows in rows_by_group(group):
        values = rewards[rows]
        if np.isnan(values).any() or np.ptp(values) > 0:
            continue
        bound = UNIFORM_ROUNDING * max(abs(float(values[0])), 1e-30)
        result[rows[np.abs(advantages[rows]) <= bound]] = 0
    return result


def _is_sequence_level(trainer: Any) -> bool:
    from trl.trainer.rloo_trainer import RLOOTrainer

    return isinstance(trainer, RLOOTrainer)


def _eos_ids(trainer: Any) -> list[int]:
    return list(getattr(trainer, "eos_token_ids", None) or [trainer._tokenizer.eos_token_id])


def _has_dropout(model: Any) -> bool:
    """Return whether a forward pass in training mode draws random numbers."""
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()):
        return True
    config = model.config.get_text_config()
    return any("attention_dropout" in name and value for name, value in vars(config).items())


def _none_for_nan(values: Iterable[float]) -> list[float | None]:
    return [None if value != value else float(value) for value in values]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON can hold them."""
    return json.loads(json.dumps(dict(values), default=str))
