"""Which checkpoints of a run stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from colossus.checkpoints.find import committed
from colossus.checkpoints.format import (
    COMMITTED,
    DamagedCheckpoint,
    checkpoints_folder,
    is_committed,
    read_manifest,
    sync_folder,
)
from colossus.errors import UserError


def prune(run_folder: str | Path, keep: int, keep_every: int = 0) -> list[Path]:
    """Deletes the older checkpoints of a run; returns them.

    The newest `keep` (>= 1) whole ones stay, and for good those whose step is a multiple of `keep_every`
    (0: none). A damaged one does not count as kept; it goes when `keep` whole ones are newer. So the only
    whole one is never deleted.

    A reader in another process may lose the race with this: on POSIX what it has open stays readable; what
    it opens later is reported as deleted, and `latest` then knows a newer one.
    """
    assert keep >= 1
    num_whole = 0
    deleted = []
    for path in committed(run_folder, say=lambda message: None):
        if num_whole >= keep:
            if not (keep_every and _step(path) % keep_every == 0):
                delete(path)
                deleted.append(path)
        elif _is_whole(path):
            num_whole += 1
    return deleted


def delete(path: Path) -> None:
    """Deletes a checkpoint, its commit first, so that a kill in between leaves nothing that loads."""
    (path / COMMITTED).unlink(missing_ok=True)
    sync_folder(path)
    shutil.rmtree(path)


def delete_leftovers(run_folder: str | Path) -> None:
    """Deletes what saves and deletions that were cut short left. Nobody else may write to the run."""
    for path in checkpoints_folder(run_folder).glob("step-[0-9]*"):
        if path.is_dir() and not is_committed(path):
            shutil.rmtree(path)


def _step(path: Path) -> int:
    """The step, from the folder's name: step-00000100 or step-00000100.2."""
    return int(path.name.removeprefix("step-").split(".")[0])


def _is_whole(path: Path) -> bool:
    try:
        read_manifest(path)
    except DamagedCheckpoint:
        return False
    except UserError:  # of a newer format: not ours to judge
        return True
    return True
