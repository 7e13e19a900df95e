"""Writes one rank's pieces of a checkpoint: a safetensors file, streamed, with checksums."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from colossus.checkpoints.format import CHUNK_BYTES, ITEM_BYTES, Entry, File, Key, Piece, new_file


class Writable(Protocol):
    """A box of a logical tensor, and its row-major bytes, one part after the other."""

    @property
    def key(self) -> Key: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logical tensor."""

    @property
    def offset(self) -> tuple[int, ...]: ...
    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the box."""

    @property
    def num_bytes(self) -> int: ...
    def parts(self) -> Iterable[memoryview]: ...


def write_shards(path: Path, shards: Sequence[Writable]) -> tuple[File, list[Entry]]:
    """Writes shards to a new safetensors file, on storage when this returns; where that fails, none is left.

    Returns what the manifest says of the file, and of each tensor the piece that is in it.
    """
    shards = sorted(shards, key=lambda shard: -ITEM_BYTES[shard.dtype])  # so that each is aligned
    header, begins = _header(shards)
    entries = []
    with new_file(path) as descriptor:
        _write(descriptor, memoryview(header))
        for shard, begin in zip(shards, begins, strict=True):
            checksums = _write_parts(descriptor, shard.parts())
            piece = Piece(path.name, _name_in_file(shard), shard.offset, shard.sizes, begin, checksums)
            entries.append(Entry(*shard.key, shard.dtype, shard.shape, (piece,)))
        size = os.fstat(descriptor).st_size
    return File(size, len(header), zlib.crc32(header)), entries


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


def _header(shards: Sequence[Writable]) -> tuple[bytes, list[int]]:
    """The header of a safetensors file, and where in the file each tensor begins."""
    tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = [], 0
    for shard in shards:
        begins.append(end)
        end += shard.num_bytes
        tree[_name_in_file(shard)] = {
            "dtype": shard.dtype,
            "shape": list(shard.sizes),
            "data_offsets": [begins[-1], end],
        }
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + begin for begin in begins]


def _name_in_file(shard: Writable) -> str:
    name, kind = shard.key
    return f"{kind}/{name}"


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
