"""Find characters of a task that a tokenizer cannot encode or decode.

A character that is not decoded to itself is lost.
"""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

from entrace.trainer.tasks import Task
from entrace.trainer.tasks.math_verifier import MathVerifier
from entrace.trainer.tasks.prompt import Verifier
from entrace.trainer.tasks.verifiers import UserFunction

NUM_NAMED = 20

logger = logging.getLogger(__name__)


def task_texts(task: Task, template: str | None) -> Iterator[str]:
    """Yield the texts that a policy reads and writes.

    These are the template, questions, and answers as verifiers expect them.
    """
    yield template or ""
    for source in task.sources:
        for prompt in source.prompts:
            yield prompt.text
            yield answer_format(prompt.verifier).format(prompt.ground_truth or "")


def answer_format(verifier: Verifier) -> str:
    """Return the format in which a verifier looks for an answer, with ``{}`` in it."""
    if isinstance(verifier, UserFunction):
        return "{}"
    return r"\boxed{{{}}}" if isinstance(verifier, MathVerifier) else "<answer>{}</answer>"


def find_lost(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[str]:
    """Return, sorted, the characters that the tokenizer cannot encode or decode.

    Such a character becomes an unknown token, or is lost when decoded. Every character is tried in the first text that
    holds it. Canonically equivalent Unicode forms count as equal, and white space at the ends is ignored.
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
    """Return one line that names the characters and the consequence."""
    number = "1 character" if len(characters) == 1 else f"{len(characters)} characters"
    named = ", ".join(_name(character) for character in characters[:NUM_NAMED])
    more = f", and {len(characters) - NUM_NAMED} more" if len(characters) > NUM_NAMED else ""
    return (
        f"policy.path: the tokenizer of {model} cannot encode {number} of the task, {named}{more}; "
        "the policy can neither read nor write them: choose another model, or prompts without them"
    )


def warn_of_lost(tokenizer: PreTrainedTokenizerBase, task: Task, model: str, template: str | None = None) -> None:
    """Warn of characters of the task that the tokenizer cannot encode, if any."""
    if lost := find_lost(tokenizer, task_texts(task, template)):
        logger.warning("entrace: %s", describe_lost(lost, model))


def _name(character: str) -> str:
    code = f"U+{ord(character):04X}"
    return f'"{character}" ({code})' if character.isprintable() and not character.isspace() else code


def _lost_in(tokenizer: PreTrainedTokenizerBase, text: str) -> set[str]:
    wanted, found = Counter(unicodedata.normalize("NFC", text.strip())), Counter(_round_trip(tokenizer, text))
    # Tokenizers add and merge spaces between words, so that only their presence counts.
    suspects = {c for c, number in wanted.items() if found[c] < (1 if c.isspace() else number)}
    # A word with one unknown character may be unknown as a whole.
    alone = {c for c in suspects if c.isspace() or c not in _round_trip(tokenizer, c)}
    return alone or suspects


def _round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # The text of the unknown token must not count as a character.
    known = [i for i in ids if i != tokenizer.unk_token_id]
    return unicodedata.normalize("NFC", "".join(tokenizer.decode(known, clean_up_tokenization_spaces=False)))
