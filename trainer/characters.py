"""Characters of a task that a tokenizer cannot encode, or does not decode to what they were."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

from trainer.tasks import Task

NUM_NAMED = 20
# Tags and boxes in which verifiers look for an answer.
ANSWER_FORMATS = ("<answer></answer>", r"\boxed{}")

logger = logging.getLogger(__name__)


def task_texts(task: Task, template: str | None) -> Iterator[str]:
    """Yield what a policy reads and must be able to write: template, questions, answers, and their formats."""
    yield from (template or "", *ANSWER_FORMATS)
    for source in task.sources:
        for prompt in source.prompts:
            yield prompt.text
            yield prompt.ground_truth or ""


def find_lost(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[str]:
    """Return the characters that become an unknown token, or are not among what their tokens decode to, sorted.

    Every character is tried in the first text that holds it. Forms of one character that Unicode calls canonically
    equivalent count as equal, and so does white space at the ends.
    """
    seen: set[str] = set()
    lost: set[str] = set()
    for text in texts:
        new = set(text) - seen
        if new:
            seen |= new
            lost |= _lost_in(tokenizer, text)
    return sorted(lost)


def describe_lost(characters: list[str], model: str) -> str:
    """Return one line that names the characters and says what follows."""
    number = "1 character" if len(characters) == 1 else f"{len(characters)} characters"
    named = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in characters[:NUM_NAMED])
    more = f", and {len(characters) - NUM_NAMED} more" if len(characters) > NUM_NAMED else ""
    return (
        f"policy.path: the tokenizer of {model} cannot encode {number} of the task, {named}{more}; "
        "the policy can neither read nor write them: choose another model, or prompts without them"
    )


def warn_of_lost(tokenizer: PreTrainedTokenizerBase, task: Task, model: str, template: str | None = None) -> None:
    """Log a warning that names the task's characters which the tokenizer cannot encode, if there are any."""
    if lost := find_lost(tokenizer, task_texts(task, template)):
        logger.warning("entrace: %s", describe_lost(lost, model))


def _lost_in(tokenizer: PreTrainedTokenizerBase, text: str) -> set[str]:
    wanted, found = Counter(unicodedata.normalize("NFC", text.strip())), Counter(_round_trip(tokenizer, text))
    # Tokenizers add and merge spaces between words, which changes how many there are.
    suspects = {c for c, number in wanted.items() if found[c] < (1 if c.isspace() else number)}
    # A word with one unknown character may be unknown as a whole.
    alone = {c for c in suspects if c.isspace() or c not in _round_trip(tokenizer, c)}
    return alone or suspects


def _round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # The text of the unknown token must not pass for that of a character.
    known = [i for i in ids if i != tokenizer.unk_token_id]
    return unicodedata.normalize("NFC", "".join(tokenizer.decode(known, clean_up_tokenization_spaces=False)))
