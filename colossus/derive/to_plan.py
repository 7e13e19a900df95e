"""A job on its way to a plan and back: with the model that `train` would fill in, and what the plan found."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from colossus.derive.dial import sequences_for
from colossus.derive.model import default_optimizer, model_by_length
from colossus.job import Job
from colossus.planner.plan import USUAL_MFU, Plan, layout_values

if TYPE_CHECKING:
    from colossus.hardware.machine import Machine
    from colossus.planner.choice import Choice
    from colossus.planner.estimate import Problem


def with_model(job: Job, machine: Machine | None) -> Job:
    """The job with the model that `train` would fill in; on this machine, where the fleet names no other,
    with its batch, length, optimizer and type too."""
    if machine is None:
        return model_by_length(job)[0]
    from colossus.derive.machine import type_here

    if job.model.hidden_size is not None or job.model.init_from is not None:
        rate = USUAL_MFU * machine.peak_flops_per_second(machine.device)
        known, dialled = model_by_length(job, machine.device, rate)
    else:
        from colossus.derive.fill import model_here

        known, dialled = model_here(job, machine)
    if job.run.batch_schedule is None:
        known = known.derive(**{"run.global_batch": sequences_for(dialled.compute, known.data.seq_len)})
    known = known.derive(**{"optimizer.name": default_optimizer(job)})
    known = known.derive(**{"precision.type": type_here(known, machine)})
    sections = ("model", "data", "run", "optimizer", "precision")
    names = {name for name in known.origins if name.partition(".")[0] in sections}
    return dataclasses.replace(
        job,
        **{section: getattr(known, section) for section in sections},
        origins=job.origins | {name: known.origins[name] for name in names},
    )


def planned(job: Job, plan: Plan) -> Job:
    """The job with what a plan found or assumed where it was open: model, layout, optimizer, type, batch and
    length."""
    job = laid_out_as(job, plan.problem, plan.best)
    if job.run.minutes is None and job.run.steps is None and job.run.tokens is None:
        job = job.derive("planned", **{"run.tokens": int(plan.tokens)})
    return job


def laid_out_as(job: Job, problem: Problem, choice: Choice) -> Job:
    """As `planned`, of any of the layouts that were looked at, but for its length."""
    layout = layout_values(choice, problem.global_batch)
    values: dict[str, Any] = {f"layout.{name}": value for name, value in layout.items()}
    model = problem.arch.model_dump(exclude_none=True, exclude={"base_width"})  # it follows the length
    values |= {f"model.{name}": value for name, value in model.items()}
    _, times, seq_len = problem.shapes[0]
    values |= {"run.global_batch": int(times * problem.global_batch), "data.seq_len": seq_len}
    values |= {"optimizer.name": problem.optimizer, "precision.type": problem.precision}
    return job.derive("planned", **values)
