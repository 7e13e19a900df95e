"""Who talks to whom, over what, and how long that takes: worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from colossus.hardware.fleets import Hardware, hardware_of
from colossus.job import load_job
from colossus.perf import communication as comm
from colossus.perf.communication import FILL, NETWORK_HOP, NVLINK_HOP, NVLINK_SHARE, SEND_START, START, Group

ORDER = ("tp", "cp", "dp_shard", "dp_replicate", "pp")


def fleet(*words: str) -> Hardware:
    """H100s, eight a server, 50 GB/s of network each."""
    return hardware_of(load_job(None, ["fleet.accelerator=h100-sxm", "fleet.count=64", *words]).fleet)


def group(size: int, stride: int = 1) -> Group:
    return Group(np.array([float(size)]), np.array([float(stride)]))


def columns(**axes: int) -> dict[str, np.ndarray]:
    usual = dict.fromkeys((*ORDER, "ep", "etp"), 1) | axes
    return {name: np.array([float(value)]) for name, value in usual.items()}


@pytest.mark.parametrize(
    ("etp", "experts", "experts_dp", "ep"),
    [  # (ranks, how far apart): of 4 x 2 x 2 that have different tokens, or of 4 x 2 where tp has the same
        (1, (4, 4), (8, 4), (4, 1)),
        (2, (2, 8), (4, 8), (4, 2)),
    ],
)
def test_groups_and_how_far_apart_their_ranks_lie(
    etp: int, experts: tuple[int, int], experts_dp: tuple[int, int], ep: tuple[int, int]
) -> None:
    axes = columns(tp=2, cp=2, dp_shard=4, dp_replicate=2, pp=2, ep=4, etp=etp)
    made = comm.groups_of(axes, ORDER)
    found = {name: (int(g.size[0]), int(g.stride[0])) for name, g in made.items()}
    assert found == {
        "tp": (2, 1),
        "cp": (2, 2),
        "dp_shard": (4, 4),
        "dp_replicate": (2, 16),
        "pp": (2, 32),
        "fsdp": (8, 2),
        "dp": (16, 2),
        "ep": ep,
        "experts": experts,
        "experts_dp": experts_dp,
    }


@pytest.mark.parametrize(
    ("size", "stride", "members", "nodes"),
    [
        (4, 1, 4, 1),
        (8, 1, 8, 1),
        (12, 1, 8, 2),
        (16, 1, 8, 2),
        (4, 4, 2, 2),
        (6, 4, 2, 3),
        (2, 8, 1, 2),
        (3, 32, 1, 3),
    ],
)
def test_how_many_of_a_group_are_in_one_server(size: int, stride: int, members: int, nodes: int) -> None:
    wire = comm.wire(group(size, stride), fleet(), 1.0)
    assert (wire.members[0], wire.nodes[0]) == (members, nodes)


@pytest.mark.parametrize(("size", "stride", "beyond"), [(16, 1, 1.0), (17, 1, 4.0), (4, 4, 1.0), (4, 8, 4.0)])
def test_only_what_reaches_beyond_a_pod_meets_its_oversubscription(
    size: int, stride: int, beyond: float
) -> None:
    hardware = fleet("fleet.pod=16", "fleet.oversubscription=4")
    assert comm.wire(group(size, stride), hardware, 0.9).outside[0] == pytest.approx(50e9 * 0.9 / beyond)


def test_a_gather_sends_each_rank_what_it_lacks() -> None:
    """Of 800 MB four ranks lack three quarters each; over servers by the slower of links and cards."""
    hardware, sent = fleet(), np.array([8e8])
    inside = hardware.accelerator.nvlink * NVLINK_SHARE
    start = START + 3 * NVLINK_HOP + min(8e8, FILL) / inside
    found = comm.gather_seconds(sent, group(4), hardware, 1.0)[0]
    assert found == pytest.approx(6e8 / inside + start)
    found = comm.gather_seconds(sent, group(2, 8), hardware, 1.0)[0]
    start = START + 2 * NETWORK_HOP + min(8e8, FILL) / inside
    assert found == pytest.approx(4e8 / 50e9 + start)
    assert comm.gather_seconds(sent, group(1), hardware, 1.0)[0] == 0
    twice = comm.reduce_seconds(sent, group(4), hardware, 1.0)[0]
    assert twice == pytest.approx(2 * comm.gather_seconds(sent, group(4), hardware, 1.0)[0])


@pytest.mark.parametrize(("stride", "is_inside"), [(1, True), (4, True), (8, False), (32, False)])
def test_a_message_to_the_next_stage_leaves_the_server_where_it_lies_elsewhere(
    stride: int, is_inside: bool
) -> None:
    hardware = fleet()
    rate = hardware.accelerator.nvlink * NVLINK_SHARE if is_inside else 50e9
    found = comm.send_seconds(np.array([1e9]), group(2, stride), hardware, 1.0)[0]
    assert found == pytest.approx(1e9 / rate + SEND_START)
