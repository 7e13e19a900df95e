"""What a run decided from a clock, a measurement or a fault, and from which step on it holds.

A run is a function of its job and its decisions: resuming, or following another run, replays them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from colossus.events import EventLog
from colossus.parallel.world import World

CLOCK_FOLLOWS = "follow"  # the decision of a run that replays another's: its own clock decides nothing
CHANGE = "change"  # what a user changed when the run went on; see `trainer.course`
BRANCH = "branch"  # where a run that goes on from another's checkpoint came from


@dataclass(frozen=True)
class Decision:
    """`name` has `value` from step `first_step` on."""

    name: str
    value: Any
    first_step: int


class Decisions:
    """The decisions of a run, oldest first. Every rank holds the same ones."""

    def __init__(self, earlier: Iterable[Decision] = ()) -> None:
        self._all = list(earlier)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self._all)

    def get(self, name: str, step: int) -> Any | None:
        """The value of `name` that holds at `step`; the latest decided wins."""
        held = [d.value for d in self._all if d.name == name and d.first_step <= step]
        return held[-1] if held else None

    def to_come(self, step: int) -> list[Decision]:
        """Decisions that an earlier attempt made for steps from `step` on."""
        return [d for d in self._all if d.first_step >= step]

    def record(self, decision: Decision, log: EventLog | None) -> None:
        """Takes a decision that all ranks agree on; with a log it is on disk when this returns."""
        if decision in self._all:
            return
        if log is not None:
            log.write("decision", step=decision.first_step, synced=True, **asdict(decision))
        self._all.append(decision)

    def decide(
        self, name: str, first_step: int, choose: Callable[[], Any], world: World, log: EventLog | None
    ) -> Any:
        """The value of `name` at `first_step`: what an earlier attempt decided, else rank 0's choice now."""
        known = [d.value for d in self._all if d.name == name and d.first_step == first_step]
        if known:
            return known[-1]
        value = world.broadcast(choose() if world.rank == 0 else None)
        self.record(Decision(name, value, first_step), log)
        return value

    def changes(self) -> list[Decision]:
        """What the user changed, in the order of steps."""
        return [d for d in self._all if d.name == CHANGE]

    def to_list(self) -> list[dict[str, Any]]:
        """As plain data, for a checkpoint."""
        return [asdict(d) for d in self._all]

    @classmethod
    def merge(cls, *sources: Iterable[dict[str, Any]]) -> Decisions:
        """The decisions of a checkpoint and, last, of the event log, each once, in the order they were made.

        The log knows that order; what it has lost comes before it. Where a run went back to an earlier step
        to change its course, what it had decided for that step and later holds no more.
        """
        *others, log = ([Decision(e["name"], e["value"], e["first_step"]) for e in s] for s in sources)
        merged: list[Decision] = []
        for decision in [*(d for other in others for d in other if d not in log), *log]:
            if decision.name == CHANGE:
                stays = (CLOCK_FOLLOWS, BRANCH)
                merged = [d for d in merged if d.first_step < decision.first_step or d.name in stays]
            if decision not in merged:
                merged.append(decision)
        return cls(merged)


def to_follow(decisions: Iterable[dict[str, Any]]) -> list[Decision]:
    """The first decisions of a run that replays another's, and so takes the same steps."""
    return [Decision(CLOCK_FOLLOWS, True, 0), *Decisions.merge(decisions)]
