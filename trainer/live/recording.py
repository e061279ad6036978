"""Open traces and log warnings alike for TRL and verl."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from entrace.analysis.trace.recorder import Recorder
from entrace.trainer.live.arguments import Arguments

log = logging.getLogger("entrace")


class Notices:
    """Log each warning once."""

    def __init__(self, *, is_main: bool = True) -> None:
        """Start without any message; outside the main process none is logged."""
        self._is_main = is_main
        self._said: set[str] = set()

    def say(self, text: str) -> None:
        """Log a warning, unless it has been logged before."""
        if self._is_main and text not in self._said:
            self._said.add(text)
            log.warning("%s", text)

    def say_already_recorded(self, step: int, benchmark: str) -> None:
        """Warn of an evaluation that the trace holds already."""
        self.say(f"evaluation of {benchmark} at step {step} is already in the trace and is not recorded again")

    def say_truncated(
        self, library: str, setting: Callable[[str, Any], Any], neutral: Mapping[str, tuple[Any, ...]]
    ) -> None:
        """Warn that log-probabilities and entropies ignore truncated sampling.

        Args:
            library: Name of the traced library.
            setting: Returns the setting of a name, or the given default.
            neutral: Values that leave the distribution as it is, by name; the first is the default.
        """
        found = {name: setting(name, values[0]) for name, values in neutral.items()}
        changed = ", ".join(f"{name}={value}" for name, value in found.items() if value not in neutral[name])
        if changed:
            self.say(f"{changed}: {library}'s log-probabilities and entropies, as recorded, are those without it")


def open_recorder(
    trainer: Any,
    arguments: Arguments,
    tokenizer: Any,
    *,
    library: str,
    settings: Any,
    correct: str,
    manifest: Mapping[str, Any],
    **options: Any,
) -> Recorder:
    """Open the trace of a trainer.

    Args:
        trainer: Trainer of TRL or verl.
        arguments: Arguments of the traced trainer.
        tokenizer: Tokenizer of the policy.
        library: Package of the trainer.
        settings: Settings of the trainer; values that JSON cannot hold become text.
        correct: Rule in words that decides correctness.
        manifest: Further keys of ``run.json``.
        **options: Further arguments of ``Recorder``.
    """
    described = {
        "arm": arguments.arm or arguments.shaping.method,
        "config": {
            "trainer": type(trainer).__name__,
            "shaping": arguments.shaping.model_dump(mode="json"),
            "correct": correct,
            library: json.loads(json.dumps(settings, default=str), parse_constant=str),
        },
    }
    recorder = Recorder(
        arguments.run_dir,
        tokenizer,
        correct_at=None,
        manifest={**described, **manifest},
        flush_every=arguments.flush_every,
        **options,
    )
    recorder.manifest["versions"] = {**recorder.manifest.get("versions", {}), library: version(library)}
    return recorder


def first_truths(
    recorder: Recorder, prompt_ids: Sequence[str], ground_truths: Sequence[str | None]
) -> list[str | None]:
    """Return the first ground truth of each prompt that is new to the trace.

    The others are None: a dataset may hold a text twice with different answers, and the recorder refuses these.
    """
    found: list[str | None] = []
    seen: set[str] = set()
    for prompt_id, truth in zip(prompt_ids, ground_truths, strict=True):
        is_first = truth is not None and prompt_id not in seen and not recorder.has_prompt(prompt_id)
        found.append(truth if is_first else None)
        if is_first:
            seen.add(prompt_id)
    return found


def common_reasons(library: str, arguments: Arguments) -> dict[str, str]:
    """Return why columns are null in traces of both libraries, by table and column."""
    answers = ("rollouts.answer", "rollouts.has_answer", "steps.format_rate", "evals.answer")
    reasons: dict[str, str] = dict.fromkeys(answers, f"{library}'s reward functions return scores, not answers")
    if not arguments.after_update_every:
        reasons |= dict.fromkeys(("tokens.logprob_after", "tokens.entropy_after"), "after_update_every is 0")
    reasons["evals"] = "no evaluation ran while training was recorded"
    reasons["prompts.difficulty"] = f"datasets of {library} do not say"
    return reasons
