"""The layouts that are compared with one rank, by what they show. Tests take most of them."""

from __future__ import annotations

import random
from typing import Any

from colossus.layout import ONE_STAGE, SCHEDULES, ZERO_BUBBLE, violations
from tests.ranks.cases import Case

EXPERTS: dict[str, Any] = {"preset": "mixtral-8x7b"}
OF_MANY: dict[str, Any] = {"preset": "deepseek-v3"}  # latent attention, groups of experts, one that all visit
ALL_HEADS = {"num_kv_heads": 4}
V: dict[str, Any] = {"pp": 2, "stages_per_rank": 2}
BY_SEQUENCE = {"experts.balance_over": "sequence", "experts.z_loss": 1e-2}
BY_BIAS = {"experts.selection_bias": True, "experts.balance_loss": 0.0, "experts.z_loss": 1e-2}

ALONE = [
    Case.of(dp_replicate=2),
    Case.of(dp_shard=2),
    Case.of(dp_shard=4),
    Case.of(tp=2),
    Case.of(ALL_HEADS, tp=4),
    Case.of(pp=2),
    Case.of(pp=4),
    Case.of(cp=2),
    Case.of(cp=4),
    Case.of(cp=2, cp_method="ulysses"),
    Case.of(ALL_HEADS, cp=4, cp_method="ulysses"),
    Case.of(dp_replicate=2, **EXPERTS),
    Case.of(dp_shard=2, **EXPERTS),
    Case.of(tp=2, **EXPERTS),
    Case.of(pp=2, **EXPERTS),
    Case.of(cp=2, **EXPERTS),
    Case.of(dp_shard=2, ep=2, **EXPERTS),
    Case.of(dp_shard=4, ep=4, **EXPERTS),
    Case.of(dp_shard=4, ep=2, **EXPERTS),
    Case.of(cp=2, ep=2, **EXPERTS),
    Case.of(tp=2, ep=2, **EXPERTS),
    Case.of(tp=2, etp=2, **EXPERTS),
]

PAIRS = [
    Case.of(dp_replicate=2, dp_shard=2),
    Case.of(dp_replicate=2, tp=2),
    Case.of(dp_replicate=2, pp=2),
    Case.of(dp_replicate=2, cp=2),
    Case.of(dp_shard=2, tp=2),
    Case.of(dp_shard=2, pp=2),
    Case.of(dp_shard=2, cp=2),
    Case.of(tp=2, pp=2),
    Case.of(tp=2, cp=2),
    Case.of(ALL_HEADS, tp=2, cp=2, cp_method="ulysses"),
    Case.of(pp=2, cp=2),
    Case.of(dp_replicate=2, dp_shard=2, ep=2, **EXPERTS),
    Case.of(dp_replicate=2, tp=2, ep=2, **EXPERTS),
    Case.of(dp_shard=2, tp=2, ep=2, **EXPERTS),
    Case.of(dp_shard=2, tp=2, ep=4, **EXPERTS),
    Case.of(dp_shard=2, tp=2, ep=2, etp=2, **EXPERTS),
    Case.of(dp_shard=2, tp=2, etp=2, **EXPERTS),
    Case.of(dp_shard=2, pp=2, ep=2, **OF_MANY),
    Case.of(dp_shard=2, cp=2, ep=4, **OF_MANY),
    Case.of(dp_shard=2, cp=2, ep=2, **EXPERTS),
    Case.of(tp=2, pp=2, ep=2, **OF_MANY),
    Case.of(pp=2, cp=2, ep=2, **EXPERTS),
    Case.of(tp=2, cp=2, ep=2, cp_method="ulysses", **OF_MANY),
    Case.of(tp=2, cp=2, preset="deepseek-v3, straight queries"),
]  # fmt: skip


def _stages(schedule: str) -> int:
    return 1 if schedule in ONE_STAGE else 2


PIPELINES = [
    Case.of(changed, pp=2, schedule=schedule, stages_per_rank=_stages(schedule), **preset)
    for schedule in SCHEDULES
    for changed, preset in (({"tie_embeddings": False}, {}), ({"tie_embeddings": True}, {}), ({}, OF_MANY))
]
PIPELINES_AMONG_OTHERS = [
    Case.of(pp=2, dp_shard=2, tp=2, schedule=schedule, stages_per_rank=_stages(schedule), **more)
    for schedule in SCHEDULES
    for more in ({}, {"ep": 4} | EXPERTS)
]

MANY = [
    Case.of(dp_shard=2, tp=2, pp=2),
    Case.of(dp_shard=2, cp=2, tp=2),
    Case.of(dp_replicate=2, dp_shard=2, tp=2),
    Case.of(pp=2, cp=2, tp=2),
    Case.of(dp_replicate=2, dp_shard=2, pp=2, ep=2, **EXPERTS),
    Case.of(dp_replicate=2, cp=2, tp=2, ep=4, **OF_MANY),
    Case.of(dp_shard=2, cp=2, tp=2, ep=8, **EXPERTS),
    Case.of(dp_shard=2, pp=2, cp=2, ep=4, **OF_MANY),
]
FIVE_AXES = Case.of(dp_shard=2, pp=2, cp=2, tp=2, ep=4, packed=True, **OF_MANY)
LARGE = [
    FIVE_AXES,
    Case.of(dp_shard=2, cp=2, tp=2, **V, schedule="zbv_zero_bubble", ep=8, **OF_MANY),
    Case.of(dp_replicate=2, dp_shard=2, pp=2, cp=2, tp=2, ep=4, optimizer="muon", **EXPERTS),
]

FAMILIES = [
    Case.of(tp=2, pp=2, preset="gpt2-124m", packed=True),
    Case.of(cp=2, tp=2, preset="mistral-7b-v0.1", packed=True),
    Case.of(cp=2, tp=2, preset="qwen3-8b"),
    Case.of(cp=2, tp=2, preset="olmo2-7b", packed=True),
    Case.of(dp_shard=2, tp=2, ep=2, preset="qwen3-30b-a3b"),
    Case.of(tp=2, cp=2, ep=4, preset="gpt-oss-20b", packed=True),
    Case.of(tp=2, etp=2, dp_shard=2, ep=2, preset="gpt-oss-20b"),
    Case.of(tp=2, cp=2, ep=2, preset="kimi-k2", packed=True),
    Case.of(tp=2, dp_shard=2, ep=4, preset="glm-4.5"),
    Case.of(tp=2, cp=2, ep=2, preset="grok-1"),
    Case.of(dp_shard=2, cp=2, ep=4, preset="grok-2"),
]

OPTIONS = [
    # Where the batch does not divide, and where a rank takes its share in parts.
    Case.of(dp_shard=3),
    Case.of(dp_shard=3, batch=4, micro_batch=2),
    Case.of(dp_shard=2, pp=2, batch=5),
    Case.of(dp_shard=2, ep=2, batch=3, micro_batch=2, **EXPERTS),
    Case.of({"experts.num_experts": 9}, dp_shard=3, ep=3, **EXPERTS),
    Case.of(dp_shard=2, micro_batch=4),
    Case.of(dp_shard=2, ep=2, micro_batch=2, **EXPERTS),
    Case.of(pp=2, micro_batch=2, **EXPERTS),
    # What is whole through a step.
    Case.of(dp_shard=2, zero=1),
    Case.of(dp_shard=2, zero=2),
    Case.of(dp_replicate=2, dp_shard=2, zero=1),
    Case.of(dp_replicate=2, dp_shard=2, zero=2),
    Case.of(dp_shard=2, tp=2, ep=4, zero=2, **EXPERTS),
    Case.of(dp_shard=2, pp=2, zero=1),
    Case.of(dp_shard=2, pp=2, zero=3, recompute="full"),
    Case.of(dp_shard=2, **V, schedule="interleaved_1f1b", zero=3, **EXPERTS),
    Case.of(dp_replicate=2, dp_shard=2, pp=2, zero=2),
    Case.of(dp_replicate=2, **V, schedule="dualpipe_v"),
    Case.of(dp_shard=2, **V, schedule="zbv_zero_bubble", **EXPERTS),
    # Documents that end within samples.
    Case.of(dp_shard=2, packed=True),
    Case.of(tp=2, packed=True, micro_batch=4),
    Case.of(pp=2, packed=True, micro_batch=2),
    Case.of(dp_shard=2, ep=2, packed=True, **EXPERTS),
    # What is computed once more.
    Case.of(dp_shard=2, recompute="full"),
    Case.of(tp=2, recompute="selective"),
    Case.of(tp=2, recompute="full", recompute_layers=2),
    Case.of(cp=2, recompute="full"),
    Case.of(pp=2, recompute="selective", packed=True),
    Case.of(dp_shard=2, ep=2, recompute="full", **EXPERTS),
    Case.of(dp_shard=2, tp=2, ep=4, recompute="selective", **OF_MANY),
    Case.of(dp_shard=2, pp=2, ep=2, recompute="full", micro_batch=2, **OF_MANY),
    # What keeps the loads of experts alike, where ranks share the tokens of a sequence.
    Case.of(BY_SEQUENCE, cp=2, **EXPERTS),
    Case.of(BY_SEQUENCE, tp=2, **EXPERTS),
    Case.of(BY_SEQUENCE, tp=2, cp=2, ep=2, packed=True, **EXPERTS),
    Case.of(BY_SEQUENCE, pp=2, micro_batch=2, **EXPERTS),
    Case.of(BY_SEQUENCE, dp_shard=2, ep=2, recompute="full", **EXPERTS),
    Case.of(BY_BIAS, dp_shard=2, tp=2, ep=2, **EXPERTS),
    # Matrices made orthogonal.
    Case.of(dp_shard=2, optimizer="muon"),
    Case.of(tp=2, optimizer="muon"),
    Case.of(pp=2, dp_replicate=2, optimizer="muon"),
    Case.of(dp_shard=2, tp=2, ep=2, optimizer="muon", **EXPERTS),
    Case.of(dp_shard=2, tp=2, ep=2, etp=2, optimizer="muon", **EXPERTS),
]

IN_FP32 = [
    Case.of(dp_shard=2, type="fp32", steps=5),
    Case.of(tp=2, cp=2, type="fp32", steps=5, packed=True),
    Case.of(pp=2, dp_shard=2, type="fp32", steps=5),
    Case.of(dp_shard=2, tp=2, ep=2, type="fp32", steps=5, **EXPERTS),
]
# As wide as in the runs in which the noise of bf16 was measured; wider ones make first steps chaotic.
SMALL_VALUES: dict[str, Any] = {"initializer_range": 0.05}
IN_BF16 = [
    Case.of(SMALL_VALUES, dp_shard=2, type="bf16", steps=5),
    Case.of(SMALL_VALUES, tp=2, type="bf16", steps=5),
    Case.of(SMALL_VALUES, pp=2, cp=2, type="bf16", steps=5, packed=True),
    Case.of(SMALL_VALUES, dp_shard=2, ep=2, type="bf16", steps=5, **EXPERTS),
    Case.of(SMALL_VALUES, tp=2, ep=2, cp=2, type="bf16", steps=5, **EXPERTS),
]
COMPILED = [
    Case.of(dp_shard=2, tp=2, compile=True),
    Case.of(dp_shard=2, ep=2, compile=True, **EXPERTS),
    Case.of(pp=2, cp=2, compile=True, recompute="selective"),
]

ATTENTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (ALL_HEADS, {}),
    "grouped queries": ({}, {}),
    "latent": ({}, {"preset": "deepseek-v3"}),
    "sinks": ({"attention_sinks": True}, {}),
    "window": ({"window": 5}, {}),
    "soft cap": ({"attention_soft_cap": 5.0}, {}),
}
CONTEXTS = {
    f"{attention}, {method}{', packed' if packed else ''}": Case.of(
        changed, cp=2, cp_method=method, packed=packed, **preset
    )
    for attention, (changed, preset) in ATTENTIONS.items()
    for method in ("gather", "ulysses")
    for packed in (False, True)
}

SECTIONS: dict[str, list[Case]] = {
    "axes alone": ALONE,
    "pairs of axes": PAIRS,
    "schedules": PIPELINES,
    "schedules among other axes": PIPELINES_AMONG_OTHERS,
    "three and more axes": [*MANY, *LARGE],
    "families": FAMILIES,
    "options": OPTIONS,
    "context parallel by attention": list(CONTEXTS.values()),
    "compiled": COMPILED,
    "fp32": IN_FP32,
    "bf16": IN_BF16,
}


def random_case(seed: int, most_ranks: int = 8) -> Case:
    """A legal layout of at most so many ranks, of a model whose sizes have several divisors."""
    draw = random.Random(seed)
    while True:
        case = _drawn(draw)
        job = case.job()
        legal = not violations(job.layout, case.arch, global_batch=case.batch, seq_len=case.seq_len)
        if legal and 1 < job.layout.num_ranks <= most_ranks:
            return case


def _drawn(draw: random.Random) -> Case:
    one = draw.choice
    layout: dict[str, Any] = {
        axis: one((2, 2, 3, 4)) if draw.random() < 0.6 else 1
        for axis in ("dp_replicate", "dp_shard", "pp", "cp", "tp")
    }
    schedule = one(SCHEDULES) if layout["pp"] > 1 else "1f1b"
    has_experts = draw.random() < 0.6
    changed: dict[str, Any] = {
        "num_heads": 12,
        "num_kv_heads": one((6, 12)),
        "head_dim": 4,
        "vocab_size": 60,
        "tie_embeddings": draw.random() < 0.5,
        "attention_sinks": draw.random() < 0.2,
        "window": one((None, None, 5)),
    }
    if has_experts:
        changed |= {
            "experts.num_experts": 12,
            "experts.balance_over": one(("batch", "sequence")),
            "experts.num_shared": one((0, 1)),
            "experts.dense_layers": one((0, 1)),
        }
    apart = layout["pp"] > 1 and schedule in ZERO_BUBBLE
    layout |= {
        "ep": one((1, 2, 2, 3, 4, 6)) if has_experts else 1,
        "etp": one((1, layout["tp"])),
        "schedule": schedule,
        "stages_per_rank": 1 if schedule in ONE_STAGE else 2,
        "cp_method": one(("gather", "ulysses")),
        "micro_batch": one((1, 1, 2)),
        "recompute": one(("none",) if apart else ("none", "none", "selective", "full")),
        "zero": one((1,) if apart else (1, 2, 3)),
    }
    return Case.of(
        changed,
        preset="mixtral-8x7b" if has_experts else "llama3.1-8b",
        optimizer=one(("adamw", "adamw", "muon")),
        batch=one((6, 8, 12)),
        seq_len=one((12, 24)),
        packed=draw.random() < 0.5,
        steps=2,
        **layout,
    )


def axes_above_one(case: Case) -> list[str]:
    """Of a layout, `ep` too."""
    names = ("dp_replicate", "dp_shard", "pp", "cp", "tp", "ep")
    return [name for name in names if dict(case.layout).get(name, 1) > 1]
