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

    def to_list(self) -> list[dict[str, Any]]:
        """As plain data, for a checkpoint."""
        return [asdict(d) for d in self._all]

    @classmethod
    def merge(cls, *sources: Iterable[dict[str, Any]]) -> Decisions:
        """The decisions of a checkpoint and of the event log, each once, in the order they were made."""
        merged: list[Decision] = []
        for source in sources:
            for entry in source:
                decision = Decision(entry["name"], entry["value"], entry["first_step"])
                if decision not in merged:
                    merged.append(decision)
        return cls(merged)


def to_follow(decisions: Iterable[dict[str, Any]]) -> list[Decision]:
    """The first decisions of a run that replays another's, and so takes the same steps."""
    return [Decision(CLOCK_FOLLOWS, True, 0), *Decisions.merge(decisions)]
