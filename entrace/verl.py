"""Record verl while it trains, with an environment variable and a trainer mode.

Usage::

    export VERL_USE_EXTERNAL_MODULES=entrace.verl
    python -m verl.trainer.main_ppo trainer.v1.trainer_mode=entrace_sync +entrace.trace=data/runs/mine/verl ...

Modes: ``entrace_sync``, ``entrace_colocate_async``, and ``entrace_separate_async``, each over the mode of verl without
``entrace_``. ``Traced`` records a trainer of one's own. The asynchronous modes have not been run, because they need the
rollout engine of a GPU.
"""

# pyright: reportMissingImports=false
# verl is not installed where types are checked.

from __future__ import annotations

try:
    from verl.trainer.ppo.v1.trainer_base import register_trainer
    from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
    from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("verl", "transfer_queue"):
        raise
    raise ImportError("entrace.verl needs verl 0.9 or later and TransferQueue; see docs/verl.md") from None

from entrace.trainer.live.verl import Traced

__all__ = ["Traced", "TracedColocateAsync", "TracedSeparateAsync", "TracedSync"]


@register_trainer("entrace_sync")
class TracedSync(Traced, PPOTrainerSync):
    """Record verl's ``PPOTrainerSync``; see ``Traced`` for the added config section."""


@register_trainer("entrace_colocate_async")
class TracedColocateAsync(Traced, PPOTrainerColocateAsync):
    """Record verl's ``PPOTrainerColocateAsync``; not run, see the module."""


@register_trainer("entrace_separate_async")
class TracedSeparateAsync(Traced, PPOTrainerSeparateAsync):
    """Record verl's ``PPOTrainerSeparateAsync``; not run, see the module."""
