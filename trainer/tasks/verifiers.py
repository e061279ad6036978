"""Judge answers with verifiers, which are chosen by the prompt's data source."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from entrace.analysis.trace import InputError, nearest
from entrace.trainer.settings import import_function
from entrace.trainer.tasks.config import DEFAULT
from entrace.trainer.tasks.math_verifier import MathVerifier
from entrace.trainer.tasks.prompt import Prompt, Score, Verifier, extract_answer, extract_boxed

# Largest score: its square fits into float32 many times.
MAX_SCORE = 1e15


class Verifiers:
    """The verifier of every data source, each created once."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """``names`` is ``task.verifiers``."""
        self._names = names
        self._seen: set[str] = set()
        self._needs_default = False
        self._made = cache(make_verifier)

    def of(self, data_source: str, own: Verifier | None = None, *, scorer: Verifier | None = None) -> Verifier:
        """Return the verifier named for the data source.

        Without one, the verifier is ``own``, the default, ``scorer``, or exact match, in this order.
        """
        self._seen.add(data_source)
        if name := self._names.get(data_source):
            return self._made(name)
        if own:
            return own
        self._needs_default = True
        if name := self._names.get(DEFAULT):
            return self._made(name)
        return scorer or self._made("exact")

    def check_names(self) -> None:
        """Refuse data sources that no prompt has, and a default that judges no prompt.

        Raises:
            InputError: there is such a name or default.
        """
        for name in sorted(self._names.keys() - self._seen - {DEFAULT}):
            raise InputError(f'task.verifiers: no prompt has data source "{name}"{nearest(name, self._seen)}')
        if DEFAULT in self._names and not self._needs_default:
            raise InputError(
                f"task.verifiers.default: judges no prompt, because every data source already has a verifier "
                f"({', '.join(sorted(self._seen))}); remove it"
            )


def make_verifier(name: str) -> Verifier:
    """Return the verifier of a valid name.

    Raises:
        InputError: a function cannot be imported, or a library is not installed.
    """
    known: dict[str, Callable[[], Verifier]] = {
        "exact": lambda: match_exactly,
        "math": MathVerifier,
        "math_text": lambda: MathVerifier(reads_text=True),
        "reasoning_gym": lambda: score_by(score_gym_row),
    }
    return known[name]() if name in known else UserFunction(name)


def match_exactly(completion: str, prompt: Prompt) -> Score:
    """Score 1 if the last ``<answer>...</answer>`` is the ground truth, else 0.

    Case and width of white space are ignored.
    """
    answer, truth = extract_answer(completion), prompt.ground_truth
    return Score(answer, float(answer is not None and truth is not None and _normalize(answer) == _normalize(truth)))


def answer_classes(prompt: Prompt, scores: Sequence[Score]) -> list[str | None]:
    """Return the class of each answer to one prompt.

    Answers that the verifier finds equal share a class. The class is None for a missing answer, and for verifiers that
    compare answers only with the ground truth.
    """
    if isinstance(prompt.verifier, MathVerifier):
        return prompt.verifier.classes(scores)
    if prompt.verifier is match_exactly:
        return [score.answer and _normalize(score.answer) for score in scores]
    return [None] * len(scores)


def score_by(score_answer: Callable[[str, dict[str, Any]], float]) -> Verifier:
    """Return a verifier that passes answers to a reasoning-gym scorer.

    An answer is the content of the last ``<answer>...</answer>``.
    """

    def verify(completion: str, prompt: Prompt) -> Score:
        answer = extract_answer(completion)
        return Score(answer, 0.0 if answer is None else float(score_answer(answer, prompt.entry)))

    return verify


def score_gym_row(answer: str, row: dict[str, Any]) -> float:
    """Score an answer with the reasoning-gym task that the row's metadata names.

    The key is ``source_dataset``.
    """
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(row["metadata"]["source_dataset"])(answer, row)  # pyright: ignore[reportCallIssue]


class UserFunction:
    r"""A user's own verifier, ``module:function``.

    The function is called with the completion and the prompt's row. It returns a number, a bool, or a mapping with
    ``score`` and, optionally, ``answer``. A score of None is no verdict: the response is excluded from its group's mean
    and from the loss. If the function returns no answer, the answer is the content of the last
    ``<answer>...</answer>``, else of the last ``\boxed{...}``, else the completion.
    """

    def __init__(self, name: str) -> None:
        """Import the function, possibly from a module of the working directory.

        Raises:
            InputError: the module or function does not exist, or the module raises an error.
        """
        self._name = name
        self._function = import_function(name, "verifier")

    def __call__(self, completion: str, prompt: Prompt) -> Score:
        """Call the function.

        Raises:
            InputError: the score is neither a number up to ``MAX_SCORE`` nor None.
        """
        result = self._function(completion, dict(prompt.entry))
        answer = None
        if isinstance(result, Mapping):
            if "score" not in result:
                raise InputError(f'verifier {self._name} returned no "score" for {prompt.origin}: {result!r}')
            result, answer = result["score"], result.get("answer")
        try:
            score = math.nan if isinstance(result, str) else None if result is None else float(result)
        except (OverflowError, TypeError, ValueError):
            score = math.nan
        if score is not None and not abs(score) <= MAX_SCORE:
            raise InputError(
                f"verifier {self._name} returned {result!r} for {prompt.origin}, expected a finite number or None"
                f"{f' (up to {MAX_SCORE:g})' * math.isfinite(score)}"
            )
        if answer is None:
            answer = extract_answer(completion) or extract_boxed(completion) or completion.strip() or None
        return Score(None if answer is None else str(answer), score)


def _normalize(text: str) -> str:
    return " ".join(text.split()).casefold()
