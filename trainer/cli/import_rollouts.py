"""``entrace import``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entrace.analysis.cli import say
from entrace.analysis.terminal.stops import stoppable
from entrace.analysis.trace import InputError
from entrace.analysis.trace.digests import hash_file
from entrace.analysis.trace.places import reaching, to_place
from entrace.trainer.cli.options import Resume, named_by, require_train_extra

if TYPE_CHECKING:
    from entrace.analysis.importers.codec import Codec
    from entrace.analysis.importers.tables import Evaluator
    from entrace.trainer.config import PolicyConfig


def import_rollouts(
    dump: Annotated[
        list[str],
        typer.Argument(
            metavar="DUMP...",
            help="Folder or URL of a dump, or its JSONL and Parquet files.",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the trace; its name is the run id.")],
    format_name: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FORMAT",
            help="Format of the dump: trl, verl, prime-rl, verifiers, nemo-rl, open-instruct, ms-swift, openai, or "
            "rows (default: detected).",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model that computes missing values and is compared with recorded ones; any value of policy.path "
            "(default: none, values as recorded)."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Reference policy, such as the model before training, whose log-probabilities and entropies are "
            "added; needs --model, and its tokens (default: none, values as recorded).",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="tokenizer.json or its folder, for the texts of tokens (default: that of --model, or none).",
        ),
    ] = None,
    rewards: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Rows of id and reward, joined by id (default: rewards of the dump)."),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="Prompt text that replaces the chat template, with {question} for the prompt; {question} alone if the "
            "rows hold the templated prompt (default: the chat template)."
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature of the rollouts (default: as recorded; 1.0 with --model)."),
    ] = None,
    correct_at: Annotated[float, typer.Option(help="Lowest reward of a correct response.")] = 1.0,
    field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=KEY",
            help="Key that holds a field under another name; NAME= ignores the field. Repeatable.",
        ),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per forward pass, padding included.")] = 8192,
    skip_bad_rows: Annotated[
        bool,
        typer.Option("--skip-bad-rows", help="Skip malformed rows with the rest of their groups (default: stop)."),
    ] = False,
    resume: Resume = False,
) -> None:
    """Import rollouts that another trainer sampled.

    Formats: TRL, verl, prime-rl, verifiers, NeMo-RL, open-instruct, ms-swift, OpenAI, and plain rows.

    Recorded logprobs, entropies, and advantages are kept as they are. --model adds missing ones with one teacher-forced
    pass and compares it with recorded values.

    Example: entrace import runs/mine/token_exports --tokenizer Qwen3-4B --out data/runs/theirs/recorded

    Example: entrace import train_data_step1.jsonl --rewards rewards.jsonl --out data/runs/theirs/joined

    Example: entrace import rollouts.jsonl --model data/base-policy --out data/runs/theirs/rescored

    Example: entrace import rollouts.jsonl --model trained --reference data/base-policy --out data/runs/theirs/both
    """
    from entrace.analysis.importers import run
    from entrace.analysis.importers.collect import collect
    from entrace.analysis.importers.dump import Dump
    from entrace.analysis.importers.rewards import Rewards
    from entrace.analysis.importers.settings import ImportSettings
    from entrace.analysis.terminal.progress import Progress, reading
    from entrace.analysis.trace.lock import locked

    fields = _parse_fields(field or [])
    policy = _policy_config(model, tokenizer, template)
    settings = ImportSettings(
        policy=policy.model_dump(mode="json") if policy else None,
        temperature=temperature,
        correct_at=correct_at,
        skip_bad_rows=skip_bad_rows,
        fields=fields,
    )
    if model and tokenizer:
        raise InputError("--tokenizer: --model has its own tokenizer; leave one of them out")
    if reference and not model:
        raise InputError("--reference: needs --model MODEL, which tokenizes the prompts")
    reference_config = _policy_config(reference, None, None)
    with reaching(dump[0]), stoppable(f"with --resume continues in {out}"), locked(out, waits=False):
        run.check_target(out, resume)
        found = Dump.find([to_place(path) for path in dump], format_name, has_fields=bool(fields))
        joined = Rewards(rewards, fields.get("id")) if rewards else None
        with named_by("--model"):
            using = _load(policy, tokenizer, template, out)
        with named_by("--reference"):
            base = _load(reference_config, None, None, out) if reference_config else None
        if base and base.tokens != using.tokens:
            raise InputError(f"--reference: {reference} has other tokens than {model}; choose a model of its family")
        with using.guard, ExitStack() as stack:
            with reading(out.name) as on_read:
                read = stack.enter_context(
                    collect(found, settings, using.codec, rewards=joined, has_model=model is not None, on_read=on_read)
                )
            progress = stack.enter_context(Progress(out.name, read.counts.rollouts))
            evaluator = of_reference = None
            if using.make_evaluator:
                of_pass = run.temperature_of_pass(read.counts, temperature)
                settings = replace(settings, temperature=of_pass)
                evaluator = using.make_evaluator(of_pass, batch_tokens)
                if base and base.make_evaluator:
                    of_reference = base.make_evaluator(of_pass, batch_tokens)
            for remark in read.remarks:
                say(f"entrace: {remark}", err=True)
            differences = run.record(
                read,
                settings,
                out,
                codec=using.codec,
                evaluator=evaluator,
                reference=of_reference,
                weights=using.weights,
                extra={
                    **using.extra,
                    **({"rewards": hash_file(rewards)} if rewards else {}),
                    # Null without one, so that a trace without a reference does not resume with one.
                    "reference": {"path": reference, "weights": base.weights} if base else None,
                },
                resume=resume,
                on_step=progress.update,
                explain=using.explain,
            )
        if evaluator:
            for line in run.describe_differences(differences, evaluator.name):
                say(f"entrace: {line}", err=True)
    say(str(out))


@dataclass(frozen=True)
class _Using:
    """Hold the tokenizer and model of an import.

    ``explain`` translates the model's errors. ``make_evaluator`` takes the sampling temperature and the tokens of a
    forward pass. ``extra`` describes a tokenizer without a model in ``run.json``. ``tokens`` are the ids of a model's
    tokens.
    """

    codec: Codec | None = None
    make_evaluator: Callable[[float, int], Evaluator] | None = None
    weights: str | None = None
    extra: Mapping[str, Any] = dataclass_field(default_factory=dict)
    guard: AbstractContextManager[Any] = dataclass_field(default_factory=nullcontext)
    explain: Callable[[Exception], Exception] = lambda error: error
    tokens: Mapping[str, int] = dataclass_field(default_factory=dict)


def _policy_config(model: str | None, tokenizer: Path | None, template: str | None) -> PolicyConfig | None:
    """Check the settings of the model, and return them; None without a model."""
    if template is not None and "{question}" not in template:
        raise InputError("--template: expected {question}, which marks where the question goes")
    if model is None:
        if template is not None and tokenizer is None:
            raise InputError("--template: needs --tokenizer PATH or --model MODEL, which tokenizes the prompts")
        return None
    require_train_extra()
    from entrace.trainer.config import PolicyConfig
    from entrace.trainer.settings import validate_section

    return validate_section(PolicyConfig, {"path": model, "template": template}, "import")


def _load(
    config: PolicyConfig | None,
    tokenizer: Path | None,
    template: str | None,
    out: Path,
) -> _Using:
    """Load the model or the tokenizer."""
    if config is None:
        from entrace.analysis.importers.tokenizer import TokenizerFile

        # Without a tokenizer, null, so that a trace without one does not resume with one.
        codec = TokenizerFile(tokenizer, template) if tokenizer else None
        return _Using(codec, extra={"tokenizer": hash_file(codec.path) if codec else None, "template": template})
    from entrace.trainer.external.policy_codec import PolicyCodec
    from entrace.trainer.external.teacher_forcing import PassSettings, TeacherForcing
    from entrace.trainer.faults import explain_fault, translate_errors
    from entrace.trainer.model.policy import Policy
    from entrace.trainer.runs.run_folder import hash_weights

    policy = Policy.load(config)

    def make_evaluator(temperature: float, batch_tokens: int) -> Evaluator:
        settings = PassSettings(policy=config, temperature=temperature, batch_tokens=batch_tokens)
        return TeacherForcing(policy, settings)

    return _Using(
        PolicyCodec(policy),
        make_evaluator,
        hash_weights(config.path),
        guard=translate_errors(out),
        explain=lambda error: explain_fault(error, out),
        tokens=policy.tokenizer.get_vocab(),
    )


def score() -> None:
    """Name the command that replaced ``entrace score``.

    Raises:
        InputError: always.
    """
    raise InputError("score: this command is now `entrace import --model embedded`, with the same arguments")


def _parse_fields(pairs: list[str]) -> dict[str, str]:
    fields = {}
    for pair in pairs:
        name, sign, key = pair.partition("=")
        if not (name and sign):
            raise InputError(f'--field "{pair}": expected NAME=KEY, such as reward=accuracy_reward')
        fields[name] = key
    return fields
