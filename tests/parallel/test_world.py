"""What the ranks of a job say to each other, alone and in two real processes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist

from colossus.errors import UserError
from colossus.layout import Layout
from colossus.parallel.world import World
from tests.parallel.real_ranks import in_ranks

LAYOUTS = [{"dp_replicate": 1, "dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 1}]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_alone_there_is_no_process_group() -> None:
    value = {"any": object()}
    with World.join(Layout(), "cpu") as world:
        assert (world.rank, world.size, world.device, world.meshes) == (0, 1, torch.device("cpu"), None)
        assert not dist.is_initialized()
        assert world.broadcast(value) is value
        found = world.sum([3, 0.1])
        assert found == [3.0, 0.1] and all(type(number) is float for number in found)
        assert world.any(True) and not world.any(False)


@pytest.mark.parametrize(
    ("layout", "started", "message"),
    [
        ({"dp_shard": 2}, None, "needs 2 ranks .* but 1 were started; start 2, or set layout.dp_shard=1"),
        ({}, "4", "needs 1 ranks .* but 4 were started; start 1, or set layout.dp_shard=4"),
        ({"dp_replicate": 2, "dp_shard": 3}, "3", "needs 6 ranks .* but 3 were started"),
    ],
)
def test_another_number_of_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, layout: dict[str, int], started: str | None, message: str
) -> None:
    if started is not None:
        monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(UserError, match=message), World.join(Layout(**layout), "cpu"):
        pass
    assert not dist.is_initialized()


def talk(layout: dict[str, int]) -> dict[str, Any]:
    """What one rank of two hears before something goes wrong."""
    answer: dict[str, Any] = {}
    with contextlib.suppress(KeyError), World.join(Layout(**layout), "cpu") as world:
        assert world.meshes is not None
        answer["rank"] = (world.rank, world.size, world.device.type)
        answer["mesh"] = {axis: world.meshes.dense[axis].size() for axis in ("dp_replicate", "fsdp")}
        answer["sums"] = world.sum([2.0**53 - 2, 0.25 * (1 + world.rank), -1.0])
        answer["any"] = [world.any(flag) for flag in (False, world.rank == 1, True)]
        answer["said"] = world.broadcast({"by": world.rank, "steps": [1, 2]})
        raise KeyError
    return answer | {"left": not dist.is_initialized()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_hear_the_same(layout: dict[str, int]) -> None:
    """Sums keep every bit of float64, and a group is left however it ends."""
    answers = in_ranks(2, talk, layout)
    assert [answer.pop("rank") for answer in answers] == [(0, 2, "cpu"), (1, 2, "cpu")]
    assert answers == 2 * [
        {
            "mesh": {"dp_replicate": layout["dp_replicate"], "fsdp": layout["dp_shard"]},
            "sums": [2.0**54 - 4, 0.75, -2.0],
            "any": [False, True, True],
            "said": {"by": 0, "steps": [1, 2]},
            "left": True,
        }
    ]
