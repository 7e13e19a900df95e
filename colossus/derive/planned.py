"""`layout=auto`: the planner chooses what is open of the layout, for the ranks that can be started here."""

from __future__ import annotations

import dataclasses
import math
import os

from colossus.derive.machine import check_device, threads_of_rank
from colossus.errors import UserError
from colossus.hardware.fleets import hardware_of
from colossus.hardware.machine import Machine
from colossus.job import PREDICTED, Job
from colossus.layout import AXES
from colossus.planner.plan import FIELDS, make_plan

AUTO = "auto"


def is_planned(job: Job) -> bool:
    """Whether the planner is to choose: it was asked to, and something is open."""
    return job.layout.preset == AUTO and any(getattr(job.layout, name) is None for name in FIELDS)


def ranks_here(job: Job, machine: Machine) -> int:
    """For how many ranks to plan: as many as a launcher has started; else the GPUs, or those of them that
    the fleet counts; on a processor what `fleet.count` or the axes that were asked for say.

    Raises:
        UserError: the fleet's accelerators are not those that there are here.
    """
    check_device(job, machine)
    started, fleet = _started(), job.fleet
    device = fleet.device or machine.device
    if fleet.accelerator is not None or fleet.pools is not None:
        named, there = hardware_of(fleet), started or len(machine.gpus)
        if device == "cpu" or (named.count != there if started else named.count > there):
            raise UserError(
                f"fleet: {named.count} of {named.accelerator.name}; layout=auto plans for what starts here, "
                f"{'a processor' if device == 'cpu' else f'{there} GPUs'}. Leave the fleet out, or train the "
                "job that `colossus plan --job` wrote"
            )
        return named.count
    axes = (f"layout.{axis}" for axis in AXES)
    asked = math.prod(job.get(axis) for axis in axes if job.asked_for(axis))
    return started or fleet.count or (len(machine.gpus) if device == "cuda" else asked)


def derive_layout_by_plan(job: Job, machine: Machine, ranks: int) -> Job:
    """The job, its model and batch known, with the layout that the planner finds best for so many ranks; what
    was asked for stays. What it predicts is kept in `made`.

    Raises:
        UserError: the job cannot be planned; NothingFits: no layout is legal and fits.
    """
    fields = (*FIELDS, "recompute_layers", "cp_method", "pools")
    names = [name for name in fields if not job.asked_for(f"layout.{name}")]
    question = job.without(*(f"layout.{name}" for name in names))
    conditions = {
        "run.global_batch": min(count for _, count in job.run.batch_schedule),
        "precision.type": "fp32" if job.precision.type == "fp64" else job.precision.type,
    }
    if job.fleet.accelerator is None and job.fleet.pools is None:
        conditions["fleet.count"] = ranks
    # Ranks that were started, and those that share a processor, must all work; of GPUs some may rest.
    whole = job.fleet.device == "cpu" or _started() is not None
    plan = make_plan(question.put(conditions, "derived"), machine, whole=whole)
    chosen = {"pools": []} | plan.layout()
    job = job.put({f"layout.{name}": chosen[name] for name in names}, "planned")
    if not job.asked_for("run.threads") and job.fleet.device == "cuda":  # where some may rest
        job = job.put({"run.threads": threads_of_rank(job, machine)}, "derived")
    predicted = (f"{plan.best.seconds:.6g}", f"{plan.best.reserved:.0f}")
    return dataclasses.replace(job, made=job.made | dict(zip(PREDICTED, predicted, strict=True)))


def _started() -> int | None:
    """Processes that a launcher has started; None where there is none."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else None
