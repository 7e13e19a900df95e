"""How the ranks of a save come together without collectives: each announces its part on storage."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossus.checkpoints.format import (
    COMMITTED,
    MANIFEST,
    Entry,
    File,
    Key,
    Manifest,
    Piece,
    announcement_name,
    check_tiling,
    committed_line,
    encode,
    entries_from_json,
    entries_to_json,
    is_committed,
    pieces_name,
    write_synced,
)
from colossus.errors import MachineError


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank wrote of a checkpoint."""

    name: str  # of its file
    file: File
    entries: list[Entry]
    held: list[Key]  # tensors that it holds and that another rank writes


def announce(folder: Path, rank: int, save_id: str, part: Part) -> None:
    """Tells rank 0 that this rank's part is on storage."""
    tree = {
        "save": save_id,
        "file": dataclasses.asdict(part.file),
        "entries": entries_to_json(part.entries),
        "held": part.held,
    }
    write_synced(folder / announcement_name(rank), json.dumps(tree, separators=(",", ":")).encode())


def announce_failure(folder: Path, rank: int, save_id: str, message: str) -> None:
    """Tells rank 0, if that can be done, not to wait for this rank."""
    announcement = json.dumps({"save": save_id, "failed": message}).encode()
    with contextlib.suppress(OSError):  # the storage that failed is also the way to tell
        write_synced(folder / announcement_name(rank), announcement)


def collect(
    folder: Path, save_id: str, world_size: int, patience_seconds: float, cancelled: threading.Event
) -> list[Part]:
    """Waits for the parts of ranks 1, 2, ... Raises MachineError where one failed or does not come, or it is
    `cancelled`."""
    deadline = time.monotonic() + patience_seconds
    parts: list[Part] = []
    pause = 0.005
    while len(parts) < world_size - 1:
        rank = len(parts) + 1
        part = _read(folder, rank, save_id)
        if part is not None:
            parts.append(part)
            pause = 0.005
            continue
        if time.monotonic() > deadline:
            raise MachineError(f"rank {rank} wrote no part in {patience_seconds:.0f} s")
        if cancelled.wait(pause):
            raise MachineError("another rank could not write its part")
        pause = min(2 * pause, 0.5)
    return parts


def merge(parts: list[Part]) -> dict[Key, Entry]:
    """One entry a tensor, with the pieces of all ranks; of equal boxes the first counts.

    Raises MachineError where the pieces of a tensor that some rank holds do not make it up.
    """
    tensors: dict[Key, Entry] = {}
    boxes: dict[Key, dict[tuple[int, ...], Piece]] = {}
    for entry in (entry for part in parts for entry in part.entries):
        key = (entry.name, entry.kind)
        first = tensors.setdefault(key, entry)
        if (first.shape, first.dtype) != (entry.shape, entry.dtype):
            raise MachineError(f"ranks disagree about the shape or type of {entry.name} ({entry.kind})")
        for piece in entry.pieces:
            if math.prod(piece.shape) or not math.prod(entry.shape):
                boxes.setdefault(key, {}).setdefault((*piece.offset, *piece.shape), piece)
    for name, kind in (key for part in parts for key in part.held):
        if (name, kind) not in tensors:
            raise MachineError(f"no rank wrote {name} ({kind})")
    merged = {
        key: dataclasses.replace(entry, pieces=tuple(boxes.get(key, {}).values()))
        for key, entry in tensors.items()
    }
    for entry in merged.values():
        check_tiling(entry)
    return merged


def commit(folder: Path, step: int, serial: int, meta: dict[str, Any], parts: list[Part]) -> Manifest:
    """Makes a checkpoint of parts that are on storage. Raises MachineError where they are not whole."""
    manifest = Manifest(
        step=step,
        serial=serial,
        meta=meta,
        files={part.name: part.file for part in parts},
        tensors=merge(parts),
    )
    data = encode(manifest)
    write_synced(folder / MANIFEST, data)
    try:
        write_synced(folder / COMMITTED, committed_line(serial, data).encode())
    except BaseException:
        if not is_committed(folder):
            with contextlib.suppress(OSError):
                (folder / MANIFEST).unlink()
        raise
    return manifest


def forget(folder: Path, world_size: int) -> None:
    """Removes the announcements of a save that is committed."""
    for rank in range(1, world_size):
        (folder / announcement_name(rank)).unlink(missing_ok=True)


def take_back(folder: Path, save_id: str, world_size: int) -> None:
    """Deletes the parts of other ranks that were announced for a save which is given up."""
    for rank in range(1, world_size):
        try:
            theirs = _announcement(folder, rank, save_id)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue
        if theirs is not None:
            if "failed" not in theirs:  # else the rank has deleted its part itself
                (folder / pieces_name(rank)).unlink(missing_ok=True)
            (folder / announcement_name(rank)).unlink(missing_ok=True)


def _announcement(folder: Path, rank: int, save_id: str) -> dict[str, Any] | None:
    """What a rank announced for this save; None: for another one."""
    tree = json.loads((folder / announcement_name(rank)).read_bytes())
    return tree if tree["save"] == save_id else None


def _read(folder: Path, rank: int, save_id: str) -> Part | None:
    """A rank's announcement; None while there is no whole one of this save."""
    try:
        tree = _announcement(folder, rank, save_id)
    except (FileNotFoundError, ValueError):
        return None
    if tree is None:
        return None
    if "failed" in tree:
        raise MachineError(f"rank {rank}: {tree['failed']}")
    held = [(name, kind) for name, kind in tree["held"]]
    return Part(pieces_name(rank), File(**tree["file"]), entries_from_json(tree["entries"]), held)
