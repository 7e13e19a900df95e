"""The job of a run from step to step.

A run's job says what holds at its end. What a user changed on the way is a decision with the step that it
holds from on; so the job of an earlier step is the last one, with what was changed since put back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colossus.job import LENGTHS, Job
from colossus.trainer.decisions import CHANGE, Decision, Decisions

# What holds from a step on. The rest of what may change is no part of what a run learns (folder.MAY_CHANGE).
RATES = tuple(
    f"optimizer.{name}"
    for name in (
        *("lr", "matrix_lr", "weight_decay", "beta1", "beta2", "eps", "momentum", "grad_clip", "z_loss"),
        *("decay_fraction", "final_lr_fraction"),
    )
)
SCHEDULES = ("run.batch_schedule", "data.phases", "data.skip")  # which say themselves from when on
CUT = "layout.micro_batch"  # derived from batch and length; it decides in which order a step is summed
COURSE = (*LENGTHS, *RATES, *SCHEDULES, "run.global_batch", "data.seq_len", "data.weights")


@dataclass(frozen=True)
class Part:
    """From `first_step` on the run follows `job`. rewarm: there the rate rises anew, as after a start."""

    first_step: int
    job: Job
    rewarm: bool = False


def parts(job: Job, decisions: Decisions) -> list[Part]:
    """The parts of a run whose last one follows `job`, from step 0 on."""
    found: list[Part] = []
    for change in reversed(decisions.changes()):
        found.append(Part(change.first_step, job, change.value["rewarm"]))
        job = undone(job, change)
    return [Part(0, job), *reversed(found)]


def job_at(step: int, job: Job, decisions: Decisions) -> Job:
    """The job that holds at `step` of a run whose last part follows `job`."""
    return [part.job for part in parts(job, decisions) if part.first_step <= step][-1]


def latest(kept: Job, decisions: Decisions) -> Job:
    """The job that a run follows at its end: as kept, with what was decided since."""
    for change in decisions.changes():
        after = change.value["after"]
        if any(kept.get(name) != value for name, value in after.items() if name != CUT):
            kept = with_values(kept, {n: v for n, v in after.items() if n != CUT or not kept.asked_for(CUT)})
    return kept


def undone(job: Job, change: Decision) -> Job:
    """The job as it was before a change. Its steps are cut into passes as they were, unless the run is spread
    otherwise since."""
    before, after = change.value["before"], change.value["after"]
    as_then = not job.asked_for(CUT) and job.get(CUT) == after.get(CUT)
    return with_values(job, {name: value for name, value in before.items() if name != CUT or as_then})


def with_values(job: Job, values: Mapping[str, Any]) -> Job:
    """The job with these values; None opens a field. What was derived, from the other rate or from the batch,
    stays so."""
    opened = [name for name, value in values.items() if value is None]
    given = {name: value for name, value in values.items() if value is not None}
    matrix = "optimizer.matrix_lr"
    derived: set[str] = {CUT} & given.keys()
    if not job.asked_for(matrix) and matrix in given and given[matrix] == given.get("optimizer.lr"):
        derived.add(matrix)
    job = (job.without(*opened) if opened else job).put(given, "argument")
    return dataclasses.replace(job, origins=job.origins | dict.fromkeys(derived, "derived"))


def change(first_step: int, before: Job, after: Job, *, rewarm: bool, **told: Any) -> Decision | None:
    """The decision that a run follows `after` from `first_step` on, and `before` until then; None where they
    are one course. told: what else there is to tell of it."""
    names = [name for name in COURSE if before.get(name) != after.get(name)]
    if not names:
        return None
    if not after.asked_for(CUT) and before.get(CUT) != after.get(CUT) is not None:
        names.append(CUT)
    value = {
        "before": {name: plain(before.get(name)) for name in names},
        "after": {name: plain(after.get(name)) for name in names},
        "rewarm": rewarm,
    }
    return Decision(CHANGE, value | told, first_step)


def plain(value: Any) -> Any:
    """As it comes back from a log: tables and pairs as plain data."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value
