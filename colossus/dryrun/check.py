"""Before a run on several nodes: would its ranks fit? Whoever prepares the run asks once, for all."""

from __future__ import annotations

import time
from dataclasses import replace

from colossus.dryrun import report
from colossus.dryrun.compare import like
from colossus.dryrun.mend import mended
from colossus.dryrun.ranks import dry_run
from colossus.errors import MachineError, UserError
from colossus.hardware.fleets import hardware_of
from colossus.hardware.machine import Machine, ranks_here
from colossus.job import CHECKED, Job
from colossus.planner.measured import corrections_for
from colossus.words import duration

WITHOUT = "fleet.check_fit=false starts without asking"


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
    try:
        found = dry_run(job, hardware)
    except (UserError, MachineError) as error:
        raise type(error)(f"{error} (in a dry run before ranks on several nodes start; {WITHOUT})") from error
    if not found.fits:
        found = mended(found, corrections=corrections_for(hardware))
        verdict = "; ".join(report.verdict(found))
        raise UserError(
            f"layout: {verdict}. Nothing was started; a dry run said so in "
            f"{duration(time.perf_counter() - began)} ({WITHOUT})"
        )
    needs = max(judged.reserved for judged in found.ranks)
    said = (
        f"{needs:.0f}",
        f"{found.worst.kind.accelerator.memory:.0f}",
        f"{time.perf_counter() - began:.1f}",
    )
    return replace(job, made=job.made | dict(zip(CHECKED, said, strict=True)))


def _is_named(job: Job) -> bool:
    return job.fleet.accelerator is not None or job.fleet.pools is not None
