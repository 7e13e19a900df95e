"""Fills in what a job leaves out: from the machine as measured, the length of the run and the model's size.

The dial: minutes give the compute C that this machine reaches in them; C gives the model's size, the tokens,
the batch and the learning rate by laws that others fitted over many orders of magnitude (named below) and
that `benchmarks/dial.py` checks at the small end. Tokens or steps instead of minutes go through the same
laws the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from colossus import architecture, layout
from colossus.architecture import Architecture
from colossus.data.tokenizer import BytesTokenizer, load_tokenizer
from colossus.errors import UserError
from colossus.hardware.machine import Machine
from colossus.job import Job
from colossus.measure.machine import free_memory_bytes
from colossus.measure.training import training_flops_per_second
from colossus.perf.flops import model_flops_per_token

MADE_LATER = {"data.folder", "run.folder"}
DEFAULT_MINUTES = 5.0
USABLE = 0.85  # of the minutes goes into training steps; the rest into validation, saving, compiling
COMPILED_GAIN = 1.3  # of compiled blocks over eager ones, as benchmarks/train_speed measures it
COMPILE_SECONDS = 25.0  # of the first step; blocks are alike, so it hardly depends on the model
MAX_BATCH = 10**7
WIDTH_STEP, MAX_WIDTH = 32, 16_384  # of the default models
VOCABULARY = 4096  # of a small model's own tokenizer
TOKENS_PER_FLOP = 3.5  # D = TOKENS_PER_FLOP x C^DATA_POWER
DATA_POWER = 0.4757  # DeepSeek LLM (arXiv 2401.02954), section 3.2: the optimal data grows so with compute


@dataclass(frozen=True)
class Plan:
    """What the dial says of a run. compute: model FLOPs of all its training tokens."""

    arch: Architecture
    compute: float
    tokens: float


def derive(job: Job, machine: Machine) -> Job:
    """The job with everything filled in.

    Raises:
        UserError: what was asked for cannot be together.
    """
    if not set(job.missing()) - MADE_LATER:
        _check(job)
        return job
    if job.run.minutes is None and job.run.steps is None and job.run.tokens is None:
        job = job.derive(**{"run.minutes": DEFAULT_MINUTES})
    job = _derive_machine(job, machine)
    job = derive_data(job)
    plan = _plan(job)
    job = _derive_model(job, plan.arch)
    job = _derive_steps(job, plan)
    job = _derive_optimizer(job, plan)
    job = _derive_layout(job, machine)
    job = _derive_rest(job, plan)
    _check(job)
    return job


def tokens_for(compute: float) -> float:
    """The tokens that make the best of `compute` model FLOPs."""
    return TOKENS_PER_FLOP * compute**DATA_POWER


def batch_tokens_for(compute: float) -> float:
    """Tokens of a step: 0.2920 C^0.3271 (DeepSeek LLM, arXiv 2401.02954, section 3.1)."""
    return 0.2920 * compute**0.3271


def lr_for(compute: float) -> float:
    """AdamW's rate at the top of the schedule: 0.3118 C^-0.1250 (the same section)."""
    return 0.3118 * compute**-0.1250


def shape(width: int, vocab_size: int, seq_len: int) -> dict[str, Any]:
    """The sizes of the default model of a width, which is a multiple of 32."""
    head_dim = 64 if width % 64 == 0 else 32
    heads = width // head_dim
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_layers": max(3, round(width / 48)),
        "num_heads": heads,
        "num_kv_heads": heads // 2 if heads % 2 == 0 else heads,
        "head_dim": head_dim,
        "intermediate_size": 32 * round(width * 8 / 3 / 32),
        "max_seq_len": seq_len,
    }


def choose_for_machine(job: Job, machine: Machine) -> dict[str, Any]:
    """Type, threads and compilation on `machine`, but for what the user asked for."""
    asked = {name for name, origin in job.origins.items() if origin != "derived"}

    def kept(name: str, choose: Callable[[], Any]) -> Any:
        return job.get(name) if name in asked else choose()

    return {
        "type": kept("precision.type", lambda: machine.best_type),
        "threads": kept("run.threads", lambda: _threads(job, machine)),
        "compile": kept("layout.compile", lambda: _compiling_pays(job, machine)),
    }


def _derive_machine(job: Job, machine: Machine) -> Job:
    if job.fleet.device == "cuda" and not machine.gpus:
        raise UserError.field("fleet.device", "cuda", "this machine has no GPU that PyTorch can use; cpu")
    job = job.derive(**{"fleet.name": "this-machine", "fleet.device": machine.device})
    axes = {f"layout.{axis}": 1 for axis in ("dp_replicate", "tp", "pp", "cp", "ep")}
    ranks = max(1, len(machine.gpus)) if job.fleet.device == "cuda" else 1
    job = job.derive(**axes, **{"layout.dp_shard": ranks, "layout.recompute": "none"})
    as_far_as_known = job.layout.model_copy(update={"micro_batch": job.layout.micro_batch or 1})
    layout.check(as_far_as_known, job.run.global_batch or MAX_BATCH)  # before anything is measured
    kind = "bf16" if job.fleet.device == "cuda" else machine.best.type
    return job.derive(**{"precision.type": kind, "run.threads": _threads(job, machine)})


def _threads(job: Job, machine: Machine) -> int:
    return max(1, machine.best_threads // job.layout.num_ranks)


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
    return job.derive(**{"data.seq_len": min(512, job.model.max_seq_len or 512)})


def _vocabulary(job: Job) -> int:
    if job.model.vocab_size is not None:
        return job.model.vocab_size
    if job.data.tokenizer == "bytes":
        return BytesTokenizer.vocab_size
    return VOCABULARY if job.data.tokenizer == "bpe" else load_tokenizer(job.data.tokenizer).vocab_size


def _plan(job: Job) -> Plan:
    """The model, what was asked for of it kept, and the compute that the run's length gives it."""
    rate_of = _measured_rates(job)

    def compute_of(arch: Architecture) -> float:
        if job.run.minutes is not None:
            return rate_of(arch) * job.run.minutes * 60 * USABLE
        return _compute_of(job, model_flops_per_token(arch, job.data.seq_len))

    return dial(job, compute_of)


def dial(job: Job, compute_of: Callable[[Architecture], float]) -> Plan:
    """The model whose tokens come nearest to the best for its compute; the one that was asked for, if any.

    job: its data derived (see `derive_data`). compute_of: model FLOPs of a run of that model.
    """
    last: Plan | None = None
    for width in range(WIDTH_STEP, MAX_WIDTH, WIDTH_STEP):
        arch = _complete(job, width)
        compute = compute_of(arch)
        plan = Plan(arch, compute, compute / model_flops_per_token(arch, job.data.seq_len))
        if job.model.hidden_size is not None:
            return plan
        if plan.tokens < tokens_for(compute):
            return plan if last is None else min(last, plan, key=_distance)
        last = plan
    assert last is not None
    return last


def _distance(plan: Plan) -> float:
    """How far the tokens are from the best, in either direction."""
    return abs(math.log(plan.tokens / tokens_for(plan.compute)))


def _measured_rates(job: Job) -> Callable[[Architecture], float]:
    """The rate that training a model will reach: measured for the default models of widths that are powers
    of two, when asked, and in between in proportion; for a model that was asked for, measured itself."""

    @cache
    def measured(arch: Architecture) -> float:
        data, kind, threads = job.data, job.precision.type, job.run.threads
        return training_flops_per_second(arch, data.seq_len, kind, threads, job.fleet.device) * _gain(job)

    def rate(arch: Architecture) -> float:
        if job.model.hidden_size is not None:
            return measured(arch)
        power = int(math.log2(arch.hidden_size))
        share = math.log2(arch.hidden_size) - power
        low = measured(_complete(job, 2**power))
        return low if not share else low ** (1 - share) * measured(_complete(job, 2 ** (power + 1))) ** share

    return rate


def _gain(job: Job) -> float:
    """What compiling makes of the rate of blocks that are not compiled, which is the one that is measured."""
    assert job.run.minutes is not None
    compiled = job.layout.compile
    return (
        COMPILED_GAIN if (_is_long(job.run.minutes * 60 * USABLE) if compiled is None else compiled) else 1.0
    )


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


def _complete(job: Job, width: int) -> Architecture:
    """The model that was asked for, with what is left out of it taken from the default shape of a width."""
    asked = job.model
    sizes = shape(asked.hidden_size or width, _vocabulary(job), job.data.seq_len)
    head_dim = asked.head_dim or (
        asked.hidden_size // asked.num_heads if asked.hidden_size and asked.num_heads else sizes["head_dim"]
    )
    heads = asked.num_heads or max(1, (asked.hidden_size or width) // head_dim)
    sizes |= {"head_dim": head_dim, "num_heads": heads}
    if heads % sizes["num_kv_heads"]:
        sizes["num_kv_heads"] = heads
    sizes |= {
        "rope_theta": 10_000.0,
        "norm_eps": 1e-5,
        "tie_embeddings": True,
        "qk_norm": True,
        "initializer_range": 0.02,
    }
    given = asked.model_dump(exclude_none=True)
    return Architecture.model_validate(sizes | given)


def _derive_model(job: Job, arch: Architecture) -> Job:
    values = arch.model_dump(exclude_none=True)
    values.pop("rope_scaling", None)
    job = job.derive(**{f"model.{name}": v for name, v in values.items() if name not in ("preset", "family")})
    if job.data.seq_len > job.model.max_seq_len:
        raise UserError(
            f"data.seq_len={job.data.seq_len}: longer than model.max_seq_len={job.model.max_seq_len}; "
            f"at most {job.model.max_seq_len}"
        )
    architecture.check(job.model)
    return job


def _derive_steps(job: Job, plan: Plan) -> Job:
    batch = max(1, round(batch_tokens_for(plan.compute) / job.data.seq_len))
    if batch > 4:
        batch = 4 * round(batch / 4)
    batch = max(batch, job.layout.dp)
    job = job.derive(**{"run.global_batch": batch, "run.seed": 0})
    return job.derive(**{"run.batch_schedule": [(0, job.run.global_batch)]})


def _expected_steps(job: Job, plan: Plan) -> int:
    if job.run.steps is not None:
        return job.run.steps
    return max(1, round(plan.tokens / (job.run.global_batch * job.data.seq_len)))


def _derive_optimizer(job: Job, plan: Plan) -> Job:
    lr = float(f"{lr_for(plan.compute):.2g}")
    return job.derive(
        **{
            "optimizer.name": "muon",
            "optimizer.lr": lr,
            "optimizer.matrix_lr": job.optimizer.lr or lr,
            "optimizer.weight_decay": 0.1,
            "optimizer.beta1": 0.9,
            "optimizer.beta2": 0.95,
            "optimizer.eps": 1e-8,
            "optimizer.momentum": 0.95,
            "optimizer.grad_clip": 1.0,
            "optimizer.z_loss": 0.0,
            "optimizer.schedule": "wsd",
            "optimizer.decay_fraction": 0.5,
            "optimizer.final_lr_fraction": 0.0,
            "optimizer.warmup_steps": min(200, math.ceil(0.02 * _expected_steps(job, plan))),
        }
    )


def _derive_layout(job: Job, machine: Machine) -> Job:
    share = -(-job.run.global_batch // job.layout.dp)
    job = job.derive(**{"layout.micro_batch": _micro_batch(job, share, machine)})
    return job.derive(**{"layout.compile": _compiling_pays(job, machine)})


def _micro_batch(job: Job, share: int, machine: Machine) -> int:
    """The largest divisor of a rank's share of a batch whose activations fit into a quarter of the memory."""
    on_cpu = job.fleet.device == "cpu"
    memory = free_memory_bytes() / job.layout.num_ranks if on_cpu else machine.gpus[0].memory_bytes
    arch = job.model
    # What waits for the backward pass, in fp32: as Korthikanti et al. 2022 (arXiv 2205.05198) count it, with
    # the three products of SwiGLU, and attention that keeps no scores.
    per_token = 4 * arch.num_layers * (16 * arch.hidden_size + 4 * arch.intermediate_size)
    fits = max(1, int(memory / 4 / (per_token * job.data.seq_len)))
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= fits)


def _compiling_pays(job: Job, machine: Machine) -> bool:
    """Whether the run is long enough to win back the seconds that the first step takes longer."""
    if job.fleet.device == "cpu" and machine.compiler is None:
        return False
    if job.run.minutes is not None:
        seconds = job.run.minutes * 60 * USABLE
    else:
        rate = 0.4 * machine.peak_flops_per_second
        seconds = _compute_of(job, model_flops_per_token(job.model, job.data.seq_len)) / rate
    return _is_long(seconds)


def _is_long(seconds: float) -> bool:
    """Whether a run of so many seconds wins back what compiling takes."""
    return seconds * (1 - 1 / COMPILED_GAIN) > COMPILE_SECONDS


def _derive_rest(job: Job, plan: Plan) -> Job:
    steps = _expected_steps(job, plan)
    prompt = "def " if job.data.corpus == ["python"] else "The "
    return job.derive(
        **{
            "run.validate_every": max(1, steps // 10),
            "run.prompt": prompt,
            "checkpoint.minutes": 10.0,
            "checkpoint.steps": 0,
            "checkpoint.keep": 2,
            "checkpoint.keep_every": 0,
        }
    )


def _check(job: Job) -> None:
    layout.check(job.layout, min(count for _, count in job.run.batch_schedule))
    if job.optimizer.schedule == "cosine" and job.run.minutes is not None:
        raise UserError(
            "optimizer.schedule=cosine: needs to know its end from the start; with run.minutes it is "
            "wsd, or give run.steps or run.tokens"
        )
    assert not set(job.missing()) - MADE_LATER, f"not derived: {job.missing()}"
