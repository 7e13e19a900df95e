"""What fits: how many layers are recomputed, what waits in reserve, and an answer in time."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import colossus
from colossus.derive import to_plan
from colossus.hardware import fleets
from colossus.hardware.catalogue import accelerator
from colossus.job import load_job
from colossus.layout import Layout, Pool, violations
from colossus.planner import fitting as module
from colossus.planner.choice import exact_pipeline
from colossus.planner.columns import ALL, Layouts
from colossus.planner.estimate import estimate
from colossus.planner.fitting import Search, fits, fitting, price
from colossus.planner.memory import memory
from colossus.planner.plan import _binding, make_plan
from colossus.planner.search import Limits, NothingFits, search
from colossus.planner.space import layouts_of
from tests.perf.tiny import tiny
from tests.planner.problems import hardware, problem

GIB = 2**30


def with_memory(made, size: float):
    pool = made.pricer.hardware.pools[0]
    part = replace(pool.accelerator, memory=size)
    return made.on(replace(made.pricer.hardware, pools=(replace(pool, accelerator=part),)))


def at(space: Layouts, recompute: float, layers: int) -> Layouts:
    size = len(space)
    return space.with_columns(recompute=np.full(size, recompute), recompute_layers=np.full(size, layers))


@pytest.mark.parametrize("model", ["llama3.2-1b", "deepseek-v3", "gpt-oss-20b"])
@pytest.mark.parametrize(
    ("pp", "chunks", "schedule"), [(1, 1, "1f1b"), (3, 1, "1f1b"), (2, 2, "interleaved_1f1b")]
)
def test_recomputing_all_layers_of_a_stage_is_recomputing_all(model, pp, chunks, schedule):
    arch = {"llama3.2-1b": "llama3.1-8b"}.get(model, model)
    made = replace(problem("llama3.2-1b", count=8, batch=64), arch=tiny(arch, num_layers=8))
    row = {"pp": pp, "dp_shard": 2, "schedule": schedule, "stages_per_rank": chunks}
    one = Layouts.of([row])
    most = made.shape(schedule, pp, chunks).most_layers
    for recompute in (1.0, 2.0):
        some = [at(one, recompute, layers) for layers in (ALL, most, most + 3, 0)]
        seconds = [estimate(made, layouts).seconds[0] for layouts in some]
        bytes_ = [memory(made, layouts).allocated[0] for layouts in some]
        exact = [exact_pipeline(made, layouts.row(0), estimate(made, layouts), 0) for layouts in some]
        assert seconds[0] == pytest.approx(seconds[1], rel=1e-12) == pytest.approx(seconds[2], rel=1e-12)
        assert bytes_[0] == bytes_[1] == bytes_[2] and exact[0] == exact[1] == exact[2]
        # none of them is none at all
        assert seconds[3] == estimate(made, at(one, 0.0, ALL)).seconds[0] < seconds[0]
        assert bytes_[3] == memory(made, at(one, 0.0, ALL)).allocated[0]


def test_each_recomputed_layer_costs_its_forward_pass_and_saves_its_activations():
    """Llama 8B whole on a rank, 32 equal layers: seconds rise, and bytes fall, by the same for each layer."""
    made = problem("llama3.1-8b", count=1, seq_len=4096, batch=4)
    several = Layouts.joined([at(Layouts.of([{"zero": 2.0}]), 2.0, n) for n in (1, 2, 3, 31, 32)])
    priced, needs = estimate(made, several), memory(made, several)
    again = priced.parts["recomputation"]
    each = priced.phases["recompute", "dense"][0]  # the forward pass without its last product
    assert 0.6 * priced.phases["forward", "dense"][0] < each < priced.phases["forward", "dense"][0]
    assert again == pytest.approx(4 * each * np.array([1, 2, 3, 31, 32]), rel=1e-3)
    saved = -np.diff(needs.parts["activations"])
    assert saved[0] == pytest.approx(saved[1], rel=1e-9) and saved[2] == pytest.approx(
        28 * saved[0], rel=1e-9
    )
    # a layer that is made again keeps its input alone: 4,096 tokens x 4,096 in two bytes
    kept = needs.parts["activations"][4] - needs.parts["activations"][3] + saved[0]
    assert kept == pytest.approx(0.0, abs=1.0)


@pytest.mark.parametrize("size", [2.0, 2.4, 3.2, 5.0])
def test_as_few_layers_are_recomputed_as_the_memory_asks_for(size):
    """Against every kind and count of recomputed layers of every layout, one by one."""
    made = problem("llama3.2-1b", count=2, seq_len=4096, batch=8)
    made = replace(made, arch=made.arch.model_copy(update={"num_layers": 5, "vocab_size": 4096}))
    least = float(memory(made, at(layouts_of(made, 2, Limits({}), compiled=True), 2.0, ALL)).reserved.min())
    made = with_memory(made, size / 2 * least)
    limits = Limits({"micro_batch": 1, "compile": True})
    space = layouts_of(made.as_ours(True), 2, limits, compiled=True)
    best = float("inf")
    for recompute, layers in [(0.0, ALL), *product((1.0, 2.0), range(1, 6))]:
        tried = at(space, recompute, layers)
        seconds = estimate(made, tried).seconds
        room = fits(made, tried, limits)
        best = min(best, float(seconds[room].min(initial=np.inf)))
    run = Search()
    found = fitting(made, price(made, space, run), limits, 4, True, run)
    assert found.seconds[0] == pytest.approx(best, rel=1e-12)
    assert (np.diff(found.seconds) >= 0).all()


def test_memory_that_is_free_is_not_recomputed_for():
    """DeepSeek-V3 over 16 ranks of a pipeline: nothing quicker of the winner's shape fits."""
    made = problem("deepseek-v3", count=2048, batch=7680, part="h800-sxm")
    found = search(made, Limits({"pp": 16, "tp": 1, "compile": True}))
    best = found.choices[0]
    row = best.row
    layers = made.shape(row["schedule"], row["pp"], row["stages_per_rank"]).most_layers
    ours = Layouts.of([row])
    for recompute, count in [(0.0, ALL), *product((1.0, 2.0), range(1, layers + 1))]:
        tried = at(ours, recompute, count)
        if estimate(made, tried).seconds[0] < estimate(made, ours).seconds[0]:
            assert not fits(made, tried, Limits({}))[0], (recompute, count)


def test_what_binds_is_known_by_relaxing_it():
    made = problem("llama3.1-8b", count=8, batch=64)
    tight = search(with_memory(made, 24 * GIB), Limits({}))
    assert tight.unbound.seconds < 0.98 * tight.choices[0].seconds
    assert tight.unbound.reserved > 24 * GIB
    best, other = tight.choices[0], tight.unbound
    said = _binding(tight, with_memory(made, 24 * GIB))
    kept_out, needs = re.fullmatch(
        r"memory: 24 GiB a rank keep out (.*), which needs (.*) GiB and would save .*", said
    ).groups()
    assert float(needs) == pytest.approx(other.reserved / GIB, rel=0.01)
    assert f"save {100 * (1 - other.seconds / best.seconds):.0f}% of a step; most is lost to" in said
    words = dict(word.split("=") for word in kept_out.split())
    assert words and all(str(other.row[n]).lower() == v != str(best.row[n]).lower() for n, v in words.items())
    far = replace(tight, unbound=replace(other, reserved=2048 * GIB))
    assert "memory" not in _binding(far, with_memory(made, 24 * GIB)), "no accelerator has near as much"
    roomy = search(with_memory(made, 4096 * GIB), Limits({}))
    assert roomy.choices[0].seconds == roomy.unbound.seconds
    assert roomy.unbound.seconds == pytest.approx(tight.unbound.seconds)
    plans = [planned("model=llama3.2-1b", "fleet=dgx-h100-1", *words)
             for words in (["layout.recompute=full"], [])]  # fmt: skip
    assert not plans[0].binding.startswith("memory"), "full recomputation was asked for: memory does not bind"
    assert plans[1].best.seconds < plans[0].best.seconds


def test_a_field_that_is_fixed_stays_and_a_bound_on_activations_holds():
    made = problem("llama3.1-8b", count=8, batch=64)
    for choice in search(made, Limits({"recompute_layers": 3, "tp": 2})).choices:
        assert choice.row["recompute_layers"] == 3 and choice.row["recompute"] in ("selective", "full")
    for choice in search(made, Limits({"recompute": 2.0})).choices:
        assert choice.row["recompute"] == "full" and choice.row["recompute_layers"] is None
    for choice in search(made, Limits({}, activation_bytes=8 * GIB)).choices:
        assert choice.memory["activations"] <= 8 * GIB and choice.row["recompute"] != "selective"


# ---------------------------------------------------------------------- what works and what waits


def planned(*words: str):
    return colossus.plan(load_job(None, ["run.tokens=1e12", *words]))


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        (["fleet.count=2048", "layout.dp_shard=64", "layout.tp=2", "layout.pp=16"], 2048),
        (["fleet.count=16384", "layout.tp=8", "layout.pp=16", "layout.dp_shard=128"], 16384),
        (["fleet.count=16384", "layout.tp=8", "layout.pp=16", "layout.dp_replicate=4", "layout.dp_shard=32"],
         16384),
        (["fleet.count=4096", "layout.tp=8", "layout.pp=8", "layout.dp_shard=64"], 4096),
        (["fleet.count=4096", "layout.tp=8", "layout.pp=8", "layout.dp_shard=32"], 4096),
        (["fleet.count=4096", "layout.tp=8", "layout.pp=8", "layout.dp_shard=16", "layout.dp_replicate=3"],
         3072),
    ],
)  # fmt: skip
def test_a_published_layout_is_priced_as_it_is(words, ranks):
    plan = planned("model=llama3.1-405b", "fleet.accelerator=h100-sxm", "run.global_batch=2048", *words)
    assert plan.best.ranks == ranks
    assert plan.best.ranks + plan.reserve + plan.idle == plan.hardware.count
    assert f"{ranks:,} accelerators work" in plan.use()
    if ranks == plan.hardware.count:
        assert plan.spares > 0 and "failures ask for" in plan.use()


def test_no_large_part_of_a_fleet_idles_where_ranks_are_open():
    plan = planned("model=llama3.1-405b", "fleet.accelerator=h100-sxm", "fleet.count=16384", "layout.tp=8",
                   "layout.pp=16", "run.global_batch=2048")  # fmt: skip
    assert plan.best.ranks > 0.95 * 16384
    data = plan.to_dict()["accelerators"]
    assert data == {"working": plan.best.ranks, "reserve": plan.reserve, "idle": plan.idle}
    said = f"{plan.reserve:,} wait in reserve" if plan.reserve else f"failures ask for {plan.spares:,}"
    assert said in plan.use()


def test_a_reserve_that_costs_more_than_twice_its_share_is_given_up():
    """512 sequences on 512 accelerators, one a rank: with 16 of them in reserve a rank has two, which takes
    almost twice as long."""
    made = problem("llama3.2-1b", count=512, seq_len=4096, batch=512)
    found = search(made, Limits({"pp": 1, "tp": 1, "cp": 1}, spares=16))
    assert found.choices[0].ranks == 512 and found.all_working == found.choices[0].seconds
    # where a rank has many, and they come out even, 16 cost little
    found = search(replace(made, global_batch=4 * 31 * 512), Limits({"pp": 1, "tp": 1, "cp": 1}, spares=16))
    assert 480 <= found.choices[0].ranks <= 496 and found.all_working < found.choices[0].seconds


def test_what_a_launcher_has_started_all_works():
    job = load_job(None, ["model=llama3.2-1b", "fleet.accelerator=h100-sxm", "fleet.count=1024",
                          "run.tokens=1e12"])  # fmt: skip
    plan = make_plan(to_plan.with_model(job, None), whole=True)
    assert plan.best.ranks == 1024 and plan.spares == 0 and plan.use() == "1,024 accelerators work"


# ---------------------------------------------------------------------- in time


def test_a_late_search_answers_with_the_best_so_far_and_says_so(monkeypatch):
    made = problem("llama3.1-8b", count=32, batch=512)
    whole = search(made, Limits({}))
    assert whole.complete
    monkeypatch.setattr(module, "CHUNK", 1024)
    monkeypatch.setattr(Search, "is_late", lambda run: setattr(run, "complete", False) or True)
    early = search(made, Limits({}))
    assert not early.complete and early.priced < whole.priced / 4
    assert whole.choices[0].seconds <= early.choices[0].seconds < 1.1 * whole.choices[0].seconds
    plan = colossus.plan(load_job(None, ["model=llama3.2-1b", "fleet=dgx-h100-4", "run.tokens=1e9"]))
    assert not plan.complete and plan.to_dict()["complete"] is False
    from colossus.planner.report import text

    assert "time ran out: the best so far" in text(plan)


def test_time_is_by_the_clock_and_grows_with_what_there_is_to_price(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    run = Search(began=now[0])
    run.expect(1_000_000)
    now[0] += module.LEAST_SECONDS + 59
    assert not run.is_late() and run.complete
    now[0] += 2
    assert run.is_late() and not run.complete


def test_a_search_without_time_still_finds_what_little_fits(monkeypatch):
    """The quickest thousands do not fit: late or not, the search goes on to the first that does."""
    monkeypatch.setattr(Search, "is_late", lambda run: True)
    made = problem("llama3.1-70b", count=32, batch=64)
    assert search(made, Limits({})).choices[0].reserved <= accelerator("h100-sxm").memory


# ---------------------------------------------------------------------- unequal pools


def mixed(model: str, first: int, second: int, batch: int, others: str = "h200-sxm"):
    made = problem(model, batch=batch)
    pools = (fleets.Pool(accelerator("h100-sxm"), first), fleets.Pool(accelerator(others), second))
    return made.on(replace(hardware(first + second), pools=pools))


@pytest.mark.parametrize(
    ("fixed", "batch"),
    [({}, 128), ({"micro_batch": 2}, 100), ({"recompute": 2.0, "tp": 2}, 90), ({"dp_replicate": 6}, 48),
     ({"recompute_layers": 4, "tp": 1, "pp": 2}, 60), ({"compile": False}, 64)],
)  # fmt: skip
def test_pools_keep_what_is_fixed_and_share_the_batch_exactly(fixed, batch):
    made = mixed("llama3.2-1b", 12, 4, batch)
    best = search(made, Limits(fixed)).choices[0]
    names = {number: name for name, number in (("none", 0.0), ("selective", 1.0), ("full", 2.0))}
    for name, value in fixed.items():
        if name not in ("micro_batch", "recompute"):
            assert best.row[name] == value
    for pool in best.pools:
        assert pool.micro_batch == fixed.get("micro_batch", pool.micro_batch)
        assert pool.recompute == names[fixed["recompute"]] if "recompute" in fixed else True
        assert pool.reserved <= pool.capacity
    assert sum(pool.replicas * pool.share for pool in best.pools) == batch
    assert best.compiled is fixed.get("compile", True)
    pools = [Pool(replicas=p.replicas, share=p.share, micro_batch=p.micro_batch, recompute=p.recompute)
             for p in best.pools]  # fmt: skip
    fields = {name: value for name, value in best.row.items() if name in Layout.model_fields}
    layout = Layout(**fields, pools=pools)
    assert not violations(layout, made.arch, global_batch=batch, seq_len=made.seq_len, node_size=8)


def test_mfu_of_pools_is_over_each_ones_peak():
    best = search(mixed("llama3.2-1b", 8, 8, 64, "a100-sxm-80"), Limits({})).choices[0]
    ranks = {pool.accelerator: pool.replicas * best.ranks / best.row["dp_replicate"] for pool in best.pools}
    peak = sum(count * accelerator(name).bf16 for name, count in ranks.items())
    made = problem("llama3.2-1b", batch=64)
    assert best.mfu == pytest.approx(made.model_flops / (best.seconds * peak), rel=1e-9)


def test_pools_on_which_nothing_fits_say_so():
    with pytest.raises(NothingFits, match="memory binds"):
        search(mixed("llama3.1-405b", 16, 8, 64), Limits({}))
