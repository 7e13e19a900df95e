"""What one pass of a micro batch takes: its kernels one after another, what of its messages they do not hide,
and the host that starts them. Of ledgers from formulas and from the real program alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from colossus.perf.ledger import COMMUNICATION, Columns, Ledger
from colossus.perf.price import Pricer

OVERLAP_COST = 0.1  # of the seconds of a hidden message, that it takes from what it hides behind (Calculon:
# 0.15 over NVLink, 0.02 over network cards)
TOGETHER = 3.0  # power with which seconds of host and device add up where neither is much longer
LAUNCHES_OF_MESSAGE = 4.0  # the host takes some 50 us for a collective, where a kernel takes it 10


@dataclass(frozen=True)
class PassSeconds:
    """Of a pass, [N] each. compute: of kernels; exposed: by stream, of messages that layers wait for; host:
    what starting them adds to that."""

    compute: Columns
    exposed: dict[str, Columns]
    host: Columns

    @property
    def total(self) -> Columns:
        return np.asarray(self.compute + sum(self.exposed.values()) + self.host)


def pass_seconds(
    pricer: Pricer, ledger: Ledger, seconds: Columns, rows: NDArray[np.bool_], tp_ranks: Columns
) -> PassSeconds:
    """Of the `rows` [R] of a ledger. seconds: of each row with its repeats, [R, N]; tp_ranks: [N]."""
    software, host = pricer.software, pricer.dispatch()

    def of(stream: str) -> Columns:
        return np.asarray(seconds[rows & ledger.where(stream=stream)].sum(axis=0))

    kernels = np.where(ledger.where(kind=COMMUNICATION)[rows], LAUNCHES_OF_MESSAGE, 1.0)[:, None]
    launches = (kernels * ledger.launches[rows] * ledger.repeat[rows]).sum(axis=0)
    compute = of("compute") + pricer.gap * launches * (host > 0)
    # A product takes its input piece by piece, a rank's own first, or gives its output so.
    hidden = software.tp_hidden * (1 - 1 / tp_ranks)
    beside = np.maximum(OVERLAP_COST * of("tp_hidden"), of("tp_hidden") - compute)
    attention = seconds[rows & ledger.where(kind="fused_attention")].sum(axis=0)
    exposed = {
        "tp": of("tp") * (1 - hidden * (1 - OVERLAP_COST)) + beside,
        "cp": np.maximum(0.0, of("cp") - software.cp_hidden * attention),
        "ep": of("ep") * (1 - software.overlaps_experts),
    }
    device = compute + exposed["tp"] + exposed["cp"] + exposed["ep"]
    # Some kernels wait for the host and others for the device: more than the longer of both.
    together = (device**TOGETHER + (host * launches) ** TOGETHER) ** (1 / TOGETHER)
    return PassSeconds(compute, exposed, together - device)


def exposed(seconds: Columns, window: Columns, alone: Columns | float = 0.0) -> Columns:
    """Of messages behind `window` seconds of work: `alone`, which has nothing to hide behind, what is left
    over, and what hidden messages take from the work."""
    behind = seconds - alone
    left = np.maximum(behind - window, 0.0)
    return np.asarray(alone + left + OVERLAP_COST * (behind - left))
