"""Open the trace of a TRL trainer, new or resumed."""

from __future__ import annotations

from typing import Any

from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.manifest import MANIFEST, read_manifest
from entrace.analysis.trace.recorder import Recorder
from entrace.trainer.live.arguments import Arguments
from entrace.trainer.live.batches import BatchReader
from entrace.trainer.live.passes import Passes
from entrace.trainer.live.recording import common_reasons, open_recorder

# Key of run.json: last step of the trace by optimizer step of a checkpoint.
CHECKPOINTS = "checkpoints"


def open_trl_recorder(trainer: Any, arguments: Arguments, reader: BatchReader, passes: Passes) -> Recorder:
    """Open a new trace, or the trace of the checkpoint that training resumes from.

    Raises:
        InputError: the folder holds other files, or no step that ends at the checkpoint.
    """
    run_dir, state = arguments.run_dir, trainer.state
    generate_every = trainer.args.steps_per_generation * trainer.num_iterations
    manifest = {
        "seed": trainer.args.seed,
        "model": str(getattr(trainer.model.config, "_name_or_path", "") or type(trainer.model).__name__),
        "task": " + ".join(reader.reward_names),
        "total_steps": -(-state.max_steps * trainer.args.gradient_accumulation_steps // generate_every),
        "num_processes": trainer.accelerator.num_processes,
    }
    resume_after = None
    if state.global_step and (run_dir / MANIFEST).exists():
        steps = read_manifest(run_dir).get(CHECKPOINTS) or {}
        if str(state.global_step) not in steps:
            raise InputError(
                f"{run_dir}: holds no step that ends at the checkpoint of optimizer step {state.global_step}; "
                "choose another folder for trace"
            )
        resume_after = steps[str(state.global_step)]
        manifest[CHECKPOINTS] = {saved: step for saved, step in steps.items() if int(saved) <= state.global_step}
    elif run_dir.exists() and any(run_dir.iterdir()):
        raise InputError(
            f"{run_dir}: already holds files; choose another folder for trace, or resume with "
            "train(resume_from_checkpoint=...)"
        )
    return open_recorder(
        trainer,
        arguments,
        trainer._tokenizer,
        library="trl",
        settings=trainer.args.to_dict(),
        correct=reader.correct_note,
        manifest=manifest,
        unknown=_reasons(trainer, arguments, reader, passes),
        resume_after=resume_after,
        **of_policy(trainer),
    )


def of_policy(trainer: Any) -> dict[str, Any]:
    """Return the arguments of ``Recorder`` that describe the policy."""
    return {
        "vocab_size": trainer.model.config.get_text_config().vocab_size,
        "temperature": trainer.temperature,
    }


def _reasons(trainer: Any, arguments: Arguments, reader: BatchReader, passes: Passes) -> dict[str, str]:
    """Return why columns are null, by table and column."""
    reasons = common_reasons("TRL", arguments)
    if reader.correct is None:
        judged = ("rollouts.is_correct", "tokens.is_correct", "steps.accuracy", "evals.is_correct")
        reasons |= dict.fromkeys(judged, reader.correct_note)
    if passes.probe is None:
        reasons["tokens.grad_norm"] = "this version of TRL, or this model, does not give sums of squared probabilities"
    if not trainer.args.beta:
        reasons |= dict.fromkeys(
            ("tokens.reference_logprob", "tokens.reference_entropy", "steps.kl"),
            "there is no reference policy: beta is 0",
        )
    elif getattr(trainer, "ref_model", None) is not None and not passes.has_reference_entropy:
        reasons["tokens.reference_entropy"] = "this version of TRL computes no entropies of the reference model"
    if not getattr(trainer.args, "use_vllm", False):
        reasons["tokens.sampling_logprob"] = "the policy sampled without an inference engine"
    reasons["steps.clip_frac_dual"] = "TRL does not report it"
    return reasons
