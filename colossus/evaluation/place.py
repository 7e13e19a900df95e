"""Where and in which type a model is evaluated: what is quickest on this machine, as measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from colossus.measure.machine import this_machine
from colossus.precision.policy import apply_precision

if TYPE_CHECKING:
    from colossus.models import Decoder


def place(model: Decoder, kind: str | None = None) -> tuple[str, str]:
    """Moves `model` to a GPU where there is one, and makes it compute in the quickest type, or in `kind`
    ("fp32" or "bf16"); sets this process's threads. Returns (type, device).

    Raises:
        UserError: `kind` is no type.
    """
    machine = this_machine()
    chosen = kind or ("bf16" if machine.device == "cuda" else machine.best.type)
    apply_precision(model, chosen)
    model.to(machine.device)
    if machine.device == "cpu":
        torch.set_num_threads(machine.best_threads)
    return chosen, machine.device
