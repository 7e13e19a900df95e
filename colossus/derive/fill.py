"""Fills in what a job leaves out."""

from __future__ import annotations

import math
from collections.abc import Iterable

from colossus import architecture, layout
from colossus.architecture import Architecture
from colossus.derive.dial import (
    Plan,
    best_compute_for,
    beta2_for,
    compute_of_length,
    longest_sample,
    lr_for,
    sequences_for,
)
from colossus.derive.machine import (
    USABLE,
    check_device,
    check_memory,
    check_ranks,
    derive_machine,
    derive_settings,
    mean_rates,
    memory_bytes,
    micro_batch,
    state_bytes,
    zero_level,
)
from colossus.derive.model import default_optimizer, derive_data, derive_model, follow_model
from colossus.derive.origin import TUNING
from colossus.derive.planned import derive_layout_by_plan, is_planned, ranks_here
from colossus.derive.recompute import check_recompute, derive_recompute, is_open
from colossus.errors import UserError
from colossus.hardware.fleets import NODE_SIZE
from colossus.hardware.machine import Machine
from colossus.job import Job
from colossus.perf.flops import model_flops_per_token
from colossus.planner.search import NothingFits

MADE_LATER = {"data.folder", "run.folder"}
DEFAULT_MINUTES = 5.0
VALIDATIONS, FEW_STEPS = 10, 20  # during a run; of so few steps it is validated at the end alone


def derive(job: Job, machine: Machine) -> Job:
    """The job with everything filled in but the folders.

    Raises:
        UserError: what was asked for cannot be together, or does not fit the machine.
    """
    if not set(job.missing()) - MADE_LATER and not is_open(job):
        check_device(job, machine)
        _check(job, machine)
        return job
    planned_for = ranks_here(job, machine) if is_planned(job) else None
    job, plan = model_here(job, machine, planned_for)
    job = _derive_steps(job, plan)
    job = derive_settings(job, machine)
    job = _derive_optimizer(job, plan)
    if planned_for is not None:
        job = _plan_layout(job, machine, planned_for)
    job = _derive_layout(job, machine)
    job = derive_recompute(job, longest_sample(job))
    job = _derive_rest(job)
    _check(job, machine)
    return job


def model_here(job: Job, machine: Machine, ranks: int | None = None) -> tuple[Job, Plan]:
    """The job with its machine, its data and its model filled in, and the compute that its length gives it
    here. ranks: see `derive_machine`.

    Raises:
        UserError: what was asked for cannot be together, or does not fit the machine.
    """
    job = follow_model(job)
    if job.run.minutes is None and job.run.steps is None and job.run.tokens is None:
        job = job.derive(**{"run.minutes": DEFAULT_MINUTES})
    job = derive_data(derive_machine(job, machine, ranks))
    rate_of = mean_rates(job, machine) if job.run.minutes is not None else None

    def compute_of(arch: Architecture) -> float:
        if job.model.hidden_size is not None:
            architecture.check(arch)
            check_memory(job, arch, machine)
        if rate_of is not None and job.run.minutes is not None:
            return rate_of(arch) * job.run.minutes * 60 * USABLE
        return compute_of_length(job, model_flops_per_token(arch, job.data.seq_len))

    def fits(arch: Architecture) -> bool:
        return 2 * state_bytes(job, arch) < memory_bytes(job, machine)

    return derive_model(job, compute_of, fits)


def _derive_steps(job: Job, plan: Plan) -> Job:
    batch = max(sequences_for(plan.compute, job.data.seq_len), job.layout.dp)
    schedule = job.run.batch_schedule or [(0, job.run.global_batch or batch)]
    job = job.derive(**{"run.global_batch": schedule[0][1], "run.batch_schedule": schedule, "run.seed": 0})
    if job.run.global_batch != schedule[0][1]:
        raise UserError(
            f"run.global_batch={job.run.global_batch}: run.batch_schedule begins with {schedule[0][1]}; "
            "give one of them"
        )
    steps = job.run.steps or max(1, round(plan.tokens / (job.run.global_batch * job.data.seq_len)))
    every = min(steps // VALIDATIONS, 10**9) if steps >= FEW_STEPS else 0
    return job.derive(**{"run.expected_steps": steps, "run.validate_every": every})


def _derive_optimizer(job: Job, plan: Plan) -> Job:
    lr = float(f"{_lr(job, plan):.2g}")
    return job.derive(
        **{
            "optimizer.name": default_optimizer(job),
            "optimizer.lr": lr,
            "optimizer.matrix_lr": job.optimizer.lr or lr,
            "optimizer.weight_decay": 0.1,
            "optimizer.beta1": 0.9,
            "optimizer.beta2": beta2_for(job.run.global_batch * job.data.seq_len),
            "optimizer.eps": 1e-8,
            "optimizer.momentum": 0.95,
            "optimizer.grad_clip": 1.0,
            "optimizer.z_loss": 0.0,
            "optimizer.schedule": "wsd",
            "optimizer.decay_fraction": 0.5,
            "optimizer.final_lr_fraction": 0.0,
            "optimizer.warmup_steps": min(200, math.ceil(0.02 * job.run.expected_steps)),
        }
    )


def _lr(job: Job, plan: Plan) -> float:
    """AdamW's rate at the top of the schedule. Of a model that exists it follows from the model's size: the
    law holds for models of about the best size for their compute, and a run of a few steps would get a higher
    rate than a long one, which its weights do not bear."""
    if job.model.init_from is None:
        return lr_for(plan.compute)
    of_its_size = best_compute_for(model_flops_per_token(plan.arch, job.data.seq_len))
    return TUNING * lr_for(max(plan.compute, of_its_size))


def _plan_layout(job: Job, machine: Machine, ranks: int) -> Job:
    """By the planner; where it finds none because what was asked for breaks a rule, in that rule's words."""
    try:
        return derive_layout_by_plan(job, machine, ranks)
    except NothingFits:
        broken = _violations(_derive_layout(job, machine))
        if asked := _of_what_was_asked(job, broken):
            raise UserError("\n".join(asked)) from None
        raise


def _derive_layout(job: Job, machine: Machine) -> Job:
    share = job.layout.fewest_rows(min(batch for _, batch in job.run.batch_schedule))
    job = job.derive(**{"layout.micro_batch": micro_batch(job, share, machine)})
    return job.derive(**{"layout.zero": zero_level(job, machine)})


def _derive_rest(job: Job) -> Job:
    prompt = "def " if job.data.corpus == ["python"] else "The "
    return job.derive(
        **{
            "run.prompt": prompt,
            "run.hooks": [],
            "checkpoint.minutes": min(10.0, (job.run.minutes or math.inf) / 5),
            "checkpoint.steps": 0,
            "checkpoint.keep": 2,
            "checkpoint.keep_every": 0,
        }
    )


def _of_what_was_asked(job: Job, broken: Iterable[str]) -> list[str]:
    """Of what is wrong with a layout, what is said of fields that were asked for: the cause. What is derived
    follows from them, and may be right once they are."""
    asked = tuple(f"{name}=" for name in job.origins if name.startswith("layout.") and job.asked_for(name))
    return [text for text in broken if text.startswith((*asked, "layout.pools"))]


def _violations(job: Job) -> list[str]:
    (_, batch, seq_len), *later = job.shapes()
    return layout.violations(
        job.layout,
        job.model,
        global_batch=batch,
        seq_len=seq_len,
        later=later,
        node_size=NODE_SIZE,
        has_symmetric_memory=job.fleet.device == "cuda" and job.layout.compile,
    )


def _check(job: Job, machine: Machine) -> None:
    check_ranks(job, machine)
    if broken := _violations(job):
        raise UserError("\n".join(_of_what_was_asked(job, broken) or broken))
    check_recompute(job)
    if job.optimizer.schedule == "cosine" and job.run.minutes is not None:
        raise UserError(
            "optimizer.schedule=cosine: needs to know its end from the start; with run.minutes it is "
            "wsd, or give run.steps or run.tokens"
        )
    assert not set(job.missing()) - MADE_LATER, f"not derived: {job.missing()}"
