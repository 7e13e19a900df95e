"""Fills in what a job leaves out."""

from __future__ import annotations

import math

from colossus import architecture, layout
from colossus.architecture import Architecture
from colossus.derive.dial import Plan, base_width_for, batch_tokens_for, beta2_for, dial, lr_for
from colossus.derive.machine import (
    USABLE,
    check_device,
    check_memory,
    compiling_pays,
    derive_machine,
    letting_go_pays,
    longest_sample,
    measured_rates,
    memory_bytes,
    micro_batch,
    state_bytes,
)
from colossus.derive.origin import TUNING, follow_model
from colossus.derive.planned import derive_layout_by_plan, is_planned, ranks_here
from colossus.derive.recompute import derive_recompute
from colossus.errors import UserError
from colossus.hardware.fleets import NODE_SIZE
from colossus.hardware.machine import Machine
from colossus.job import Job
from colossus.perf.flops import model_flops_per_token
from colossus.planner.search import NothingFits

MADE_LATER = {"data.folder", "run.folder"}
DEFAULT_MINUTES = 5.0
# Short runs learn more from short samples: on 1e13 FLOPs a model of width 96 ended at 1.35 bits per byte with
# samples of 256 tokens, at 1.61 with 512 (one seed each: the step at which a small model learns to copy, and
# its loss falls at once, differs by seed).
SEQ_LEN = {"cpu": 256, "cuda": 1024}


def derive(job: Job, machine: Machine) -> Job:
    """The job with everything filled in but the folders.

    Raises:
        UserError: what was asked for cannot be together, or does not fit the machine.
    """
    if not set(job.missing()) - MADE_LATER:
        check_device(job, machine)
        _check(job)
        return job
    job = follow_model(job)
    if job.run.minutes is None and job.run.steps is None and job.run.tokens is None:
        job = job.derive(**{"run.minutes": DEFAULT_MINUTES})
    planned_for = ranks_here(job, machine) if is_planned(job) else None
    job = derive_machine(job, machine, planned_for)
    job = derive_data(job)
    plan = _plan(job, machine)
    job = _derive_base_width(job, plan)
    job = _derive_model(job, plan.arch)
    job = _derive_steps(job, plan)
    job = _derive_optimizer(job, plan)
    if planned_for is not None:
        job = _plan_layout(job, machine, planned_for)
    job = _derive_layout(job, machine)
    job = derive_recompute(job, longest_sample(job))
    job = _derive_rest(job)
    _check(job)
    return job


def derive_data(job: Job) -> Job:
    """What is learned from, and in samples of what length."""
    job = job.derive(
        **{
            "data.corpus": ["python"],
            "data.tokenizer": "bpe",
            "data.text_field": "text",
            "data.mask_documents": False,
            "data.validation_fraction": 0.02,
            "data.phases": [],
            "data.skip": [],
        }
    )
    job = job.derive(**{"data.weights": [1.0] * len(job.data.corpus)})
    if len(job.data.weights) != len(job.data.corpus):
        raise UserError(
            f"data.weights={job.data.weights}: {len(job.data.weights)} numbers for "
            f"{len(job.data.corpus)} corpora; one for each of data.corpus={job.data.corpus}"
        )
    for phase in job.data.phases:
        if phase.weights is not None and len(phase.weights) != len(job.data.corpus):
            raise UserError(
                f"data.phases from_step={phase.from_step}: {len(phase.weights)} weights for "
                f"{len(job.data.corpus)} corpora; one for each"
            )
    seq_len = SEQ_LEN[job.fleet.device or "cpu"]
    return job.derive(**{"data.seq_len": min(seq_len, job.model.max_seq_len or seq_len)})


def _plan(job: Job, machine: Machine) -> Plan:
    """The model, what was asked for of it kept, and the compute that the run's length gives it."""
    rate_of = measured_rates(job) if job.run.minutes is not None else None

    def compute_of(arch: Architecture) -> float:
        if job.model.hidden_size is not None:
            architecture.check(arch)
            check_memory(job, arch, machine)
        if rate_of is not None and job.run.minutes is not None:
            return rate_of(arch) * job.run.minutes * 60 * USABLE
        return _compute_of(job, model_flops_per_token(arch, job.data.seq_len))

    return dial(job, compute_of, lambda arch: 2 * state_bytes(job, arch) < memory_bytes(job, machine))


def _compute_of(job: Job, flops_per_token: float) -> float:
    """Model FLOPs of a run of given tokens or steps; a step's tokens may follow from the compute."""
    if job.run.tokens is not None:
        return job.run.tokens * flops_per_token
    assert job.run.steps is not None
    compute = 1e12
    for _ in range(50):  # the exponent is below 1, so this closes in on the one solution
        batch = job.run.global_batch
        tokens = batch * job.data.seq_len if batch is not None else batch_tokens_for(compute)
        compute = job.run.steps * tokens * flops_per_token
    return compute


def _derive_base_width(job: Job, plan: Plan) -> Job:
    """Where the rates hold as they are: a model that the dial chose, and rates that were asked for, are not
    scaled."""
    asked = job.optimizer.lr is not None or job.optimizer.matrix_lr is not None
    if asked or job.model.hidden_size is None:
        return job.derive(**{"model.base_width": plan.arch.hidden_size})
    return job.derive(**{"model.base_width": base_width_for(job, plan.arch, plan.compute)})


def _derive_model(job: Job, arch: Architecture) -> Job:
    values = arch.model_dump(exclude_none=True, exclude={"rope_scaling"})
    if arch.experts is not None:  # what was left out of the table that was asked for
        table = arch.experts.model_dump(exclude_none=True, exclude_unset=True)
        job = job.put({"model.experts": table}, job.origins.get("model.experts", "derived"))
    job = job.derive(**{f"model.{name}": v for name, v in values.items() if name not in ("preset", "family")})
    longest, most = longest_sample(job), job.model.max_seq_len
    if longest > most:
        where = "data.seq_len" if longest == job.data.seq_len else "data.phases seq_len"
        raise UserError(f"{where}={longest}: longer than model.max_seq_len={most}; at most {most}")
    architecture.check(job.model)
    return job


def _derive_steps(job: Job, plan: Plan) -> Job:
    batch = max(1, round(batch_tokens_for(plan.compute) / job.data.seq_len))
    if batch > 4:
        batch = 4 * round(batch / 4)
    batch = max(batch, job.layout.dp)
    schedule = job.run.batch_schedule or [(0, job.run.global_batch or batch)]
    job = job.derive(**{"run.global_batch": schedule[0][1], "run.batch_schedule": schedule, "run.seed": 0})
    if job.run.global_batch != schedule[0][1]:
        raise UserError(
            f"run.global_batch={job.run.global_batch}: run.batch_schedule begins with {schedule[0][1]}; "
            "give one of them"
        )
    steps = job.run.steps or max(1, round(plan.tokens / (job.run.global_batch * job.data.seq_len)))
    return job.derive(**{"run.expected_steps": steps, "run.validate_every": max(1, steps // 10)})


def _derive_optimizer(job: Job, plan: Plan) -> Job:
    tunes = job.model.init_from is not None
    lr = float(f"{lr_for(plan.compute) * (TUNING if tunes else 1):.2g}")
    return job.derive(
        **{
            "optimizer.name": "adamw" if tunes else "muon",
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


def _plan_layout(job: Job, machine: Machine, ranks: int) -> Job:
    """By the planner; where it finds none because what was asked for breaks a rule, in that rule's words."""
    try:
        return derive_layout_by_plan(job, machine, ranks)
    except NothingFits:
        asked = tuple(
            f"{name}=" for name in job.origins if name.startswith("layout.") and job.asked_for(name)
        )
        if broken := [text for text in _violations(_derive_layout(job, machine)) if text.startswith(asked)]:
            raise UserError("\n".join(broken)) from None
        raise


def _derive_layout(job: Job, machine: Machine) -> Job:
    share = -(-min(batch for _, batch in job.run.batch_schedule) // job.layout.dp)
    job = job.derive(**{"layout.micro_batch": micro_batch(job, share, machine)})
    job = job.derive(**{"layout.reshard": letting_go_pays(job, machine)})
    return job.derive(**{"layout.compile": compiling_pays(job, machine)})


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


def _violations(job: Job) -> list[str]:
    return layout.violations(
        job.layout,
        job.model,
        global_batch=min(count for _, count in job.run.batch_schedule),
        seq_len=longest_sample(job),
        node_size=NODE_SIZE,
        has_symmetric_memory=job.fleet.device == "cuda" and job.layout.compile,
    )


def _check(job: Job) -> None:
    if broken := _violations(job):
        raise UserError("\n".join(broken))
    if job.optimizer.schedule == "cosine" and job.run.minutes is not None:
        raise UserError(
            "optimizer.schedule=cosine: needs to know its end from the start; with run.minutes it is "
            "wsd, or give run.steps or run.tokens"
        )
    assert not set(job.missing()) - MADE_LATER, f"not derived: {job.missing()}"
