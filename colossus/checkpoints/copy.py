"""Makes a checkpoint the newest one of a run: where it goes on from an earlier step, or from another run."""

from __future__ import annotations

import os
import shutil
from itertools import count
from pathlib import Path
from typing import Any

from colossus.checkpoints.claims import committed
from colossus.checkpoints.find import verify
from colossus.checkpoints.format import (
    COMMITTED,
    MANIFEST,
    checkpoints_folder,
    committed_line,
    folder_name,
    read_serial,
    sync_folder,
    write_synced,
)
from colossus.checkpoints.manifest import with_meta
from colossus.checkpoints.pieces import pieces_of


def copy_checkpoint(source: Path, run_folder: Path, meta: dict[str, Any], *, shared: bool = False) -> Path:
    """Copies a checkpoint, verified, into a run, where it is the newest; returns it. Nobody else may write to
    the run.

    meta: beside the tensors, over what the source says.
    shared: both may be the same files on storage, where that can be: those of a checkpoint never change.

    Raises:
        DamagedCheckpoint: the source is not whole. OSError: the storage failed; nothing is committed.
    """
    manifest = verify(source)
    folder = checkpoints_folder(run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    newest = next(iter(committed(run_folder, say=lambda message: None)), None)
    serial = read_serial(newest) + 1 if newest is not None else 1
    target = _made(folder, manifest.step)
    for name in pieces_of(source, manifest).names():
        _copy(source / name, target / name, shared)
    sync_folder(target)
    sync_folder(folder)
    data = with_meta((source / MANIFEST).read_bytes(), serial, meta)
    write_synced(target / MANIFEST, data)
    write_synced(target / COMMITTED, committed_line(serial, data).encode())
    return target


def _made(folder: Path, step: int) -> Path:
    """A new folder, named as a save would name it."""
    for n in count(1):
        path = folder / folder_name(step, n)
        if not path.exists():
            path.mkdir()
            return path
    raise AssertionError("numbers end")


def _copy(source: Path, target: Path, shared: bool) -> None:
    if shared:
        try:
            target.hardlink_to(source)
            return
        except OSError:  # a file system without links
            pass
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())
