"""How much of a run's time is training, in closed form: failures, checkpoints, restarts, spares.

Failures come as a Poisson process; each stops the run, loses what was done since the last checkpoint and
costs a restart. With a checkpoint every tau productive seconds that stops training for c, and a restart of R,
a stretch of tau takes (1/lambda + R) (exp(lambda (tau + c)) - 1) seconds in the mean (Daly 2006).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from colossus.hardware.fleets import DAY, Hardware


@dataclass(frozen=True)
class Goodput:
    """At one rate of failures. rate: per 1000 days of a server of 8 accelerators. interval: productive
    seconds between checkpoints.

    share: of the wall-clock time that is training. spare_nodes: servers that keep the run from waiting
    for repairs in all but 1 of 1000 cases.
    """

    rate: float
    failures_per_day: float
    interval: float
    share: float
    lost_to_saving: float
    lost_to_repeating: float
    lost_to_restarts: float
    spare_nodes: int


def goodput(hardware: Hardware, ranks: float, rate: float) -> Goodput:
    """Of `ranks` accelerators that fail at `rate`, with the best checkpoint interval."""
    failures = hardware.failing(ranks, rate)
    save, restart = hardware.save_seconds, hardware.restart_seconds
    if failures <= 0:
        return Goodput(rate, 0.0, math.inf, 1.0, 0.0, 0.0, 0.0, 0)
    taus = np.geomspace(max(5.0, save), max(50.0, 20 / failures), 2000)
    with np.errstate(over="ignore"):
        shares = taus / ((1 / failures + restart) * np.expm1(failures * (taus + save)))
    best = int(np.argmax(shares))
    tau, share = float(taus[best]), float(shares[best])
    saving = share * save / tau
    restarts = restart / (1 / failures + restart)
    return Goodput(
        rate=rate,
        failures_per_day=failures * DAY,
        interval=tau,
        share=share,
        lost_to_saving=saving,
        lost_to_repeating=max(0.0, 1 - share - saving - restarts),
        lost_to_restarts=restarts,
        spare_nodes=spare_nodes(failures, hardware.repair_seconds),
    )


def spare_nodes(failures: float, repair_seconds: float) -> int:
    """Servers that wait in reserve: the mean number in repair (Little's law) and three deviations."""
    mean = failures * repair_seconds
    return math.ceil(mean + 3 * math.sqrt(mean)) if mean > 0 else 0
