"""Compare recorded responses with a model, for ``entrace audit --model``.

The responses of each step of a run were sampled by different weights. The command compares only responses that this
model sampled: those of the step that the user names, or of the step that ``run.json`` proves to be sampled by these
weights. Otherwise, the command refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import polars as pl

from entrace.analysis.audit import Reference, Sample
from entrace.analysis.audit.distributions import NUM_TOP, TEMPERATURES, Distributions
from entrace.analysis.audit.sample import PROMPTS, read_responses
from entrace.analysis.importers.collect import Collected
from entrace.analysis.runs import Runs
from entrace.analysis.terminal.progress import Progress
from entrace.analysis.trace import InputError
from entrace.analysis.trace.manifest import IMPORTED
from entrace.trainer.config import PolicyConfig
from entrace.trainer.external.policy_codec import PolicyCodec
from entrace.trainer.external.teacher_forcing import PassSettings
from entrace.trainer.external.vocabulary_pass import VocabularyPass
from entrace.trainer.model.policy import Policy
from entrace.trainer.resources import find_local_model, find_model
from entrace.trainer.runs.run_folder import hash_weights
from entrace.trainer.settings import validate_section

# Generated tokens that are compared, in whole groups.
MAX_COMPARED = 20_000
ALL = "all"


@dataclass
class Comparison:
    """Read responses with a model.

    Attributes:
        path: The model, as named by the user.
        policy: The model.
        reading: Its pass.
        step: Step that the model sampled; None if not given, -1 for all.
        prompts: Prompt tokens by response, of each dump.
        abouts: Which responses of each dump are compared.
    """

    path: str
    policy: Policy
    reading: VocabularyPass
    step: int | None
    prompts: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    abouts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str, step: str | None, batch_tokens: int) -> Comparison:
        """Load the model.

        Raises:
            InputError: there is no usable model, or ``step`` is neither a number nor ``all``.
        """
        if step is not None and step != ALL and not step.isdecimal():
            raise InputError(f'--model-step {step}: expected a step such as 1, or "{ALL}"')
        number = None if step is None else -1 if step == ALL else int(step)
        config = validate_section(PolicyConfig, {"path": path}, "audit")
        policy = Policy.load(config)
        settings = PassSettings(policy=config, batch_tokens=batch_tokens)
        return cls(path, policy, VocabularyPass(policy, settings, TEMPERATURES, NUM_TOP), number)

    @property
    def codec(self) -> PolicyCodec:
        """Return the tokenizer of the model."""
        return PolicyCodec(self.policy)

    def keep(self, run_id: str, read: Collected, dump: str) -> None:
        """Keep the prompt tokens of the responses of a dump that are compared.

        Raises:
            InputError: the dump has several steps, or not the one that was named.
        """
        if self.step is None and read.counts.steps > 1:
            raise InputError(
                f"{dump}: holds {read.counts.steps} steps, and {self.path} sampled at most one of them; name it with "
                f"--model-step STEP, or --model-step {ALL} if the policy did not change"
            )
        # Prompts and number of generated tokens, by place of the group in the dump.
        kept: dict[int, tuple[dict[int, list[int]], int]] = {}
        stride = 1
        numbered = enumerate(read.in_order())
        for place, (_, of_group) in enumerate(groupby(numbered, key=lambda pair: (pair[1].step, pair[1].group_id))):
            group = list(of_group)
            if self.step not in (None, -1, group[0][1].step) or place % stride:
                continue
            prompts = {number: rollout.prompt_ids or [] for number, rollout in group}
            kept[place] = (prompts, sum(sum(rollout.is_generated) for _, rollout in group))
            while len(kept) > 1 and sum(tokens for _, tokens in kept.values()) > 2 * MAX_COMPARED:
                stride *= 2
                kept = {place: group for place, group in kept.items() if place % stride == 0} or dict([kept.popitem()])
        if not kept:
            raise InputError(f"{dump}: no response of step {self.step}, which --model-step names")
        self.prompts[run_id] = {key: ids for prompts, _ in kept.values() for key, ids in prompts.items()}
        which = f"step {self.step}" if self.step not in (None, -1) else "all steps" if self.step == -1 else "the dump"
        anew = read.counts.rollouts - read.counts.exact
        self.abouts[run_id] = f"{which} (token ids of {anew:,} responses from text)" if anew else which

    def refer(self, runs: Runs, sample: Sample, run_id: str) -> Reference:
        """Return the values of the model at the responses that it sampled.

        Raises:
            InputError: it is not known which responses the model sampled, or a token is not in its vocabulary.
        """
        prompts, about = self.choose(runs, sample, run_id)
        tokens = read_responses(runs, run_id, prompts)
        if tokens.is_empty():
            raise InputError(f"{run_id}: no tokens of {about} are recorded")
        if (largest := tokens["token_id"].max()) >= self.policy.vocab_size:  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
            raise InputError(
                f"{run_id}: token {largest} is not in the vocabulary of {self.path} ({self.policy.vocab_size:,} "
                "entries), which did not sample it"
            )
        return self.read(tokens, prompts, about)

    def choose(self, runs: Runs, sample: Sample, run_id: str) -> tuple[dict[int, list[int]], str]:
        """Return the prompt tokens of the responses that the model sampled.

        The result maps response ids to tokens. A description of the chosen responses comes with it.

        Raises:
            InputError: it is not known which responses the model sampled.
        """
        if run_id in self.prompts:
            return self.prompts[run_id], self.abouts[run_id]
        return self._prompts_of_run(runs, sample, run_id)

    def read(self, tokens: pl.DataFrame, prompts: Mapping[int, list[int]], about: str) -> Reference:
        """Read responses with the model.

        Args:
            tokens: Tokens of responses, context included, as ``read_responses`` returns them.
            prompts: Prompt tokens by response.
            about: Which responses these are.

        Raises:
            InputError: a response is longer than the model takes.
        """
        frames = tokens.partition_by("rollout_id", maintain_order=True)
        given = [prompts[frame["rollout_id"][0]] for frame in frames]
        responses = [frame["token_id"].to_list() for frame in frames]
        limit = self.codec.max_tokens
        longest = max(len(p) + len(r) for p, r in zip(given, responses, strict=True))
        if longest > limit:
            raise InputError(f"prompt and response have {longest} tokens, {self.path} takes at most {limit - 1}")
        parts: list[Distributions] = []
        order: list[pl.DataFrame] = []
        with Progress(f"reading with {self.path}", len(frames), final_line=False) as progress:
            for chosen, found in self.reading.parts(given, responses):
                part = pl.concat([frames[i] for i in chosen])
                is_generated = part["is_generated"].to_numpy()
                of_part = Distributions(**found, num_entries=self.policy.vocab_size)
                parts.append(of_part.take(is_generated))
                order.append(part.filter("is_generated"))
                progress.update(sum(frame["rollout_id"].n_unique() for frame in order))
        compared = pl.concat(order)
        is_canonical = compared["rollout_id"].is_in(self._canonical(tokens)).to_numpy()
        return Reference(self.path, about, compared, Distributions.join(parts), is_canonical)

    def _canonical(self, tokens: pl.DataFrame) -> list[int]:
        """Return the responses whose text encodes to their own token ids.

        Special tokens are ignored.
        """
        special = self.policy.tokenizer.all_special_ids
        shown = tokens.filter(~pl.col("token_id").is_in(special))
        # Turns are tokenized apart from the context between them.
        spans = pl.col("is_generated").rle_id().over("rollout_id").alias("span")
        spans = shown.with_columns(spans).group_by("rollout_id", "span", maintain_order=True).agg("token_id")
        spans = spans.with_columns(text=pl.Series(self.policy.decode(spans["token_id"].to_list())))
        is_same = [self.codec.encode(text) == ids for _, _, ids, text in spans.iter_rows()]
        whole = spans.with_columns(same=pl.Series(is_same)).group_by("rollout_id").agg(pl.col("same").all())
        return whole.filter("same")["rollout_id"].to_list()

    def _prompts_of_run(self, runs: Runs, sample: Sample, run_id: str) -> tuple[dict[int, list[int]], str]:
        """Return prompt tokens of responses that the model sampled; see ``choose``."""
        manifest = runs.manifests[run_id]
        if IMPORTED in manifest:
            raise InputError(f"{run_id}: an imported trace holds no prompt tokens; audit the dump itself with --model")
        rows, about = self._rows_of_run(sample.responses, manifest, Path(manifest["path"]), run_id)
        # A trace may hold the tokens of some responses only.
        there = runs.run_shipped(WITH_TOKENS, {"run": run_id, "steps": rows["step"].unique().to_list()})
        rows = _thin(rows.join(there, on="rollout_id", how="semi"))
        template = ((manifest.get("config") or {}).get("policy") or {}).get("template")
        self.policy.template = template
        texts = dict(runs.run_shipped(PROMPTS, {"run": run_id}).iter_rows())
        encoded = {key: self.policy.encode_prompt(texts[key]) for key in rows["prompt_id"].unique().to_list()}
        return {
            rollout: encoded[prompt] for rollout, prompt in rows.select("rollout_id", "prompt_id").iter_rows()
        }, about

    def _rows_of_run(
        self, responses: pl.DataFrame, manifest: Mapping[str, Any], folder: Path, run_id: str
    ) -> tuple[pl.DataFrame, str]:
        if self.step == -1:
            return responses, "all steps"
        if self.step is not None:
            rows = responses.filter(step=self.step)
            if rows.is_empty():
                raise InputError(f"{run_id}: no response of step {self.step}, which --model-step names")
            return rows, f"step {self.step}"
        updates, why = self._updates(manifest, folder)
        if updates is None:
            raise InputError(
                f"{run_id}: {self.path} is neither its starting policy nor one of its checkpoints; name the step that "
                f"it sampled with --model-step STEP, or --model-step {ALL} if the policy did not change"
            )
        rows = responses.filter(policy_step=updates)
        if rows.is_empty():
            raise InputError(
                f"{run_id}: no response was sampled after {updates} updates, which {self.path} has ({why})"
            )
        steps = sorted(rows["step"].unique().to_list())
        named = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        return rows, f"{named} (sampled by {why})"

    def _updates(self, manifest: Mapping[str, Any], folder: Path) -> tuple[int | None, str]:
        """Return the updates that the model has received, and how they are known.

        The number is None if the model is not a policy of the run.
        """
        weights = hash_weights(self.path)
        starting = (manifest.get("common_random_numbers") or {}).get("base_policy")
        if starting is None:
            starting = _hash_local(str(manifest.get("model")))
        if weights is not None and weights == starting:
            return 0, "the starting policy"
        path = find_model(self.path)
        for part in (path, path.parent):
            name = part.name.removeprefix("step-")
            if name.isdecimal() and part.parent.resolve() == (folder / "checkpoints").resolve():
                return int(name), f"checkpoint {part.name}"
        return None, ""


def _hash_local(name: str) -> str | None:
    """Return the fingerprint of a model on this machine, None if it is not there."""
    try:
        return hash_weights(name) if find_local_model(name) else None
    except InputError:
        return None


WITH_TOKENS = """
select distinct rollout_id from tokens where run_id = $run and list_contains($steps, step)
"""


def _thin(rows: pl.DataFrame) -> pl.DataFrame:
    """Return whole groups, evenly spaced, of about ``MAX_COMPARED`` tokens."""
    total = int(rows["response_length"].fill_null(0).sum())
    groups = rows["group_id"].unique().sort()
    chosen = groups.gather_every(max(1, round(total / MAX_COMPARED)))
    return rows.filter(pl.col("group_id").is_in(chosen.to_list()))
