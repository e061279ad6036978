"""Write worked solutions of mixed quality for chain_sum questions.

The solutions are the corpus of the embedded base policy.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pydantic import NonNegativeFloat

from entrace.analysis.trace import InputError
from entrace.trainer.settings import BaseConfig, Fraction

T = TypeVar("T")
Term = tuple[str, int]

EXPRESSION = re.compile(r"\d+(?: [+-] \d+)+")

LEADS = ("to find {}, ", "we need {}. ", "we add {}: ")
# Careful and hasty work begin differently, so that a policy can learn to prefer one.
CAREFUL_OPENERS = ("", "", "first, ", "first, ", "okay, ", "let's see. ")
HASTY_OPENERS = ("maybe ", "i think ", "hmm, ", "quickly, ")
# Repeated entries weigh more, so that most wording is predictable, as it is for a language model.
RELATIONS = (" = ", " = ", " = ", " = ", " = ", " is ")
CONNECTIVES = (". then ", ". then ", ". then ", ", so ", ". next, ")
CLOSERS = (" so the answer is ", " so the answer is ", " so the answer is ", " therefore ", " the answer is ")
UNTAGGED_CLOSERS = (*CLOSERS, " so we get ", " answer: ", " the total is ")
GUESS_OPENERS = ("", "", "i think ", "maybe ", "it is ", "the answer is ", "easy, ", "my guess is ", "about ")
CHECK_OPENERS = (
    " wait, check: ",
    " let me check: ",
    " check again: ",
    " to be sure: ",
    " let's verify: ",
    " yes, because ",
)
CHECK_CLOSERS = (", yes.", ", correct.", ". yes.", ". okay.", ", sure.")
CORRECTIONS = (". wait, that is wrong. ", ". wait, no. ", ". hmm, check: ", ". oops, a mistake. ", ". no, actually ")
LOOPS = (
    "let me think.",
    "hmm, let me see.",
    "wait, we check it again.",
    "check it again.",
    "so we add it.",
    "then we check it.",
    "because it is so.",
    "maybe it is wrong.",
)
# Off-topic text without words of the lexicon or the question, which would hide the defect.
TALK = (
    ("the ", "my ", "our ", "this "),
    ("garden", "river", "weather", "music", "coffee", "cat", "town", "train"),
    (" is ", " looks ", " was "),
    ("lovely", "cold", "quiet", "old", "bright", "slow"),
    (" today.", " by the sea.", " in the spring.", " this morning.", " at night."),
)
SLIPS = (-10, -2, -1, -1, 1, 1, 2, 10)
GUESS_SPREAD = 12


class Styles(BaseConfig):
    """Weights of the styles of solutions; only their ratios matter."""

    right: NonNegativeFloat
    self_check: NonNegativeFloat
    slip: NonNegativeFloat
    guess: NonNegativeFloat
    unformatted: NonNegativeFloat
    irrelevant: NonNegativeFloat
    repetition: NonNegativeFloat


class Rates(BaseConfig):
    """Probabilities within the styles."""

    restated: Fraction
    slip_careful: Fraction
    unformatted_slip: Fraction
    check_corrects: Fraction
    guess_right: Fraction
    talk_unanswered: Fraction
    loop_stops: Fraction


@dataclass(frozen=True)
class Step:
    """One written operation of the left-to-right evaluation; ``result`` may be wrong."""

    left: int
    operator: str
    right: int
    result: int

    def write(self, relation: str) -> str:
        """Return the step as text, such as ``15 - 43 = -28``."""
        return f"{self.left} {self.operator} {self.right}{relation}{self.result}"


class SolutionWriter:
    """Write solutions in a style drawn by weight.

    Equal seeds and questions give equal texts.
    """

    def __init__(self, styles: Styles, rates: Rates, seed: int) -> None:
        self._rates = rates
        self._rng = random.Random(seed)
        weights = styles.model_dump()
        self._names, self._weights = list(weights), list(weights.values())
        self._write: dict[str, Callable[[list[Term]], str]] = {
            "right": self._write_right,
            "self_check": self._write_self_check,
            "slip": self._write_slip,
            "guess": self._write_guess,
            "unformatted": self._write_unformatted,
            "irrelevant": self._write_irrelevant,
            "repetition": self._write_repetition,
        }

    def write(self, question: str, style: str | None = None) -> str:
        """Return a solution of ``question``.

        Args:
            question: Text with a sum of integers, such as ``15 - 43 - 75``.
            style: A field of ``Styles``; None draws one by weight.

        Raises:
            InputError: the question contains no sum of integers.
        """
        style = style or self._rng.choices(self._names, self._weights)[0]
        return self._write[style](parse_terms(question))

    def _write_right(self, terms: list[Term]) -> str:
        return self._open(terms, CAREFUL_OPENERS) + self._work(solve(terms)) + self._close(solve(terms)[-1].result)

    def _write_slip(self, terms: list[Term]) -> str:
        careful = self._rng.random() < self._rates.slip_careful
        opener = self._open(terms, CAREFUL_OPENERS if careful else HASTY_OPENERS)
        steps = self._slip(terms)
        return opener + self._work(steps) + self._close(steps[-1].result)

    def _write_unformatted(self, terms: list[Term]) -> str:
        slips = self._rng.random() < self._rates.unformatted_slip
        opener = self._open(terms, HASTY_OPENERS if slips else CAREFUL_OPENERS)
        steps = self._slip(terms) if slips else solve(terms)
        return f"{opener}{self._work(steps)}{self._pick(UNTAGGED_CLOSERS)}{steps[-1].result}."

    def _write_self_check(self, terms: list[Term]) -> str:
        steps = solve(terms)
        opener = self._open(terms, CAREFUL_OPENERS)
        if self._rng.random() < self._rates.check_corrects:
            work = self._work_corrected(steps)
        else:
            again = self._rng.choice(steps).write(self._pick(RELATIONS))
            work = f"{self._work(steps)}{self._pick(CHECK_OPENERS)}{again}{self._pick(CHECK_CLOSERS)}"
        return opener + work + self._close(steps[-1].result)

    def _write_guess(self, terms: list[Term]) -> str:
        return f"{self._pick(GUESS_OPENERS)}{tag(self._guess(terms))}"

    def _write_irrelevant(self, terms: list[Term]) -> str:
        talk = "".join(map(self._pick, TALK))
        if self._rng.random() < 0.5:
            talk += " " + "".join(map(self._pick, TALK))
        if self._rng.random() < self._rates.talk_unanswered:
            return talk
        return talk + self._close(self._guess(terms))

    def _write_repetition(self, terms: list[Term]) -> str:
        loop = [self._pick(LOOPS)] * 3
        while self._rng.random() >= self._rates.loop_stops:
            loop.append(loop[0])
        return " ".join(loop) + self._close(self._guess(terms))

    def _slip(self, terms: list[Term]) -> list[Step]:
        """Return steps with one wrong result, which later steps use.

        The last result is always wrong.
        """
        return solve(terms, slip_at=self._rng.randrange(len(terms) - 1), slip=self._pick(SLIPS))

    def _guess(self, terms: list[Term]) -> int:
        value = solve(terms)[-1].result
        if self._rng.random() < self._rates.guess_right:
            return value
        return value + self._rng.choice((-1, 1)) * self._rng.randint(1, GUESS_SPREAD)

    def _work(self, steps: list[Step]) -> str:
        relation = self._pick(RELATIONS)
        return self._join([step.write(relation) for step in steps]) + "."

    def _work_corrected(self, steps: list[Step]) -> str:
        """Return all steps as text, one of them first wrong and then corrected."""
        relation = self._pick(RELATIONS)
        written = [step.write(relation) for step in steps]
        at = self._rng.randrange(len(steps))
        wrong = replace(steps[at], result=steps[at].result + self._pick(SLIPS))
        written[at] = wrong.write(relation) + self._pick(CORRECTIONS) + written[at]
        return self._join(written) + "."

    def _open(self, terms: list[Term], openers: Sequence[str]) -> str:
        """Return an opener, sometimes after a restatement of the problem."""
        lead = ""
        if self._rng.random() < self._rates.restated:
            lead = self._pick(LEADS).format(" ".join(f"{sign} {number}" for sign, number in terms).removeprefix("+ "))
        return lead + self._pick(openers)

    def _join(self, sentences: list[str]) -> str:
        text = sentences[0]
        for sentence in sentences[1:]:
            text += self._pick(CONNECTIVES) + sentence
        return text

    def _close(self, value: int) -> str:
        return self._pick(CLOSERS) + tag(value)

    def _pick(self, options: Sequence[T]) -> T:
        return self._rng.choice(options)


def parse_terms(question: str) -> list[Term]:
    """Return signs and numbers of the first sum in a text.

    ``15 - 43`` gives ``[("+", 15), ("-", 43)]``.

    Raises:
        InputError: the text contains no sum.
    """
    found = EXPRESSION.search(question)
    if found is None:
        raise InputError(f'worked solutions need a sum such as "15 - 43 + 7", found "{question}"')
    words = ["+", *found.group().split()]
    return [(sign, int(number)) for sign, number in zip(words[::2], words[1::2], strict=True)]


def solve(terms: list[Term], slip_at: int | None = None, slip: int = 0) -> list[Step]:
    """Evaluate from left to right.

    The result of step ``slip_at`` is off by ``slip``, and later steps use it.
    """
    steps: list[Step] = []
    value = terms[0][1]
    for index, (sign, number) in enumerate(terms[1:]):
        result = value + number if sign == "+" else value - number
        steps.append(Step(value, sign, number, result + slip * (index == slip_at)))
        value = steps[-1].result
    return steps


def tag(value: int) -> str:
    """Return the answer in the format that the task requires."""
    return f"<answer>{value}</answer>"
