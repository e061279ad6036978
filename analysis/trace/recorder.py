"""Record a training loop as a trace.

This module does not import torch, so any loop can use it.

Usage::

    with Recorder("data/runs/mine/by-hand", tokenizer, temperature=1.0) as recorder:
        for step in ...:
            recorder.record(step, prompt=texts, response_ids=ids, logprob=logprobs, entropy=entropies, reward=rewards)
            recorder.record_eval(step, prompt=texts, response_ids=ids, reward=rewards)

Arguments are named like the columns that they fill; ``entrace tables`` describes these. Values that are not passed are
null, and ``unknown`` in ``run.json`` says so.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import reprlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from entrace.analysis.trace.arguments import checked
from entrace.analysis.trace.batch import MAX_FLOAT, Batch, as_float, find_generated, group_indices
from entrace.analysis.trace.errors import InputError, in_one_line, nearest, with_kind
from entrace.analysis.trace.groups import mean_of
from entrace.analysis.trace.lexicon import Lexicon
from entrace.analysis.trace.lock import acquire_lock
from entrace.analysis.trace.manifest import check_kinds, describe_machine, read_manifest, to_json
from entrace.analysis.trace.parts import PART, last_whole_step, listed_files, part_path, read_part
from entrace.analysis.trace.places import check_folder, usable
from entrace.analysis.trace.plain import well_formed
from entrace.analysis.trace.ragged import Responses, as_list
from entrace.analysis.trace.rows import nullable
from entrace.analysis.trace.schema import EVALS, PROMPTS, ROLLOUTS, STEPS, TABLES, TOKENS
from entrace.analysis.trace.vocabulary import Vocabulary
from entrace.analysis.trace.writer import TraceWriter, holds_files

# Arguments by what one value belongs to. An advantage may also be per token.
PER_TOKEN = (
    "shaped_advantage",
    "grad_norm",
    "logprob_after",
    "entropy_after",
    "is_clipped",
    "sampling_logprob",
    "reference_logprob",
    "turn",
    "policy_version",
    "sum_p2_others",
    "sum_p2_logp_others",
    "reference_entropy",
)
PER_RESPONSE = (
    "answer",
    "answer_class",
    "length_penalty",
    "reward_components",
    "has_answer",
    "is_truncated",
    "is_kept",
    "drop_reason",
    "policy_step",
)
PER_PROMPT = ("prompt_id", "task", "ground_truth", "difficulty")
EXPLICIT = (
    "prompt",
    "response_ids",
    "response_mask",
    "loss_mask",
    "logprob",
    "entropy",
    "reward",
    "group",
    "advantage",
    "is_correct",
    "completion",
    "metrics",
)
EVAL_ONLY = ("response_length", "entropy_mean")
# Columns of table steps that follow from the responses.
DERIVED = ("reward_mean", "accuracy", "format_rate", "entropy_token_mean", "tokens", "groups_kept", "groups_dropped")
STEP_METRICS = tuple(c.name for c in STEPS.columns if c.name not in ("run_id", "step", *DERIVED))
# Columns in which null is a statement of its own (see the schema) and needs no reason.
NULL_IS_KNOWN = {
    "tokens": {"loss_mask", "turn"},
    "rollouts": {"generated_length", "reward_components", "answer_class", "drop_reason", "length_penalty"},
    "evals": {"answer_class"},
}
NOT_PASSED = "the training loop did not pass it to the recorder"
UNKNOWN = {
    "interventions": "the trace has no checkpoints to continue from",
    "evals": "the training loop recorded no evaluation",
}
HASH_LENGTH = 16


class Tokenizer(Protocol):
    """A tokenizer of transformers, as far as it is recognized."""

    @property
    def batch_decode(self) -> Any:
        """Decode lists of token ids."""


class Recorder:
    """Write a trace from the arrays of a training loop, one call per step.

    Derived from what is passed: lengths, positions, entropy_mean, surprisal_mean, ppl, ppl_z, defects, group ids, texts
    of responses, correctness, advantages, and the means of table ``steps``.
    """

    @checked
    def __init__(
        self,
        run_dir: Path | str,
        vocab: Vocabulary | Tokenizer | Iterable[str],
        *,
        vocab_size: int | None = None,
        temperature: float | None = None,
        correct_at: float | None = 1.0,
        entropy_kind: Literal["exact", "top_k"] = "exact",
        logprob_kind: Literal["trainer", "engine", "rescored"] = "trainer",
        manifest: Mapping[str, Any] | None = None,
        unknown: Mapping[str, str] | None = None,
        lexicon: Lexicon | None = None,
        flush_every: int = 10,
        resume_after: int | Literal["last"] | None = None,
    ) -> None:
        """Open a trace.

        Args:
            run_dir: Folder of the trace; its name is the run id.
            vocab: A tokenizer of transformers, a ``Vocabulary``, or the text of every token by id; that of the trace if
                it is resumed.
            vocab_size: Rows of the LM head, if more than the entries of the tokenizer.
            temperature: Sampling temperature, included in every log-probability and entropy (default: unknown).
            correct_at: Reward from which a response is correct (default 1.0; None: correctness is unknown unless
                passed).
            entropy_kind: ``exact``, or ``top_k`` if entropies cover only the entries that an engine reported.
            logprob_kind: Who computed the log-probabilities.
            manifest: Further keys of ``run.json``, such as ``seed``, ``arm``, ``model``, ``config``.
            unknown: Reasons why columns are null, by ``table.column``.
            lexicon: Rules of the token categories (default: the shipped lexicon).
            flush_every: Steps per Parquet file, which is written when the next step arrives; see ``flush``.
            resume_after: Continue an existing trace after this step and remove later steps; ``last`` is its last
                durable step (default: start a new trace in an empty folder).

        Raises:
            InputError: the folder cannot be used, an argument is invalid, or another process records the run.
        """
        self.run_dir = Path(run_dir)
        if flush_every < 1:
            raise InputError(f"flush_every is {flush_every}, expected at least 1 step")
        self.temperature, self.correct_at = as_float(temperature), as_float(correct_at)
        if self.temperature is not None and not 0 < self.temperature <= MAX_FLOAT:
            hint = "; pass 0, greedy decoding, to record_eval" if self.temperature == 0 else ""
            raise InputError(f"temperature is {self.temperature:g}, expected a number above 0{hint}")
        if self.correct_at is not None and not math.isfinite(self.correct_at):
            raise InputError(f"correct_at is {self.correct_at:g}, expected a finite number or None")
        self._kinds = {"entropy": entropy_kind, "logprob": logprob_kind}
        self._flush_every = flush_every
        self._decode: Callable[[Sequence[int]], str] | None = None
        self._special: frozenset[int] = frozenset()
        self._texts: list[str] = []
        read_entries = self._prepare_vocabulary(vocab, vocab_size)
        with usable(self.run_dir):
            check_folder(self.run_dir)
        self._lock = acquire_lock(self.run_dir, waits=False)
        try:
            self._open(read_entries, dict(manifest or {}), dict(unknown or {}), lexicon, resume_after)
        except BaseException:
            self._release()
            raise

    def _prepare_vocabulary(self, vocab: Any, size: int | None) -> Callable[[], Vocabulary]:
        """Return a function that reads the vocabulary.

        It takes a second for the 150,000 entries of a tokenizer, and is called when no cheaper check has failed.
        """
        if hasattr(vocab, "batch_decode"):
            self._decode = lambda ids: vocab.decode(ids, skip_special_tokens=True)
            return lambda: Vocabulary.of(vocab, max(len(vocab), size or 0))
        entries = vocab if isinstance(vocab, Vocabulary) else Vocabulary(list(vocab))
        self._texts = entries.texts
        if entries.is_special:
            self._special = frozenset(np.flatnonzero(entries.is_special).tolist())
        return lambda: entries

    def _open(
        self,
        read_entries: Callable[[], Vocabulary],
        manifest: dict[str, Any],
        unknown: dict[str, str],
        lexicon: Lexicon | None,
        resume_after: int | str | None,
    ) -> None:
        # Hashes of text and ground truth; the hash of an unknown ground truth is None.
        self._prompts: dict[str, tuple[bytes, bytes | None]] = {}
        self._samples: dict[tuple[int, str], Counter[str]] = {}
        self._rollouts, self._since_flush = 0, 0
        reasons = _reasons(unknown)
        # Before a resume removes later steps.
        check_kinds("manifest", manifest)
        to_json("manifest", manifest)
        described = {
            "recorded": {"correct_at": self.correct_at},
            "study": self.run_dir.resolve().parent.name,
            # Unlike the path itself, an absolute one has a name even if it was given as ``.``.
            "run_id": Path(os.path.abspath(self.run_dir)).name,
            **manifest,
        }
        if resume_after is None:
            described |= {"unknown": reasons, **describe_machine()}
            if holds_files(self.run_dir):
                raise InputError(f"{self.run_dir}: already holds files; choose another folder, or pass resume_after")
            self._writer = TraceWriter.create(self.run_dir, described, read_entries(), lexicon)
            self._last = self._eval_step = 0
            return
        recorded = read_manifest(self.run_dir)
        self._last = self._eval_step = self._check_resumable(resume_after, recorded)
        run_id = recorded.get("run_id")
        if manifest.get("run_id", run_id) != run_id:
            given = reprlib.repr(manifest["run_id"])
            raise InputError(f"manifest: run_id is {given}, and that of the trace is {run_id!r}; leave it out")
        self._check_vocabulary(read_entries(), recorded)
        self._writer = TraceWriter.resume(self.run_dir, self._last)
        found = self._writer.manifest
        # A reason that an earlier part of the run has removed stays removed.
        kept = {name: unknown.get(name, reason) for name, reason in (found.get("unknown") or {}).items()}
        found |= {**manifest, "unknown": kept}
        for prompt_id, text, truth in self._read_rows("prompts", ["prompt_id", "prompt", "ground_truth"]):
            self._prompts[prompt_id] = (_digest(text), None if truth is None else _digest(truth))
        self._rollouts = max((number for (number,) in self._read_rows("rollouts", ["rollout_id"])), default=-1) + 1
        for step, benchmark, prompt_id in self._read_rows("evals", ["step", "benchmark", "prompt_id"]):
            self._samples.setdefault((step, benchmark), Counter())[prompt_id] += 1

    def _check_resumable(self, wanted: int | str, manifest: dict[str, Any]) -> int:
        """Return the step to resume after; ``manifest`` is that of the trace.

        Raises:
            InputError: the trace ends earlier, or the step lies inside a file.
        """
        whole, _ = last_whole_step(self.run_dir, manifest)
        if isinstance(wanted, str):
            return whole
        if wanted > whole:
            raise InputError(f"{self.run_dir}: ends at step {whole}, and cannot continue after step {wanted}")
        for files in listed_files(self.run_dir, manifest).values():
            for match in filter(None, map(PART.fullmatch, files)):
                if int(match[1]) <= wanted < int(match[2]):
                    raise InputError(
                        f"{self.run_dir}: cannot continue after step {wanted}, which lies inside {match[0]}; call "
                        "flush() whenever a checkpoint is saved"
                    )
        return wanted

    def _check_vocabulary(self, entries: Vocabulary, manifest: dict[str, Any]) -> None:
        """Compare the vocabulary with that of the trace to resume.

        ``manifest`` is that of the trace. Rows without an entry, which have an empty text, may be more or fewer, and
        unknown texts are not compared.

        Raises:
            InputError: a token has another text.
        """
        listed = listed_files(self.run_dir, manifest)
        parts = [part_path(self.run_dir, "vocab", name) for name in listed.get("vocab", ())]
        if not parts:
            # The writer reports a trace without a durable step.
            return
        rows = pa.concat_tables([read_part(path, ["token_id", "text"]) for path in parts]).sort_by("token_id")
        recorded, remedy = rows["text"].to_pylist(), "resume with the vocabulary of the trace"
        has_text = entries.has_text or [True] * len(entries.texts)
        for token, (text, stored) in enumerate(itertools.zip_longest(entries.texts, recorded, fillvalue="")):
            if stored in (text, well_formed(text)) or stored in (str(token), f"<{token}>"):
                continue
            if token >= min(len(entries.texts), len(recorded)):
                raise InputError(f"vocab: {len(entries.texts)} entries, and the trace has {len(recorded)}; {remedy}")
            if has_text[token]:
                found = f"token {token} is {reprlib.repr(text)}, and {reprlib.repr(stored)} in the trace"
                raise InputError(f"vocab: {found}; {remedy}")

    def _read_rows(self, table: str, columns: list[str]) -> Iterable[tuple[Any, ...]]:
        for name in self._writer.manifest["files"].get(table, {}):
            rows = read_part(self.run_dir / table / name, columns)
            yield from zip(*(rows[column].to_pylist() for column in columns), strict=True)

    @property
    def last_step(self) -> int:
        """Last recorded step, 0 if there is none."""
        return self._last

    @property
    def manifest(self) -> dict[str, Any]:
        """Content of ``run.json``; changes are written with the next flush."""
        return self._writer.manifest

    @checked
    def has_eval(self, step: int, benchmark: str) -> bool:
        """Return whether the trace holds an evaluation."""
        return (step, benchmark) in self._samples

    @checked
    def has_prompt(self, prompt_id: str) -> bool:
        """Return whether the trace holds a prompt."""
        return prompt_id in self._prompts

    def past_metrics(self) -> list[tuple[float | None, float | None]]:
        """Return (entropy_token_mean, accuracy) of every durable step, in order of step."""
        rows = sorted(self._read_rows("steps", ["step", "entropy_token_mean", "accuracy"]))
        return [(entropy, accuracy) for _, entropy, accuracy in rows]

    @checked
    def record(
        self,
        step: int,
        *,
        prompt: Any,
        response_ids: Any,
        response_mask: Any = None,
        loss_mask: Any = None,
        logprob: Any = None,
        entropy: Any = None,
        reward: Any = None,
        group: Any = None,
        advantage: Any = None,
        is_correct: Any = None,
        completion: Sequence[str] | None = None,
        metrics: Mapping[str, Any] | None = None,
        **columns: Any,
    ) -> dict[str, Any]:
        """Add the responses of one training step.

        B responses. Values per token are one list per response, or a padded array ``(B, T)`` with ``response_mask``.
        Values per response are a list or array of length B. Arrays of numpy and tensors of torch are accepted. Context
        tokens count toward positions and lengths; their measured values are null.

        Args:
            step: The step, from 1; greater than that of the call before. Steps may be skipped.
            prompt: Text of the prompt of each response, or its token ids.
            response_ids: Token ids of each response, including the end of sequence.
            response_mask: True at the tokens of the responses, if ``response_ids`` is padded.
            loss_mask: True at tokens that the policy generated, false at context such as tool output (default: all
                true).
            logprob: Log-probability of each token under the distribution that it was sampled from, nats.
            entropy: Entropy of that distribution, nats.
            reward: Score of each response; None where there is no verdict.
            group: Label of the group of each response (default: equal prompts of one step are a group).
            advantage: Advantage of each response, or of each token (default: group-relative, from the rewards, as in
                GRPO; then ``shaped_advantage`` is null unless passed).
            is_correct: Verdict on each response (default: the reward is at least ``correct_at``).
            completion: Text of each response (default: its tokens, decoded without special tokens).
            metrics: Columns of table ``steps`` that do not follow from responses, such as loss, lr, and kl.
            **columns: Further columns of tables tokens, rollouts, and prompts, by name: per token, response, or prompt
                of each response.

        Returns:
            The row of table ``steps``.

        Raises:
            InputError: a name is unknown, a length differs, a value is NaN or infinite, or steps go back.
        """
        started = time.perf_counter()
        _check_names("record", columns, (*PER_TOKEN, *PER_RESPONSE, *PER_PROMPT), EXPLICIT)
        _check_names("metrics", metrics or {}, STEP_METRICS, ())
        self._check_step(step, self._last + 1)
        responses = Responses.of(response_ids, response_mask)
        if not len(responses):
            raise InputError(f"step {step}: no responses; record a step with at least one response")
        batch = self._batch(responses, loss_mask, prompt, columns)
        batch.groups = group_indices(batch.prompt_ids if group is None else batch.per_response("group", group))
        batch.add_tokens({"logprob": logprob, "entropy": entropy, **{name: columns.get(name) for name in PER_TOKEN}})
        batch.add_responses({name: columns.get(name) for name in PER_RESPONSE})
        batch.rewards = batch.numbers("reward", reward)
        batch.correct = self._judge(batch, is_correct)
        batch.advantages = batch.add_advantage(advantage)
        batch.kept, batch.drop_reasons = batch.take_kept(has_advantage=advantage is not None)
        completions = self._completions(batch, completion)
        # Only now, so that a file holds the evaluations of its last step.
        if self._since_flush >= self._flush_every:
            self.flush()
        row = {"step": step, **batch.step_row(), **_finite_metrics(metrics or {})}

        rollouts, tokens = batch.columns(step, self._rollouts + np.arange(len(responses)), completions)
        with self._writer.all_or_nothing():
            prompts = self._append_prompts(batch, "train", columns)
            kinds = {f"{name}_kind": kind if name in batch.token else None for name, kind in self._kinds.items()}
            self._append("rollouts", {**rollouts, "temperature": self.temperature, **kinds})
            self._append("tokens", tokens)
            row.setdefault("record_s", time.perf_counter() - started)
            self._append("steps", row)
        self._prompts |= prompts
        self._rollouts += len(responses)
        self._last = step
        self._writer.end_step(step)
        self._since_flush += 1
        return row

    @checked
    def record_eval(
        self,
        step: int,
        *,
        prompt: Any,
        benchmark: str = "heldout",
        response_ids: Any = None,
        response_mask: Any = None,
        loss_mask: Any = None,
        entropy: Any = None,
        reward: Any = None,
        is_correct: Any = None,
        temperature: float | None = None,
        **columns: Any,
    ) -> None:
        """Add responses to held-out prompts.

        Several calls for one step and benchmark add up.

        Args:
            step: Updates applied to the evaluated policy, 0 for the base policy; no less than in the call before.
            prompt: As in ``record``.
            benchmark: Name of the held-out set.
            response_ids: As in ``record``; ``response_length`` per response is enough.
            response_mask: As in ``record``.
            loss_mask: As in ``record``.
            entropy: As in ``record``; or ``entropy_mean`` per response.
            reward: As in ``record``.
            is_correct: As in ``record``.
            temperature: Sampling temperature, 0 for greedy decoding (default: that of the recorder).
            **columns: answer, answer_class, entropy_mean, and response_length per response; prompt_id, task,
                ground_truth, and difficulty per prompt.

        Raises:
            InputError: as in ``record``, or neither ``response_ids`` nor ``response_length`` is given.
        """
        names = ("answer", "answer_class", *EVAL_ONLY, *PER_PROMPT)
        explicit = ("prompt", "benchmark", "response_ids", "response_mask", "loss_mask", "entropy", "reward")
        _check_names("record_eval", columns, names, (*explicit, "is_correct", "temperature"))
        temperature = as_float(temperature)
        if temperature is not None and not 0 <= temperature <= MAX_FLOAT:
            raise InputError(f"temperature is {temperature:g}, expected a number of at least 0")
        self._check_step(step, max(self._last, self._eval_step))
        if response_ids is None:
            if columns.get("response_length") is None:
                raise InputError("record_eval: response_ids is missing; pass it, or response_length per response")
            given = _listed("response_length", columns["response_length"])
            responses = Responses(np.empty(0, np.int64), np.zeros(len(given), np.int64))
            if entropy is not None:
                raise InputError("entropy: needs response_ids; pass entropy_mean per response instead")
        else:
            responses = Responses.of(response_ids, response_mask)
        batch = self._batch(responses, loss_mask, prompt, columns)
        batch.add_tokens({"entropy": entropy})
        batch.add_responses({name: columns.get(name) for name in ("answer", "answer_class", "response_length")})
        batch.rewards = batch.numbers("reward", reward)
        given = columns.get("entropy_mean")
        means = batch.reduce("entropy", mean_of) if entropy is not None else batch.numbers("entropy_mean", given)
        counts = Counter(self._samples.get((step, benchmark), ()))
        samples = []
        for prompt_id in batch.prompt_ids:
            samples.append(counts[prompt_id])
            counts[prompt_id] += 1
        lengths = batch.response.get("response_length")
        row = {
            "benchmark": benchmark,
            "prompt_id": batch.prompt_ids,
            "sample_index": samples,
            "answer": batch.response.get("answer"),
            "answer_class": batch.response.get("answer_class"),
            "is_correct": self._judge(batch, is_correct),
            "reward": nullable(batch.rewards),
            "response_length": responses.lengths if lengths is None else lengths,
            "entropy_mean": nullable(means),
            "temperature": self.temperature if temperature is None else temperature,
        }
        with self._writer.all_or_nothing():
            prompts = self._append_prompts(batch, "heldout", columns)
            self._append("evals", {"step": step, **row})
        self._prompts |= prompts
        self._samples[step, benchmark] = counts
        (self.manifest.get("unknown") or {}).pop("evals", None)
        self._eval_step = step
        if step <= self._last:
            self._writer.end_step(self._last)

    def flush(self) -> None:
        """Make all recorded steps durable.

        Call this method when a checkpoint is saved, so that the run can resume there.
        """
        self._writer.flush()
        self._since_flush = 0

    @checked
    def close(self, error: str | None = None) -> None:
        """Flush the recorded steps, and mark the run ``complete`` or ``failed``.

        A run with an ``error`` has failed; the trace stores the error.
        """
        try:
            self._writer.end_step(max(self._last, self._eval_step))
            if error is None:
                self.flush()
            else:
                # The cause, such as a full disk, may prevent this write too; durable rows remain.
                with suppress(Exception):
                    self.flush()
            self._writer.finish(error)
        finally:
            self._release()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif isinstance(error, Exception):
            with suppress(Exception):
                self.close(with_kind(error))
        else:
            # Interrupted: the run is not complete and can resume.
            with suppress(Exception):
                self.flush()
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_step(self, step: int, lowest: int) -> None:
        if step < lowest:
            raise InputError(f"step {step}: expected at least {lowest}; steps never go back")

    def _batch(self, responses: Responses, loss_mask: Any, prompt: Any, columns: Mapping[str, Any]) -> Batch:
        """Return the responses of a call with their prompts."""
        values = [prompt] if isinstance(prompt, str) else _listed("prompt", prompt)
        if len(values) != len(responses):
            raise InputError(f"prompt: {len(values)} prompts, expected {len(responses)}, one per response")
        texts = [value if isinstance(value, str) else self._text("prompt", value) for value in values]
        batch = Batch(responses, find_generated(responses, loss_mask), texts)
        if columns.get("prompt_id") is None:
            batch.prompt_ids = [prompt_hash(text) for text in texts]
        else:
            given = batch.per_response("prompt_id", columns["prompt_id"])
            batch.prompt_ids = [well_formed(str(value)) for value in given]
        return batch

    def _text(self, name: str, ids: Any) -> str:
        try:
            tokens = [int(i) for i in as_list(ids)]
            if self._decode:
                return self._decode(tokens)
            return "".join(self._texts[i] for i in tokens if i not in self._special)
        except (TypeError, ValueError, IndexError, OverflowError) as error:
            raise InputError(f"{name}: expected text or token ids ({in_one_line(error)})") from None

    def _completions(self, batch: Batch, given: Sequence[str] | None) -> list[str]:
        if given is not None:
            return [str(text) for text in batch.per_response("completion", given)]
        ends = np.cumsum(batch.responses.lengths)[:-1]
        return [self._text("response_ids", ids) for ids in np.split(batch.responses.ids, ends)]

    def _judge(self, batch: Batch, given: Any) -> list[bool | None]:
        if given is not None:
            return batch.flags("is_correct", given)
        if self.correct_at is None:
            return [None] * len(batch.responses)
        return [None if np.isnan(value) else bool(value >= self.correct_at) for value in batch.rewards]

    def _append_prompts(self, batch: Batch, split: str, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Add the prompts that the trace does not hold yet, and return all by id.

        Raises:
            InputError: a prompt has two texts, or two ground truths.
        """
        given = columns.get("ground_truth")
        truths = [None] * len(batch.texts) if given is None else batch.per_response("ground_truth", given)
        digests = {text: _digest(text) for text in set(batch.texts)}
        found: dict[str, tuple[bytes, bytes | None]] = {}
        # By id, the rows of the first text and of the first ground truth.
        first: dict[str, int] = {}
        known: dict[str, str] = {}
        for row, (prompt_id, text, value) in enumerate(zip(batch.prompt_ids, batch.texts, truths, strict=True)):
            digest, truth = digests[text], None if value is None else _digest(str(value))
            before, truth_before = found.get(prompt_id) or self._prompts.get(prompt_id) or (digest, truth)
            if digest != before:
                raise InputError(
                    f'prompt: response {row} has another text than earlier ones of prompt_id "{prompt_id}"; '
                    "prompts that differ need their own prompt_id"
                )
            if truth and truth_before and truth != truth_before:
                raise InputError(
                    f'ground_truth: response {row} has another one than earlier ones of prompt_id "{prompt_id}"; '
                    "questions with the same text need their own prompt_id"
                )
            found[prompt_id] = (digest, truth_before or truth)
            if prompt_id not in self._prompts:
                first.setdefault(prompt_id, row)
                if value is not None:
                    known.setdefault(prompt_id, str(value))
        rows: dict[str, Any] = {"task": str(self.manifest.get("task") or "unnamed")}
        if known:
            rows["ground_truth"] = [known.get(prompt_id) for prompt_id in first]
        for name in ("task", "difficulty"):
            if columns.get(name) is not None:
                values = batch.per_response(name, columns[name])
                rows[name] = [None if values[i] is None else str(values[i]) for i in first.values()]
        if first:
            texts = [batch.texts[i] for i in first.values()]
            self._append("prompts", {"prompt_id": list(first), "split": split, "prompt": texts, **rows})
        return found

    def _append(self, table: str, columns: Mapping[str, Any]) -> None:
        """Append rows, and drop the reasons of columns that have a value."""
        self._writer.append(table, columns)
        reasons = self.manifest.get("unknown") or {}
        for name, values in columns.items():
            if f"{table}.{name}" in reasons and _has_value(values):
                del reasons[f"{table}.{name}"]


def _listed(name: str, values: Any) -> list[Any]:
    """Return one value per response.

    Raises:
        InputError: the argument holds no values that can be listed.
    """
    try:
        return list(values)
    except TypeError:
        raise InputError(f"{name}: expected one value per response, found {type(values).__name__}") from None


def _reasons(given: Mapping[str, str]) -> dict[str, str]:
    """Return the reason of every column that is null until a value is recorded."""
    tables = (TOKENS, ROLLOUTS, PROMPTS, STEPS, EVALS)
    names = {
        f"{table.name}.{column.name}": NOT_PASSED
        for table in tables
        for column in table.columns
        if column.nullable and column.name not in NULL_IS_KNOWN.get(table.name, ())
    }
    known = {*names, *TABLES, *(f"{t.name}.{c.name}" for t in TABLES.values() for c in t.columns), "policy.entropy"}
    for name in given:
        if name not in known:
            raise InputError(f'unknown: no column "{name}"{nearest(name, known)}')
    return {**UNKNOWN, **names, **given}


def _check_names(place: str, given: Iterable[str], names: Iterable[str], explicit: Iterable[str]) -> None:
    for name in given:
        if name in DERIVED:
            raise InputError(f"{place}: {name} follows from the responses; leave it out")
        if name not in names:
            raise InputError(f'{place}: unknown name "{name}"{nearest(name, (*names, *explicit))}')


def prompt_hash(text: str) -> str:
    """Return a hash of the text of a prompt, its identifier unless one is passed."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:HASH_LENGTH]


def _digest(text: str) -> bytes:
    """Return a short hash of a text as the trace stores it."""
    return hashlib.sha256(well_formed(text).encode()).digest()[:HASH_LENGTH]


def _finite_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
    for name, value in found.items():
        if isinstance(value, float) and not np.isfinite(value):
            raise InputError(f"metrics: {name} is {value}; leave it out where it is unknown")
    return found


def _has_value(values: Any) -> bool:
    if isinstance(values, pa.Array):
        return values.null_count < len(values)
    if isinstance(values, list):
        return any(value is not None for value in values)
    return values is not None
