"""Record TRL while it trains: change one import and add one argument.

Usage::

    from entrace.trl import TracedGRPOTrainer

    trainer = TracedGRPOTrainer(model=..., reward_funcs=..., train_dataset=..., trace="runs/mine")
    trainer.train()

``Traced`` records a subclass of one's own: ``class Mine(Traced, MyTrainer)``.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("trl") is None:
    raise ImportError("entrace.trl needs TRL: pip install 'entrace[trl]'")

from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from entrace.trainer.live.trl import Traced

__all__ = ["Traced", "TracedGRPOTrainer", "TracedRLOOTrainer"]


class TracedGRPOTrainer(Traced, GRPOTrainer):
    """Record TRL's ``GRPOTrainer``; see ``Traced`` for the arguments that are added."""


class TracedRLOOTrainer(Traced, RLOOTrainer):
    """Record TRL's ``RLOOTrainer``; see ``Traced`` for the arguments that are added."""
