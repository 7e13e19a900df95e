"""What may fail on one rank, done so that all learn of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from colossus.errors import MachineError, UserError
from colossus.parallel.world import World


def on_every_rank(world: World, act: Callable[[], Any]) -> None:
    """Runs `act`, which must not wait for other ranks, on each; raises the first error on every rank."""
    error: Exception | None = None
    try:
        act()
    except (UserError, MachineError) as raised:
        error = raised
    error = world.first_error(error)
    if error is not None:
        raise error


def on_first_rank(world: World, act: Callable[[], Any]) -> None:
    """Runs `act` on rank 0, which may take as long as it needs, and raises its error on every rank."""
    error: Exception | None = None
    try:
        if world.rank == 0:
            act()
    except (UserError, MachineError) as raised:
        error = raised
    finally:
        world.after_first()
    error = world.broadcast(error)
    if error is not None:
        raise error
