"""The space of a search is what the one table of rules allows, for any length, axis and user's choice."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from colossus.errors import UserError
from colossus.layout import RULES, SCHEDULES, model_row
from colossus.planner.columns import Layouts, unique_columns
from colossus.planner.search import Limits, NothingFits, search
from colossus.planner.space import MOST_MICRO_BATCH, MOST_STAGES, layouts_of
from tests.perf.tiny import tiny
from tests.planner.problems import problem

NAMES = ("tp", "cp", "pp", "dp_replicate", "dp_shard", "ep", "etp", "schedule", "stages_per_rank",
         "micro_batch", "zero")  # fmt: skip


def small(count: int, seq_len: int, batch: int, preset: str = "llama3.1-8b", **changed: object):
    made = problem("llama3.2-1b", count=count, seq_len=seq_len, batch=batch)
    return replace(made, arch=tiny(preset, num_layers=4, num_kv_heads=4, vocab_size=64, **changed))


def by_hand(made, compiled: bool = True) -> set[tuple[object, ...]]:
    """Every combination that the table calls legal, asked one by one."""
    count, found = made.pricer.hardware.count, set()
    facts = model_row(made.arch) | {
        "global_batch": made.global_batch, "seq_len": made.seq_len, "node_size": 8, "has_symmetric_memory": 0,
        "async_tp": 0, "compile": int(compiled), "cp_method": "gather", "recompute": 0,
    }  # fmt: skip
    experts = made.arch.experts is not None
    sizes = range(1, count + 1)
    for tp, cp, pp, replicate, shard in product(sizes, repeat=5):
        if tp * cp * pp * replicate * shard > count:
            continue
        schedules = ["1f1b"] if pp == 1 else [s for s in SCHEDULES if s != "gpipe"]
        eps, etps = (range(1, 9), sizes) if experts else ([1], [1])
        several = [1, 2, 3] if shard * cp > 1 else [1]
        for row in product(eps, etps, schedules, range(1, MOST_STAGES + 1), range(1, MOST_MICRO_BATCH + 1),
                           several):  # fmt: skip
            values = (tp, cp, pp, replicate, shard, *row)
            asked = facts | dict(zip(NAMES, values, strict=True))
            if all(rule.holds(asked) for rule in RULES):
                found.add(values)
    return found


def rows(space: Layouts) -> set[tuple[object, ...]]:
    return set(zip(*(space[name].tolist() for name in NAMES), strict=True))


@pytest.mark.parametrize(
    ("count", "seq_len", "batch", "preset"),
    [
        (3, 8191, 6, "llama3.1-8b"),
        (4, 1, 4, "llama3.1-8b"),
        (4, 4096 + 6, 7, "llama3.1-8b"),
        (6, 3 * 512, 4, "llama3.1-8b"),
        (5, 50, 5, "llama3.1-8b"),
        (4, 66, 4, "mixtral-8x7b"),
    ],
)
def test_on_a_small_fleet_the_space_is_all_that_the_table_allows(count, seq_len, batch, preset):
    made = small(count, seq_len, batch, preset)
    space = layouts_of(made, count, Limits({}), compiled=True)
    found = rows(space)
    assert len(found) == len(space), "a layout is there twice"
    assert found == by_hand(made)


@pytest.mark.parametrize("seq_len", [1, 127, 8191, 4095])
def test_every_odd_length_has_layouts(seq_len):
    best = search(small(8, seq_len, 16), Limits({}, whole=True)).choices[0]
    assert best.ranks == 8 and (best.row["tp"], best.row["cp"]) == (1, 1)


@pytest.mark.parametrize(("cp", "seq_len"), [(3, 6 * 512), (5, 10 * 300), (6, 12 * 100), (7, 14 * 9)])
def test_ranks_of_context_are_whatever_divides_a_sequence(cp, seq_len):
    made = small(4 * cp, seq_len, 4)
    assert cp in layouts_of(made, 4 * cp, Limits({}), compiled=True)["cp"]
    assert search(made, Limits({"cp": cp})).choices[0].row["cp"] == cp
    large = problem("llama3.1-8b", count=4096 * cp, seq_len=seq_len * 64, batch=2048)
    assert cp in layouts_of(large, 4096 * cp, Limits({}), compiled=True)["cp"]


@pytest.mark.parametrize(
    ("fixed", "said"),
    [
        ({"tp": 3}, "layout.tp=3: must divide the 4 attention heads; 2"),
        ({"schedule": "zbv_zero_bubble", "pp": 2, "compile": True}, "schedule=zbv_zero_bubble: compiled"),
        ({"ep": 2}, "layout.ep=2: the model has no experts; 1"),
        ({"cp": 4}, "layout.cp=4: the 4095 tokens of a sequence are cut into 2 x cp equal parts; 1"),
        ({"tp": 2}, "layout.tp=2: tp x cp must divide the 4095 tokens of a sequence"),
        ({"pp": 8, "stages_per_rank": 2}, "pp x stages_per_rank = 16 stages, and the model has 4 layers"),
        ({"dp_shard": 64, "dp_replicate": 2}, "layout.dp_shard=64: 128 ranks; at most fleet."),
        ({"dp_shard": 8, "tp": 2}, "layout.dp_shard=8 x layout.tp=2: 16 ranks; at most fleet.count=8"),
    ],
)  # fmt: skip
def test_what_can_be_in_no_layout_is_said_in_the_words_of_the_table(fixed, said):
    with pytest.raises(UserError) as error:
        search(small(8, 4095, 128), Limits(fixed))
    assert said in str(error.value)


@pytest.mark.parametrize("count", [2048, 16384])
@pytest.mark.parametrize(
    "fixed",
    [
        {"dp_shard": 128, "pp": 16},
        {"tp": 8, "pp": 16, "dp_shard": 16},
        {"dp_shard": 96},
        {"dp_replicate": 3},
        {"dp_replicate": 4, "dp_shard": 32, "pp": 4},
        {"micro_batch": 3},
        {"pp": 11, "stages_per_rank": 7},
        {"ep": 4, "tp": 2, "etp": 2},
    ],
)
def test_whatever_the_user_fixes_is_in_every_layout_and_takes_the_fleet(count, fixed):
    arch = "mixtral-8x7b" if "ep" in fixed else "llama3.1-405b"
    made = problem(arch, count=count, seq_len=8192, batch=2048 + 2048 * (fixed.get("dp_replicate") == 3))
    space = layouts_of(made, count, Limits(fixed, spares=48), compiled=True)
    assert len(space)
    for name, value in fixed.items():
        assert (space[name] == value).all(), name
    whole = np.prod(
        [value for name, value in fixed.items() if name in ("dp_replicate", "dp_shard", "pp", "tp")]
    )
    if whole <= count:
        assert space.ranks.max() > count - max(whole, 512)


def test_unique_columns_are_numpys():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 4, (5, 300)).astype(float) * 1.5
    unique, back = unique_columns(keys)
    assert np.array_equal(unique[:, back], keys)
    assert unique.shape == np.unique(keys, axis=1).shape


def test_nothing_that_is_fixed_is_dropped_where_a_model_does_not_fit():
    with pytest.raises(NothingFits, match=r"with layout\.tp=1 .* layout\.recompute=none, no "):
        fixed = {"tp": 1, "pp": 1, "cp": 1, "micro_batch": 16, "recompute": 0.0}
        search(problem("llama3.1-70b", count=64, batch=1024), Limits(fixed))
