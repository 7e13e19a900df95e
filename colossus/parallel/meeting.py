"""Where the ranks of a job find each other: who does not come is named, in seconds, instead of waited for."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed has them, unlisted
from torch.distributed import DistError, DistStoreError

from colossus.errors import MachineError

SAY_SECONDS = 10.0  # until it is said who is waited for
PATIENCE_SECONDS = 60.0  # that processes have to start, and a millisecond more for each
SHOWN = 8  # of the missing


def meet(purpose: str, patience_seconds: float | None = None) -> tuple[Any, int, int]:
    """(store, this rank, how many), once all ranks are there that the launcher's variables speak of.

    purpose: what they meet for; each meeting has keys of its own, also where ranks meet again for the same,
        in this attempt or after a restart. Rank 0 keeps the store where no process of torchrun's does; it
        ends with it, for as long as the others may ask for something.

    Raises:
        MachineError: some did not come; rank 0 names them.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    patience = patience_seconds or PATIENCE_SECONDS + size / 1000
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = PrefixStore(purpose, connect(patience))
        end = time.monotonic() + patience
        return (_open_round if rank == 0 else _join_round)(store, rank, size, patience, end), rank, size
    except DistError as error:
        if rank == 0:
            raise MachineError(f"rank 0: no ranks can meet at {place}: {_first_line(error)}") from error
        raise MachineError(
            f"rank {rank}: rank 0 does not answer at {place}; is its process started?"
        ) from error


def connect(patience_seconds: float = PATIENCE_SECONDS) -> Store:
    """The store of all attempts of one start: of the same `torchrun`, whose id others may have as well."""
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process has it
    store = TCPStore(  # as PyTorch's own "env://", which would wait for all ranks without a word
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=os.environ["RANK"] == "0" and not of_agent,
        timeout=timedelta(seconds=patience_seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return PrefixStore(f"colossus/{os.environ.get('TORCHELASTIC_RUN_ID', 'none')}", store)


# torchrun keeps one store over restarts, with all that attempts before have left in it. Its count of restarts
# does not tell attempts apart: where ranks of one node fail, the other nodes are restarted uncounted. So rank
# 0 opens a new round each time. A rank joins a round once, and the round has begun when rank 0 says so, which
# it does if all have joined: a rank that finds an earlier round cannot take it for this one.


def _open_round(store: Store, rank: int, size: int, patience: float, end: float) -> Store:
    meeting = PrefixStore(str(store.add("rounds", 1)), store)
    meeting.set("open", "")
    _arrive(meeting, rank, size)
    said = False
    while not _comes(meeting, "all", end):
        if time.monotonic() >= end:
            who = absent(meeting, "here", size)
            raise MachineError(f"{who} of {size} did not come in {patience:.0f} s; is each process started?")
        if not said:
            logging.getLogger(__name__).warning("waiting for %s of %d", absent(meeting, "here", size), size)
            said = True
    meeting.set("begun", "")
    return meeting


def _join_round(store: Store, rank: int, size: int, patience: float, end: float) -> Store:
    while not _comes(store, "rounds", end):
        if time.monotonic() >= end:
            missing = MachineError(
                f"rank 0 of {size} did not come in {patience:.0f} s; is its process started?"
            )
            missing.told = rank != 1  # one of them names it
            raise missing
    number = int(store.get("rounds"))
    while time.monotonic() < end:
        meeting = PrefixStore(str(number), store)
        if _comes(meeting, "open", end):
            if _begins(meeting, PrefixStore(str(number + 1), store), rank, size, end):
                return meeting
            number += 1
    missing = MachineError(f"some of {size} ranks did not come in {patience:.0f} s")
    missing.told = True  # by rank 0, which names them
    raise missing


def _begins(meeting: Store, following: Store, rank: int, size: int, end: float) -> bool:
    """Whether a round begins with this rank: none that it joined before, or that another has followed."""
    if meeting.check([f"here-{rank}"]):
        return False
    _arrive(meeting, rank, size)
    while not _comes(meeting, "begun", end):
        if time.monotonic() >= end or following.check(["open"]):
            return False
    return True


def _arrive(meeting: Store, rank: int, size: int) -> None:
    meeting.set(f"here-{rank}", "")
    if meeting.add("arrived", 1) == size:
        meeting.set("all", "")


def _comes(store: Store, key: str, end: float) -> bool:
    """Whether somebody sets `key`; waited for until `end`, `SAY_SECONDS` at most."""
    seconds = max(0.001, min(end - time.monotonic(), SAY_SECONDS))
    with contextlib.suppress(DistStoreError):  # of time
        store.wait([key], timedelta(seconds=seconds))
        return True
    return False


def all_come(store: Store, purpose: str, size: int, seconds: float) -> bool:
    """Whether all ranks come for `purpose` before one of them has waited so long; each hears the same."""
    try:
        verdict = "all"
        if store.add(f"{purpose}-arrived", 1) < size:
            verdict = "not all"
            with contextlib.suppress(DistStoreError):  # of time
                store.wait([f"{purpose}-verdict"], timedelta(seconds=seconds))
        return store.compare_set(f"{purpose}-verdict", "", verdict).decode() == "all"
    except DistError:  # the store has ended
        return False


def after_first(store: Store, rank: int) -> None:
    """Rank 0 lets the others go on, which wait for it here however long that takes. All ranks call it, as
    often."""
    number = store.add(f"after-first-{rank}", 1)
    if rank == 0:
        store.set(f"first-is-done-{number}", "")
    while not _comes(store, f"first-is-done-{number}", float("inf")):
        pass


def absent(store: Store, key: str, size: int) -> str:
    """The ranks of which there is no `key`, in words."""
    missing = _without(store, key, range(size), SHOWN + 1)
    names = ", ".join(map(str, missing[:SHOWN])) + (", ..." if len(missing) > SHOWN else "")
    return f"rank{'s' * (len(missing) != 1)} {names}"


def _without(store: Store, key: str, ranks: Sequence[int], most: int) -> list[int]:
    """The first `most` of them, found by halves: of many ranks few are missing."""
    if not ranks or most <= 0 or store.check([f"{key}-{rank}" for rank in ranks]):
        return []
    if len(ranks) == 1:
        return [ranks[0]]
    half = len(ranks) // 2
    found = _without(store, key, ranks[:half], most)
    return found + _without(store, key, ranks[half:], most - len(found))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
