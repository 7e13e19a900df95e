"""Makes a checkpoint the newest one of a run: where it goes on from an earlier step, or from another run."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from colossus.checkpoints.find import committed, verify
from colossus.checkpoints.format import (
    COMMITTED,
    MANIFEST,
    checkpoints_folder,
    committed_line,
    encode,
    read_serial,
    sync_folder,
    write_synced,
)


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
    for name in manifest.files:
        _copy(source / name, target / name, shared)
    sync_folder(target)
    sync_folder(folder)
    data = encode(replace(manifest, serial=serial, meta=manifest.meta | meta))
    write_synced(target / MANIFEST, data)
    write_synced(target / COMMITTED, committed_line(serial, data).encode())
    return target


def _made(folder: Path, step: int) -> Path:
    """A new folder, named as a save would name it."""
    name = f"step-{step:08d}"
    for end in chain([""], (f".{n}" for n in count(2))):
        path = folder / (name + end)
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
