"""Which checkpoints of a run stay, and what is a save's to delete: files and folders named as it names them.

Whatever else lies there is the user's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from colossus.checkpoints.claims import committed
from colossus.checkpoints.format import (
    COMMITTED,
    checkpoints_folder,
    is_committed,
    is_ours,
    step_of,
    sync_folder,
)

ENDING_SECONDS = 1.0  # that a save of a killed attempt may take to notice it


def prune(
    run_folder: str | Path,
    keep: int,
    keep_every: int = 0,
    damaged: Collection[str] = (),
    before: int | None = None,
    first: int | None = None,
) -> list[Path]:
    """Deletes the older checkpoints of a run; returns them. Of each, its marker alone is read.

    The newest `keep` (>= 1) stay, and for good those whose step is a multiple of `keep_every` (0: none). One
    that is known to be damaged does not count as kept; it goes when `keep` others are newer.

    damaged: names of such; who prunes has just committed the newest, so that the only whole one is never
        deleted.
    before: the newest one of at most this step stays, too: where the rate begins to fall, from which a run
        can be made longer.
    first: one of this step stays for good: what a branch began with, from which who follows it begins.

    A reader in another process may lose the race with this: on POSIX what it has open stays readable; what
    it opens later is reported as deleted, and `latest` then knows a newer one.
    """
    assert keep >= 1
    num_kept = 0
    deleted = []
    for path in committed(run_folder, say=lambda message: None):
        step, counts = step_of(path.name), path.name not in damaged
        assert step is not None, "`committed` gives folders of saves"
        is_last_before = before is not None and step <= before
        if is_last_before and counts:
            before = None
        if num_kept >= keep:
            if not is_last_before and step != first and not (keep_every and step % keep_every == 0):
                delete(path)
                deleted.append(path)
        elif counts:
            num_kept += 1
    return deleted


def delete(path: Path) -> None:
    """Deletes a checkpoint, its commit first, so that a kill in between leaves nothing that loads. What no
    save wrote stays, and then the folder does."""
    (path / COMMITTED).unlink(missing_ok=True)
    sync_folder(path)
    for file in list(path.iterdir()):
        if is_ours(file.name) and not _is_folder(file):
            file.unlink(missing_ok=True)
    delete_empty(path)


def delete_empty(path: Path) -> None:
    """Deletes a folder unless something is in it."""
    try:
        path.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def delete_leftovers(run_folder: str | Path, seconds: float = math.inf) -> None:
    """Deletes what saves and deletions that were cut short left, unless a save of another process is under
    way: what that has written so far looks the same.

    seconds: after which the rest is left to the next start.
    """
    end = time.monotonic() + seconds
    folder = checkpoints_folder(run_folder)
    with locked(folder, alone=True) as nobody_saves:
        for path in list(folder.iterdir()) if nobody_saves else ():
            if step_of(path.name) is None or not _is_folder(path) or is_committed(path):
                continue
            files = list(path.iterdir())
            if any(not is_ours(file.name) or _is_folder(file) for file in files):
                continue
            for file in files:
                if time.monotonic() > end:
                    return
                file.unlink(missing_ok=True)
            delete_empty(path)


@contextlib.contextmanager
def locked(folder: Path, *, alone: bool = False) -> Iterator[bool]:
    """Held through a save by its first rank, and by the process that commits. alone: gives whether no save
    holds it, and keeps them out.

    Where a file system has no such locks, that of the run's folder must do.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield _is_locked(descriptor, alone)
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int, alone: bool) -> bool:
    end = time.monotonic() + ENDING_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
            continue
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
        return True


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
