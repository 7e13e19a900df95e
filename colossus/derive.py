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
    job = _derive_data(job)
    plan = _plan(job, machine)
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
    kind = "bf16" if job.fleet.device == "cuda" else machine.best.type
    return job.derive(**{"precision.type": kind, "run.threads": _threads(job, machine)})


def _threads(job: Job, machine: Machine) -> int:
    return max(1, machine.best_threads // job.layout.num_ranks)


def _derive_data(job: Job) -> Job:
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


def _plan(job: Job, machine: Machine) -> Plan:
    """The model, what was asked for of it kept, and the compute that the run's length gives it."""
    if _is_shaped(job):
        arch = _complete(job, 256)
        return _fixed(job, arch, machine)
    best: Plan | None = None
    rate = None
    for width in range(64, 8193, 32):
        arch = _complete(job, width)
        flops = model_flops_per_token(arch, job.data.seq_len)
        if job.run.minutes is None:
            compute = _compute_of(job, flops)
        else:
            # The rate grows with the width, and slowly: measured at every fourth, the last one holds on.
            if rate is None or width % 128 == 64:
                rate = _rate(job, arch, machine)
            compute = rate * job.run.minutes * 60 * USABLE
        plan = Plan(arch, compute, compute / flops)
        if plan.tokens < tokens_for(compute):
            return _nearer(best, plan)
        best = plan
    assert best is not None
    return best


def _nearer(smaller: Plan | None, larger: Plan) -> Plan:
    """Of two models, one on each side of the law, the one that is nearer to it."""
    if smaller is None:
        return larger
    over = smaller.tokens / tokens_for(smaller.compute)
    under = tokens_for(larger.compute) / larger.tokens
    return smaller if over < under else larger


def _fixed(job: Job, arch: Architecture, machine: Machine) -> Plan:
    flops = model_flops_per_token(arch, job.data.seq_len)
    if job.run.minutes is None:
        compute = _compute_of(job, flops)
    else:
        compute = _rate(job, arch, machine) * job.run.minutes * 60 * USABLE
    return Plan(arch, compute, compute / flops)


def _compute_of(job: Job, flops_per_token: float) -> float:
    """Model FLOPs of a run of given tokens or steps; a step's tokens may follow from the compute."""
    if job.run.tokens is not None:
        return job.run.tokens * flops_per_token
    compute = 1e12
    for _ in range(50):
        batch = job.run.global_batch
        tokens = batch * job.data.seq_len if batch is not None else batch_tokens_for(compute)
        compute = job.run.steps * tokens * flops_per_token
    return compute


def _is_shaped(job: Job) -> bool:
    return job.model.hidden_size is not None


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
    """The largest divisor of a rank's share of a batch whose activations take a quarter of the free memory."""
    memory = free_memory_bytes() if job.fleet.device == "cpu" else machine.gpus[0].memory_bytes
    budget = memory / 4 / (job.layout.num_ranks if job.fleet.device == "cpu" else 1)
    arch = job.model
    # Bytes of a token's activations that wait for the backward pass, fp32 (Korthikanti et al. 2022, section 4).
    per_token = arch.num_layers * 4 * (16 * arch.hidden_size + 4 * arch.intermediate_size) + 16 * arch.hidden_size
    fits = max(1, int(budget / (per_token * job.data.seq_len)))
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


def _rate(job: Job, arch: Architecture, machine: Machine) -> float:
    rate = training_flops_per_second(
        arch, job.data.seq_len, job.precision.type, job.run.threads, job.fleet.device
    )
    if job.run.minutes is not None and job.run.minutes * 60 * USABLE * (1 - 1 / COMPILED_GAIN) > COMPILE_SECONDS:
        rate *= COMPILED_GAIN
    return rate


