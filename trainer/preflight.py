"""Check data files, tokenizer, verifiers, and evaluations before a run starts.

``dry_run`` plans the memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import PreTrainedTokenizerBase

from entrace.analysis.trace import InputError, Lexicon
from entrace.trainer.config import Config
from entrace.trainer.model.loading import load_tokenizer
from entrace.trainer.model.policy import Policy
from entrace.trainer.sampling.vllm_engine import load_vllm
from entrace.trainer.tasks import Prompt, Task, load_task
from entrace.trainer.tasks.characters import describe_lost, find_lost, task_texts
from entrace.trainer.tasks.files import FileSource

# Answers that are given to the verifier of each data source.
NUM_TRIED = 5
FORMATS = ("<answer>{}</answer>", r"\boxed{{{}}}", "{}")
NAME_WIDTH = 14

T = TypeVar("T")


@dataclass
class Checks:
    """Findings about the needs of a run.

    Attributes:
        files: Rows of each file, as in ``RowCount``.
        training: Training prompts by source; None for a task that generates them without end.
        heldout: Held-out prompts by benchmark.
        tokenizer_entries: Vocabulary size of the tokenizer; None if it cannot be loaded.
        lost_characters: Characters of the task that the tokenizer cannot encode.
        gold_accepted: Number of correct answers that each data source's verifier judged, and accepted.
        evaluations: Evaluations of the run, including those before the first and after the last step.
        evaluation_responses: Responses per evaluation.
        evaluation_tokens: Largest number of tokens per evaluation.
        warnings: Findings that do not stop the run, one line each.
        problems: Findings that stop the run, one line each.
    """

    files: dict[str, dict[str, int]] = field(default_factory=dict)
    training: dict[str, int | None] = field(default_factory=dict)
    heldout: dict[str, int] = field(default_factory=dict)
    tokenizer_entries: int | None = None
    lost_characters: list[str] = field(default_factory=list)
    gold_accepted: dict[str, tuple[int, int]] = field(default_factory=dict)
    evaluations: int = 0
    evaluation_responses: int = 0
    evaluation_tokens: int = 0
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Yield the findings as text, one line per fact, without warnings and problems."""
        for path, count in self.files.items():
            left_out = {"malformed": count["bad_rows"], "too long": count["too_long"]}
            parts = [f"{number:,} {name}" for name, number in left_out.items() if number]
            parts += [f"{count['without_answer']:,} without an answer"] if count.get("without_answer") else []
            yield _line("file", ", ".join([f"{path}: {count['rows']:,} rows", *parts]))
        for label, number in self.training.items():
            prompts = "generated without end" if number is None else f"{number:,} prompts"
            yield _line("training", f"{label}: {prompts}")
        for benchmark, number in self.heldout.items():
            yield _line("held out", f"{benchmark}: {number:,} prompts")
        if self.tokenizer_entries is not None:
            yield _line("tokenizer", f"{self.tokenizer_entries:,} entries")
        for name, (tried, accepted) in self.gold_accepted.items():
            verdict = f"accepts {accepted} of {tried} correct answers" if tried else "runs; no answer to try"
            yield _line("verifier", f"{name}: {verdict}")
        if self.evaluations:
            each = f"{self.evaluation_responses:,} responses, at most {self.evaluation_tokens:,} tokens"
            tokens = self.evaluations * self.evaluation_tokens
            total = f"{self.evaluations} times, at most {tokens:,} tokens over the run"
            yield _line("evaluation", f"{each}; {total}")


def check_run(config: Config) -> Checks:
    """Open the files, load the tokenizer, and try the verifiers of a run.

    Weights are not read. A failed check adds a line to ``problems`` instead of raising, so that one call reports all
    problems.
    """
    found = Checks()
    tokenizer = _try(found, lambda: load_tokenizer(config.policy.path))
    if config.rollout.engine == "vllm":
        _try(found, load_vllm)
    if config.record.lexicon:
        _try(found, lambda: Lexicon.load(Path(str(config.record.lexicon))))
    policy = _without_model(config, tokenizer) if tokenizer else None
    task = _try(found, lambda: _load_task(config, policy))
    if tokenizer:
        found.tokenizer_entries = len(tokenizer)
    if not task:
        return found
    _count_prompts(found, config, task)
    tried = _by_data_source(task)
    for name, prompts in tried.items():
        _try(found, lambda name=name, prompts=prompts: _try_verifier(found, task, name, prompts))
    if tokenizer and policy:
        _try(found, lambda: [policy.encode_prompt(prompt.question) for part in tried.values() for prompt in part])
        found.lost_characters = find_lost(tokenizer, task_texts(task, config.policy.template))
        if found.lost_characters:
            found.warnings.append(describe_lost(found.lost_characters, config.policy.path))
    return found


def _try(found: Checks, check: Callable[[], T]) -> T | None:
    """Return the result of the check, or None if it raised, which becomes a problem."""
    try:
        return check()
    except InputError as error:
        found.problems.append(str(error))
        return None


def _without_model(config: Config, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """Return a policy without weights, which can only encode prompts."""
    no_model = cast("Any", None)
    device, dtype = torch.device("cpu"), torch.float32
    return Policy(no_model, tokenizer, device, dtype, config.policy.path, config.policy.template)


def _load_task(config: Config, policy: Policy | None) -> Task:
    if policy is None:
        # Prompt lengths cannot be measured, but files and rows can be checked.
        return load_task(config.task.model_copy(update={"max_prompt_tokens": None}), config.seed)
    return load_task(config.task, config.seed, policy.encode_prompt)


def _count_prompts(found: Checks, config: Config, task: Task) -> None:
    found.files = task.describe().get("data", {})
    for (label, source), loaded in zip(config.task.sources.items(), task.sources, strict=True):
        if source.weight:
            found.training[label] = loaded.num_training if isinstance(loaded, FileSource) else None
    found.heldout = dict(Counter(prompt.task for prompt in task.heldout))
    needed, numbers = config.rollout.prompts_per_step, list(found.training.values())
    if None not in numbers and (there := sum(number or 0 for number in numbers)) < needed:
        found.warnings.append(
            f"rollout.prompts_per_step = {needed}: there are only {there} training prompts, so that a step repeats some"
        )
    steps, every = config.steps, config.eval.every
    found.evaluations = 1 + steps // every + (steps % every > 0)
    found.evaluation_responses = len(task.heldout) * config.eval.samples
    found.evaluation_tokens = found.evaluation_responses * config.rollout.max_response_tokens


def _by_data_source(task: Task) -> dict[str, list[Prompt]]:
    """Return a few prompts of each data source, those with an answer first."""
    found: dict[str, list[Prompt]] = {}
    for source in task.sources:
        for prompt in source.prompts:
            found.setdefault(prompt.task, []).append(prompt)
    for prompts in found.values():
        prompts.sort(key=lambda prompt: prompt.ground_truth is None)
    return {name: prompts[:NUM_TRIED] for name, prompts in found.items()}


def _try_verifier(found: Checks, task: Task, name: str, prompts: list[Prompt]) -> None:
    """Judge correct answers in each form that verifiers look for.

    If there are no answers, an empty response is judged.
    """
    with_answer = [prompt for prompt in prompts if prompt.ground_truth is not None]
    if not with_answer:
        task.score("", prompts[0])
    rejected: list[str] = []
    for prompt in with_answer:
        scores = [task.score(form.format(prompt.ground_truth), prompt) for form in FORMATS]
        if not any(score.is_correct for score in scores):
            best = max((score.score for score in scores if score.score is not None), default=None)
            verdict = "no verdict" if best is None else f"{best:g}"
            rejected.append(f"{prompt.origin} ({str(prompt.ground_truth)[:40]!r} gets {verdict})")
    found.gold_accepted[name] = len(with_answer), len(with_answer) - len(rejected)
    if rejected:
        found.warnings.append(
            f"task.verifiers: {len(rejected)} of {len(with_answer)} correct answers of {name} are judged incorrect, in "
            f"tags, boxed, and plain: {rejected[0]}; check the answers, the verifier, and task.correct_at"
        )


def _line(name: str, text: str) -> str:
    return f"{name:<{NAME_WIDTH}}{text}"
