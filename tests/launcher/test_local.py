"""What the first rank prepares for the others, under torchrun's environment, and who follows the events."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from colossus.checkpoints.format import DamagedCheckpoint
from colossus.errors import MachineError, UserError
from colossus.events import EventLog
from colossus.launcher import local
from colossus.layout import Layout
from colossus.parallel.world import World
from tests.parallel.real_ranks import in_ranks


@pytest.mark.parametrize(("rank", "first"), [(None, True), ("0", True), ("1", False), ("10", False)])
def test_the_first_rank_is_the_one_that_speaks(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, first: bool
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert local.is_first_rank() is first


def test_a_process_alone_prepares_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    value = object()
    with local.first_rank_prepares(lambda: value) as prepared:
        assert prepared is value
    with pytest.raises(UserError, match="a reason"), local.first_rank_prepares(_refuse):
        pass


def _refuse() -> None:
    raise UserError("a reason")


def _full_disk() -> None:
    raise MachineError("the disk")


def prepared(folder: Path, kind: str) -> dict[str, Any]:
    """What one rank gets, and whether the ranks can meet afterwards."""

    def prepare() -> dict[str, Any]:
        (folder / f"by-{os.environ['RANK']}").touch()
        time.sleep(0.2)  # the other rank waits
        {"user error": _refuse, "machine error": _full_disk}.get(kind, lambda: None)()
        return {"tokens": 3, "by": os.environ["RANK"]}

    try:
        with (
            local.first_rank_prepares(prepare) as value,
            World.join(Layout(dp_replicate=1, dp_shard=2), "cpu") as world,
        ):
            return {"value": value, "sum": world.sum([1.0 + world.rank])}
    except (UserError, MachineError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("value", {"value": {"tokens": 3, "by": "0"}, "sum": [3.0]}),
        ("user error", {"error": "UserError: a reason"}),
        ("machine error", {"error": "MachineError: the disk"}),
    ],
)
def test_one_rank_prepares_and_all_have_what_it_made(
    tmp_path: Path, kind: str, expected: dict[str, Any]
) -> None:
    assert in_ranks(2, prepared, tmp_path, kind) == [expected, expected]
    assert [path.name for path in tmp_path.iterdir()] == ["by-0"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("two lines\nand 'quotes'"), UserError),
        (DamagedCheckpoint("step-3: truncated:\n  a\n  b"), MachineError),
    ],
)
def test_what_a_rank_raised_first_reaches_the_parent_whole(
    tmp_path: Path, error: UserError | MachineError, kind: type[Exception]
) -> None:
    assert local._first_told(tmp_path) is None
    local._tell(tmp_path, error)
    local._tell(tmp_path, MachineError("waited in vain"))
    told = local._first_told(tmp_path)
    assert type(told) is kind and str(told) == str(error)


def test_a_follower_hands_on_what_is_new_once_and_in_order(tmp_path: Path) -> None:
    """Earlier attempts' events are not told again; the last one is told before it ends."""
    EventLog(tmp_path).write("start")
    heard: list[Any] = []
    with local._Follower(tmp_path, [heard.append, lambda event: heard.append(event["step"])]):
        log = EventLog(tmp_path)
        for step in range(5):
            log.write("step", step, loss=0.5)
            time.sleep(local.STOP_SECONDS / 3)
        log.write("end", 5)
    log.close()
    events = heard[::2]
    assert [event["kind"] for event in events] == ["step"] * 5 + ["end"]
    assert [event["step"] for event in events] == heard[1::2] == [0, 1, 2, 3, 4, 5]
    assert all(event["attempt"] == 1 for event in events)


def test_without_listeners_nothing_is_followed(tmp_path: Path) -> None:
    before = threading.active_count()
    with local._Follower(tmp_path, []):
        assert threading.active_count() == before
