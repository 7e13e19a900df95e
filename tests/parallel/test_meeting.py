"""A rank that does not come is named within seconds, by real processes."""

from __future__ import annotations

import logging
import time

import pytest

from colossus.errors import MachineError
from colossus.parallel import meeting
from tests.parallel.real_ranks import in_ranks


def comes(patience: float, absent: int) -> str:
    """What a rank of three hears where one of them never comes."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("colossus").addHandler(handler)
    meeting.SAY_SECONDS = 0.2
    import os

    rank = int(os.environ["RANK"])
    os.environ["WORLD_SIZE"] = "3"
    os.environ["RANK"] = str(rank + (rank >= absent))
    began = time.monotonic()
    try:
        meeting.meet("test", patience)
    except MachineError as error:
        assert time.monotonic() - began < patience + 20
        return " | ".join([*said, str(error)])
    return "all came"


def test_one_of_three_does_not_come() -> None:
    first, second = in_ranks(2, comes, 2.0, 1)
    waits, _, ends = first.partition(" | ")
    assert waits in ("waiting for rank 1 of 3", "waiting for ranks 1, 2 of 3")  # as quick as they start
    assert ends == "rank 1 of 3 did not come in 2 s; is each process started?"
    assert second.startswith(("some of 3 ranks did not come in 2 s", "rank 2: rank 0 does not answer"))


def test_the_first_one_does_not_come() -> None:
    for rank, said in enumerate(in_ranks(2, comes, 2.0, 0), 1):
        assert said.startswith(f"rank {rank}: rank 0 does not answer at 127.0.0.1:")


def test_all_come_and_may_meet_again() -> None:
    assert in_ranks(2, meets_twice) == [(0, 2), (1, 2)]


def meets_twice() -> tuple[int, int]:
    first = meeting.meet("one")
    store, rank, size = meeting.meet("other", 10.0)
    assert first[1:] == (rank, size)
    store.set(f"said-{rank}", "")
    store.wait([f"said-{other}" for other in range(size)])
    store.add("left", 1)
    while rank == 0 and store.add("left", 0) < size:
        time.sleep(0.01)
    return rank, size


def test_a_place_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(MachineError, match=r"rank 0: no ranks can meet at 127\.0\.0\.1:1: "):
        meeting.meet("test", 0.5)
