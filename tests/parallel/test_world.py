"""What the ranks of a job say to each other, alone and in two real processes."""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from colossus.errors import MachineError, UserError
from colossus.layout import Layout
from colossus.parallel import meeting
from colossus.parallel import world as worlds
from colossus.parallel.world import World, leave
from colossus.trainer.together import on_first_rank
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
        ({}, "4", "needs 1 rank .* but 4 were started; start 1, or set layout.dp_shard=4"),
        ({"dp_replicate": 2, "dp_shard": 3}, "3", "needs 6 ranks .* but 3 were started; start 6$"),
        ({"tp": 2, "dp_shard": 3}, "4", "needs 6 ranks .*; start 6, or set layout.dp_shard=2$"),
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


def sums_here(environments: list[dict[str, str]]) -> float:
    os.environ |= environments[int(os.environ["RANK"])]
    with World.join(Layout(dp_replicate=1, dp_shard=3), "cpu") as world:
        return world.sum_here(10.0**world.rank)


@pytest.mark.parametrize(
    ("environments", "expected"),
    [
        ([{}] * 3, [111.0] * 3),
        ([{"LOCAL_WORLD_SIZE": "1"}] * 3, [1.0, 10.0, 100.0]),
        (
            [
                {"LOCAL_WORLD_SIZE": n, "GROUP_WORLD_SIZE": "2", "GROUP_RANK": g}
                for n, g in ("10", "21", "21")
            ],
            [1.0, 110.0, 110.0],
        ),
    ],
    ids=["one machine", "a rank a machine", "unequal machines"],
)
def test_a_sum_over_the_ranks_of_a_machine(environments: list[dict[str, str]], expected: list[float]) -> None:
    assert in_ranks(3, sums_here, environments) == expected


def talk(layout: dict[str, int]) -> dict[str, Any]:
    """What one rank of two hears before something goes wrong."""
    answer: dict[str, Any] = {}
    with contextlib.suppress(KeyError, MachineError), World.join(Layout(**layout), "cpu") as world:
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


def act_longer_than_a_collective_may_wait() -> list[Any]:
    """Twice; then rank 0 fails, in words and otherwise."""
    worlds.TIMEOUT, meeting.SAY_SECONDS = timedelta(seconds=1), 0.3
    heard: list[Any] = []
    with World.join(Layout(dp_shard=2), "cpu") as world:
        for number in range(2):
            on_first_rank(world, lambda number=number: (time.sleep(2), heard.append(number)))
            heard.append(world.sum([1.0])[0])

        def fail() -> None:
            time.sleep(2)
            raise UserError("no such corpus")

        try:
            on_first_rank(world, fail)
        except UserError as error:
            heard.append(str(error))
    return heard


def test_what_one_rank_does_for_all_takes_as_long_as_it_needs() -> None:
    first, second = in_ranks(2, act_longer_than_a_collective_may_wait)
    assert first == [0, 2.0, 1, 2.0, "no such corpus"] and second == [2.0, 2.0, "no such corpus"]


def come_or_not(late: float) -> bool:
    with World.join(Layout(dp_shard=2), "cpu") as world:
        time.sleep(late if world.rank else 0.0)
        found = world.all_come("leave", 1.0)
        world.sum([1.0])  # none leaves the store before
        return found


@pytest.mark.parametrize(("late", "comes"), [(0.0, True), (2.5, False)])
def test_all_ranks_hear_the_same_of_whether_all_have_come(late: float, comes: bool) -> None:
    assert in_ranks(2, come_or_not, late) == [comes, comes]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("failed", [False, True], ids=["done", "failed"])
def test_a_rank_that_has_left_can_meet_again(device: str, failed: bool) -> None:
    """A rank that failed leaves at once, whatever its GPU still has before it."""
    for _ in range(2):
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        group = dist.new_group([0])
        ones = torch.ones(4, device=device)
        work = dist.all_reduce(ones, group=group, async_op=True)
        work.wait()
        assert ones.tolist() == [1.0] * 4
        if device == "cuda":
            torch.cuda._sleep(10**9)  # about a second
            dist.all_reduce(ones, async_op=True)
        began = time.monotonic()
        leave(device, failed=failed)
        assert not dist.is_initialized() and time.monotonic() - began < 20
    leave(device, failed=failed)  # nothing is left to leave


def test_a_failed_rank_with_a_gpu_aborts_what_others_may_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends the groups of a GPU ends those of a processor too, which is all that can be tried here."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.new_group([0])

    def wait() -> None:
        raise AssertionError("it would wait for the others")

    monkeypatch.setattr(dist, "destroy_process_group", wait)
    leave("cuda", failed=True)
    assert not dist.is_initialized()
