"""What a dry run says of a run's job, beside what the run has measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from colossus.dryrun.host import CUDA_PROCESS, PROCESS, host_of
from colossus.dryrun.ranks import DryRun, dry_run
from colossus.errors import UserError
from colossus.events import number, read_events
from colossus.hardware.fleets import Hardware, hardware_of
from colossus.hardware.machine import Machine, ranks_here
from colossus.job import Job
from colossus.planner.measured import corrections_for
from colossus.words import memory, span

WARMING = 10  # the first of so many parts of a run's steps hold warming up and compiling
DECIDED = {"type": "precision.type", "compile": "layout.compile"}  # by the run, as it measured


@dataclass(frozen=True)
class Row:
    """A figure of both; measured is None where the run has none of it."""

    what: str
    predicted: float
    measured: float | None
    words: Callable[[float], str]


@dataclass(frozen=True)
class Comparison:
    """A run beside its dry run. notes: what keeps the two apart."""

    folder: Path
    found: DryRun
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        rows = [{"what": r.what, "predicted": r.predicted, "measured": r.measured} for r in self.rows]
        return {
            "run": str(self.folder),
            "compared": rows,
            "notes": list(self.notes),
            "dry_run": self.found.to_dict(),
        }


def compare(folder: Path, job: Job, *, say: Callable[[str], None] = lambda line: None) -> Comparison:
    """Runs the job of the run in `folder` dry, on machines like the one that it ran on.

    Raises:
        UserError: it has taken no step, so that there is nothing to compare with.
    """
    events = list(read_events(folder))
    starts = [event for event in events if event["kind"] in ("start", "resume")]
    if not starts or not any(event["kind"] == "step" for event in events):
        raise UserError(f"{folder}: this run has taken no step; there is nothing to compare with")
    machine = Machine.from_json(json.dumps(starts[-1]["machine"]))
    decided = [e["value"] for e in events if e["kind"] == "decision" and e["name"] == "machine"]
    if decided:
        values = {name: decided[-1].get(key) for key, name in DECIDED.items()}
        job = job.put({name: value for name, value in values.items() if value is not None}, "derived")
    hardware = like(job, machine)
    found = dry_run(job, hardware, corrections=corrections_for(hardware, machine), say=say)
    return Comparison(folder, found, tuple(_rows(found, events)), tuple(_notes(found)))


def like(job: Job, machine: Machine) -> Hardware:
    """As many machines like `machine` as there are ranks for, or those that the fleet names."""
    if job.fleet.accelerator is not None or job.fleet.pools is not None:
        return hardware_of(job.fleet)
    here = ranks_here(job.layout.num_ranks)
    one = hardware_of(job.fleet.model_copy(update={"count": None}), machine, ranks=here)
    return replace(one.with_count(job.layout.num_ranks), node_size=here)


def text(made: Comparison) -> str:
    """For a terminal."""
    lines = [f"{made.folder}, beside a dry run of its job:", ""]
    lines.append(f"{'':32}{'predicted':>12}{'measured':>12}{'measured/predicted':>20}")
    for row in made.rows:
        measured, ratio = "not recorded", ""
        if row.measured is not None:
            measured, ratio = row.words(row.measured), f"{row.measured / row.predicted:.2f}"
        lines.append(f"{row.what:32}{row.words(row.predicted):>12}{measured:>12}{ratio:>20}")
    return "\n".join([*lines, "", *made.notes])


def _rows(found: DryRun, events: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    steps = [event for event in events if event["kind"] == "step"]
    steps = steps[len(steps) // WARMING :]

    def typical(name: str) -> float | None:
        values = [number(event[name]) for event in steps if event.get(name) is not None]
        return median(values) if values else None

    price, first = found.price, found.ranks[0]
    if price is not None:
        yield Row("a step", price.seconds, typical("step_seconds"), span)
        yield Row("tokens/s", price.tokens_per_second, typical("tokens_per_second"), lambda n: f"{n:,.0f}")
    ends = [event for event in events if event["kind"] == "end"]
    end = ends[-1] if ends else {}
    on_gpu = first.kind.accelerator.device == "cuda"
    if on_gpu:
        peak = float(first.traced.peak.num_bytes)
        yield Row("tensors on rank 0, the most", peak, end.get("peak_allocated_bytes"), memory)
        yield Row("reserved on rank 0, the most", first.reserved, end.get("peak_reserved_bytes"), memory)
    host = CUDA_PROCESS if on_gpu else first.reserved + PROCESS
    yield Row("host memory of rank 0, the most", host, end.get("peak_memory_bytes"), memory)
    saves = [event["bytes"] for event in events if event["kind"] == "checkpoint" and "bytes" in event]
    yield Row("a checkpoint", float(host_of(found).checkpoint), saves[-1] if saves else None, memory)


def _notes(found: DryRun) -> Iterator[str]:
    if found.job.layout.compile:
        yield "layers were compiled, and traced as they are written; what compiling saves is an estimate"
    if found.job.fleet.device == "cpu":
        yield "of a processor, memory is that of tensors times what a heap takes, and of the process itself"
    yield "messages: a run records none of its own; tests compare those of a dry run with real ranks'"
