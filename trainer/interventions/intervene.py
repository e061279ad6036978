"""Replace tokens of recorded responses and measure the effect on accuracy.

The performance impact of token o_t (arXiv 2508.02260) is the accuracy of K continuations of the response up to and
including o_t, minus that of K continuations of the response with an alternative drawn from p(. | not o_t) instead.
Alternatives and continuations come from a checkpoint of the run, responses from the steps just before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from entrace.analysis.trace import InputError, read_manifest
from entrace.analysis.trace.parts import read_part
from entrace.analysis.trace.writer import write_part
from entrace.trainer.config import Config
from entrace.trainer.interventions.candidates import load_candidates, order_candidates
from entrace.trainer.model.policy import Policy
from entrace.trainer.runs.checkpoint import find_checkpoint, read_state
from entrace.trainer.runs.run_folder import load_sampling_config
from entrace.trainer.sampling.decoder import Decoder
from entrace.trainer.sampling.sampler import sample_at
from entrace.trainer.sampling.samples import SamplingParams
from entrace.trainer.sampling.token_sampler import ends_response, invert_cdf
from entrace.trainer.seeding import Stream, generator
from entrace.trainer.tasks import Prompt, load_task

TABLE = "interventions"
SETTINGS_KEY = b"entrace_settings"
AS_RECORDED = (
    "step",
    "prompt_id",
    "rollout_id",
    "position",
    "response_length",
    "token_id",
    "category",
    "logprob",
    "entropy",
    "ppl",
    "ppl_tercile",
    "is_correct",
)


@dataclass(frozen=True)
class Settings:
    """Settings that determine every row of a series of interventions.

    A series has one checkpoint and one seed.

    Attributes:
        checkpoint_step: Updates that the policy had received.
        seed: Seed of the choice of tokens, the alternatives, and the continuations.
        continuations: K, per prefix.
        entropy: Entropy quantiles that bound the tokens to replace.
        position: Bounds of their relative position.
        ppl_tercile: Perplexity terciles of their responses.
    """

    checkpoint_step: int
    seed: int = 0
    continuations: int = 8
    entropy: tuple[float, float] = (0.0, 1.0)
    position: tuple[float, float] = (0.0, 1.0)
    ppl_tercile: tuple[int, ...] = (1, 2, 3)

    @property
    def selection(self) -> str:
        """Return the limits on the tokens to replace, as text for column ``selection``."""
        entropy, position = (f"{low:g}-{high:g}" for low, high in (self.entropy, self.position))
        return f"entropy {entropy}, position {position}, ppl_tercile {','.join(map(str, self.ppl_tercile))}"

    def part(self, run_dir: Path, number: int) -> Path:
        """Return the file of one batch.

        ``TraceWriter`` keeps files of this name when a run is resumed.
        """
        return run_dir / TABLE / f"step-{self.checkpoint_step:06d}-seed-{self.seed}-{number:06d}.parquet"


@dataclass
class InterventionCounts:
    """Counts of a series so far.

    Attributes:
        interventions: Number of rows.
        num_new: Rows added by this call.
        tokens: Tokens generated for the rows.
        mean_abs_impact: Mean of abs(impact).
        is_exhausted: Whether no candidate is left.
    """

    interventions: int = 0
    num_new: int = 0
    tokens: int = 0
    mean_abs_impact: float = 0.0
    is_exhausted: bool = False

    def add(self, impact: np.ndarray, tokens: np.ndarray) -> None:
        """Count one batch."""
        total = self.mean_abs_impact * self.interventions + float(np.abs(impact).sum())
        self.interventions += len(impact)
        self.mean_abs_impact = total / self.interventions
        self.tokens += int(tokens.sum())


def resolve_checkpoint(run_dir: Path, step: int | None) -> int:
    """Return the step of an existing checkpoint, by default the latest.

    Raises:
        InputError: the folder is not a trace, or it has no such checkpoint.
    """
    read_manifest(run_dir)
    return read_state(find_checkpoint(run_dir, step)).step


def intervene(
    run_dir: Path, settings: Settings, budget: int, on_batch: Callable[[InterventionCounts], None] = lambda counts: None
) -> InterventionCounts:
    """Replace tokens in batches until the budget is spent.

    The result is table ``interventions`` of the run. Batches of earlier calls are counted and kept. The rows depend
    only on ``settings``.

    Args:
        run_dir: A run with checkpoints.
        settings: Settings of the series.
        budget: Tokens to generate; the last batch may exceed it.
        on_batch: Called after every batch.

    Raises:
        InputError: the folder is not a trace, the checkpoint does not exist, no token passes the filters, or the series
            has other settings.
    """
    manifest = read_manifest(run_dir)
    checkpoint = find_checkpoint(run_dir, settings.checkpoint_step)
    _check_settings(run_dir, settings)
    config = load_sampling_config(run_dir)
    tokens = load_candidates(run_dir, settings.checkpoint_step)
    rng = generator(settings.seed, Stream.TOKEN_CHOICE, settings.checkpoint_step)
    candidates = order_candidates(tokens, settings.entropy, settings.position, settings.ppl_tercile, rng)
    # A batch has the size of a sampling round of the run, which is known to fit into memory.
    rows_at_once = config.rollout.prompts_per_step * config.rollout.group_size
    batches = list(candidates.iter_slices(max(1, rows_at_once // (2 * settings.continuations))))
    parts = [settings.part(run_dir, number) for number in range(len(batches))]
    written = list(takewhile(Path.exists, parts))
    counts = _read_counts(written)
    counts.is_exhausted = len(written) == len(parts)
    if counts.is_exhausted or counts.tokens >= budget:
        return counts
    on_batch(counts)
    intervener = Intervener(config, checkpoint, tokens, settings)
    metadata = {SETTINGS_KEY.decode(): json.dumps(asdict(settings))}
    for path, batch in list(zip(parts, batches, strict=True))[len(written) :]:
        columns = intervener.replace_tokens(batch)
        write_part(path, TABLE, {"run_id": manifest["run_id"], **columns}, metadata)
        counts.add(columns["impact"], columns["tokens"])
        counts.num_new += len(batch)
        counts.is_exhausted = path == parts[-1]
        on_batch(counts)
        if counts.tokens >= budget:
            break
    return counts


@dataclass(frozen=True)
class _Prefix:
    """A response up to the original token or its alternative.

    ``numbers`` are the uniforms of its continuations, (K, room).
    """

    prompt: Prompt
    tokens: list[int]
    numbers: np.ndarray


class Intervener:
    """Policy of a checkpoint, responses to change, and verifiers of continuations."""

    def __init__(self, config: Config, checkpoint: Path, tokens: pl.DataFrame, settings: Settings) -> None:
        """Load the policy.

        ``tokens`` hold complete responses, sorted by rollout_id and position.
        """
        self.config, self.settings = config, settings
        self.policy = Policy.load(config.policy.model_copy(update={"path": str(checkpoint / "policy")}))
        self.task = load_task(config.task, config.seed, self.policy.encode_prompt)
        num_prompts = read_state(checkpoint).prompt_position
        self._prompts = {p.prompt_id: p for p in map(self.task.train_prompt, range(num_prompts))}
        responses = tokens.group_by("rollout_id", maintain_order=True).agg("token_id")
        self._responses = dict(zip(responses["rollout_id"], responses["token_id"], strict=True))
        self._params = SamplingParams.of(config.rollout)

    def replace_tokens(self, tokens: pl.DataFrame) -> dict[str, Any]:
        """Intervene on each of ``tokens``; rows are independent of each other.

        Returns:
            Columns of table ``interventions`` except ``run_id``.
        """
        settings = self.settings
        places = list(tokens.select("rollout_id", "position").iter_rows())
        prompts = [self._prompts[prompt_id] for prompt_id in tokens["prompt_id"]]
        before = [self._responses[rollout_id][:position].to_list() for rollout_id, position in places]
        contexts = [self.policy.encode_prompt(p.question) + part for p, part in zip(prompts, before, strict=True)]
        originals = tokens["token_id"].to_list()
        draws = torch.tensor([self._generator(Stream.ALTERNATIVE, place).random(dtype=np.float32) for place in places])
        alternatives = draw_alternatives(
            self.policy, contexts, torch.tensor(originals), draws, self.config.rollout.temperature
        ).tolist()
        prefixes = []
        for replacements in (originals, alternatives):
            for prompt, part, token, place in zip(prompts, before, replacements, places, strict=True):
                shape = (settings.continuations, self.config.rollout.max_response_tokens - len(part) - 1)
                # Common random numbers: the continuations of both prefixes differ only because of the token.
                numbers = self._generator(Stream.CONTINUATION, place).random(shape, dtype=np.float32)
                prefixes.append(_Prefix(prompt, [*part, token], numbers))
        accuracy, generated = self._complete(prefixes)
        original, alternative = np.split(accuracy, 2)
        return {
            **{name: tokens[name].to_list() for name in AS_RECORDED},
            "checkpoint_step": settings.checkpoint_step,
            "seed": settings.seed,
            "selection": settings.selection,
            "temperature": self.config.rollout.temperature,
            "num_continuations": settings.continuations,
            "alternative_id": alternatives,
            "accuracy_original": original,
            "accuracy_alternative": alternative,
            "impact": original - alternative,
            "tokens": np.add(*np.split(generated, 2)),
        }

    def _complete(self, prefixes: list[_Prefix]) -> tuple[np.ndarray, np.ndarray]:
        """Return accuracy and generated tokens of continuations per prefix.

        Shape (N,) both. A prefix that already ends, by its stop token or at the length limit, is scored unchanged.
        """
        open_ones = [b.numbers.shape[1] > 0 and not self._has_ended(b.tokens) for b in prefixes]
        endings = iter(self._sample([b for b, is_open in zip(prefixes, open_ones, strict=True) if is_open]))
        accuracy, generated = np.zeros(len(prefixes)), np.zeros(len(prefixes), dtype=np.int64)
        for i, (prefix, is_open) in enumerate(zip(prefixes, open_ones, strict=True)):
            ends = [self._cut(prefix.tokens, end) for end in next(endings)] if is_open else [[]]
            texts = self.policy.decode([prefix.tokens + end for end in ends])
            verdicts = [self.task.score(text, prefix.prompt).is_correct for text in texts]
            judged = [verdict for verdict in verdicts if verdict is not None]
            if not judged:
                raise InputError(f"the verifier gave no verdict on any continuation of {prefix.prompt.origin}")
            accuracy[i] = np.mean(judged)
            generated[i] = sum(map(len, ends))
        return accuracy, generated

    def _sample(self, prefixes: list[_Prefix]) -> list[list[list[int]]]:
        """Return K continuations of each prefix, each within its room."""
        if not prefixes:
            return []
        contexts = [self.policy.encode_prompt(b.prompt.question) + b.tokens for b in prefixes]
        rooms = [b.numbers.shape[1] for b in prefixes]
        padding = [((0, 0), (0, max(rooms) - room)) for room in rooms]
        uniforms = np.concatenate([np.pad(b.numbers, width) for b, width in zip(prefixes, padding, strict=True)])
        params = replace(self._params, max_tokens=max(rooms))
        responses = [r.tolist() for r in sample_at(self.policy, contexts, uniforms, rooms, params).responses()]
        size = self.settings.continuations
        return [responses[start : start + size] for start in range(0, len(responses), size)]

    def _cut(self, tokens: list[int], end: list[int]) -> list[int]:
        """Cut a continuation at a stop text that begins in the prefix.

        Sampling cannot see such a stop text.
        """
        lengths = range(1, len(end) + 1) if self._params.stop else ()
        return end[: next((n for n in lengths if self._has_ended([*tokens, *end[:n]])), None)]

    def _has_ended(self, tokens: list[int]) -> bool:
        row, last = torch.tensor([0]), torch.tensor([len(tokens) - 1])
        return bool(ends_response(self.policy, torch.tensor([tokens]), row, last, self._params.stop))

    def _generator(self, stream: Stream, place: tuple[int, int]) -> np.random.Generator:
        return generator(self.settings.seed, stream, self.settings.checkpoint_step, *place)


@torch.no_grad()
def draw_alternatives(
    policy: Policy, contexts: list[list[int]], originals: Tensor, uniforms: Tensor, temperature: float
) -> Tensor:
    """Draw from p(v | not o) = p(v) / (1 - p(o)), v != o, by inverting its CDF.

    p is without top-p and top-k, which might leave only o.

    Args:
        policy: The model.
        contexts: All tokens before the original, N lists.
        originals: The tokens o, (N,).
        uniforms: Random numbers in [0, 1), (N,) float32.
        temperature: Divides the logits.

    Returns:
        Token ids, (N,).
    """
    logits = policy.head.logits(Decoder(policy, contexts, len(contexts)).hidden) / temperature
    # Excluded before the softmax, because 1 - p(o) may round to 0.
    logits.scatter_(1, originals[:, None].to(policy.device), -torch.inf)
    rows = torch.arange(len(logits), device=policy.device)
    return invert_cdf(logits.softmax(-1), rows, uniforms.to(policy.device)).cpu()


def _check_settings(run_dir: Path, settings: Settings) -> None:
    path = settings.part(run_dir, 0)
    if not path.exists():
        return
    found = json.loads(read_part(path, []).schema.metadata[SETTINGS_KEY])
    wanted = json.loads(json.dumps(asdict(settings)))
    changed = [f"{name} {found[name]}, not {wanted[name]}" for name in wanted if found[name] != wanted[name]]
    if changed:
        raise InputError(
            f"{path.parent}: checkpoint {settings.checkpoint_step} with seed {settings.seed} has {'; '.join(changed)}; "
            "start a new series with another --seed"
        )


def _read_counts(parts: list[Path]) -> InterventionCounts:
    counts = InterventionCounts()
    for path in parts:
        rows = read_part(path, ["impact", "tokens"])
        counts.add(rows["impact"].to_numpy(), rows["tokens"].to_numpy())
    return counts
