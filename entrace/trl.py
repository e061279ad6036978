"""Record TRL while it trains: change one import and add one argument.

Usage::

    from entrace.trl import TracedGRPOTrainer

    trainer = TracedGRPOTrainer(model=..., reward_funcs=..., train_dataset=..., trace="runs/mine")
    trainer.train()

``Traced`` records a subclass of one's own: ``class Mine(Traced, MyTrainer)``.
"""

from __future__ import annotations

try:
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("trl", "datasets"):
        raise
    raise ImportError("entrace.trl needs TRL: pip install 'entrace[trl]'") from None

from entrace.trainer.live.trl import Traced

__all__ = ["Traced", "TracedGRPOTrainer", "TracedRLOOTrainer"]


class TracedGRPOTrainer(Traced, GRPOTrainer):
    """Record TRL's ``GRPOTrainer``; see ``Traced`` for the arguments that are added."""


class TracedRLOOTrainer(Traced, RLOOTrainer):
    """Record TRL's ``RLOOTrainer``; see ``Traced`` for the arguments that are added."""
