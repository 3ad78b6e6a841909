"""Add a default LoadBalancer for a user who has not added one."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_hetero.plugin.balancing.load_balancer import LoadBalancer

__all__ = ["add_default_balancer"]


def add_default_balancer(trainer: Trainer) -> None:
    """Add a LoadBalancer with default settings to the callbacks of ``trainer`` unless they already have one."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # public, but not annotated
    # one that was made for the other package of Lightning counts too
    if not any(getattr(callback, "finds_shares", False) for callback in callbacks):
        # Lightning keeps checkpoint callbacks last
        first_checkpoint = next((i for i, c in enumerate(callbacks) if isinstance(c, Checkpoint)), len(callbacks))
        callbacks.insert(first_checkpoint, LoadBalancer())
