"""Small problems that tests of the planner share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from colossus.hardware.catalogue import accelerator
from colossus.hardware.fleets import Hardware, Pool, hardware_of
from colossus.job import load_job
from colossus.perf.price import Pricer
from colossus.perf.software import OURS
from colossus.planner.estimate import Problem
from colossus.sections import Fleet


def hardware(count: int = 8, part: str = "h100-sxm", **changed: Any) -> Hardware:
    made = hardware_of(Fleet(accelerator=part, count=count))
    return replace(made, pools=(Pool(accelerator(part), count),), **changed)


def problem(
    model: str = "llama3.2-1b", count: int = 8, seq_len: int = 4096, batch: int = 32, **changed: Any
) -> Problem:
    arch = load_job(None, [f"model={model}"]).model
    return Problem(arch, seq_len, batch, "bf16", Pricer.of(hardware(count, **changed), OURS))
