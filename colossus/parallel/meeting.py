"""Where the ranks of a job find each other: who does not come is named, in seconds, instead of waited for."""

from __future__ import annotations

import contextlib
import logging
import os
import time
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

    purpose: what they meet for; each has keys of its own. Rank 0 keeps the store, which ends with it, for as
        long as the others may ask for something.

    Raises:
        MachineError: some did not come; rank 0 names them.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    patience = patience_seconds or PATIENCE_SECONDS + size / 1000
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = PrefixStore(f"colossus/{purpose}", _connect(rank, patience))
        store.set(f"here-{rank}", "")
        if store.add("arrived", 1) >= size:
            store.set("all", "")
        _wait(store, rank, size, patience)
    except DistError as error:
        if rank == 0:
            raise MachineError(f"rank 0: no ranks can meet at {place}: {_first_line(error)}") from error
        raise MachineError(
            f"rank {rank}: rank 0 does not answer at {place}; is its process started?"
        ) from error
    return store, rank, size


def _connect(rank: int, patience: float) -> Store:
    """As PyTorch's own "env://", which would wait for all ranks without a word."""
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process has it
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not of_agent,
        timeout=timedelta(seconds=patience),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _wait(store: Store, rank: int, size: int, patience: float) -> None:
    began, said = time.monotonic(), False
    while True:
        left = patience - (time.monotonic() - began)
        if left <= 0:
            who = f"{_missing(store, size)} of {size}" if rank == 0 else f"some of {size} ranks"
            missing = MachineError(f"{who} did not come in {patience:.0f} s; is each process started?")
            missing.told = rank != 0  # who names them
            raise missing
        with contextlib.suppress(DistStoreError):  # of time
            store.wait(["all"], timedelta(seconds=min(left, SAY_SECONDS)))
            return
        if rank == 0 and not said and time.monotonic() - began < patience:
            logging.getLogger(__name__).warning("waiting for %s of %d", _missing(store, size), size)
            said = True


def _missing(store: Store, size: int) -> str:
    """The ranks that have not come yet, in words."""
    missing = [rank for rank in range(size) if not store.check([f"here-{rank}"])]
    names = ", ".join(map(str, missing[:SHOWN])) + (", ..." if len(missing) > SHOWN else "")
    return f"rank{'s' * (len(missing) > 1)} {names}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
