"""Whether a run goes on by itself after some of its ranks have died: a function of what is known alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

IN_VAIN = 3  # attempts in a row that may end before anything new is saved


@dataclass(frozen=True)
class Fault:
    """How an attempt ended. culprit: the rank that died, None where none did: ranks that fail with a word say
    what would fail again. num_steps: that it took. saved_step: of the newest whole checkpoint by then."""

    culprit: int | None
    text: str
    num_steps: int
    saved_step: int


@dataclass(frozen=True)
class Decision:
    """Whether the run goes on, and in words why."""

    goes_on: bool
    why: str


def decide(faults: Sequence[Fault]) -> Decision:
    """After the last of these, which come in their order."""
    last = faults[-1]
    if last.culprit is None:
        return Decision(False, "what failed would fail again")
    if not any(fault.num_steps for fault in faults):
        return Decision(False, "it died before a step was taken")
    in_vain = list(takewhile(lambda fault: fault.saved_step == last.saved_step, reversed(faults)))
    if len(in_vain) >= IN_VAIN:
        return Decision(False, f"{len(in_vain)} attempts in a row died before anything new was saved")
    if not last.saved_step:
        return Decision(True, "from the begin, as nothing is saved yet")
    return Decision(True, f"from step {last.saved_step:,}, which is saved")
