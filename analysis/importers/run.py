"""Record the rollouts of a dump as a trace.

Values that the dump holds are recorded as they are: logprobs, entropies, and advantages, with ``logprob_kind`` and
``entropy_kind`` saying whose they are. A model adds what is missing. Columns that neither knows are null, and
``unknown`` in ``run.json`` gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from entrace.analysis.importers.codec import Codec
from entrace.analysis.importers.collect import Collected, Counts
from entrace.analysis.importers.rollout import Rollout
from entrace.analysis.importers.settings import ImportSettings
from entrace.analysis.importers.tables import Chunk, Difference, Differences, Evaluator, StepSums
from entrace.analysis.importers.unknown import unknown_columns
from entrace.analysis.trace.digests import hash_file
from entrace.analysis.trace.errors import InputError, in_one_line
from entrace.analysis.trace.manifest import IMPORTED, MANIFEST, describe_machine, is_before_manifest, read_manifest
from entrace.analysis.trace.parts import last_step, last_whole_step, listed_files
from entrace.analysis.trace.places import check_folder
from entrace.analysis.trace.writer import TraceWriter

# Tokens per chunk, which holds whole groups, and tokens between two flushes, which come after whole steps.
CHUNK_TOKENS = 1 << 17
FLUSH_TOKENS = 1 << 20
# Largest difference between two passes in float32 that differ in the order of summation, in nats.
ROUNDING = 1e-3


def record(
    rollouts: Collected,
    settings: ImportSettings,
    run_dir: Path,
    *,
    codec: Codec | None = None,
    evaluator: Evaluator | None = None,
    reference: Evaluator | None = None,
    weights: str | None = None,
    extra: Mapping[str, Any] | None = None,
    resume: bool = False,
    on_step: Callable[..., None] = lambda done, note, **metrics: None,
    explain: Callable[[Exception], Exception] = lambda error: error,
) -> Differences:
    """Record rollouts in ``run_dir``.

    Args:
        rollouts: Rollouts of a dump.
        settings: Settings of the import.
        run_dir: Folder of the trace; its name is the run id.
        codec: Tokenizer that gives the texts of tokens; None to use those that the dump holds.
        evaluator: Model that adds missing values.
        reference: Model that adds log-probabilities and entropies of the reference policy.
        weights: Fingerprint of its weights.
        extra: Further entries that determine the trace, such as the fingerprint of a file of rewards.
        resume: Continue after the steps that the folder holds.
        on_step: Called with the number of finished responses, the step, and metrics to show.
        explain: Return the error to record for one that ended the import.

    Returns:
        Differences between recorded and rescored values of the steps that this call recorded.

    Raises:
        InputError: the folder cannot be used.
    """
    description = _describe(rollouts, settings, weights, extra or {})
    writer, done = _open_trace(
        rollouts, description, codec, evaluator, run_dir, resume, has_reference=reference is not None
    )
    differences = Differences()
    with _finalize_on_exit(writer, explain):
        _record_steps(rollouts, settings, evaluator, reference, writer, done, differences, on_step)
        writer.manifest |= _compared(differences)
    return differences


def check_target(run_dir: Path, resume: bool) -> None:
    """Refuse a folder that already holds files, before anything is read.

    Raises:
        InputError: the path is a file; or the folder holds files, and ``resume`` is not set or the files are no trace.
    """
    check_folder(run_dir)
    is_used = run_dir.is_dir() and any(not path.name.startswith(".") for path in run_dir.iterdir())
    if is_used and not (resume and ((run_dir / MANIFEST).exists() or is_before_manifest(run_dir))):
        raise InputError(f"{run_dir}: already holds files; choose another folder, or resume with --resume")


def temperature_of_pass(counts: Counts, given: float | None) -> float:
    """Return the temperature of the pass: as given, else as recorded, else 1.

    Raises:
        InputError: the dump records several temperatures, and none is given.
    """
    if given is not None or counts.temperatures is None:
        return 1.0 if given is None else given
    low, high = counts.temperatures
    if low != high:
        raise InputError(
            f"the dump records temperatures from {low:g} to {high:g}, and a pass has one; add --temperature"
        )
    if low <= 0:
        raise InputError(f"the dump records temperature {low:g}, at which no pass can evaluate; add --temperature")
    return low


def describe_differences(differences: Differences, name: str) -> list[str]:
    """Return remarks that compare recorded values with those of a model."""
    lines = []
    for kind, found in (("logprobs", differences.logprob), ("entropies", differences.entropy)):
        if found.count:
            verdict = "agree with" if found.largest <= ROUNDING else "differ by more than rounding from"
            lines.append(
                f"recorded {kind} {verdict} those of {name}: mean difference {found.mean:.2g}, largest "
                f"{found.largest:.2g} nats over {found.count} tokens"
            )
    return lines


def _describe(
    rollouts: Collected, settings: ImportSettings, weights: str | None, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the description of the trace's origin for ``run.json``.

    A trace resumes only if this description is equal, apart from the folders of files.
    """
    counts = rollouts.counts
    masked = f", without {counts.masked} outside loss_mask" if counts.masked else ""
    anew = f"text tokenized anew, except {counts.exact} rows{masked}"
    given = "as given" if counts.with_advantage else "group-relative, from rewards"
    return {
        "files": {str(path): hash_file(path) for path in rollouts.dump.files},
        "weights": weights,
        "rows": counts.rows,
        "bad_rows": counts.bad_rows,
        "fields": dict(rollouts.keys),
        "advantage": given if counts.with_advantage or counts.known["reward"] else "unknown",
        "response_tokens": f"as given{masked}" if counts.exact == counts.rollouts else anew,
        "settings": asdict(settings),
        "format": rollouts.dump.format.name,
        "dropped_groups": counts.dropped_groups,
        "logprobs": dict(counts.kinds),
        **extra,
    }


def _content(key: str, value: Any) -> Any:
    """Return a value of a description, with files by name: paths vary."""
    return [(Path(path).name, digest) for path, digest in value.items()] if key == "files" and value else value


def _open_trace(
    rollouts: Collected,
    description: Mapping[str, Any],
    codec: Codec | None,
    evaluator: Evaluator | None,
    run_dir: Path,
    resume: bool,
    *,
    has_reference: bool,
) -> tuple[TraceWriter, int]:
    """Return a new or resumed trace and the last step that it holds, -1 for none."""
    if resume and (run_dir / MANIFEST).exists():
        manifest = read_manifest(run_dir)
        before = manifest.get(IMPORTED)
        if before is None:
            raise InputError(f"{run_dir}: not a trace of entrace import; choose another folder")
        # An earlier version described less.
        if changed := [key for key in before if _content(key, before[key]) != _content(key, description.get(key))]:
            raise InputError(f"{run_dir}: imported with another value of {', '.join(changed)}; choose another folder")
        last, damage = last_whole_step(run_dir, manifest)
        has_vocab = any(last_step(name) <= last for name in listed_files(run_dir, manifest).get("vocab", {}))
        if has_vocab and (last or not damage):
            return TraceWriter.resume(run_dir, last), last
    manifest = {
        "run_id": run_dir.name,
        "study": run_dir.resolve().parent.name,
        "model": evaluator.name if evaluator else None,
        "task": " + ".join(dict.fromkeys(map(rollouts.dump.task_of, rollouts.dump.files))),
        "total_steps": rollouts.counts.steps,
        "config": {"import": description["settings"]},
        IMPORTED: dict(description),
        "unknown": unknown_columns(
            rollouts.counts,
            has_model=evaluator is not None,
            has_texts=codec is not None,
            has_reference=has_reference,
        ),
        **describe_machine(),
    }
    size = max(rollouts.counts.largest_id + 1, len(rollouts.texts))
    vocabulary = codec.vocabulary() if codec else rollouts.texts.vocabulary(size)
    return TraceWriter.create(run_dir, manifest, vocabulary, replace=resume), -1


def _compared(differences: Differences) -> dict[str, Any]:
    """Return the entry of ``run.json`` that compares recorded with rescored values."""
    found = {"logprob": differences.logprob, "entropy": differences.entropy}
    entry = {name: _entry(difference) for name, difference in found.items() if difference.count}
    return {"rescored": entry} if entry else {}


def _entry(difference: Difference) -> dict[str, float]:
    return {"tokens": difference.count, "mean": difference.mean, "largest": difference.largest}


def _record_steps(
    rollouts: Collected,
    settings: ImportSettings,
    evaluator: Evaluator | None,
    reference: Evaluator | None,
    writer: TraceWriter,
    done: int,
    differences: Differences,
    on_step: Callable[..., None],
) -> None:
    num_done = buffered = 0
    prompts: set[str] = set()
    has_advantages = rollouts.counts.with_advantage > 0
    for step, of_step in groupby(rollouts.in_order(), key=lambda rollout: rollout.step):
        if step <= done:
            for rollout in of_step:
                prompts.add(rollout.prompt_id)
                num_done += 1
            continue
        sums = StepSums()
        for part in _chunks(of_step):
            _record_prompts(writer, part, prompts)
            chunk = Chunk.of(part, evaluator, differences, has_advantages=has_advantages, reference=reference)
            chunk.write(writer, num_done, settings.temperature, sums)
            num_done += len(part)
            metrics = {"entropy": sums.entropy / sums.with_entropy} if sums.with_entropy else {}
            on_step(num_done, f"step {step}", **metrics)
        writer.append("steps", {"step": step, **sums.columns()})
        writer.end_step(step)
        buffered += sums.tokens
        if buffered >= FLUSH_TOKENS:
            writer.flush()
            buffered = 0
    writer.flush()


def _chunks(rollouts: Iterator[Rollout]) -> Iterator[list[Rollout]]:
    """Yield whole groups of up to ``CHUNK_TOKENS`` tokens together.

    A longer group is a chunk of its own.
    """
    chunk: list[Rollout] = []
    num_tokens = 0
    for _, of_group in groupby(rollouts, key=lambda rollout: rollout.group_id):
        group = list(of_group)
        of_this = sum(len(rollout.response_ids) for rollout in group)
        if chunk and num_tokens + of_this > CHUNK_TOKENS:
            yield chunk
            chunk, num_tokens = [], 0
        chunk += group
        num_tokens += of_this
    yield chunk


def _record_prompts(writer: TraceWriter, chunk: Sequence[Rollout], known: set[str]) -> None:
    new = {rollout.prompt_id: rollout for rollout in reversed(chunk) if rollout.prompt_id not in known}
    known.update(new)
    columns = ("prompt_id", "task", "prompt", "ground_truth")
    rows = {name: [getattr(rollout, name) for rollout in new.values()] for name in columns}
    writer.append("prompts", {"split": "train", **rows})


@contextmanager
def _finalize_on_exit(writer: TraceWriter, explain: Callable[[Exception], Exception]) -> Iterator[None]:
    """Flush finished steps and record how the import ended, even if it raised.

    The end is recorded in ``run.json``.
    """
    try:
        yield
    except BaseException as error:
        # The cause, such as a full disk, may prevent this write too; durable rows remain.
        with suppress(Exception):
            writer.flush()
        if isinstance(error, Exception):
            failure = explain(error)
            with suppress(Exception):
                writer.finish(error=f"{type(failure).__name__}: {in_one_line(failure)}")
        raise
    writer.finish()
