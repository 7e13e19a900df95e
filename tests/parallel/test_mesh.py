"""Who shares which axis: against an enumeration by hand, at 200,000 ranks, and in real processes."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from colossus.job import Job
from colossus.layout import AXES, Layout
from colossus.parallel.apply import build
from colossus.parallel.mesh import Meshes, Place, shared_slices
from colossus.parallel.world import World
from colossus.sections import Data, Precision, RunSection
from tests.parallel.meeting import groups_of, meet
from tests.parallel.real_ranks import in_ranks
from tests.perf.tiny import tiny

ORDER = ("dp_replicate", "pp", "dp_shard", "cp", "tp")  # in which ranks count, the last one fastest


@contextlib.contextmanager
def fake_world(size: int, rank: int) -> Iterator[None]:
    """This process as one rank of so many, which are not there."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Of at most 64 ranks, with or without groups of experts."""
    axes, left = {}, 64
    for axis in draw(st.permutations(AXES)):
        axes[axis] = draw(st.integers(1, min(left, 5)))
        left //= axes[axis]
    etp = draw(st.sampled_from([1, axes["tp"]]))
    token_ranks = axes["dp_shard"] * axes["cp"] * (axes["tp"] // etp)
    ep = draw(st.sampled_from([n for n in range(1, token_ranks + 1) if token_ranks % n == 0]))
    return Layout(**axes, ep=ep, etp=etp).filled()


def coordinates(layout: Layout) -> list[dict[str, int]]:
    """Of each rank, by counting them one after the other; those of experts from their place in a stage."""
    found = []
    seen: dict[tuple[int, int], int] = {}
    for values in itertools.product(*(range(getattr(layout, axis)) for axis in ORDER)):
        place = dict(zip(ORDER, values, strict=True))
        stage = (place["dp_replicate"], place["pp"])
        number = seen[stage] = seen.get(stage, -1) + 1  # among the ranks of its replica's stage
        place["etp"] = number % layout.etp
        place["ep"] = number // layout.etp % layout.ep
        place["efsdp"] = number // layout.etp // layout.ep
        found.append(place)
    return found


def sharing(places: list[dict[str, int]], rank: int, *axes: str) -> list[int]:
    """The ranks that are where `rank` is on each of the axes."""
    return [r for r, place in enumerate(places) if all(place[a] == places[rank][a] for a in axes)]


def ranks_of(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group)


def expected_groups(layout: Layout, rank: int) -> dict[str, list[int]]:
    places = coordinates(layout)

    def along(*axes: str) -> list[int]:
        return sharing(places, rank, *(axis for axis in ORDER if axis not in axes))

    def of_experts(*axes: str) -> list[int]:
        others = [axis for axis in ("efsdp", "ep", "etp") if axis not in axes]
        return sharing(places, rank, "dp_replicate", "pp", *others)

    return {
        "dp_replicate": along("dp_replicate"),
        "fsdp": along("dp_shard", "cp"),
        "tp": along("tp"),
        "cp": along("cp"),
        "pp": along("pp"),
        "sequence": along("cp", "tp"),
        "efsdp": of_experts("efsdp"),
        "ep": of_experts("ep"),
        "etp": of_experts("etp"),
        "replicas of experts": sharing(places, rank, "pp", "efsdp", "ep", "etp"),
    }


@settings(max_examples=60, deadline=None)
@given(layouts(), st.data())
def test_each_group_has_the_ranks_that_differ_in_its_axes_alone(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.num_ranks - 1))
    expected, places = expected_groups(layout, rank), coordinates(layout)
    with fake_world(layout.num_ranks, rank):
        meshes = Meshes.build(layout, "cpu", experts=True, rank=rank)
        assert {name: ranks_of(group) for name, group in groups_of(meshes).items()} == expected
        assert meshes.tp is meshes.dense.get_group("tp")
        here = places[rank]
        assert meshes.place == Place(*(here[axis] for axis in ORDER))
        of_fsdp = here["dp_shard"] * layout.cp + here["cp"]
        assert meshes.dense.get_coordinate() == (here["dp_replicate"], of_fsdp, here["tp"])
        assert meshes.expert is not None
        of_experts = tuple(here[axis] for axis in ("dp_replicate", "efsdp", "ep", "etp"))
        assert meshes.expert.get_coordinate() == of_experts
        ends = [expected["pp"][0], expected["pp"][-1]]
        assert (ranks_of(meshes.ends) if meshes.ends else None) == (
            ends if layout.pp > 1 and rank in ends else None
        )
        everyone = list(range(layout.num_ranks))
        assert [ranks_of(group) for group in meshes.sums] == ([everyone] if len(everyone) > 1 else [])
        names = {group.group_name for group in groups_of(meshes).values()}
        assert not names & {group.group_name for group in meshes.sums}


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_groups_of_experts_have_different_tokens_of_one_replica(layout: Layout) -> None:
    """`ep` and what remains, `efsdp`, are dp_shard x cp, and x tp where experts are not cut over it."""
    places = coordinates(layout)
    for rank in range(layout.num_ranks):
        assert Place.of(layout, rank) == Place(*(places[rank][axis] for axis in ORDER))
        groups = expected_groups(layout, rank)
        regrouped = sorted(r for first in groups["efsdp"] for r in expected_groups(layout, first)["ep"])
        of_tp = ("tp",) if layout.etp > 1 else ()
        assert regrouped == sharing(places, rank, "dp_replicate", "pp", *of_tp)
        if layout.etp > 1:
            assert groups["etp"] == groups["tp"]


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        ({"dp_replicate": 2, "pp": 2, "dp_shard": 8, "cp": 2, "tp": 4}, [64, 4]),
        ({"dp_replicate": 3, "dp_shard": 65}, [65, 3]),
        ({"dp_shard": 70}, [70]),
    ],
)
def test_sums_over_each_group_in_turn_are_sums_over_all_ranks(axes: dict[str, int], sizes: list[int]) -> None:
    layout = Layout(**axes).filled()
    groups = []
    for rank in range(layout.num_ranks):
        with fake_world(layout.num_ranks, rank):
            meshes = Meshes.build(layout, "cpu", experts=False, rank=rank)
            groups.append([ranks_of(group) for group in meshes.sums])
    assert all([len(group) for group in found] == sizes for found in groups)
    values = [7**rank for rank in range(layout.num_ranks)]  # of which no two sums are alike
    total = sum(values)
    for turn in range(len(sizes)):
        values = [sum(values[r] for r in found[turn]) for found in groups]
    assert values == [total] * layout.num_ranks


def job_of(layout: Layout, preset: str, **sizes: int) -> Job:
    return Job(
        model=tiny(preset, **sizes),
        data=Data(seq_len=64),
        layout=layout,
        precision=Precision(type="fp32"),
        run=RunSection(seed=0, global_batch=layout.dp * (layout.pp or 1)),
    )


AT_SCALE = [
    (
        {"tp": 8, "dp_shard": 100, "dp_replicate": 250},
        "llama3.1-8b",
        {"num_heads": 8, "num_kv_heads": 8, "intermediate_size": 64, "vocab_size": 64},
    ),
    ({"pp": 5, "dp_shard": 64, "dp_replicate": 625, "ep": 64}, "qwen3-30b-a3b", {}),
]


@pytest.mark.parametrize(("axes", "preset", "sizes"), AT_SCALE)
def test_one_of_200_000_ranks_makes_few_meshes(
    axes: dict[str, int], preset: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not two for every parameter, each with a list of all ranks: that took 44 s and 12 GB."""
    made = []
    make = DeviceMesh.__init__

    def count(mesh: DeviceMesh, *arguments: Any, **named: Any) -> None:
        made.append(None)
        make(mesh, *arguments, **named)

    monkeypatch.setattr(DeviceMesh, "__init__", count)
    layout = Layout(**axes, recompute="full", micro_batch=1).filled()
    assert layout.num_ranks == 200_000
    start = time.process_time()
    with fake_world(layout.num_ranks, 133_338):
        job = job_of(layout, preset, **sizes)
        meshes = Meshes.build(layout, "cpu", experts=job.model.experts is not None, rank=133_338)
        model = build(job, World(133_338, 200_000, torch.device("meta"), meshes, layout))
        seconds = time.process_time() - start
        parameters = list(model.parameters())
        assert all(isinstance(p, DTensor) and p.is_meta for p in parameters)
        assert len(made) <= 15
    assert seconds < 15


def test_slices_are_shared_within_and_nothing_is_changed_after() -> None:
    before = (DeviceMesh.__getitem__, DeviceMesh._concatenate)
    layout = Layout(dp_replicate=2, dp_shard=4, tp=2).filled()
    with fake_world(16, 5), contextlib.suppress(KeyError):
        dense = Meshes.build(layout, "cpu", experts=False, rank=5).dense
        apart = dense["dp_replicate", "fsdp"]
        with shared_slices():
            shared = dense["dp_replicate", "fsdp"]
            assert shared is dense["dp_replicate", "fsdp"] is not apart
            assert shared == apart and shared["fsdp"] is shared[("fsdp",)]
            joined = DeviceMesh._concatenate([shared, dense["tp"]])
            assert joined is DeviceMesh._concatenate([shared, dense["tp"]])
            assert joined == dense and joined.mesh_dim_names == dense.mesh_dim_names
            raise KeyError
    assert (DeviceMesh.__getitem__, DeviceMesh._concatenate) == before


@pytest.mark.parametrize(
    "axes",
    [
        {"dp_replicate": 2, "pp": 2, "tp": 2, "etp": 2},
        {"dp_shard": 2, "cp": 2, "tp": 2, "ep": 4},
        {"dp_replicate": 2, "dp_shard": 4, "ep": 2},
    ],
)
def test_real_ranks_meet_in_their_groups(axes: dict[str, int]) -> None:
    """The names of groups agree between ranks that make different ones, and sums are those of all ranks."""
    layout = Layout(**axes).filled()
    for rank, heard in enumerate(in_ranks(8, meet, axes)):
        assert heard.pop("rank") == rank and heard.pop("rings") == len(axes.keys() - {"ep", "etp"})
        assert heard.pop("sums") == [[28.0, 4.0], [2.0**56 - 16], [8.0]]
        assert heard.pop("data") == [8.0 / layout.tp]
        assert heard == expected_groups(layout, rank)
