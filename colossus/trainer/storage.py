"""Whether all nodes see one storage, asked before the first step: what another node cannot read is no
checkpoint, and a rank that reads other texts trains another model."""

from __future__ import annotations

import os
import secrets
import socket
import time
from pathlib import Path

from colossus.data.shards import replace_synced
from colossus.data.sources import TrainingData
from colossus.errors import UserError
from colossus.hardware.machine import ranks_here
from colossus.parallel.world import World
from colossus.trainer.together import on_every_rank, on_first_rank

SHOWN_SECONDS = 60.0  # that a network's file system may take to show another node a new file
LOOK_SECONDS = 0.05


def check_shared(folder: Path, world: World, patience: float = SHOWN_SECONDS) -> None:
    """One process of each node looks for what rank 0 writes into the run's folder. Every rank calls this.

    Raises:
        UserError: it is not there, on every rank.
        MachineError: it cannot be written.
    """
    if ranks_here(world.size) == world.size:
        return
    token, place = world.broadcast(secrets.token_hex(8)), folder / "seen"
    on_first_rank(world, lambda: replace_synced(place, token.encode()))

    def look() -> None:
        end = time.monotonic() + patience
        while os.environ.get("LOCAL_RANK", "0") == "0" and not _holds(place, token):
            if time.monotonic() > end:
                raise UserError(
                    f"run.folder={folder}: {_name(world)} does not see what rank 0 wrote there, as "
                    f"{place.absolute()}; name a folder on storage that all nodes share"
                )
            time.sleep(LOOK_SECONDS)

    try:
        on_every_rank(world, look)
    finally:
        if world.rank == 0:
            place.unlink(missing_ok=True)


def _name(world: World) -> str:
    return f"rank {world.rank} on {socket.gethostname()}"


def _holds(place: Path, token: str) -> bool:
    try:
        return place.read_text(errors="replace") == token
    except OSError:
        return False


def check_same_data(data: TrainingData, folder: str, world: World) -> None:
    """Raises UserError on every rank where one has other shards than rank 0. Every rank calls this."""
    mine = [source.fingerprint for source in (*data.train, *data.validation)]
    first = world.broadcast(mine)

    def compare() -> None:
        if mine != first:
            raise UserError(
                f"data.folder={folder}: {_name(world)} has other shards there than rank 0; share the "
                "folder, or copy rank 0's to each node"
            )

    on_every_rank(world, compare)
