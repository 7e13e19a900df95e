"""How weights follow gradients: AdamW, Muon, and the schedules of their rates."""

from __future__ import annotations

from colossus.optim.optimizer import Optimizer, build

__all__ = ["Optimizer", "build"]
