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
from collections.abc import Callable, Iterator
from pathlib import Path

from colossus.checkpoints.find import committed, verify
from colossus.checkpoints.format import (
    COMMITTED,
    DamagedCheckpoint,
    checkpoints_folder,
    is_committed,
    is_ours,
    read_manifest,
    step_of,
    sync_folder,
)
from colossus.errors import UserError


def is_whole(path: Path, most_bytes: float = math.inf) -> bool:
    """Whether every byte of a checkpoint is as it was written. Reads them all, unless there are more than
    `most_bytes`: then sizes have to do."""
    try:
        if read_manifest(path).num_bytes <= most_bytes:
            verify(path)
    except DamagedCheckpoint:
        return False
    except UserError:  # of a newer format: not ours to judge
        return True
    return True


def prune(
    run_folder: str | Path,
    keep: int,
    keep_every: int = 0,
    counts: Callable[[Path], bool] = is_whole,
    before: int | None = None,
    first: int | None = None,
) -> list[Path]:
    """Deletes the older checkpoints of a run; returns them.

    The newest `keep` (>= 1) whole ones stay, and for good those whose step is a multiple of `keep_every`
    (0: none). A damaged one does not count as kept; it goes when `keep` whole ones are newer. So the only
    whole one is never deleted.

    counts: whether one is whole; who knows of some need not read them.
    before: the newest whole one of at most this step stays, too: where the rate begins to fall, from which a
        run can be made longer.
    first: one of this step stays for good: what a branch began with, from which who follows it begins.

    A reader in another process may lose the race with this: on POSIX what it has open stays readable; what
    it opens later is reported as deleted, and `latest` then knows a newer one.
    """
    assert keep >= 1
    num_whole = 0
    deleted = []
    for path in committed(run_folder, say=lambda message: None):
        step = step_of(path.name)
        assert step is not None, "`committed` gives folders of saves"
        is_last_before = before is not None and step <= before
        if is_last_before and counts(path):
            before = None
        if num_whole >= keep:
            if not is_last_before and step != first and not (keep_every and step % keep_every == 0):
                delete(path)
                deleted.append(path)
        elif counts(path):
            num_whole += 1
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
    """Held through a save by its first rank. alone: gives whether no save holds it, and keeps them out.

    Where a file system has no such locks, that of the run's folder must do.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        free = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError:
            free = False
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
        yield free
    finally:
        os.close(descriptor)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
