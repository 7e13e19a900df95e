"""What a traced step takes, beside the planner's formulas for the same layout: the work, and its price."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from colossus.dryrun.price import Price, price, problem_of, standing_for
from colossus.dryrun.rank import Traced
from colossus.dryrun.rows import KINDS, Rows, row_at
from colossus.dryrun.work import ONCE, Message, Product, Work
from colossus.hardware.fleets import hardware_of
from colossus.job import Job, load_job
from colossus.layout import SCHEDULES, ZERO_BUBBLE, layout_row
from colossus.perf.ledger import COMMUNICATION
from colossus.planner.choice import refined
from colossus.planner.columns import Layouts
from colossus.planner.estimate import Problem, estimate, groups_of, rank_weights
from colossus.planner.measured import corrections_for
from colossus.planner.muon import muon_bytes, muon_update
from colossus.planner.plan import layouts_of_row
from tests.dryrun.programs import dry
from tests.ranks.cases import Case
from tests.ranks.pool import Pool

H100 = load_job(None, ["fleet.accelerator=h100-sxm", "fleet.count=64"]).fleet
WIDE = {
    "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 32768, "num_heads": 16, "num_kv_heads": 8,
    "head_dim": 128, "num_layers": 4,
}  # fmt: skip
ROUTED = WIDE | {"intermediate_size": 4096, "experts.num_experts": 8, "experts.per_token": 2}
CASES = [
    Case.of(WIDE, dp_shard=2, seq_len=2048, type="bf16"),
    Case.of(WIDE, dp_shard=2, tp=2, seq_len=2048, type="bf16", zero=2),
    Case.of(WIDE, pp=2, dp_replicate=2, seq_len=2048, type="bf16", zero=1),
    Case.of(WIDE, cp=2, dp_shard=2, seq_len=2048, type="bf16"),
    Case.of(WIDE, dp_shard=2, tp=2, recompute="full", seq_len=2048, type="bf16"),
    Case.of(WIDE, cp=2, tp=2, recompute="selective", seq_len=2048, type="bf16"),
    Case.of(ROUTED, preset="mixtral-8x7b", dp_shard=4, ep=4, seq_len=2048, type="bf16"),
]

# Matrices of several buckets, which travel beside the work.
TRAVELLING = [
    Case.of(WIDE, optimizer="muon", seq_len=2048, type="bf16", batch=2, **axes)
    for axes in ({"dp_shard": 2}, {"dp_replicate": 2}, {"dp_replicate": 2, "tp": 2})
]
# Each rank of tp makes the vectors that queries, keys and values come from, of all tokens.
LATENT = {
    "num_kv_heads": 16, "head_dim": 192, "latent.q_rank": 512, "latent.kv_rank": 256, "latent.nope_dim": 128,
    "latent.rope_dim": 64, "latent.v_dim": 128, "experts.num_experts": 8, "experts.per_token": 2,
    "experts.num_groups": 1, "experts.groups_per_token": 1, "experts.intermediate_size": 2048,
}  # fmt: skip
OF_LATENTS = Case.of(WIDE | LATENT, preset="deepseek-v3", tp=2, dp_shard=2, seq_len=2048, type="bf16")
TIED = Case.of(WIDE | {"tie_embeddings": True}, pp=2, dp_shard=2, seq_len=2048, type="bf16", zero=2)


@cache
def on_gpus(case: Case) -> Job:
    return dataclasses.replace(case.job(), fleet=H100.model_copy(update={"device": "cuda"}))


def problem(case: Case) -> Problem:
    hardware = hardware_of(H100)
    return problem_of(on_gpus(case), hardware, corrections_for(hardware))


def ranks_of(case: Case, pool: Pool) -> list[Traced]:
    """One of each stage."""
    layout = case.job().layout
    step = layout.num_ranks // layout.dp_replicate // layout.pp
    return [pool.run(1, dry, on_gpus(case), stage * step)[0] for stage in range(layout.pp)]


def formulas(case: Case, stage: int) -> Iterator[tuple[object, float]]:
    """The planner's rows of a stage of the pipeline, and how often each is there."""
    layout, of = case.job().layout, problem(case)
    made = of.shape(layout.schedule, layout.pp, 1)
    rows, counts = Rows(of, layout, made), dict(zip(made.kinds, made.by_stage[stage], strict=True))
    counts |= {"first": float(stage == 0), "last": float(stage == layout.pp - 1)}
    ledger = rows.formulas
    for i in range(ledger.size[0]):
        row = row_at(ledger, i)
        if counts.get(row.stage):
            yield row, counts[row.stage] * row.repeat


def check_products(case: Case, ranks: list[Traced]) -> None:
    """Every FLOP of every stage. Attention under cp is less than the planner says: a block meets no keys
    beyond its end."""
    layout = case.job().layout
    blocks = (2 * layout.cp + 1) / (4 * layout.cp) if layout.cp > 1 else 1.0  # r and 2 cp - 1 - r, of 2 cp
    for stage, traced in enumerate(ranks):
        found, expected = Counter[str](), Counter[str]()
        for work, times in works(traced).items():
            if isinstance(work, Product):
                kind = "attention" if work.kind == "attention" else "products"
                again = " again" * (work.phase == "recompute")
                found[kind + again] += work.flops * times / traced.num_micro_batches
        for row, times in formulas(case, stage):
            kind = "attention" if row.kind == "fused_attention" else "products"
            expected[kind + " again" * (row.phase == "recompute")] += row.executed * times
        expected["attention"] *= blocks
        assert found == pytest.approx(+expected, rel=1e-9)


def works(traced: Traced) -> Counter[Work]:
    """All that it does in a step."""
    found = Counter[Work]()
    for done in traced.passes.values():
        found.update(done)
    return found


def check_messages_of_layers(case: Case, ranks: list[Traced]) -> None:
    """Every byte, by axis and operation, also of what selective recomputation gathers again; beside these it
    has sums of some numbers for norms and losses, and counts of tokens for experts."""
    layout, of = case.job().layout, problem(case)
    rows = Rows(of, layout, of.shape(layout.schedule, layout.pp, 1))
    for stage, traced in enumerate(ranks):
        found, expected = Counter[str](), Counter[str]()
        for work, times in works(traced).items():
            if isinstance(work, Message) and not work.apart:
                row = rows.message(work, times)
                found[f"{row.phase} {row.name} {row.kind}"] += row.sent * times / traced.num_micro_batches
        for row, times in formulas(case, stage):
            if row.kind in COMMUNICATION:
                expected[f"{row.phase} {row.group} {row.kind}"] += row.sent * times
        small = sum(found.pop(f"{phase} tp all_reduce", 0.0) for phase in ("forward", "backward"))
        assert small < 3e-4 * sum(found.values()) or not found
        assert found == pytest.approx(+expected, rel=1e-5)


def check_messages_of_weights(case: Case, ranks: list[Traced]) -> None:
    """FSDP gathers a stage's weights once a step, of ZeRO's third level once more in each pass, and sums
    their gradients once, above the first level in each micro batch."""
    layout, of = case.job().layout, problem(case)
    made = of.shape(layout.schedule, layout.pp, 1)
    rows = Rows(of, layout, made)
    for stage, traced in enumerate(ranks):
        found = Counter[str]()
        for work, times in works(traced).items():
            if isinstance(work, Message) and work.apart and work.group in ("fsdp", "efsdp") and work.size > 1:
                found[KINDS.get(work.operation.strip("_"), "")] += work.num_bytes * times
        if layout.dp_shard * layout.cp == 1:
            assert not +found
            continue
        dense, routed = (float(weights[0]) for weights in rank_weights(of.arch, rows.layouts, made, stage))
        edges = 2 * 32768 * 2048 / layout.tp  # gathered once a micro batch: the head's backward pass follows
        weights, many = dense + (routed if layout.ep < 4 else 0.0), traced.num_micro_batches
        gathers = many * (2 * weights - edges) if layout.zero == 3 else weights
        sums = many if layout.zero >= 2 else 1
        assert found["all_gather"] == pytest.approx(2 * gathers, rel=1e-3)
        assert found["reduce_scatter"] == pytest.approx(4 * weights * sums, rel=1e-3)


@pytest.mark.parametrize(
    ("case", "low", "high"),
    [
        *((case, 0.98, 1.03) for case in CASES[:5]),
        (CASES[5], 0.98, 1.07),  # small sums over tp, for losses, and the host
        *((case, 0.98, 1.03) for case in (CASES[6], TIED)),
    ],
    ids=str,
)
def test_work_and_price_are_the_planners(case: Case, low: float, high: float, pool: Pool) -> None:
    """Every product, every message, and the step: of one trace of each stage."""
    ranks = ranks_of(case, pool)
    if case is not TIED:
        check_products(case, ranks)
        check_messages_of_layers(case, ranks)
        check_messages_of_weights(case, ranks)
    check_price(case, ranks, low, high)


def check_price(case: Case, ranks: list[Traced], low: float, high: float) -> None:
    found = priced(case, ranks)
    layout = case.job().layout
    row = {**layout_row(layout), "recompute": layout.recompute, "recompute_layers": None}
    planned = refined(problem(case), layouts_of_row(row), compiled=False)
    assert low <= found.seconds / planned.seconds <= high
    assert found.mfu == pytest.approx(planned.mfu * planned.seconds / found.seconds)
    pool_priced = found.slowest
    for rank in range(layout.pp):
        causes = pool_priced.causes(rank)
        assert sum(causes.values()) == pytest.approx(found.seconds)
        for cause, seconds in pool_priced.messages(rank).items():
            assert causes.get(cause, 0.0) <= seconds * 1.001


def priced(case: Case, ranks: list[Traced], load: float = 1.0) -> Price:
    hardware = hardware_of(H100)
    return price(on_gpus(case), hardware, corrections_for(hardware), [(hardware.accelerator, ranks)], load)


def test_products_of_latents_are_the_planners(pool: Pool) -> None:
    check_products(OF_LATENTS, ranks_of(OF_LATENTS, pool))


NEAR = WIDE | {"num_layers": 2, "vocab_size": 4096, "intermediate_size": 4096}
GEMMA = {"window": 300, "full_attention_every": 2, "attention_soft_cap": 50.0, "qk_norm": True}
OSS = {"window": 128, "experts.num_experts": 4, "experts.per_token": 2}
FEW: dict[str, Any] = {"dp_shard": 2, "batch": 2, "type": "bf16"}
WINDOWS = [
    Case.of(NEAR | {"window": 512}, preset="mistral-7b-v0.1", seq_len=4096, **FEW),
    Case.of(NEAR | GEMMA, seq_len=2048, recompute="full", **FEW),
    Case.of(NEAR | OSS, preset="gpt-oss-20b", seq_len=2048, **FEW),
    Case.of(NEAR | {"window": 128}, preset="mistral-7b-v0.1", seq_len=1024, **FEW),  # a mask of all pairs
]


@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_what_a_window_touches_is_priced_in_both(case: Case, pool: Pool) -> None:
    """Every FLOP that kernels are asked for, those that take time in each pass, and the step."""
    ranks = ranks_of(case, pool)
    check_products(case, ranks)
    of, layout, found = problem(case), case.job().layout, Counter[str]()
    rows = Rows(of, layout, of.shape(layout.schedule, layout.pp, 1))
    for row in rows.traced({w: times for w, times in works(ranks[0]).items() if isinstance(w, Product)}):
        if row.kind == "fused_attention":
            found[row.phase] += row.m * row.n * row.k * row.count * row.repeat / ranks[0].num_micro_batches
    expected = Counter[str]()
    for row, times in formulas(case, 0):
        if row.kind == "fused_attention":
            expected[row.phase] += row.m * row.n * row.k * row.count * times
    assert found == pytest.approx(+expected, rel=1e-9)
    check_price(case, ranks, 0.98, 1.03)


def test_ranks_of_a_context_meet_as_many_keys_as_one_alone(pool: Pool) -> None:
    """Where masks are by blocks: with sinks, in layers with and without a window."""
    case = WINDOWS[2]
    met = []
    for layout in ((("dp_shard", 2),), (("cp", 2),)):
        (traced,) = ranks_of(dataclasses.replace(case, layout=layout), pool)
        met.append({work.met for work in works(traced) if getattr(work, "kind", "") == "attention"})
    assert met[0] == met[1] and len(met[0]) == 2


def test_a_few_micro_batches_stand_for_many() -> None:
    """The first, the last, and between them each like the one before."""
    for many in (3, 4, 9):
        stands = [list(standing_for(index, 3, many)) for index in range(3)]
        assert [index for stood in stands for index in stood] == list(range(many))
        assert stands[0] == [0] and stands[2] == [many - 1]
    assert [list(standing_for(index, 1, 1)) for index in range(1)] == [[0]]


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name in ZERO_BUBBLE])
def test_what_takes_a_backward_pass_in_two_is_priced(schedule: str, pool: Pool) -> None:
    """Its first stage, which gives no gradient to anyone, has nothing to do in the first half."""
    case = Case.of(
        {"num_layers": 4}, pp=2, schedule=schedule, stages_per_rank=2, batch=6, seq_len=64, type="bf16"
    )
    ranks = ranks_of(case, pool)
    found = price(on_gpus(case), hardware_of(H100), None, [(hardware_of(H100).accelerator, ranks)])
    (pool_of,) = found.pools
    halves = [action for action in pool_of.spent if action.work == "I"]
    assert halves and all((pool_of.spent[action].seconds > 0) is (action.stage > 0) for action in halves)
    assert found.seconds > 0


@pytest.mark.parametrize("case", TRAVELLING, ids=str)
def test_muons_update_is_the_planners(case: Case, pool: Pool) -> None:
    """Seconds of its products and of those messages that no work hides; the bytes of its buckets."""
    (traced,) = ranks_of(case, pool)
    (once,) = priced(case, [traced]).slowest.once
    of, layouts = problem(case), Layouts.of_layout(case.job().layout)
    made = of.shape("1f1b", 1, 1)
    groups = groups_of(of, layouts)
    planned = muon_update(of.arch, layouts, made, of.pricer, "bf16", groups)
    assert once.seconds == pytest.approx(float(estimate(of, layouts).parts["update"][0]), rel=0.04)
    travels = {cause: seconds for cause, seconds in once.messages.items() if "all to all" in cause}
    assert sum(travels.values()) == pytest.approx(float(planned.messages[0]), rel=0.05)
    shown = sum(once.causes[cause] for cause in travels)
    assert 0 < shown == pytest.approx(float(planned.shown[0]), rel=0.2) and shown < 0.3 * sum(
        travels.values()
    )
    at_rest = traced.at_rest["weights"] + traced.at_rest["optimizer"]
    buckets = traced.lived[ONCE][0] - at_rest - traced.at_rest["weights"]  # and gradients
    # Formulas take all buckets for the largest.
    assert 0.98 <= float(muon_bytes(of.arch, layouts, made, "bf16", groups)[0, 0]) / buckets <= 1.4
