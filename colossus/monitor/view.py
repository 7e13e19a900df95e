"""A run as its event log tells it: what the report and the summary show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from colossus.events import kept_and_lost, number, read_events
from colossus.monitor import phrases

Event = dict[str, Any]
COMPRESSORS = (("xz", "xz -9e"), ("bz2", "bz2 -9"), ("gzip", "gzip -9"))


@dataclass(frozen=True)
class Share:
    """A part of the time, and what it went to."""

    name: str
    seconds: float


@dataclass
class RunView:
    """The events of a run, sorted by what they tell.

    steps, measured, evaluated: the steps, validations and evaluations that the run is made of, in
    order. repeated: steps that an attempt took beyond the checkpoint that the next one went on from.
    starts: one an attempt.
    """

    LEDGER = (
        "training steps",
        "first steps: compiling, warming up",
        "steps taken again after a restart",
        "waiting for data",
        "waiting for other ranks",
        "validation",
        "saving, while training stood still",
        "everything else",
    )

    folder: Path
    events: list[Event]
    steps: list[Event] = field(default_factory=list)
    repeated: list[Event] = field(default_factory=list)
    measured: list[Event] = field(default_factory=list)
    evaluated: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        kept, lost = kept_and_lost(self.of("start", "resume", "step", "validation", "eval"))
        self.steps = [e for e in kept if e["kind"] == "step"]
        self.measured = [e for e in kept if e["kind"] == "validation"]
        self.evaluated = [e for e in kept if e["kind"] == "eval"]
        self.repeated = [e for e in lost if e["kind"] == "step"]

    @classmethod
    def read(cls, folder: str | Path) -> RunView:
        """From a run's folder; a log that is missing, empty or torn gives a view of what there is."""
        return cls(Path(folder), read_events(folder))

    def of(self, *kinds: str) -> list[Event]:
        """Events of these kinds that have what is shown of them."""
        return [e for e in self.events if e["kind"] in kinds and _NEEDED.get(e["kind"], set()) <= e.keys()]

    @cached_property
    def starts(self) -> list[Event]:
        return self.of("start", "resume")

    @cached_property
    def start(self) -> Event:
        """The newest start; empty where there is none."""
        return self.starts[-1] if self.starts else {}

    @cached_property
    def validations(self) -> list[Event]:
        """One a step and scope, the newest."""
        newest = {(e["step"], bool(e.get("whole"))): e for e in self.measured}
        return [newest[key] for key in sorted(newest)]

    @cached_property
    def final(self) -> Event | None:
        """The validation that counts: the newest on all documents, else the newest."""
        whole = [e for e in self.validations if e.get("whole")]
        return next(reversed(whole or self.validations), None)

    @cached_property
    def before(self) -> Event | None:
        """What the model that training began with reached on the documents of the final validation; None
        where it began with none, or no step was taken."""
        final = self.final
        if final is None or not final["step"]:
            return None
        same = ("whole", "num_documents", "num_bytes")
        begun = (e for e in self.validations if e["step"] == 0)
        return next((e for e in begun if all(e.get(name) == final.get(name) for name in same)), None)

    @cached_property
    def decisions(self) -> list[Event]:
        """Those that the run is made of: a change undoes what was decided before for its step and later."""
        newest: dict[tuple[str, int], Event] = {}
        for event in self.of("decision"):
            if event["name"] == "change":
                later = (key for key in newest if key[1] >= event["first_step"])
                for key in [key for key in later if key[0] not in ("branch", "follow")]:
                    del newest[key]
            newest[event["name"], event["first_step"]] = event
        return sorted(newest.values(), key=lambda e: e["first_step"])

    @cached_property
    def changes(self) -> list[Event]:
        """What a user changed on the way, and where the run was branched from."""
        return [
            e for e in self.decisions if e["name"] in ("change", "branch") and isinstance(e["value"], dict)
        ]

    @property
    def predicted_step_seconds(self) -> float | None:
        """By the newest plan; None where the layout was not planned."""
        plans = self.of("plan")
        return number(plans[-1]["predicted_step_seconds"]) if plans else None

    @property
    def outcome(self) -> str:
        """ "finished", the signal that stopped it, "running or killed", or "not started"."""
        if not self.events:
            return "not started"
        last = self.events[-1]
        return str(last.get("reason", "finished")) if last["kind"] == "end" else "running, or killed"

    @property
    def num_steps(self) -> int:
        return self.steps[-1]["step"] + 1 if self.steps else 0

    @property
    def first_step(self) -> int:
        """Steps that the weights had taken before: those of the run that it was branched from."""
        return self.steps[0]["step"] if self.steps else 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the weights have learned from."""
        return sum(e["tokens"] for e in self.steps)

    @property
    def run_seconds(self) -> float:
        """Of training, over all attempts; downtime is not counted."""
        return max((number(e["run_seconds"]) for e in self.events), default=0.0)

    @property
    def downtime_seconds(self) -> float:
        """Between the last event of an attempt and the start of the next."""
        ends = {e["attempt"]: e for e in self.events}
        starts = {e["attempt"]: e for e in reversed(self.events)}
        return sum(max(0.0, starts[a]["time"] - ends[a - 1]["time"]) for a in starts if a - 1 in ends)

    def typical(self, name: str) -> float | None:
        """The median of a step's figure, the first tenth left out: it holds warming up and compiling."""
        values = [number(e[name]) for e in self.steps[len(self.steps) // 10 :] if e.get(name) is not None]
        return median(values) if values else None

    @property
    def peak_flops_per_second(self) -> float | None:
        """What MFU counts against: measured before the run, or corrected by it."""
        found = self.last("peak_flops_per_second") or self.start.get("peak_flops_per_second")
        return number(found) if found else None

    @property
    def mfu(self) -> float | None:
        """The median, as `typical` has it; of steps before the peak was corrected against that one too."""
        at_start, peak = self.start.get("peak_flops_per_second"), self.peak_flops_per_second
        steps = [e for e in self.steps[len(self.steps) // 10 :] if e.get("mfu") is not None]
        if not peak:
            return self.typical("mfu")
        values = [
            number(e["mfu"]) * number(e.get("peak_flops_per_second") or at_start or peak) for e in steps
        ]
        return median(values) / peak if values else None

    def last(self, name: str) -> float | None:
        """A figure of the newest step that has it."""
        return next((number(e[name]) for e in reversed(self.steps) if e.get(name) is not None), None)

    def time_ledger(self) -> list[Share]:
        """Where the seconds of training went; they add up to `run_seconds`."""
        typical = self.typical("step_seconds") or 0.0
        firsts = {e["attempt"]: e for e in reversed(self.of("step"))}.values()
        compiling = sum(max(0.0, number(e["step_seconds"]) - 2 * typical) for e in firsts)
        steps = _total(self.steps, "step_seconds")
        seconds = [
            max(0.0, steps - compiling),
            compiling,
            _total(self.repeated, "step_seconds"),
            _total([*self.steps, *self.repeated], "data_wait_seconds"),
            _total([*self.steps, *self.repeated], "rank_wait_seconds"),
            _total(self.of("validation", "eval"), "seconds"),
            _total(self.of("checkpoint"), "blocked_seconds"),
        ]
        seconds.append(max(0.0, self.run_seconds - sum(seconds)))
        return [Share(*row) for row in zip(self.LEDGER, seconds, strict=True) if row[1] > 0]


def compressors(final: Event) -> list[tuple[str, float]]:
    """The compressors that the model can be held against, by their commands, and their bits per byte."""
    if not phrases.is_compressible(final):
        return []
    return [(tool, number(final[f"{key}_bits_per_byte"])) for key, tool in COMPRESSORS]


def beats(final: Event) -> list[str]:
    """The compressors that needed more bits than the model, by their commands."""
    ours = number(final["bits_per_byte"])
    return [tool for tool, bits in compressors(final) if ours < bits]


def _total(events: Iterable[Event], name: str) -> float:
    return sum(number(e[name]) for e in events if name in e)


_NEEDED = {
    "step": {"step", "loss", "tokens", "step_seconds"},
    "validation": {"step", "loss", "bits_per_byte", *(f"{key}_bits_per_byte" for key, _ in COMPRESSORS)},
    "checkpoint": {"step", "path"},
    "decision": {"name", "value", "first_step"},
    "sample": {"prompt", "text"},
    "eval": {"step"},
    "plan": {"predicted_step_seconds"},
}
