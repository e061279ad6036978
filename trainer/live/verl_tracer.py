"""Follow a V1 trainer of verl, and record each of its steps.

A step of the trace is one global step of verl. With ``parameter_sync_step`` above 1 it holds several updates; verl
computes ``old_log_probs`` of all of them with the weights at the start of the step.
"""

# pyright: reportMissingImports=false
# verl is not installed where types are checked.

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entrace.analysis.trace.errors import InputError, nearest
from entrace.analysis.trace.manifest import MANIFEST
from entrace.analysis.trace.recorder import Recorder
from entrace.trainer.algorithm.shaping import NONE, waits_for_plateau
from entrace.trainer.live.arguments import HELDOUT, Arguments, warn_if_untested
from entrace.trainer.live.generation import shape_all, split_by_response
from entrace.trainer.live.messages import first_of, identify, text_of
from entrace.trainer.live.recording import Notices, common_reasons, first_truths, open_recorder
from entrace.trainer.seeding import Stream, generator

# Tested versions of verl: lower bound included, upper bound excluded.
TESTED = ((0, 9), (0, 10))
# Columns of table tokens by field of TransferQueue.
TOKEN_FIELDS = {
    "logprob": "old_log_probs",
    "entropy": "entropy",
    "sampling_logprob": "rollout_log_probs",
    "reference_logprob": "ref_log_prob",
    "advantage": "advantages",
}
FIELDS = (
    *TOKEN_FIELDS.values(),
    "uid",
    "prompts",
    "responses",
    "response_mask",
    "rm_scores",
    "raw_prompt",
    "reward_model",
    "data_source",
    "extra_fields",
)
# Fields that a pass for log-probabilities overwrites.
PASS_FIELDS = ("log_probs", "entropy")
METRICS = {
    "loss": ("actor/pg_loss",),
    "kl": ("actor/kl_loss", "actor/reward_kl_penalty"),
    "clip_frac_dual": ("actor/pg_clipfrac_lower",),
    "grad_norm": ("actor/grad_norm",),
    "lr": ("actor/lr",),
}
UPDATE_TIMERS = ("old_log_prob", "ref", "values", "update_critic", "update_actor")
# Sampling settings that leave the policy's distribution as it is; the first value is the default.
NEUTRAL = {"top_p": (1.0, None), "top_k": (-1, None, 0)}
# Key of the reward's extra info that decides correctness unless one is named.
ACCURACY = "acc"


@dataclass
class _Step:
    """Hold the responses of a step, one entry per response and name, until its end.

    Attributes:
        keys: Keys in TransferQueue.
        columns: Values per response; values of tokens are arrays.
        is_shaped: A shaping method was on.
        updates: Updates of the actor.
        seconds: Time that recording took.
    """

    keys: list[str] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    is_shaped: bool = False
    updates: int = 0
    seconds: float = 0.0


class Tracer:
    """Follow a trainer in verl's driver, and record what it does."""

    def __init__(self, trainer: Any, arguments: Arguments) -> None:
        """Follow ``trainer``."""
        warn_if_untested("verl", version("verl"), TESTED)
        self.trainer, self.arguments = trainer, arguments
        self.run_dir, self.config = arguments.run_dir, arguments.shaping
        self.rollout = trainer.config.actor_rollout_ref.rollout
        correction = trainer.config.algorithm.get("rollout_correction", None)
        self.is_bypassed = bool(correction and correction.get("bypass_mode", False))
        self.seed = int(trainer.config.data.get("seed", None) or 0)
        self.plateau = self.arguments.detector([])
        self._recorder: Recorder | None = None
        self._step = _Step()
        self._ends: frozenset[int] = frozenset()
        self._eval_rows: list[dict[str, Any]] | None = None
        self._notices = Notices()

    # The trace

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Open the trace, and close it after the block.

        Its status is complete after success and failed after an error; an interrupted trace stays as it is.
        """
        self._notices.say_truncated("verl", self.rollout.get, NEUTRAL)
        with self._make_recorder() as recorder:
            self._recorder = recorder
            self.plateau = self.arguments.detector(recorder.past_metrics())
            try:
                yield
            finally:
                self._recorder = None

    def _make_recorder(self) -> Recorder:
        from omegaconf import OmegaConf
        from verl.utils.config import omega_conf_to_dataclass

        trainer, done = self.trainer, self.trainer.global_steps
        model = omega_conf_to_dataclass(trainer.config.actor_rollout_ref.model)
        ends = [getattr(model.generation_config, "eos_token_id", None), trainer.tokenizer.eos_token_id]
        self._ends = frozenset(i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None)
        resume_after = None
        if done and (self.run_dir / MANIFEST).exists():
            resume_after = done
        elif self.run_dir.exists() and any(self.run_dir.iterdir()):
            raise InputError(
                f"{self.run_dir}: already holds files, and verl starts without a checkpoint; choose another folder for "
                "entrace.trace"
            )
        return open_recorder(
            trainer,
            self.arguments,
            trainer.tokenizer,
            library="verl",
            settings=OmegaConf.to_container(trainer.config, resolve=True),
            correct=self._rule(),
            manifest={
                "seed": self.seed,
                "model": str(trainer.config.actor_rollout_ref.model.path),
                "task": str(trainer.config.trainer.experiment_name),
                "total_steps": trainer.total_training_steps,
            },
            vocab_size=model.hf_config.get_text_config().vocab_size,
            temperature=float(self.rollout.temperature),
            logprob_kind="engine" if self.is_bypassed else "trainer",
            unknown=self._reasons(),
            resume_after=resume_after,
        )

    def _rule(self) -> str:
        """Return in words what makes a response correct."""
        correct = self.arguments.correct
        if correct is None:
            return f"{ACCURACY} of the reward's extra info is at least 1, or, without it, the reward"
        if isinstance(correct, str):
            return f"{correct} of the reward's extra info is at least 1"
        return f"the reward is at least {correct:g}"

    def _reasons(self) -> dict[str, str]:
        """Return why columns are null, by table and column."""
        reasons = common_reasons("verl", self.arguments)
        reasons["tokens.grad_norm"] = "verl does not give sums of squared probabilities"
        reasons["tokens.is_clipped"] = "verl reports clipping per step, not per token"
        sides = "verl reports the share of both sides together"
        reasons |= dict.fromkeys(("steps.clip_frac_low", "steps.clip_frac_high"), sides)
        reasons["steps.reward_s"] = "verl scores responses while it samples others"
        reasons["rollouts.reward_components"] = "verl's reward functions return one score"
        reasons["evals.entropy_mean"] = "verl computes no entropies when it evaluates"
        reasons["tokens.reference_entropy"] = "verl computes no entropies of the reference policy"
        if self.is_bypassed:
            names = ("tokens.entropy", "rollouts.entropy_mean", "steps.entropy_token_mean")
            reasons |= dict.fromkeys(names, "verl computes no entropies with rollout_correction.bypass_mode=true")
        if not self.trainer.use_reference_policy:
            none = "there is no reference policy: use_kl_loss and use_kl_in_reward are false"
            reasons |= dict.fromkeys(("tokens.reference_logprob", "steps.kl"), none)
        if not self.rollout.calculate_log_probs:
            reasons["tokens.sampling_logprob"] = "actor_rollout_ref.rollout.calculate_log_probs is false"
        return reasons

    def flush(self) -> None:
        """Make the recorded steps durable."""
        if self._recorder is not None:
            self._recorder.flush()

    # Advantages

    def read_masks(self, batch: Any) -> dict[str, Tensor]:
        """Return the mask of generated tokens by key, before verl changes it."""
        keys = _real_keys(batch)
        data = _get(keys, batch.partition_id, ["response_mask"])
        return dict(zip(keys, _rows(data["response_mask"]), strict=True))

    def take(self, batch: Any, generated: Mapping[str, Tensor]) -> None:
        """Keep the rows of a batch whose advantages verl has computed, and shape these."""
        started = time.perf_counter()
        keys = _real_keys(batch)
        correct = self.arguments.correct
        extra = [correct if isinstance(correct, str) else ACCURACY]
        data = _get(keys, batch.partition_id, [*FIELDS, *(name for name in extra if name not in FIELDS)])
        tags = dict(zip(batch.keys, batch.tags, strict=True))
        columns = self._describe(data, [tags[key] for key in keys])
        columns["loss_mask"] = [generated[key].bool().numpy() for key in keys]
        in_loss = [row.bool() for row in _rows(data["response_mask"])]
        columns["is_kept"] = [bool(row.any()) for row in in_loss]
        for name, source in TOKEN_FIELDS.items():
            if source in data:
                rows = [row.float().numpy() for row in _rows(data[source])]
                columns[name] = split_by_response(np.concatenate(rows), np.array([len(row) for row in rows]))
        if self.config.method != NONE:
            self._shape(keys, batch.partition_id, data, columns, in_loss)
        columns.setdefault("shaped_advantage", columns["advantage"])
        self._step.keys += keys
        for name, values in columns.items():
            self._step.columns.setdefault(name, []).extend(values)
        self._step.seconds += time.perf_counter() - started

    def _describe(self, data: Any, tags: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """Return values per response that do not depend on the policy's probabilities."""
        ids = [row.numpy() for row in _rows(data["responses"])]
        prompt_ids = _rows(data["prompts"])
        count = len(ids)
        rewards = [_finite(row.double().sum().item()) for row in _rows(data["rm_scores"])]
        versions = [(tag.get("min_global_steps"), tag.get("max_global_steps")) for tag in tags]
        columns = {
            "response_ids": ids,
            "uid": [str(uid) for uid in _values(data, "uid", count)],
            "reward": rewards,
            "is_correct": self._judge(rewards, self._scores(data, count)),
            "is_truncated": [self._is_cut(*pair) for pair in zip(prompt_ids, ids, strict=True)],
            "policy_step": [first for first, _ in versions],
            "policy_version": [first if first == last else None for first, last in versions],
        }
        return columns | self._prompt_columns(data, prompt_ids)

    def _prompt_columns(self, data: Any, prompt_ids: Sequence[Tensor]) -> dict[str, list[Any]]:
        """Return texts and identifiers of prompts, and what the dataset says about them."""
        count = len(prompt_ids)
        decode = functools.partial(self.trainer.tokenizer.decode, skip_special_tokens=True)
        messages = _values(data, "raw_prompt", count)
        # Rows of an own agent loop may hold token ids only.
        prompts = [
            decode(ids) if given is None else _as_list(given) for given, ids in zip(messages, prompt_ids, strict=True)
        ]
        models = _values(data, "reward_model", count)
        sources = _values(data, "data_source", count)
        return {
            "prompt": [text_of(prompt) for prompt in prompts],
            "prompt_id": [identify(prompt) for prompt in prompts],
            "ground_truth": [first_of(m, ("ground_truth",)) if isinstance(m, Mapping) else None for m in models],
            "task": [str(source or self.trainer.config.trainer.experiment_name) for source in sources],
        }

    def _is_cut(self, prompt_ids: Tensor, ids: np.ndarray) -> bool:
        """Return whether a response reached a limit of length without an end of sequence."""
        limit = self.rollout.get("max_model_len", None) or float("inf")
        at_limit = len(ids) >= self.rollout.response_length or len(prompt_ids) + len(ids) >= limit
        return at_limit and (not len(ids) or int(ids[-1]) not in self._ends)

    def _scores(self, data: Any, count: int) -> list[Any]:
        """Return the score that decides correctness, per response.

        Scores come from the reward's extra info or a colocated reward model, and are None without either.

        Raises:
            InputError: the key that entrace.correct names is in no response.
        """
        correct = self.arguments.correct
        if correct is not None and not isinstance(correct, str):
            return [None] * count
        name = correct or ACCURACY
        infos = [
            (fields.get("reward_extra_info") or {}) if isinstance(fields, Mapping) else {}
            for fields in _values(data, "extra_fields", count)
        ]
        # A colocated reward model writes a field per key. Not run: it needs a GPU.
        found = _values(data, name, count)
        scores = [info.get(name, other) for info, other in zip(infos, found, strict=True)]
        return self._checked(scores, {key for info in infos for key in info})

    def _checked(self, scores: Sequence[Any], keys: set[str]) -> list[Any]:
        """Return scores that decide correctness, None where they are not numbers.

        Raises:
            InputError: the key that entrace.correct names is in no response, or holds something other than numbers.
        """
        correct = self.arguments.correct
        numbers = [score if isinstance(score, bool | int | float | np.number | np.bool_) else None for score in scores]
        if isinstance(correct, str) and scores and all(number is None for number in numbers):
            known = next((score for score in scores if score is not None), None)
            if known is not None:
                raise InputError(
                    f"entrace.correct: {correct} of the reward's extra info is {known!r}, expected a number"
                )
            near = nearest(correct, sorted(keys)) if keys else "; the reward function returns none"
            raise InputError(f'entrace.correct: no key "{correct}" in the reward\'s extra info{near}')
        return numbers

    def _judge(self, rewards: Sequence[float | None], scores: Sequence[Any]) -> list[bool | None]:
        """Return the verdict on each response; None without a score."""
        correct = self.arguments.correct
        if isinstance(correct, float):
            return [None if reward is None else reward >= correct for reward in rewards]
        if correct is None:
            scores = [reward if score is None else score for reward, score in zip(rewards, scores, strict=True)]
        return [None if score is None else bool(score >= 1) for score in scores]

    def _shape(
        self, keys: list[str], partition_id: str, data: Any, columns: dict[str, list[Any]], in_loss: list[Tensor]
    ) -> None:
        """Shape the advantages of all rows, and write them to TransferQueue.

        Methods see all generated tokens. Tokens outside the loss keep verl's advantage.

        Raises:
            InputError: verl has computed no entropies.
        """
        import transfer_queue as tq
        from tensordict import TensorDict

        if "entropy" not in columns:
            raise InputError("entrace.shaping: needs entropies, which verl has not computed")
        numbers: dict[str, int] = {}
        group = np.array([numbers.setdefault(uid, len(numbers)) for uid in columns["uid"]])
        given = _rows(data["advantages"])
        sources = {name: _rows(data[TOKEN_FIELDS[name]]) for name in ("logprob", "entropy")}
        part = {name: _padded(rows).float().nan_to_num(0.0) for name, rows in sources.items()}
        part |= {
            "loss_mask": _padded([torch.from_numpy(row) for row in columns["loss_mask"]]),
            "advantage": _padded(given),
            "correct": [bool(verdict) for verdict in columns["is_correct"]],
            "group": group,
            "reward": np.array(columns["reward"], float),
        }
        step, plateau_step = self.trainer.global_steps, self.plateau.plateau_step
        shaped, is_on = shape_all([part], self.config, self.seed, step, plateau_step)
        if not is_on:
            return
        rows = [
            torch.where(mask, row[: len(old)].to(old), old)
            for row, mask, old in zip(shaped, in_loss, given, strict=True)
        ]
        nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        tq.kv_batch_put(
            keys=keys, partition_id=partition_id, fields=TensorDict({"advantages": nested}, batch_size=len(keys))
        )
        columns["shaped_advantage"] = [row.float().numpy() for row in rows]
        self._step.is_shaped = True

    # Updates

    def count_update(self) -> None:
        """Count an update of the actor."""
        self._step.updates += 1

    def end_step(self, batch: Any, metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        """Record the step that verl has taken, while its rows are still in TransferQueue."""
        started = time.perf_counter()
        step, found = self._step, self.trainer.global_steps
        self._step = _Step()
        if self._recorder is None or not step.keys:
            return
        every = self.arguments.after_update_every
        if every and found % every == 0 and step.updates:
            step.columns |= self._capture_after(batch, step.keys)
        columns = dict(step.columns)
        columns["is_kept"] = [kept and step.updates > 0 for kept in columns["is_kept"]]
        columns["ground_truth"] = first_truths(self._recorder, columns["prompt_id"], columns["ground_truth"])
        numbers = {
            name: next((float(metrics[key]) for key in keys if metrics.get(key) is not None), None)
            for name, keys in METRICS.items()
        }
        durations = {"rollout_s": seconds.get("gen"), "reward_s": seconds.get("reward")}
        durations["update_s"] = sum(seconds.get(name, 0.0) for name in UPDATE_TIMERS)
        row = self._recorder.record(
            found,
            group=columns.pop("uid"),
            metrics={
                **{name: v for name, v in (numbers | durations).items() if v is not None and np.isfinite(v)},
                "record_s": step.seconds + time.perf_counter() - started,
                "is_shaped": step.is_shaped,
            },
            **{name: values for name, values in columns.items() if any(value is not None for value in values)},
        )
        if waits_for_plateau(self.config):
            self.plateau.update(row.get("entropy_token_mean") or 0.0, row.get("accuracy") or 0.0)
            self._recorder.manifest["plateau_step"] = self.plateau.plateau_step

    def _capture_after(self, batch: Any, keys: list[str]) -> dict[str, list[Any]]:
        """Compute log-probabilities and entropies under the updated weights.

        The result holds values per response, for some responses. The pass runs in verl's actor workers, which write its
        result over that of the earlier one. The driver puts the earlier values back.
        """
        import transfer_queue as tq
        from verl.workers.utils.padding import response_from_nested

        trainer = self.trainer
        wanted = self.arguments.num_after(len(keys))
        drawn = generator(self.seed, Stream.CAPTURE, trainer.global_steps, 0).permutation(len(keys))
        rows = drawn[: self._divisible(wanted, len(keys))]
        # Fewer responses than workers: the batch with its padding is divisible.
        chosen = [keys[row] for row in sorted(rows)] or list(batch.keys)
        tags = dict(zip(batch.keys, batch.tags, strict=True))
        meta = type(batch)(keys=chosen, tags=[tags[key] for key in chosen], partition_id=batch.partition_id)
        meta.extra_info = {
            "calculate_entropy": True,
            "compute_loss": False,
            "temperature": self.rollout.temperature,
        }
        before = _get(chosen, batch.partition_id, list(PASS_FIELDS))
        trainer.actor_rollout_wg.compute_log_prob(meta)
        found = _get(chosen, batch.partition_id, [*PASS_FIELDS, "response_mask"])
        if len(before.keys()):
            tq.kv_batch_put(keys=chosen, partition_id=batch.partition_id, fields=before)
        result: dict[str, list[Any]] = {}
        for name, source in (("logprob_after", "log_probs"), ("entropy_after", "entropy")):
            values = _rows(response_from_nested(found[source], found["response_mask"]))
            by_key = {key: row.float().numpy() for key, row in zip(chosen, values, strict=True)}
            result[name] = [by_key.get(key) for key in keys]
        return result

    def _divisible(self, wanted: int, count: int) -> int:
        """Return the number of responses nearest to ``wanted`` that divides evenly.

        The number must be a multiple of actor workers times micro-batch size.
        """
        multiple = max(self.trainer.actor_rollout_wg._dispatch_info["actor"]) + 1
        if not self.rollout.log_prob_use_dynamic_bsz:
            multiple *= self.rollout.log_prob_micro_batch_size_per_gpu or 1
        return min(-(-wanted // multiple), count // multiple) * multiple

    # Evaluations

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Keep the evaluated rows that the block samples and removes from TransferQueue."""
        buffer, self._eval_rows = self.trainer.replay_buffer, []
        sample = buffer.sample

        def keep(*args: Any, **kwargs: Any) -> Any:
            batch, found = sample(*args, **kwargs)
            self._keep_evaluated(batch)
            return batch, found

        buffer.sample = keep
        try:
            yield
        finally:
            buffer.sample = sample
            self._eval_rows = None

    def _keep_evaluated(self, batch: Any) -> None:
        """Keep the last output of each session, in verl's order."""
        last: dict[str, tuple[int, int]] = {}
        for place, key in enumerate(batch.keys):
            session, _, index = key.rpartition("_")
            if session not in last or int(index) > last[session][0]:
                last[session] = (int(index), place)
        keys = [batch.keys[place] for place in sorted(place for _, place in last.values())]
        if not keys:
            return
        fields = ["uid", "prompts", "responses", "raw_prompt", "reward_model", "data_source"]
        data = _get(keys, batch.partition_id, fields)
        columns = self._prompt_columns(data, _rows(data["prompts"]))
        columns["uid"] = [str(uid) for uid in _values(data, "uid", len(keys))]
        columns["response_length"] = [len(row) for row in _rows(data["responses"])]
        if self._eval_rows is not None:
            self._eval_rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def end_evaluation(self, sources: Sequence[str], uids: Sequence[str], infos: Mapping[str, Sequence[Any]]) -> None:
        """Record an evaluation with the rewards that verl has computed."""
        recorder, rows = self._recorder, self._eval_rows
        if recorder is None or not rows:
            return
        if [row["uid"] for row in rows] != [str(uid) for uid in uids]:
            raise InputError("verl evaluated other responses than it sampled; this version cannot be recorded")
        step, correct = self.trainer.global_steps, self.arguments.correct
        scores = list(infos.get(correct if isinstance(correct, str) else ACCURACY) or [None] * len(rows))
        rewards = [_finite(float(reward)) for reward in infos["reward"]]
        verdicts = self._judge(rewards, self._checked(scores, set(infos)))
        for source in dict.fromkeys(sources):
            benchmark = HELDOUT if source == "unknown" else str(source)
            if recorder.has_eval(step, benchmark):
                self._notices.say_already_recorded(step, benchmark)
                continue
            chosen = [i for i, other in enumerate(sources) if other == source]
            names = ("prompt", "prompt_id", "ground_truth", "task", "response_length")
            of_rows = {name: [rows[i][name] for i in chosen] for name in names}
            of_rows["ground_truth"] = first_truths(recorder, of_rows["prompt_id"], of_rows["ground_truth"])
            recorder.record_eval(
                step,
                benchmark=benchmark,
                reward=[rewards[i] for i in chosen],
                is_correct=[verdicts[i] for i in chosen],
                temperature=float(self.rollout.val_kwargs.temperature),
                **of_rows,
            )
        # verl evaluates after it saves: flushed with the next step, this would be lost if the run resumed here.
        recorder.flush()


def _real_keys(batch: Any) -> list[str]:
    """Return the keys of a batch without padding, responses of a group side by side."""
    keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]
    parts = {key: key.rsplit("_", 2) for key in keys}
    first: dict[str, int] = {}
    for key in keys:
        first.setdefault(parts[key][0], len(first))

    def place(key: str) -> tuple[int, ...]:
        group, *rest = parts[key]
        return (first[group], *(int(number) for number in rest if number.isdecimal()))

    return sorted(keys, key=place)


def _get(keys: list[str], partition_id: str, fields: list[str]) -> Any:
    import transfer_queue as tq

    return tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=fields)


def _rows(values: Tensor) -> list[Tensor]:
    """Return the rows of a tensor that may be nested."""
    return list(values.unbind(0))


def _finite(value: float) -> float | None:
    """Return a number, or None for NaN and infinity."""
    return value if np.isfinite(value) else None


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _values(data: Any, name: str, count: int) -> list[Any]:
    """Return the values of a field per response; None if verl has no such field."""
    if name not in data:
        return [None] * count
    found = data[name]
    return list(found.tolist() if hasattr(found, "tolist") else found)


def _as_list(messages: Any) -> Any:
    """Return messages of a chat as a list, and a text as it is."""
    return messages if isinstance(messages, str) else list(messages)
