"""Writes one rank's pieces of a checkpoint: a safetensors file, streamed, with checksums."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

from colossus.checkpoints.format import CHUNK_BYTES, ITEM_BYTES, Entry, File, Piece, sync_folder
from colossus.checkpoints.shards import Shard, bytes_of


def write_shards(path: Path, shards: list[Shard]) -> tuple[File, list[Entry]]:
    """Writes shards to a new safetensors file, on storage when this returns.

    Returns what the manifest says of the file, and of each tensor the piece that is in it.
    """
    shards = sorted(shards, key=lambda shard: -ITEM_BYTES[shard.dtype])  # so that each is aligned
    header, begins = _header(shards)
    entries = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        _write(descriptor, memoryview(header))
        for shard, begin in zip(shards, begins, strict=True):
            checksums = []
            data = bytes_of(shard.values)
            for first in range(0, len(data), CHUNK_BYTES):
                chunk = data[first : first + CHUNK_BYTES]
                checksums.append(zlib.crc32(chunk))
                _write(descriptor, chunk)
            piece = Piece(
                path.name,
                _name_in_file(shard),
                shard.offset,
                tuple(shard.values.shape),
                begin,
                tuple(checksums),
            )
            entries.append(Entry(*shard.key, shard.dtype, shard.shape, (piece,)))
        os.fsync(descriptor)
        size = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    sync_folder(path.parent)
    return File(size, len(header), zlib.crc32(header)), entries


def _header(shards: list[Shard]) -> tuple[bytes, list[int]]:
    """The header of a safetensors file, and where in the file each tensor begins."""
    tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = [], 0
    for shard in shards:
        begins.append(end)
        end += shard.num_bytes
        tree[_name_in_file(shard)] = {
            "dtype": shard.dtype,
            "shape": list(shard.values.shape),
            "data_offsets": [begins[-1], end],
        }
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + begin for begin in begins]


def _name_in_file(shard: Shard) -> str:
    name, kind = shard.key
    return f"{kind}/{name}"


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
