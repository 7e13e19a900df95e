"""The search: on a small fleet what trying everything gives; what is legal and fits; pools end together."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from colossus.hardware.catalogue import accelerator
from colossus.hardware.fleets import Pool
from colossus.layout import (
    ONE_STAGE,
    RECOMPUTES,
    RULES,
    SCHEDULES,
    ZERO_BUBBLE,
    Layout,
    model_row,
    violations,
)
from colossus.planner.choice import exact_pipeline
from colossus.planner.columns import Layouts
from colossus.planner.estimate import estimate
from colossus.planner.memory import memory
from colossus.planner.pools import _shares, _Way
from colossus.planner.search import Limits, NothingFits, refined, search, smallest_fleet
from colossus.planner.space import MOST_MICRO_BATCH, layouts_of
from tests.perf.tiny import tiny
from tests.planner.problems import hardware, problem


def everything(made, compiled):
    """Every legal layout on up to all accelerators, one by one."""
    count, arch = made.pricer.hardware.count, made.arch
    sizes = range(1, count + 1)
    rows = []
    for tp, cp, pp, replicate, shard in product(sizes, repeat=5):
        if tp * cp * pp * replicate * shard > count:
            continue
        for schedule, chunks, micro in product(SCHEDULES, range(1, 17), range(1, MOST_MICRO_BATCH + 1)):
            if (
                (schedule in ZERO_BUBBLE) == compiled
                or schedule == "gpipe"
                or (pp == 1 and schedule != "1f1b")
            ):
                continue
            row = {"tp": tp, "cp": cp, "pp": pp, "dp_replicate": replicate, "dp_shard": shard, "ep": 1,
                   "etp": 1, "schedule": schedule, "stages_per_rank": chunks, "micro_batch": micro,
                   "cp_method": "gather", "compile": int(compiled), "async_tp": 0}  # fmt: skip
            asked = row | model_row(arch)
            asked |= {"global_batch": made.global_batch, "seq_len": made.seq_len, "node_size": 8,
                      "has_symmetric_memory": 0}  # fmt: skip
            for again, zero in product((0, 1, 2), (1, 2, 3)):
                asked |= {"recompute": again, "zero": zero}
                if all(rule.holds(asked) for rule in RULES):
                    rows.append(row | {"recompute": float(again), "zero": float(zero)})
    return Layouts.of(rows)


@pytest.mark.parametrize("count", [3, 4])
def test_on_a_small_fleet_the_search_is_exhaustive(count):
    made = problem("llama3.2-1b", count=count, seq_len=2048, batch=16)
    made = replace(made, arch=tiny("llama3.1-8b", num_layers=4, num_kv_heads=4, max_seq_len=4096))
    found = search(made, Limits({}))
    best = []
    for compiled in (True, False):
        mine = made.as_ours(compiled)
        layouts = everything(mine, compiled)
        if len(layouts):
            seconds = estimate(mine, layouts).seconds
            for i in np.argsort(seconds, kind="stable")[:48]:
                one = layouts.take(np.array([i]))
                if memory(mine, one).fits(mine.pricer.hardware.accelerator)[0]:
                    best.append(refined(mine, one, compiled).seconds)
    assert found.choices[0].seconds == pytest.approx(min(best), rel=1e-9)


def test_the_search_offers_only_what_the_trainer_calls_legal_and_what_fits():
    made = problem("llama3.1-8b", count=16, batch=64)
    for choice in search(made, Limits({})).choices:
        fields = {k: v for k, v in choice.row.items() if k in Layout.model_fields}
        assert not violations(Layout(**fields), made.arch, global_batch=64, seq_len=made.seq_len, node_size=8)
        assert choice.reserved <= accelerator("h100-sxm").memory
        assert choice.ranks <= 16
        assert sum(choice.parts.values()) == pytest.approx(choice.seconds)


def test_columns_and_rows_agree_on_what_is_legal():
    made = problem("mixtral-8x7b", count=32, batch=48)
    space = layouts_of(made, 32, Limits({}), compiled=True)
    rng = np.random.default_rng(0)
    for i in rng.integers(0, len(space), 60):
        row = space.row(int(i)) | model_row(made.arch)
        row |= {"global_batch": 48, "seq_len": made.seq_len, "node_size": 8, "has_symmetric_memory": 0}
        row |= {"recompute": RECOMPUTES.index(row["recompute"])}
        assert all(rule.holds(row) for rule in RULES)


def test_what_the_user_fixes_holds():
    made = problem("llama3.1-8b", count=16, batch=64)
    for choice in search(made, Limits({"tp": 2, "pp": 2, "micro_batch": 1})).choices:
        assert (choice.row["tp"], choice.row["pp"], choice.row["micro_batch"]) == (2, 2, 1)


def test_a_model_that_fits_nowhere_names_the_smallest_fleet():
    with pytest.raises(NothingFits, match=r"fleet.count=8: .* memory binds: (\d+) of them"):
        search(problem("llama3.1-70b", count=8, batch=64), Limits({}))


def test_seven_accelerators_are_a_fleet_too():
    choice = search(problem("llama3.2-1b", count=7, batch=32), Limits({})).choices[0]
    assert choice.ranks in (6, 7)


def test_replicas_of_unequal_pools_share_a_batch_so_that_the_last_ends_as_early_as_can_be():
    """Against every way to feed up to 3 replicas of 1 sequence a second and 2 of 2.4, four at once."""
    ways = [
        _Way(problem(), Layouts.of([{}]), 3, 1.0),
        _Way(problem(), Layouts.of([{"micro_batch": 4}]), 2, 2.4),
    ]
    for batch in (8, 23, 60, 97):
        (replicas, shares), *_ = _shares(ways, batch, None)
        assert np.dot(replicas, shares) == batch
        best = min(
            max(slow / 1.0, -(-quick // 4) * 4 / 2.4)
            for m, n, slow, quick in product(range(1, 4), range(1, 3), range(1, batch), range(1, batch))
            if m * slow + n * quick == batch
        )
        assert max(way.seconds(n) for way, n in zip(ways, shares, strict=True)) == pytest.approx(best)


def test_the_smallest_fleet_holds_the_model_and_one_fewer_does_not():
    """9.6B parameters take 16 bytes each, which 2 of 79 GiB would hold, and 22B 5; but what lies outside
    layers (1.05B) is gathered, and its gradients are on their way: by dry runs it takes 3 and 6."""
    made = problem("llama3.1-8b", seq_len=128, batch=8)
    for layers, fewest in ((39, 3), (96, 6)):
        deep = replace(made, arch=made.arch.model_copy(update={"num_layers": layers}))
        assert smallest_fleet(deep) == fewest


def test_pools_take_sequences_by_their_speed_and_end_together():
    made = problem("llama3.1-8b", batch=512)
    pools = (Pool(accelerator("h100-sxm"), 48), Pool(accelerator("h200-sxm"), 16))
    mixed = replace(made, pricer=replace(made.pricer, hardware=replace(hardware(64), pools=pools)))
    best = search(mixed, Limits({})).choices[0]
    first, second = best.pools
    assert first.accelerator == "h100-sxm" and second.accelerator == "h200-sxm"
    assert first.replicas + second.replicas == best.row["dp_replicate"]
    assert best.seconds == max(pool.seconds for pool in best.pools)
    assert all(pool.reserved <= pool.capacity for pool in best.pools)
    done = sum(pool.replicas * pool.share for pool in best.pools)
    assert done == pytest.approx(512, rel=0.05)


def test_the_exact_timeline_is_the_closed_form_where_stages_are_equal():
    made = problem("llama3.1-8b", count=16, batch=64)
    wide = replace(made, arch=made.arch.model_copy(update={"vocab_size": 256}))  # light ends
    for schedule, chunks in (("1f1b", 1), ("interleaved_1f1b", 2)):
        one = Layouts.of([{"pp": 4, "dp_shard": 4, "schedule": schedule, "stages_per_rank": chunks}])
        closed = estimate(wide, one)
        exact = exact_pipeline(wide, one.row(0), closed, 0)
        assert exact == pytest.approx(
            float(sum(closed.parts[name][0] for name in closed.parts if name in
                      ("products", "attention", "memory-bound", "recomputation", "bubble",
                       "pipeline messages", "tensor, context and expert messages"))), rel=0.03,
        )  # fmt: skip
    assert set(ONE_STAGE) == {"gpipe", "1f1b"}


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "interleaved_zero_bubble"])
@pytest.mark.parametrize("batch", [2, 4, 8, 32])
def test_the_closed_bubble_is_the_timelines_also_with_few_micro_batches(schedule, batch):
    made = problem("llama3.1-8b", count=4, batch=batch)
    light = replace(made, arch=made.arch.model_copy(update={"vocab_size": 256}))
    chunks = 1 if schedule == "1f1b" else 4
    one = Layouts.of([{"pp": 4, "schedule": schedule, "stages_per_rank": chunks}])
    closed = estimate(light, one)
    names = ("products", "attention", "memory-bound", "recomputation", "bubble", "pipeline messages",
             "tensor, context and expert messages")  # fmt: skip
    assert exact_pipeline(light, one.row(0), closed, 0) == pytest.approx(
        float(sum(closed.parts[name][0] for name in names)), rel=0.06 if batch > 2 else 0.12
    )
