"""Whether other programs took the cores meanwhile, by the system's own accounting."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from colossus.hardware.machine import CGROUP, available_cores

STAT = Path("/proc/stat")
LEFT = 0.85  # of the cores' time that something asks for: with less left to it, others disturbed it


@dataclass(frozen=True)
class Reading:
    """Seconds so far. own: processor time of this process; all: of all on its cores, stolen ones counted
    too; None where the system does not say."""

    wall: float
    own: float
    all: float | None


def read() -> Reading:
    """As of now."""
    return Reading(time.perf_counter(), time.process_time(), _all_seconds())


def taken_by_others(before: Reading, after: Reading) -> float | None:
    """Processor seconds that others had; None where the system does not say."""
    if before.all is None or after.all is None:
        return None
    return max(0.0, (after.all - before.all) - (after.own - before.own))


def was_disturbed(before: Reading, after: Reading, threads: int, cores: int | None = None) -> bool:
    """Whether others left less than is asked for by so many threads of the cores (by default those that this
    process may use).

    A library that starts fewer threads than it may is not disturbed. Where the system does not say what
    others took, the one thread that surely ran should have had all of its time.
    """
    wall, others = after.wall - before.wall, taken_by_others(before, after)
    if others is None:
        return after.own - before.own < LEFT * wall
    cores = available_cores() if cores is None else cores
    return cores * wall - others < LEFT * min(threads, cores) * wall


def _all_seconds() -> float | None:
    """Of a container that has a share of the cores its own account, else of the cores."""
    with contextlib.suppress(OSError, ValueError):
        if (CGROUP / "cpu.max").read_text().split()[0] != "max":
            numbers = dict(line.split() for line in (CGROUP / "cpu.stat").read_text().splitlines())
            waited = int(numbers.get("throttled_usec", 0))  # of what it asked for beyond its share
            return (int(numbers["usage_usec"]) + waited) / 1e6
    with contextlib.suppress(OSError, ValueError, IndexError):
        return _busy_seconds(STAT.read_text())
    return None


def _busy_seconds(stat: str) -> float | None:
    """Of the cores that this process may use: all but idle time and waiting for disks."""
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)} if hasattr(os, "sched_getaffinity") else set()
    ticks = 0
    for line in stat.splitlines():
        name, *numbers = line.split()
        if name in cores:
            user, nice, system, _, _, *interrupts_and_stolen = map(int, numbers[:8])
            ticks += user + nice + system + sum(interrupts_and_stolen)
    return ticks / os.sysconf("SC_CLK_TCK") if ticks else None  # sandboxes show zeros
