"""What follows from the machine: device and ranks; type, threads, compilation and the rate of training, as
steps of training were timed; what fits."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any

from colossus import layout
from colossus.architecture import Architecture, Parameter, num_parameters, parameter_table
from colossus.derive.dial import complete, longest_sample
from colossus.derive.model import default_optimizer
from colossus.derive.settings import Choice, Compiling, Length, candidates, choose, compiling_of
from colossus.errors import UserError
from colossus.hardware.machine import Machine, ranks_here
from colossus.hardware.timings import Timing
from colossus.job import Job
from colossus.measure.machine import free_memory_bytes
from colossus.measure.training import compiled_timings, step_timings
from colossus.optim.optimizer import MUON_GROUPS
from colossus.perf.flops import model_flops_per_token, saved_bytes_per_token
from colossus.perf.parts import kernel_of
from colossus.precision import torch_type
from colossus.words import count, plural, size

USABLE = 0.85  # of the minutes goes into training steps; the rest into validation, saving, compiling
KEPT_WHOLE = 0.05  # of a rank's memory, that gathered weights, or sums of gradients, may take through a step
SUM_BYTES = 4  # of a weight's gradient, summed over micro batches
RANK_BYTES = 200 * 10**6  # of a process that has loaded PyTorch and the trainer: 232 MB on Linux, x86-64
MEASURED_WIDTH = 1024  # rates hardly grow beyond it


def derive_machine(job: Job, machine: Machine, ranks: int | None = None) -> Job:
    """Device and ranks. ranks: so many; else as many as `fleet.count` says, as there are GPUs, or one.

    Raises:
        UserError: the machine lacks what was asked for.
    """
    check_device(job, machine)
    job = job.derive(
        **{"fleet.name": "this-machine", "fleet.device": machine.device, "fleet.check_fit": True}
    )
    axes = {f"layout.{axis}": 1 for axis in ("dp_replicate", "tp", "pp", "cp", "ep", "etp")}
    job = job.derive(**axes)
    devices = ranks or _counted(job) or (max(1, len(machine.gpus)) if job.fleet.device == "cuda" else 1)
    taken = job.layout.dp_replicate * job.layout.tp * job.layout.pp * job.layout.cp
    job = job.derive(**{"layout.dp_shard": max(1, devices // taken)})
    several = job.layout.schedule is not None and job.layout.schedule not in layout.ONE_STAGE
    return job.derive(
        **{
            "layout.schedule": "1f1b",
            "layout.stages_per_rank": 2 if several and job.layout.pp > 1 else 1,
            "layout.cp_method": "gather",
            "layout.recompute": "none",
            "layout.async_tp": False,
            "layout.pools": [],
        }
    )


def _counted(job: Job) -> int | None:
    """Of this machine's GPUs, or ranks of its processor, those that the job takes. A count of accelerators
    that it names is of the fleet that it was planned for."""
    names_others = job.fleet.accelerator is not None or job.fleet.pools is not None
    return None if names_others else job.fleet.count


def check_device(job: Job, machine: Machine) -> None:
    """Raises `UserError` where the machine has no such device or so many cores, or not what it takes to
    compile."""
    if job.asked_for("run.threads") and job.run.threads > machine.cores:
        raise UserError(
            f"run.threads={job.run.threads}: more than this machine's cores; at most {machine.cores}"
        )
    if job.layout.compile and machine.compiler is None:
        raise UserError(
            "layout.compile=true: this machine lacks a C++ compiler that PyTorch can use, or Python.h; false"
        )
    if job.fleet.device == "cuda" and not machine.gpus:
        raise UserError.field("fleet.device", "cuda", "this machine has no GPU that PyTorch can use; cpu")


def check_ranks(job: Job, machine: Machine) -> None:
    """Raises `UserError` where the job has more ranks than its fleet counts, or where this machine cannot
    hold its ranks: each needs a GPU of its own, or on a processor memory for the libraries alone. Ranks that
    a launcher has started have that already."""
    counted, axis = _counted(job), max(layout.AXES, key=lambda name: job.get(f"layout.{name}"))
    value = job.get(f"layout.{axis}")
    if counted is not None and job.layout.num_ranks > counted and "RANK" not in os.environ:
        raise UserError(
            f"layout.{axis}={value}: {plural(job.layout.num_ranks, 'rank')}; at most fleet.count={counted}"
        )
    here = ranks_here(job.layout.num_ranks)
    if job.fleet.device == "cuda":
        most = len(machine.gpus)
        why = f"which has {plural(most, 'GPU')}, and each takes one"
    elif "RANK" in os.environ:
        return
    else:
        most = max(1, machine.memory_bytes // RANK_BYTES)
        why = f"whose memory holds {count(most)} of at least {size(RANK_BYTES)} each"
    if here <= most:
        return
    if counted is not None and not any(job.asked_for(f"layout.{name}") for name in layout.AXES):
        raise UserError(f"fleet.count={counted}: {count(here)} ranks on this machine, {why}; at most {most}")
    fits = max(1, most * value // here)
    raise UserError(f"layout.{axis}={value}: {count(here)} ranks on this machine, {why}; at most {fits}")


def derive_settings(job: Job, machine: Machine) -> Job:
    """Type, threads and compilation of a job whose model is known.

    Of compilation: whether it is known to pay; where it may, the run's first steps say (see
    `trainer.hooks.compile`).
    """
    chosen = _choice(job, machine, nearest(job, job.model), _length(job))
    return job.derive(
        **{
            "precision.type": chosen.setting.type,
            "run.threads": chosen.setting.threads,
            "layout.compile": chosen.compile,
        }
    )


def type_here(job: Job, machine: Machine) -> str:
    """In which a job whose model is known would be trained here. Of a model that is too large for this
    machine no step can be timed: the type of the quickest products."""
    job = derive_machine(job, machine)
    if job.fleet.device == "cuda":
        return candidates(job, machine)[0].type
    if job.precision.type is None and state_bytes(job, job.model) > memory_bytes(job, machine):
        return machine.best.type
    kind: str = derive_settings(job, machine).precision.type
    return kind


def choose_for_machine(job: Job, machine: Machine) -> dict[str, Any]:
    """Type, threads and compilation of a resolved job on another machine, but for what the user asked for."""
    names = {"type": "precision.type", "threads": "run.threads", "compile": "layout.compile"}
    job = job.without(*(name for name in names.values() if not job.asked_for(name)))
    if machine.compiler is None:
        job = job.put({"layout.compile": False}, "derived")
    job = derive_settings(job, machine)
    return {key: job.get(name) for key, name in names.items()}


def _choice(job: Job, machine: Machine, arch: Architecture, length: Length) -> Choice:
    device, settings = job.fleet.device or "cpu", candidates(job, machine)
    timings = step_timings(machine, arch, job.data.seq_len, settings, device, optimizer_of(job))

    def compiling(timing: Timing) -> Compiling | None:
        return expected_compiling(job, machine, arch, timing) if may_compile(job, machine) else None

    return choose(timings, length, compiling, forced=job.layout.compile is True)


def expected_compiling(job: Job, machine: Machine, arch: Architecture, timing: Timing) -> Compiling:
    """What compiling the layers of `arch` is expected to gain, where steps take what `timing` says."""
    peak = machine.peak_flops_per_second(job.fleet.device or "cpu")
    if job.fleet.device != "cuda":
        peak = machine.flops_per_second(timing.type) or peak
    return compiling_of(timing, arch.hidden_size, peak, compiled_timings(machine))


def may_compile(job: Job, machine: Machine) -> bool:
    """Whether layers can be compiled here, in this layout, and the user did not say that they must not."""
    if machine.compiler is None or (job.layout.compile is False and job.asked_for("layout.compile")):
        return False
    row = layout.layout_row(job.layout) | {"compile": 1}
    return all(rule.holds(row) for rule in layout.RULES if rule.name == "no-compiled-zero-bubble")


def optimizer_of(job: Job) -> str:
    """The optimizer's name, as asked for or as it will be derived."""
    return job.optimizer.name or default_optimizer(job)


def _length(job: Job) -> Length:
    if job.run.minutes is not None:
        return Length(seconds=job.run.minutes * 60 * USABLE)
    tokens = job.run.tokens or _tokens_of_steps(job)
    flops = tokens * model_flops_per_token(job.model, job.data.seq_len)
    return Length(flops=flops / job.layout.num_ranks)


def _tokens_of_steps(job: Job) -> int:
    """Of all steps, at the batches and lengths that occur; 0 where no number of steps is given."""
    steps, shapes = job.run.steps or 0, job.shapes(job.run.global_batch or 0)
    ends = [min(begin, steps) for begin, _, _ in shapes[1:]] + [steps]
    return sum((end - begin) * b * t for (begin, b, t), end in zip(shapes, ends, strict=True) if end > begin)


def check_memory(job: Job, arch: Architecture, machine: Machine) -> None:
    """Raises `UserError` where weights, gradients and optimizer state alone are more than there is memory."""
    needed, there = state_bytes(job, arch), memory_bytes(job, machine)
    if needed > there:
        name = f"model={arch.preset}" if arch.preset else f"model.hidden_size={arch.hidden_size}"
        raise UserError(
            f"{name}: {count(num_parameters(arch))} parameters need {size(needed)} for weights, "
            f"gradients and optimizer state, and {size(there)} is free here; a smaller model (see "
            "`colossus models`)"
        )


def state_bytes(job: Job, arch: Architecture) -> int:
    """Bytes of weights, gradients and optimizer state in fp32, over all ranks."""
    muon = job.optimizer.name != "adamw"

    def copies(parameter: Parameter) -> int:
        if not parameter.trainable:
            return 1
        return 3 if muon and parameter.group in MUON_GROUPS else 4  # Muon keeps a momentum, AdamW two

    return sum(4 * p.numel * copies(p) for p in parameter_table(arch))


def memory_bytes(job: Job, machine: Machine) -> int:
    """Memory that a run can take on all its machines: what is free now on each, of GPUs all.

    Other machines are taken to be like this one.
    """
    if job.fleet.device == "cpu":
        return free_memory_bytes() * job.layout.num_ranks // ranks_here(job.layout.num_ranks)
    return machine.gpus[0].memory_bytes * job.layout.num_ranks


def micro_batch(job: Job, share: int, machine: Machine) -> int:
    """The largest divisor of a rank's share of a batch whose activations fit into a quarter of the memory,
    and which leaves a pipeline as many micro batches as it has stages, or else as its schedule needs."""
    arch, longest = job.model, longest_sample(job)
    # What waits for the backward pass, in fp32 also where the type is narrower: it is the larger.
    kernel = kernel_of(arch, longest, job.fleet.device or "cpu")
    memory = memory_bytes(job, machine) / job.layout.num_ranks
    fits = max(1, int(memory / 4 / (saved_bytes_per_token(arch, longest, kernel=kernel) * longest)))
    divisors = [n for n in range(1, min(share, fits) + 1) if share % n == 0]
    if job.layout.pp == 1:
        return max(divisors)
    legal = [n for n in divisors if _is_scheduled(job, n)]
    return max([n for n in legal if share // n >= job.layout.num_stages] or legal or [1])


def _is_scheduled(job: Job, micro_batch: int) -> bool:
    """Whether a pipeline's schedule takes the micro batches that this gives, at every step."""
    row = layout.layout_row(job.layout) | {"micro_batch": micro_batch}
    rules = [rule for rule in layout.RULES if rule.name in ("pp-micro-batches", "pp-rounds")]
    batches = {batch for _, batch, _ in job.shapes()}
    return all(rule.holds(row | {"global_batch": batch}) for rule in rules for batch in batches)


def zero_level(job: Job, machine: Machine) -> int:
    """Of ZeRO, the least: weights and sums of gradients stay whole through a step where they take little
    memory. Stages of a pipeline would gather theirs for every micro batch."""
    spread = job.layout
    if spread.pp > 1 and spread.schedule in layout.ZERO_BUBBLE:
        return 1
    little = KEPT_WHOLE * memory_bytes(job, machine) / spread.num_ranks
    weights = num_parameters(job.model) / (spread.tp * spread.pp)
    if spread.pp == 1 and weights * torch_type(job.precision.type).itemsize > little:
        return 3
    return 2 if weights * SUM_BYTES > little else 1


def mean_rates(job: Job, machine: Machine) -> Callable[[Architecture], float]:
    """The rate at which a model is trained in `run.minutes`, compiling included, in model FLOP/s."""
    length = _length(job)

    @cache
    def mean(arch: Architecture) -> float:
        return _choice(job, machine, arch, length).mean_flops_per_second

    def rate(arch: Architecture) -> float:
        near = neighbours(job, arch)
        if len(near) == 1:
            return mean(near[0])
        share = math.log2(min(arch.hidden_size, MEASURED_WIDTH)) % 1
        return mean(near[0]) ** (1 - share) * mean(near[1]) ** share

    return rate


def neighbours(job: Job, arch: Architecture) -> list[Architecture]:
    """The models that are timed in the place of `arch`, the narrower one first: of a model that was asked
    for, itself; of the default models, those whose widths are powers of two."""
    if job.asked_for("model.hidden_size") or job.model.init_from is not None:
        return [arch]
    job = job.without(*(f"model.{n}" for n in type(arch).model_fields if not job.asked_for(f"model.{n}")))
    power = math.log2(min(arch.hidden_size, MEASURED_WIDTH))
    widths = [2**n for n in sorted({math.floor(power), math.ceil(power)})]
    return [complete(job, width, arch.vocab_size) for width in widths]


def nearest(job: Job, arch: Architecture) -> Architecture:
    """That of its neighbours whose width is nearer."""
    return min(neighbours(job, arch), key=lambda other: abs(math.log(other.hidden_size / arch.hidden_size)))


def peak_flops_per_second(job: Job, machine: Machine) -> float:
    """The denominator of MFU for a job's ranks together: those on one machine share its processor."""
    sharing = ranks_here(job.layout.num_ranks) if job.fleet.device == "cpu" else 1
    return machine.peak_flops_per_second(job.fleet.device or "cpu") * job.layout.num_ranks / sharing


def threads_of_rank(job: Job, machine: Machine) -> int:
    """Of what the machine is quickest with, a rank's share."""
    return max(1, machine.best_threads // ranks_here(job.layout.num_ranks))
