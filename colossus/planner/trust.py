"""How far to trust a step's seconds: errors that were measured, by what the seconds rest on.

Each is the error that nine of ten runs stayed under, none of which anything was fitted to: of accelerators
from `benchmarks.plan_accuracy`, of processors from `benchmarks.plan_measured` (a test compares).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from colossus.perf.corrections import NEAR
from colossus.perf.ledger import Ledger
from colossus.perf.price import Pricer

PUBLISHED = {  # of a generation of accelerators, and of dense models or experts
    ("ampere", "dense models"): 0.35,
    ("hopper", "dense models"): 0.19,
    ("hopper", "experts"): 0.33,
    ("blackwell", "dense models"): 0.24,
    ("blackwell", "experts"): 0.46,
}
NO_TABLE = {
    "dense models": 0.25,
    "experts": 0.36,
}  # of Hopper, by its scalars alone; there is one table, of it
UNSEEN = {"dense models": 0.48, "experts": 0.46}  # of any generation by the scalars of another: the worst
TABLE, FORMULAS = 0.14, 0.39  # of a processor with a calibration of its own; of its measured rates alone
BEYOND = 0.02  # of the FLOPs, that are worth a word


@dataclass(frozen=True)
class Band:
    """share: of the seconds, either way. why: what that rests on, in words."""

    share: float
    why: str


def band_of(pricer: Pricer, ledger: Ledger, *, has_experts: bool, here: bool) -> Band:
    """Of a step whose operations are `ledger`. here: it is for the machine that was measured.

    Shapes beyond all that were measured weigh by their FLOPs, with the error of formulas alone.
    """
    part = pricer.hardware.accelerator
    measured = pricer.corrections is not None and here
    beyond = share_beyond(pricer, ledger) if pricer.corrections is not None else 1.0
    timed = "the shapes that were timed" if pricer.corrections is not None else "any table of timings"
    words = f"; {beyond:.0%} of FLOPs lie beyond {timed}" if beyond > BEYOND else ""
    if part.device == "cpu":
        if not measured:
            why = f"this processor's rates, and formulas (after colossus plan --calibrate: {TABLE:.0%})"
            return Band(FORMULAS, why)
        return Band(_mean(TABLE, FORMULAS, beyond), f"shapes measured here{words}")
    kind = "experts" if has_experts else "dense models"
    known = PUBLISHED.get((part.generation, kind))
    if known is None or any(words.startswith("rate of bf16") for words in part.assumed):
        why = f"no run of {kind} on {part.name} or its like was compared: as others without theirs"
        return Band(UNSEEN[kind], why)
    if part.generation == "hopper":
        known = _mean(known, NO_TABLE[kind], beyond)
    return Band(known, f"published runs of {kind} on {part.generation}{words}")


def _mean(near: float, far: float, share: float) -> float:
    return near + share * (far - near)


def share_beyond(pricer: Pricer, ledger: Ledger) -> float:
    """Of the FLOPs of products and attention: at shapes farther than `NEAR` from all that were timed."""
    rows = ledger.take(ledger.where(kind=("product", "fused_attention")))
    flops = (rows.executed * rows.repeat)[:, 0]
    distances = pricer.distances(rows)[:, 0]
    near = np.isfinite(distances) & (distances <= NEAR)
    return float(1 - flops[near].sum() / flops.sum()) if flops.sum() else 0.0
