"""Traces of verifiers, which prime-rl writes as well.

- ``traces.jsonl``: one episode or one trace per line, also below ``rollouts/step_N/train/effective`` of prime-rl.
- ``monitors/file/traces/stream.jsonl`` or ``stream/00000.jsonl[.zst]``: every episode of a run of prime-rl in the order
  of arrival. What became known later is in ``annotations/<producer>``: the step that trained on a trace, advantages,
  and the trainer's logprobs and entropies, rounded to four decimals by default.

A trace is a tree of messages. Each path from the root to a leaf, a branch, is one rollout: the tokens before the first
sampled one are its prompt. ``mask`` marks the sampled tokens, and values per token are those of the sampled ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrace.analysis.importers.formats.annotated import Records
from entrace.analysis.importers.formats.base import Convert, Format, Row, Session, find_step
from entrace.analysis.importers.row_files import BadRowError
from entrace.analysis.trace.errors import InputError

STREAMS = {
    "logprobs": "sampling_logprob",
    "trainer_logprobs": "logprob",
    "reference_logprobs": "reference_logprob",
    "entropies": "entropy",
    "advantages": "advantage",
}
# Streams of annotations, which cover all tokens of a branch.
ANNOTATED = ("advantages", "trainer_logprobs", "entropies")
TRUNCATING = {"max_turns", "max_input_tokens", "max_output_tokens", "max_total_tokens", "compaction_failed"}
ANSWER_KEYS = ("answer", "ground_truth", "gold")


@dataclass
class Reader:
    """Convert records of episodes and traces.

    Attributes:
        session: The reading.
        annotations: Annotations by trace.
        left_out: Traces that are not rollouts of the trained policy, by reason.
        run: Id of the run of the first episode.
    """

    session: Session
    annotations: Records
    left_out: dict[str, int] = field(default_factory=dict)
    run: str | None = None

    def convert(self, record: Row, path: Path) -> Iterator[Row]:
        """Yield the rollouts of a record.

        Raises:
            InputError: the record belongs to another run.
        """
        traces = record.get("traces", [record])
        self._check_run(record, path)
        for trace in traces:
            if not isinstance(trace, dict):
                raise BadRowError('"traces" holds a value that is not an object')
            yield from self._rollouts(self._annotate(trace), record, path)

    def _check_run(self, record: Row, path: Path) -> None:
        run = _at(record, "run", "id")
        if run is None:
            return
        if self.run is None:
            self.run = run
        if run != self.run:
            raise InputError(f"{path}: holds runs {self.run} and {run}; import one run at a time")

    def _annotate(self, trace: Row) -> Row:
        """Return a trace with its annotations, of which the newest counts."""
        nodes = [dict(node) for node in trace.get("nodes") or []]
        info = dict(trace.get("info") or {})
        paths = branches_of(nodes)
        for record in self.annotations.get(str(trace.get("id"))):
            info |= record.get("info") or {}
            for branch in record.get("branches") or [record]:
                index = branch.get("index", branch.get("branch_index"))
                if type(index) is int and 0 <= index < len(paths):
                    for name in ANNOTATED:
                        _spread(paths[index], name, branch.get(name))
        return {**trace, "nodes": nodes, "info": info}

    def _rollouts(self, trace: Row, episode: Row, path: Path) -> Iterator[Row]:
        reason = _why_not(trace, episode)
        paths = [nodes for nodes in branches_of(trace["nodes"]) if any(any(node.get("mask") or []) for node in nodes)]
        if not reason and not paths:
            reason = "without sampled tokens"
        if reason:
            self.left_out[reason] = self.left_out.get(reason, 0) + 1
            of_all = ", ".join(f"{count} {why}" for why, count in self.left_out.items())
            self.session.remarks[:] = [f"traces left out: {of_all}"]
            return
        for index, nodes in enumerate(paths):
            key = str(trace.get("id"))
            number = f"{key}/{index}" if len(paths) > 1 else key
            yield {**_facts(trace, episode, path, has_orders=bool(self.annotations)), **_tokens(nodes), "id": number}


def branches_of(nodes: Sequence[Row]) -> list[list[Row]]:
    """Return the nodes of each path from the root to a leaf, in order of the leaves."""
    parents = {node.get("parent") for node in nodes}
    paths = []
    for leaf in (n for n in range(len(nodes)) if n not in parents):
        path: list[Row] = []
        place: Any = leaf
        while type(place) is int and 0 <= place < len(nodes) and len(path) <= len(nodes):
            path.append(nodes[place])
            place = nodes[place].get("parent")
        paths.append(path[::-1])
    return paths


def _spread(path: Sequence[Row], name: str, stream: Any) -> None:
    """Give each node of a path the values of its sampled tokens.

    A node with a null among these values keeps its own.
    """
    start = 0
    for node in path if isinstance(stream, list) else ():
        length = len(node.get("token_ids") or [])
        span = stream[start : start + length]
        start += length
        values = [value for value, mark in zip(span, node.get("mask") or [], strict=False) if mark]
        if len(span) == length and values and None not in values:
            node[name] = values


def _why_not(trace: Row, episode: Row) -> str | None:
    """Return why a trace is not a rollout of the trained policy, or None."""
    kind = _at(trace, "info", "kind") or _at(episode, "run", "work", "type")
    if kind == "eval":
        return "of evaluations"
    return "of agents that are not trained" if _at(trace, "agent", "trainable") is False else None


def _facts(trace: Row, episode: Row, path: Path, *, has_orders: bool) -> Row:
    """Return what a trace says about all its branches."""
    info = trace["info"]
    shipped = _at(info, "ship", "step")
    steps = (shipped, find_step(path), _at(info, "arrival", "step"), _at(episode, "run", "work", "step"), 1)
    rewards = trace.get("rewards") or {}
    data = _at(trace, "task", "data") or {}
    scores = {name: None if reward is None else reward.get("score") for name, reward in rewards.items()}
    total = None
    if rewards and None not in scores.values():
        total = sum(reward["score"] * reward.get("weight", 1) for reward in rewards.values())
    calls = [call for call in trace.get("calls") or [] if call.get("error") is None]
    version = _at(episode, "run", "work", "policy") or {}
    return {
        "step": next(step for step in steps if step is not None),
        "group": _at(episode, "group", "id"),
        "task": _at(episode, "env", "name") or _at(episode, "env", "id") or _at(trace, "task", "type"),
        "reward": total,
        "reward_components": scores or None,
        "advantage": info.get("advantage"),
        "ground_truth": next((data[key] for key in ANSWER_KEYS if data.get(key) is not None), None),
        "is_truncated": (
            trace.get("stop_condition") in TRUNCATING or (bool(calls) and calls[-1].get("finish_reason") == "length")
        ),
        # Orders to train on a trace are annotations of the orchestrator.
        "is_kept": bool(info.get("effective")) if has_orders else None,
        "policy_version": version.get("start") if version.get("start") == version.get("end") else None,
        "temperature": _at(calls[-1], "sampling", "temperature") if calls else None,
    }


def _tokens(nodes: Sequence[Row]) -> Row:
    """Return the tokens of a branch with their values."""
    ids: list[int] = []
    mask: list[bool] = []
    turns: list[int] = []
    values: dict[str, list[Any]] = {name: [] for name in STREAMS}
    sampled = 0
    for node in nodes:
        own, marks = node.get("token_ids") or [], [bool(mark) for mark in node.get("mask") or []]
        if len(own) != len(marks):
            raise BadRowError(f'a node has {len(own)} "token_ids" and {len(marks)} entries in "mask"')
        ids += own
        mask += marks
        # Context belongs to the turn that it precedes.
        turns += [sampled] * len(own)
        sampled += any(marks)
        for name in STREAMS:
            given = node.get(name)
            if given and len(given) != sum(marks):
                raise BadRowError(f'a node has {sum(marks)} sampled tokens and {len(given)} entries in "{name}"')
            rest = iter(given or [None] * sum(marks))
            values[name] += [next(rest) if mark else None for mark in marks]
    start = mask.index(True)
    if start == 0:
        raise BadRowError('"mask" marks the first token as sampled, which leaves no prompt')
    found: Row = {
        "prompt_ids": ids[:start],
        "response_ids": ids[start:],
        "loss_mask": mask[start:],
        "prompt": _messages_before(nodes),
        "turn": [min(turn, sampled - 1) for turn in turns[start:]] if sampled > 1 else None,
    }
    streams = {STREAMS[name]: row[start:] for name, row in values.items() if any(value is not None for value in row)}
    return {**found, **streams}


def _messages_before(nodes: Sequence[Row]) -> list[dict[str, str]] | None:
    """Return the turns of the prompt, None if one of them has no text."""
    turns = []
    for node in nodes:
        if any(node.get("mask") or []):
            break
        message = node.get("message") or {}
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
        if not isinstance(content, str) or not content.strip() or message.get("role") == "assistant":
            return None
        turns.append({"role": str(message.get("role")), "content": content})
    return turns or None


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _open(session: Session) -> Convert:
    annotations = Records(session.folder)
    for path in annotation_files(session.files):
        annotations.add(path, lambda record: [str(record.get("trace_id"))])
    return Reader(session, annotations).convert


def annotation_files(files: Iterable[Path]) -> list[Path]:
    """Return the annotations beside the streams of a run, ordered by name."""
    found = []
    for root in dict.fromkeys(map(_root_of, files)):
        found += sorted(
            path
            for pattern in ("annotations/*.jsonl*", "annotations/*/*.jsonl*")
            for path in root.glob(pattern)
            if ".index." not in path.name and path.suffix in (".jsonl", ".zst")
        )
    return found


def _root_of(path: Path) -> Path:
    """Return the folder that holds a stream and its annotations."""
    return path.parent.parent if path.parent.name == "stream" else path.parent


def _run_of(path: Path) -> str | None:
    """Return the folder of the stream that a file belongs to; None for other files."""
    is_stream = path.parent.name == "stream" or path.name.startswith("stream")
    return str(_root_of(path)) if is_stream else None


def _without_twins(files: list[Path]) -> tuple[list[Path], list[str]]:
    """Return the files without the compressed ones whose plain twin is there."""
    there = set(files)
    return [path for path in files if path.suffix != ".zst" or path.with_suffix("") not in there], []


def _is_row(row: Mapping[str, Any], path: Path) -> bool:
    del path
    is_trace = isinstance(row.get("nodes"), list) and "task" in row
    return is_trace or (isinstance(row.get("traces"), list) and "task" in row)


FORMAT = Format(
    "verifiers",
    "verifiers traces",
    (
        "**/monitors/file/traces/stream*.jsonl*",
        "**/monitors/file/traces/stream/*.jsonl*",
        "**/train/effective/traces.jsonl",
        "**/traces.jsonl",
        "stream*.jsonl*",
        "stream/*.jsonl*",
    ),
    _is_row,
    _open,
    # Only a trace that was trained on has an advantage.
    uniform=("step",),
    run_of=_run_of,
    whole=_without_twins,
)
