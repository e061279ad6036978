"""Record verl's V1 trainers while they train.

``Traced`` is a mix-in over ``PPOTrainerSync``, its siblings, and their subclasses.

verl's driver keeps the responses of a step in TransferQueue: rows by key, which workers and driver read and replace.
``_compute_advantage`` runs in the driver over all rows of an update, before mini-batches are cut, so that shaping needs
no pass of its own. Statistics of tokens are those of verl's pass for ``old_log_probs``. One pass is added every
``after_update_every`` steps; nothing here draws from the random generators of torch.

Not run: rollout engines (vLLM, SGLang), which need a GPU, and with them colocated reward models, ``colocate_async``,
``separate_async``, and Megatron.
"""

# pyright: reportMissingImports=false
# verl is not installed where types are checked.

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrace.analysis.trace.errors import InputError, nearest
from entrace.trainer.algorithm.shaping import NONE
from entrace.trainer.live.arguments import Arguments, shaping_config
from entrace.trainer.live.verl_tracer import Tracer

# Section of verl's config that this module reads.
SECTION = "entrace"
DEFAULTS: dict[str, Any] = {
    "trace": None,
    "shaping": None,
    "correct": None,
    "after_update_every": 5,
    "after_update_responses": None,
    "flush_every": 10,
    "arm": None,
}

# Placeholder for type checkers: at run time a trainer of verl follows in the MRO.
_Base: Any = object


class Traced(_Base):
    """Record a V1 trainer of verl.

    Usage: ``@register_trainer("mine") class Mine(Traced, MyTrainer)``.

    Section ``entrace`` of verl's config holds the arguments; see ``read_arguments``.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Check section ``entrace`` and build the trainer.

        The trace is opened when training begins.

        Args:
            config: Config of verl.
            *args: Further arguments of the trainer.
            **kwargs: Further keyword arguments of the trainer.

        Raises:
            InputError: a key of section ``entrace`` is missing, unknown, or invalid.
        """
        chosen = read_arguments(config)
        # verl compares the name of the mode, for example to choose the replay buffer.
        config.trainer.v1.trainer_mode = base_mode(type(self))
        super().__init__(config, *args, **kwargs)
        self._entrace = Tracer(self, chosen)

    def fit(self, agent_loop_manager: Any) -> None:
        """Train, and close the trace however training ends."""
        with self._entrace.recording():
            super().fit(agent_loop_manager)

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        """Take one step of verl, and record it."""
        batch = super().step(metrics, timing_raw)
        self._entrace.end_step(batch, metrics, timing_raw)
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        # Rejection sampling removes tokens from the mask.
        generated = self._entrace.read_masks(batch)
        batch = super()._compute_advantage(batch, metrics)
        self._entrace.take(batch, generated)
        return batch

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._update_actor(batch, metrics)
        self._entrace.count_update()
        return batch

    def _save_checkpoint(self) -> None:
        # The trace first: a checkpoint whose steps are not durable could not resume.
        self._entrace.flush()
        super()._save_checkpoint()

    def _validate(self) -> dict[str, float]:
        with self._entrace.evaluation():
            return super()._validate()

    def _val_metrics_update(
        self, data_sources: Any, sample_uids: Any, reward_extra_infos_dict: Any, *args: Any, **kwargs: Any
    ) -> dict[str, float]:
        self._entrace.end_evaluation(data_sources, sample_uids, reward_extra_infos_dict)
        return super()._val_metrics_update(data_sources, sample_uids, reward_extra_infos_dict, *args, **kwargs)


def base_mode(trainer: type) -> str:
    """Return verl's mode for the trainer that a traced trainer extends.

    Raises:
        InputError: the trainer extends none that is registered.
    """
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    names = {cls: name for name, cls in TRAINER_REGISTRY.items() if not issubclass(cls, Traced)}
    found = next((names[cls] for cls in trainer.__mro__ if cls in names), None)
    if found is None:
        raise InputError(f"{trainer.__name__}: extends no trainer that verl registers ({', '.join(names.values())})")
    return found


def read_arguments(config: Any) -> Arguments:
    """Return the arguments in section ``entrace`` of verl's config.

    Keys: ``trace`` (folder of the trace; its name is the run id), ``shaping``, ``correct``, ``after_update_every``,
    ``after_update_responses``, ``flush_every``, and ``arm``, as for ``entrace.trl``; ``correct`` is a key of the
    reward's extra info or a reward.

    Raises:
        InputError: a key is missing, unknown, or invalid, or shaping needs entropies that verl does not compute.
    """
    from omegaconf import OmegaConf

    section = OmegaConf.select(config, SECTION)
    found = OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section
    if found is None:
        raise InputError(f"{SECTION}.trace is missing; add +{SECTION}.trace=FOLDER")
    if not isinstance(found, Mapping):
        raise InputError(f"{SECTION}: expected a section with keys {', '.join(DEFAULTS)}, found {found!r}")
    for key in found:
        if key not in DEFAULTS:
            raise InputError(f'{SECTION}: unknown key "{key}"{nearest(str(key), DEFAULTS)}')
    values = {**DEFAULTS, **found}
    for key in ("trace", "arm"):
        if values[key] is not None and (not isinstance(values[key], str) or not values[key]):
            raise InputError(f"{SECTION}.{key}: expected a text, found {values[key]!r}")
    if values["trace"] is None:
        raise InputError(f"{SECTION}.trace is missing; add +{SECTION}.trace=FOLDER")
    correct = values["correct"]
    if isinstance(correct, bool) or not isinstance(correct, str | int | float | None):
        raise InputError(f"{SECTION}.correct: expected a key of the reward's extra info or a number, found {correct!r}")
    shaping = shaping_config(values["shaping"])
    if shaping.method != NONE and OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode"):
        raise InputError(
            f"{SECTION}.shaping: needs entropies, which verl does not compute with "
            "algorithm.rollout_correction.bypass_mode=true; set one of them to its default"
        )
    return Arguments(
        run_dir=Path(values["trace"]),
        shaping=shaping,
        correct=correct if isinstance(correct, str | None) else float(correct),
        after_update_every=values["after_update_every"],
        after_update_responses=values["after_update_responses"],
        flush_every=values["flush_every"],
        arm=values["arm"],
    )
