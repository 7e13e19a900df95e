"""Writes one rank's pieces of a checkpoint: a safetensors file, streamed, with checksums."""

from __future__ import annotations

import json
import os
import zlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from colossus.checkpoints.format import CHUNK_BYTES, Entry, File, Key, in_order, new_file, pieces_name
from colossus.checkpoints.index import Index, digest


class Writable(Protocol):
    """A box of a logical tensor, and its row-major bytes, one part after the other."""

    @property
    def entry(self) -> Entry: ...
    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the box."""

    @property
    def num_bytes(self) -> int: ...
    def parts(self) -> Iterable[memoryview]: ...


def write_shards(
    folder: Path, shards: Sequence[Writable], rank: int, save_id: str = "", held: Iterable[Key] = ()
) -> Index:
    """Writes shards to this rank's new safetensors file, on storage when this returns; where that fails, none
    is left. Returns what its index says of it, which is not written yet.

    held: see `Index`.
    """
    shards = sorted(shards, key=lambda shard: in_order(shard.entry))
    header = file_header(shards)
    checksums = array("I")
    with new_file(folder / pieces_name(rank)) as descriptor:
        _write(descriptor, memoryview(header))
        for shard in shards:
            checksums.extend(_write_parts(descriptor, shard.parts()))
        size = os.fstat(descriptor).st_size
    entries = [shard.entry for shard in shards]
    listed = tuple(entry for entry in entries if entry.first == rank)
    return Index(
        save_id, File(size, len(header), zlib.crc32(header)), digest(entries), listed, tuple(held), checksums
    )


def _write_parts(descriptor: int, parts: Iterable[memoryview]) -> tuple[int, ...]:
    """Writes the bytes of a tensor; returns the checksum of every CHUNK_BYTES of them."""
    checksums, checksum, room = list[int](), 0, CHUNK_BYTES
    for data in parts:
        while data:
            chunk, data = data[:room], data[room:]
            checksum, room = zlib.crc32(chunk, checksum), room - len(chunk)
            _write(descriptor, chunk)
            if not room:
                checksums.append(checksum)
                checksum, room = 0, CHUNK_BYTES
    return (*checksums, checksum) if room < CHUNK_BYTES else tuple(checksums)


def file_header(shards: Sequence[Writable]) -> bytes:
    """The header of a safetensors file."""
    tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for shard in shards:
        begin, end = end, end + shard.num_bytes
        tree[f"{shard.entry.kind}/{shard.entry.name}"] = {
            "dtype": shard.entry.dtype,
            "shape": list(shard.sizes),
            "data_offsets": [begin, end],
        }
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
