"""Pretrain the embedded base policy from one recipe.

The recipe covers tokenizer, corpus, model, and evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entrace.analysis.trace import InputError
from entrace.analysis.trace.places import check_folder
from entrace.analysis.trace.staging import is_interrupted, staged
from entrace.trainer.config import Config, EvalConfig, PolicyConfig, RolloutConfig, TaskConfig
from entrace.trainer.evaluate import evaluate
from entrace.trainer.model.policy import Policy
from entrace.trainer.pretraining.worked_solutions import Rates, SolutionWriter, Styles
from entrace.trainer.settings import BaseConfig, Fraction, Natural, Positive, read_toml, validate_section
from entrace.trainer.tasks import Task, load_task

PAD, EOS = "<pad>", "<eos>"
ROLES = ("<system>", "<user>", "<assistant>")
# Tags, words, and signs keep the preceding space; every digit is a separate piece.
PIECES = r" ?</?\p{L}+>| ?\p{L}+(?:'\p{L}+)?| ?\d| ?[^\s\p{L}\d]|\s"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class TokenizerRecipe(BaseConfig):
    """Byte-level BPE: vocabulary size, and number of training solutions."""

    vocab_size: Annotated[int, Field(ge=300)]
    examples: Positive


class ModelRecipe(BaseConfig):
    """Shape of the Llama model, which has tied embeddings."""

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    initializer_range: Annotated[float, Field(gt=0)]
    max_position_embeddings: Annotated[int, Field(ge=192)]


class TrainingRecipe(BaseConfig):
    """Training with AdamW, warm-up, and cosine decay to ``final_lr_frac`` of ``lr``."""

    questions: Positive
    steps: Positive
    batch_size: Positive
    micro_batches: Positive
    max_response_tokens: Positive
    lr: Annotated[float, Field(gt=0)]
    final_lr_frac: Fraction
    warmup_frac: Fraction
    weight_decay: Annotated[float, Field(ge=0)]
    beta2: Annotated[float, Field(gt=0, lt=1)]
    grad_clip: Annotated[float, Field(gt=0)]
    threads: Positive


class EvaluationRecipe(BaseConfig):
    """Held-out sampling at temperature 1 after training, ``samples`` per prompt."""

    samples: Positive


class Recipe(BaseConfig):
    """The recipe of the base policy, which determines it completely."""

    seed: Natural
    task: TaskConfig
    styles: Styles
    rates: Rates
    tokenizer: TokenizerRecipe
    model: ModelRecipe
    training: TrainingRecipe
    evaluation: EvaluationRecipe


@dataclass(frozen=True)
class HeldoutMetrics:
    """Metrics on held-out prompts.

    Attributes:
        accuracy: Fraction of correct responses.
        pass_at_k: Fraction of prompts with a correct sample.
        format_rate: Fraction of responses with an answer.
        limit_frac: Fraction of responses at the length limit.
        entropy_token_mean: Mean entropy per token, nats.
        response_length_median: Median length of a response, tokens.
    """

    accuracy: float
    pass_at_k: float
    format_rate: float
    limit_frac: float
    entropy_token_mean: float
    response_length_median: float


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        InputError: the file does not exist or is not TOML, or a key is unknown, missing, or invalid.
    """
    return validate_section(Recipe, read_toml(path), str(path))


def pretrain(recipe_path: Path, out: Path, on_step: Callable[..., None]) -> HeldoutMetrics:
    """Build the base policy of a recipe in a new folder.

    Equal recipes on one CPU give equal bytes.

    Args:
        recipe_path: TOML file; see ``Recipe``.
        out: Folder for model and tokenizer, new or empty.
        on_step: Called as ``on_step(steps_done, loss=...)`` after every optimizer step.

    Returns:
        Metrics of the finished policy on held-out prompts at temperature 1.

    Raises:
        InputError: the recipe is invalid, or ``out`` is a file or not empty.
    """
    check_folder(out)
    recipe = load_recipe(recipe_path)
    if out.exists() and not is_interrupted(out) and any(out.iterdir()):
        raise InputError(f"{out}: not empty; choose a new folder")
    with staged(out, last="config.json") as folder:
        return _build(recipe, folder, on_step)


def _build(recipe: Recipe, folder: Path, on_step: Callable[..., None]) -> HeldoutMetrics:
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.training.threads)
    task = load_task(recipe.task, recipe.seed)
    corpus = _write_corpus(task, SolutionWriter(recipe.styles, recipe.rates, recipe.seed), recipe.training.questions)
    texts = [text for pair in islice(corpus, recipe.tokenizer.examples) for text in pair]
    tokenizer = train_tokenizer(texts, recipe.tokenizer.vocab_size)
    model = LlamaForCausalLM(_model_config(recipe.model, tokenizer))
    _fit(model, _batches(corpus, tokenizer, recipe.training), recipe.training, on_step)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return evaluate_heldout(folder, task, recipe)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on ``texts``.

    Decoding inverts encoding for any text, and every digit is one token.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, EOS, *ROLES],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=list(ROLES),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids, (B, T).

    ``is_response``, (B, T), marks the tokens in the loss, including the end token.
    """

    ids: Tensor
    is_response: Tensor


def evaluate_heldout(model_dir: Path, task: Task, recipe: Recipe) -> HeldoutMetrics:
    """Load a finished policy, and evaluate it on all held-out prompts.

    Loading is that of a run; the temperature is 1.
    """
    policy = Policy.load(PolicyConfig(path=str(model_dir)))
    limit, samples = recipe.training.max_response_tokens, recipe.evaluation.samples
    config = Config(
        seed=recipe.seed,
        rollout=RolloutConfig(max_response_tokens=limit),
        eval=EvalConfig(samples=samples, temperature=1.0),
    )
    rows = evaluate(config, policy, task, step=0)
    correct, lengths = np.array(rows["is_correct"]), np.array(rows["response_length"])
    return HeldoutMetrics(
        accuracy=float(correct.mean()),
        pass_at_k=float(correct.reshape(-1, samples).any(1).mean()),
        format_rate=float(np.mean([answer is not None for answer in rows["answer"]])),
        limit_frac=float(np.mean(lengths >= limit)),
        entropy_token_mean=float(np.average(rows["entropy_mean"], weights=lengths)),
        response_length_median=float(np.median(lengths)),
    )


def _model_config(shape: ModelRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        **shape.model_dump(),
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()[EOS],
        pad_token_id=tokenizer.get_vocab()[PAD],
        dtype="float32",
    )


def _write_corpus(task: Task, writer: SolutionWriter, questions: int) -> Iterator[tuple[str, str]]:
    """Yield pairs of a training question and a solution, without end.

    Held-out questions are excluded.
    """
    for index in count():
        question = task.train_prompt(index % questions).text
        yield question, writer.write(question)


def _batches(
    corpus: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, recipe: TrainingRecipe
) -> Iterator[list[Batch]]:
    """Yield random batches without end.

    A batch is cut by length into micro-batches to limit padding.
    """
    while True:
        examples = _encode(list(islice(corpus, recipe.batch_size)), tokenizer, recipe.max_response_tokens)
        examples.sort(key=lambda example: sum(map(len, example)))
        size = math.ceil(recipe.batch_size / recipe.micro_batches)
        yield [_collate(examples[i : i + size], tokenizer.get_vocab()[PAD]) for i in range(0, len(examples), size)]


def _encode(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, limit: int
) -> list[tuple[list[int], list[int]]]:
    """Return token ids of prompt and response.

    A response is cut at ``limit`` tokens and then lacks the end token.
    """
    chats = [[{"role": "user", "content": question}] for question, _ in pairs]
    rendered: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    prompts: Any = tokenizer(rendered)["input_ids"]
    solutions: Any = tokenizer([solution + EOS for _, solution in pairs])["input_ids"]
    return [(prompt, solution[:limit]) for prompt, solution in zip(prompts, solutions, strict=True)]


def _collate(examples: Sequence[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    length = max(len(prompt) + len(response) for prompt, response in examples)
    ids = torch.full((len(examples), length), pad_id)
    is_response = torch.zeros((len(examples), length), dtype=torch.bool)
    for row, (prompt, response) in enumerate(examples):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        is_response[row, len(prompt) : end] = True
    return Batch(ids, is_response)


def _fit(
    model: LlamaForCausalLM, batches: Iterator[list[Batch]], recipe: TrainingRecipe, on_step: Callable[..., None]
) -> None:
    """Minimize the mean surprisal of response tokens."""
    model.train()
    optimizer = AdamW(
        model.parameters(), lr=recipe.lr, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay, fused=True
    )
    schedule = LambdaLR(optimizer, lambda step: _lr_factor(step, recipe))
    for step, parts in enumerate(islice(batches, recipe.steps), start=1):
        # One mean over the batch; a mean per micro-batch would give tokens of short responses more weight.
        num_tokens = sum(int(part.is_response.sum()) for part in parts)
        losses = [_surprisal_sum(model, part) / num_tokens for part in parts]
        torch.stack(losses).sum().backward()
        clip_grad_norm_(model.parameters(), recipe.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step, loss=sum(loss.item() for loss in losses))


def _surprisal_sum(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    # No token can see right padding: no attention mask is needed, which permits the fast kernel.
    hidden = model.model(batch.ids[:, :-1], use_cache=False).last_hidden_state
    is_target = batch.is_response[:, 1:]
    return cross_entropy(model.lm_head(hidden[is_target]), batch.ids[:, 1:][is_target], reduction="sum")


def _lr_factor(step: int, recipe: TrainingRecipe) -> float:
    """Return the learning rate factor of a step.

    The factor rises linearly, then falls along a half cosine to ``final_lr_frac``.
    """
    warmup = max(1, round(recipe.warmup_frac * recipe.steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.final_lr_frac + (1 - recipe.final_lr_frac) * 0.5 * (1 + math.cos(math.pi * done))
