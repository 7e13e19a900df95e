"""Shares of the learning rate by step: pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Decay:
    """From `begin_step` on the share falls in a straight line from `from_factor`, to `to_factor` at
    `end_step`, which is the number of steps of the run."""

    begin_step: int
    end_step: int
    from_factor: float = 1.0
    to_factor: float = 0.0


def warmup_factor(step: int, warmup_steps: int, from_factor: float = 0.0) -> float:
    """Rises in a straight line from `from_factor`; full from step `warmup_steps` on, and never 0."""
    return from_factor + (1 - from_factor) * min(1.0, (step + 1) / (warmup_steps + 1))


def cosine_factor(
    step: int, warmup_steps: int, total_steps: int, final_factor: float, from_factor: float = 0.0
) -> float:
    """Warm-up, then half a cosine to `final_factor` (Loshchilov and Hutter 2017, arXiv 1608.03983)."""
    done = min(1.0, max(0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))
    cosine = final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * done))
    return min(warmup_factor(step, warmup_steps, from_factor), cosine)


def wsd_factor(
    step: int, warmup_steps: int, decay: Decay | None, origin: int = 0, from_factor: float = 0.0
) -> float:
    """Warm-up, a stable rate, and a linear decay once one is decided (Hu et al. 2024, arXiv 2404.06395;
    linear to zero: Bergsma et al. 2025, arXiv 2502.15938).

    origin: the step at which it warms up, from `from_factor` on.
    """
    factor = warmup_factor(step - origin, warmup_steps, from_factor)
    if decay is None or step < decay.begin_step:
        return factor
    left = max(0.0, (decay.end_step - step) / max(1, decay.end_step - decay.begin_step))
    return min(factor, decay.to_factor + (decay.from_factor - decay.to_factor) * left)
