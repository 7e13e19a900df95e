"""Before a run on several nodes: would its ranks fit? Whoever prepares the run asks once, for all."""

from __future__ import annotations

import time
from dataclasses import replace

from colossus.dryrun import report
from colossus.dryrun.compare import like
from colossus.dryrun.mend import mended
from colossus.dryrun.price import problem_of
from colossus.dryrun.ranks import DryRun, Judged, dry_run, fused_bytes
from colossus.errors import UserError
from colossus.hardware.fleets import hardware_of
from colossus.hardware.machine import Machine, ranks_here
from colossus.job import CHECKED, Job
from colossus.planner.columns import Layouts
from colossus.planner.measured import corrections_for
from colossus.words import duration


def is_asked(job: Job) -> bool:
    """Whether ranks of this job are on several nodes, by the launcher that started them or by its fleet, and
    nobody has asked yet whether they fit, or said that it need not be known."""
    if job.fleet.check_fit is False or CHECKED[0] in job.made:
        return False
    ranks = job.layout.num_ranks
    return ranks > ranks_here(ranks) or (_is_named(job) and ranks > hardware_of(job.fleet).node_size)


def check_fit(job: Job, machine: Machine) -> Job:
    """The resolved job, with what a dry run of it says, and how long that took, in `made`.

    machine: this one, as measured; others are taken to be like it where the fleet names no accelerator.

    Raises:
        UserError: a rank would not fit; with the smallest change with which all do.
    """
    began = time.perf_counter()
    hardware = like(job, machine)
    found = dry_run(job, hardware)
    if any(_reserved(found, judged) > judged.kind.accelerator.memory for judged in found.ranks):
        found = mended(found, corrections=corrections_for(hardware))
        verdict = "; ".join(report.verdict(found))
        raise UserError(
            f"layout: {verdict}. Nothing was started; a dry run said so in "
            f"{duration(time.perf_counter() - began)} (fleet.check_fit=false starts without asking)"
        )
    needs = max(_reserved(found, judged) for judged in found.ranks)
    said = (
        f"{needs:.0f}",
        f"{found.worst.kind.accelerator.memory:.0f}",
        f"{time.perf_counter() - began:.1f}",
    )
    return replace(job, made=job.made | dict(zip(CHECKED, said, strict=True)))


def _reserved(found: DryRun, judged: Judged) -> float:
    """What a kind of ranks takes; where layers are compiled, as the planner says that they are."""
    if not found.job.layout.compile:
        return judged.reserved
    layout = Layouts.of_layout(found.job.layout.of_replica(judged.kind.replica))
    return judged.reserved - fused_bytes(problem_of(found.job, found.hardware, None), layout)


def _is_named(job: Job) -> bool:
    return job.fleet.accelerator is not None or job.fleet.pools is not None
