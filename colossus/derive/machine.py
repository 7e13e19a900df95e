"""What follows from the machine: type, threads, compilation, the rate of training, what fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

from colossus import layout
from colossus.architecture import Architecture, Parameter, num_parameters, parameter_table
from colossus.derive.dial import complete
from colossus.errors import UserError
from colossus.hardware.machine import Machine
from colossus.job import Job
from colossus.measure.machine import free_memory_bytes
from colossus.measure.training import training_flops_per_second
from colossus.optim.optimizer import MUON_GROUPS
from colossus.perf.flops import model_flops_per_token, saved_bytes_per_token
from colossus.perf.parts import kernel_of
from colossus.precision import torch_type
from colossus.words import count, size

USABLE = 0.85  # of the minutes goes into training steps; the rest into validation, saving, compiling
COMPILED_GAIN = 1.15  # of compiled blocks over eager ones: 1.14 at width 128, 1.26 at 192, 1.18 at 256
COMPILE_SECONDS = 35.0  # of the first step on two cores; blocks are alike, so it hardly depends on the model
KEPT_WEIGHTS = 0.05  # of a rank's memory, that gathered weights may take through a step
MEASURED_WIDTH = 1024  # rates hardly grow beyond it


def derive_machine(job: Job, machine: Machine, ranks: int | None = None) -> Job:
    """Device, ranks, type and threads. ranks: so many; else as many as there are GPUs, or one.

    Raises:
        UserError: the machine lacks what was asked for.
    """
    check_device(job, machine)
    if job.run.threads is not None and job.run.threads > machine.cores:
        raise UserError(
            f"run.threads={job.run.threads}: more than this machine's cores; at most {machine.cores}"
        )
    job = job.derive(**{"fleet.name": "this-machine", "fleet.device": machine.device})
    axes = {f"layout.{axis}": 1 for axis in ("dp_replicate", "tp", "pp", "cp", "ep", "etp")}
    job = job.derive(**axes)
    devices = ranks or (max(1, len(machine.gpus)) if job.fleet.device == "cuda" else 1)
    taken = job.layout.dp_replicate * job.layout.tp * job.layout.pp * job.layout.cp
    job = job.derive(**{"layout.dp_shard": max(1, devices // taken)})
    several = job.layout.schedule is not None and job.layout.schedule not in layout.ONE_STAGE
    job = job.derive(
        **{
            "layout.schedule": "1f1b",
            "layout.stages_per_rank": 2 if several and job.layout.pp > 1 else 1,
            "layout.cp_method": "gather",
            "layout.recompute": "none",
            "layout.async_tp": False,
            "layout.pools": [],
        }
    )
    return job.derive(**{"precision.type": _type(job, machine), "run.threads": threads_of_rank(job, machine)})


def check_device(job: Job, machine: Machine) -> None:
    """Raises `UserError` where the machine has no such device, or not what it takes to compile."""
    if job.layout.compile and machine.compiler is None:
        raise UserError(
            "layout.compile=true: this machine lacks a C++ compiler that PyTorch can use, or Python.h; false"
        )
    if job.fleet.device == "cuda" and not machine.gpus:
        raise UserError.field("fleet.device", "cuda", "this machine has no GPU that PyTorch can use; cpu")


def choose_for_machine(job: Job, machine: Machine) -> dict[str, Any]:
    """Type, threads and compilation of a resolved job on another machine, but for what the user asked for."""

    def kept(name: str, choose: Callable[[], Any]) -> Any:
        return job.get(name) if job.asked_for(name) else choose()

    return {
        "type": kept("precision.type", lambda: _type(job, machine)),
        "threads": kept("run.threads", lambda: threads_of_rank(job, machine)),
        "compile": machine.compiler is not None
        and kept("layout.compile", lambda: compiling_pays(job, machine)),
    }


def check_memory(job: Job, arch: Architecture, machine: Machine) -> None:
    """Raises `UserError` where weights, gradients and optimizer state alone are more than there is memory."""
    needed, there = state_bytes(job, arch), memory_bytes(job, machine)
    if needed > there:
        name = arch.preset or f"model.hidden_size={arch.hidden_size}"
        raise UserError(
            f"model={name}: {count(num_parameters(arch))} parameters need {size(needed)} for weights, "
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
    """Memory that a run can take: what is free now on a processor, all of the GPUs."""
    if job.fleet.device == "cpu":
        return free_memory_bytes()
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
    """Whether a pipeline's schedule takes the micro batches that this gives."""
    smallest = min(batch for _, batch in job.run.batch_schedule)
    row = layout.layout_row(job.layout) | {"micro_batch": micro_batch, "global_batch": smallest}
    return all(rule.holds(row) for rule in layout.RULES if rule.name in ("pp-micro-batches", "pp-rounds"))


def letting_go_pays(job: Job, machine: Machine) -> bool:
    """Whether gathered weights are worth a second gathering: where they would take much memory. Stages of a
    pipeline would gather theirs for every micro batch."""
    layout = job.layout
    gathered = num_parameters(job.model) * torch_type(job.precision.type).itemsize / layout.tp
    return layout.pp == 1 and gathered > KEPT_WEIGHTS * memory_bytes(job, machine) / layout.num_ranks


def longest_sample(job: Job) -> int:
    """Tokens of the longest samples of all phases."""
    return max([job.data.seq_len, *(phase.seq_len for phase in job.data.phases if phase.seq_len)])


def measured_rates(job: Job) -> Callable[[Architecture], float]:
    """The rate that training a model in `run.minutes` will reach, in model FLOP/s.

    Measured, when asked, for the default models of widths that are powers of two, and in between in
    proportion; for a model that was asked for, measured itself.
    """
    assert job.run.minutes is not None
    compiled = job.layout.compile
    if compiled is None:
        compiled = _is_long(job.run.minutes * 60 * USABLE)

    @cache
    def measured(arch: Architecture) -> float:
        kind, threads, device = job.precision.type, job.run.threads, job.fleet.device
        rate = training_flops_per_second(arch, job.data.seq_len, kind, threads, device)
        return rate * COMPILED_GAIN if compiled else rate

    def rate(arch: Architecture) -> float:
        if job.model.hidden_size is not None:
            return measured(arch)
        power = math.log2(min(arch.hidden_size, MEASURED_WIDTH))
        below, share = 2 ** int(power), power % 1
        low = measured(complete(job, below))
        return low if not share else low ** (1 - share) * measured(complete(job, 2 * below)) ** share

    return rate


def compiling_pays(job: Job, machine: Machine) -> bool:
    """Whether the run is long enough to win back the seconds that its first step takes longer."""
    if machine.compiler is None:
        return False
    if job.run.minutes is not None:
        return _is_long(job.run.minutes * 60 * USABLE)
    steps = job.run.steps or 0
    tokens = job.run.tokens or steps * job.run.global_batch * job.data.seq_len
    flops = tokens * model_flops_per_token(job.model, job.data.seq_len)
    return _is_long(flops / (0.3 * machine.peak_flops_per_second(job.fleet.device) * job.layout.num_ranks))


def _is_long(seconds: float) -> bool:
    return seconds * (1 - 1 / COMPILED_GAIN) > COMPILE_SECONDS


def _type(job: Job, machine: Machine) -> str:
    return "bf16" if job.fleet.device == "cuda" else machine.best.type


def threads_of_rank(job: Job, machine: Machine) -> int:
    """Of what the machine is quickest with, a rank's share."""
    return max(1, machine.best_threads // job.layout.num_ranks)
