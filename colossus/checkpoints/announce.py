"""How the writers of a save come together without collectives: each tells on storage that it is done.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

from colossus.checkpoints.format import (
    Entry,
    Key,
    failure_name,
    group_name,
    group_size,
    index_name,
    write_synced,
)
from colossus.checkpoints.index import (
    DONE,
    Group,
    Index,
    Row,
    decode_group,
    decode_index,
    encode_group,
    encode_index,
    split,
)
from colossus.errors import MachineError

FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.05  # seconds between two looks at what is waited for

Pause = Callable[[float], None]
"""Waits so many seconds at most. Raises MachineError where nothing is to be waited for any more."""


class Told(Protocol):
    @property
    def save(self) -> str: ...


T = TypeVar("T", bound=Told)


def announce(folder: Path, rank: int, index: Index) -> None:
    """Tells that this rank's file is on storage: by its index, which stays."""
    _announce(folder / index_name(rank), encode_index(index))


def announce_failure(folder: Path, index: str, save_id: str, message: str) -> None:
    """Tells, if that can be done, that the index named so will not come."""
    announcement = json.dumps({"save": save_id, "failed": message}).encode()
    with contextlib.suppress(OSError):  # the storage that failed is also the way to tell
        write_synced(folder / failure_name(index), announcement)


def gather(
    folder: Path, save_id: str, num_writers: int, group: int, patience_seconds: float, pause: Pause
) -> Group:
    """Waits for the writers of a group. Raises MachineError where one has failed or does not come."""
    size = group_size(num_writers)
    members = range(group * size, min((group + 1) * size, num_writers))
    rows, listing, held = list[Row](), list[int](), dict[Key, None]()
    names = ((f"rank {rank}", index_name(rank)) for rank in members)
    indexes = _wait_for(folder, names, save_id, decode_index, patience_seconds, pause)
    for rank, (data, index) in zip(members, indexes, strict=True):
        rows.append(Row(index.file.bytes, index.rules, hashlib.sha256(data).hexdigest()))
        listing += [rank] if index.entries else []
        held |= dict.fromkeys(index.held)
    return Group(save_id, tuple(listing), tuple(held), tuple(rows))


def listed(folder: Path, rank: int, row: Row) -> tuple[Entry, ...]:
    """The entries of which a writer is the first. Raises MachineError where its index is another by now."""
    data, _ = split((folder / index_name(rank)).read_bytes())
    if hashlib.sha256(data).hexdigest() != row.sha256:
        raise MachineError(f"{index_name(rank)} changed since it was written")
    return decode_index(data).entries


def announce_group(folder: Path, number: int, group: Group) -> bytes:
    """Tells that a group is on storage; returns its index, which stays."""
    data = encode_group(group)
    _announce(folder / group_name(number), data)
    return data


def _announce(path: Path, index: bytes) -> None:
    """Writes an index, and once that is on storage, that it is."""
    write_synced(path, index)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, DONE)
        finally:
            os.close(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def gather_groups(
    folder: Path, save_id: str, num_writers: int, patience_seconds: float, pause: Pause
) -> Iterator[tuple[bytes, Group]]:
    """Waits for all groups but the first. Raises as `gather`."""
    size = group_size(num_writers)
    names = (
        (f"the group of rank {number * size}", group_name(number))
        for number in range(1, -(-num_writers // size))
    )
    return _wait_for(folder, names, save_id, decode_group, patience_seconds, pause)


def take_back(folder: Path, save_id: str) -> None:
    """Deletes all that was announced of a save that is given up. What was not is its rank's own to delete."""
    for name in [entry.name for entry in os.scandir(folder)]:
        failed = name.endswith(".failed")
        if not failed and not name.endswith(".index"):
            continue
        try:
            data = (folder / name).read_bytes()
            head = json.loads(data.partition(b"\n")[0])
            ours = head["save"] == save_id
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if ours:
            if name.startswith("pieces-") and not failed:  # else the rank has deleted its file itself
                (folder / name.replace(".index", ".safetensors")).unlink(missing_ok=True)
            (folder / name).unlink(missing_ok=True)


def _wait_for(
    folder: Path,
    names: Iterable[tuple[str, str]],
    save_id: str,
    decode: Callable[[bytes], T],
    patience_seconds: float,
    pause: Pause,
) -> Iterator[tuple[bytes, T]]:
    """Indexes by their names, each once it is there; of each is said who writes it."""
    deadline = time.monotonic() + patience_seconds
    for who, name in names:
        seconds = FIRST_PAUSE
        while (found := _read(folder, who, name, save_id, decode)) is None:
            if time.monotonic() > deadline:
                raise MachineError(f"{who} wrote no part in {patience_seconds:.0f} s")
            pause(seconds)
            seconds = min(2 * seconds, LONGEST_PAUSE)
        yield found


def _read(
    folder: Path, who: str, name: str, save_id: str, decode: Callable[[bytes], T]
) -> tuple[bytes, T] | None:
    """None while there is no whole one of this save."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        data, is_done = split((folder / name).read_bytes())
        index = decode(data)
        if is_done and index.save == save_id:
            return data, index
    with contextlib.suppress(FileNotFoundError, ValueError):
        tree = json.loads((folder / failure_name(name)).read_bytes())
        if tree["save"] == save_id:
            raise MachineError(f"{who}: {tree['failed']}" if name.startswith("pieces-") else tree["failed"])
    return None
