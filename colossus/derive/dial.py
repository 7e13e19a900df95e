"""The dial: from the compute of a run, the size of its model, its tokens, its batch and its learning rate.

Laws of others, fitted over many orders of magnitude, say how these grow with compute; `benchmarks/dial.py`
checks at the small end that a model next to the chosen one is no better.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from colossus.architecture import Architecture, Experts, check
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.data.tokenizer import load_tokenizer
from colossus.errors import UserError
from colossus.job import Job
from colossus.perf.flops import model_flops_per_token

WIDTH_STEP, MAX_WIDTH = 32, 16_384  # of the default models
MANY_HEADS = 128  # width from which a layer has more than one head of 64
VOCABULARY = 4096  # of a small model's own tokenizer
TOKENS_PER_FLOP, TOKENS_EXPONENT = 2.2, 0.4757  # of `tokens_for`
# The constant of `batch_tokens_for`: on 1e13 FLOPs a model of width 96 ended at 1.23 bits per byte with 2,048
# tokens a step, at 1.35 with 4,096 (one seed each). More and smaller steps cost time on a processor.
BATCH_TOKENS_PER_FLOP = 0.12
SMALL_BATCH_TOKENS = 2**15
CHECKED_WIDTH = 160  # of the default models for which the law of the rate was tried (benchmarks/dial.py)


@dataclass(frozen=True)
class Plan:
    """What the dial says of a run. compute: model FLOPs of all its training tokens."""

    arch: Architecture
    compute: float
    tokens: float


def tokens_for(compute: float) -> float:
    """The tokens that make the best of `compute` model FLOPs: proportional to C^0.4757 (DeepSeek LLM, arXiv
    2401.02954, section 3.2; its constant is 5.83, for another corpus and without the output head)."""
    return TOKENS_PER_FLOP * compute**TOKENS_EXPONENT


def best_compute_for(flops_per_token: float) -> float:
    """The compute for which a model with so many model FLOPs a token is the best: its tokens are those of
    `tokens_for`."""
    return float((TOKENS_PER_FLOP * flops_per_token) ** (1 / (1 - TOKENS_EXPONENT)))


def batch_tokens_for(compute: float) -> float:
    """Tokens of a step: proportional to C^0.3271 (DeepSeek LLM, section 3.1; its constant is 0.2920)."""
    return BATCH_TOKENS_PER_FLOP * compute**0.3271


def sequences_for(compute: float, seq_len: int) -> int:
    """Samples of a step: those of `batch_tokens_for`, in fours where there are more."""
    batch = max(1, round(batch_tokens_for(compute) / seq_len))
    return 4 * round(batch / 4) if batch > 4 else batch


def lr_for(compute: float) -> float:
    """AdamW's rate at the top of the schedule: 0.3118 C^-0.1250 (the same section).

    The law was fitted to models of about the best size for their compute, so that it holds at the width that
    the dial chooses for C: see `base_width_for`.
    """
    return 0.3118 * compute**-0.1250


def base_width_for(job: Job, arch: Architecture, compute: float) -> int:
    """The width at which `lr_for(compute)` holds, from which an `arch` that was asked for takes its rates.

    That is the width whose tokens are the best for this compute, or the next of the default models. A model
    that is narrower, or no wider than those for which the law was tried, is its own base: nothing is scaled.

    Two layers, Muon and the rate 0.008, near what the law gives for 200 steps of 2,048 bytes: width 512 ended
    at 1.794 nats a token scaled from 160, at 1.812 unscaled; width 256 at 1.864 from 128, 1.875 unscaled (one
    seed each).
    """
    if arch.hidden_size <= CHECKED_WIDTH:
        return arch.hidden_size
    free = dataclasses.replace(job, model=Architecture())

    def is_past(width: int) -> bool:
        flops = model_flops_per_token(complete(free, width, arch.vocab_size), job.data.seq_len)
        return compute / flops < tokens_for(compute)

    widths = range(CHECKED_WIDTH, arch.hidden_size, WIDTH_STEP)
    past = bisect_left(widths, True, key=is_past)
    return widths[past] if past < len(widths) else arch.hidden_size


def beta2_for(batch_tokens: float) -> float:
    """AdamW's memory of squared gradients, longer where a step has few tokens (Marek et al. 2025, arXiv
    2507.07101): two seeds of 9e12 FLOPs in steps of 2,048 tokens ended 2% and 3% better with 0.99."""
    return 0.99 if batch_tokens < SMALL_BATCH_TOKENS else 0.95


def shape(width: int, vocab_size: int, seq_len: int) -> dict[str, Any]:
    """The sizes of the default model of a width."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_layers": max(3, round(width / 48)),
        "head_dim": 64 if width % 64 == 0 and width >= MANY_HEADS else 32,
        "intermediate_size": 32 * max(1, round(width * 8 / 3 / 32)),
        "max_seq_len": seq_len,
    }


def longest_sample(job: Job) -> int:
    """Tokens of the longest samples of all phases."""
    return max([job.data.seq_len, *(phase.seq_len for phase in job.data.phases if phase.seq_len)])


def compute_of_length(job: Job, flops_per_token: float) -> float:
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


def dial(
    job: Job,
    compute_of: Callable[[Architecture], float],
    fits: Callable[[Architecture], bool] = lambda _: True,
) -> Plan:
    """The model whose tokens come nearest to the best for its compute; the one that was asked for, if any.

    job: its data derived (see `derive_data`). compute_of: model FLOPs of a run of that model. fits: whether
    it may be chosen.
    """
    tokens = vocabulary(job)
    last: Plan | None = None
    refused: UserError | None = None
    for width in range(WIDTH_STEP, MAX_WIDTH, WIDTH_STEP):
        arch = complete(job, width, tokens)
        try:
            check(arch)
        except UserError as error:  # what was asked for does not go with this width
            refused = error
            continue
        if last is not None and not fits(arch):
            return last
        compute = compute_of(arch)
        plan = Plan(arch, compute, compute / model_flops_per_token(arch, job.data.seq_len))
        if job.model.hidden_size is not None:
            return plan
        if plan.tokens < tokens_for(compute):
            return plan if last is None else min(last, plan, key=_distance)
        last = plan
    if last is None and refused is not None:
        raise refused
    assert last is not None
    return last


def _distance(plan: Plan) -> float:
    """How far the tokens are from the best, in either direction."""
    return abs(math.log(plan.tokens / tokens_for(plan.compute)))


def complete(job: Job, width: int, vocab_size: int) -> Architecture:
    """The model that was asked for, with what is left out of it taken from the default shape of a width."""
    asked = job.model
    sizes = shape(asked.hidden_size or width, vocab_size, longest_sample(job))
    latent = asked.latent  # which says how wide heads are, shares none, and has norms of its own
    own = asked.head_dim if latent is None else asked.head_dim or latent.nope_dim + latent.rope_dim
    head_dim = own or (
        asked.hidden_size // asked.num_heads if asked.hidden_size and asked.num_heads else sizes["head_dim"]
    )
    heads = asked.num_heads or max(1, (asked.hidden_size or width) // head_dim)
    kv_heads = heads // 2 if heads % 2 == 0 and latent is None else heads
    sizes |= {"head_dim": head_dim, "num_heads": heads, "num_kv_heads": kv_heads}
    sizes |= {
        "rope_theta": 10_000.0,
        "norm_eps": 1e-5,
        "tie_embeddings": True,
        "qk_norm": latent is None,
        "initializer_range": 0.02,
    }
    given = asked.model_dump(exclude_none=True, exclude_unset=True)
    if asked.experts is not None and asked.intermediate_size is None:
        given["experts"] = {
            "intermediate_size": expert_size(asked.experts, sizes["intermediate_size"])
        } | given["experts"]
    return Architecture.model_validate(sizes | given)


def expert_size(experts: Experts, intermediate_size: int) -> int:
    """The width of an expert with which a token is multiplied with as much as with an MLP."""
    visits = experts.per_token + experts.num_shared
    return WIDTH_STEP * max(1, round(intermediate_size / visits / WIDTH_STEP))


def vocabulary(job: Job) -> int:
    """Of the model: the tokenizer's, where nothing else was asked for."""
    if job.model.vocab_size is not None:
        return job.model.vocab_size
    if job.data.tokenizer == "bytes":
        return BytesTokenizer.vocab_size
    return VOCABULARY if job.data.tokenizer == "bpe" else load_tokenizer(job.data.tokenizer).vocab_size
