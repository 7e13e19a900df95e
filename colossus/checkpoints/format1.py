"""Reads manifests of format 1, which list every piece of every tensor. Nothing here imports torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from colossus.checkpoints.format import (
    ITEM_BYTES,
    DamagedCheckpoint,
    Entry,
    File,
    Key,
    Lists,
    Manifest,
    Piece,
)

MAX_DIMENSIONS = 64
MAX_HEADER_BYTES = 100_000_000  # of safetensors; the limit of its own library
MAX_CHUNK_BYTES = 64 << 20
_PIECES = re.compile(r"pieces-\d{5,9}\.safetensors", re.ASCII)


def decode_lists(tree: dict[str, Any]) -> Manifest:
    """The manifest from its parsed form; whatever its numbers say can be read without a further look.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none, or contradicts itself.
    """
    tensors, pieces = dict[Key, Entry](), dict[Key, tuple[Piece, ...]]()
    for each in tree["tensors"]:
        entry = Entry(each["name"], each["kind"], each["dtype"], tuple(each["shape"]))
        tensors[entry.key] = entry
        pieces[entry.key] = tuple(
            Piece(
                file=piece["file"],
                offset=tuple(piece["offset"]),
                shape=tuple(piece["shape"]),
                begin=piece["begin"],
                checksums=tuple(piece["checksums"]),
            )
            for piece in each["pieces"]
        )
    manifest = Manifest(
        step=natural(tree["step"]),
        serial=natural(tree["serial"]),
        meta=tree["meta"],
        tensors=tensors,
        source=Lists({name: File(**file) for name, file in tree["files"].items()}, pieces),
        chunk_bytes=natural(tree["chunk_bytes"]),
        format=tree["format"],
    )
    _check(manifest, len(tree["tensors"]))
    return manifest


def natural(value: Any) -> int:
    """Raises ValueError where a value is no natural number."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} where a natural number is expected")
    return value


def demand(holds: bool, what: str) -> None:
    """Raises ValueError unless it holds."""
    if not holds:
        raise ValueError(what)


def check_all(manifest: Manifest, num_entries: int) -> None:
    """Raises ValueError where what manifests of any format have is none that a save writes."""
    demand(isinstance(manifest.meta, dict), "meta is no table")
    demand(0 < manifest.chunk_bytes <= MAX_CHUNK_BYTES, f"chunk_bytes is {manifest.chunk_bytes}")
    demand(len(manifest.tensors) == num_entries, "a tensor occurs twice")
    for entry in manifest.tensors.values():
        demand(isinstance(entry.name, str) and isinstance(entry.kind, str), "a tensor has no name")
        demand(entry.dtype in ITEM_BYTES, f"{title(entry)} is of the type {entry.dtype!r:.40}")
        demand(len(entry.shape) <= MAX_DIMENSIONS, f"{title(entry)} has too many dimensions")
        for size in entry.shape:
            natural(size)


def title(entry: Entry) -> str:
    """What a tensor is called in messages."""
    return f"{entry.name!r:.80} ({entry.kind!r:.40})"


def _check(manifest: Manifest, num_entries: int) -> None:
    check_all(manifest, num_entries)
    assert isinstance(manifest.source, Lists)
    room = {}
    for name, file in manifest.source.files.items():
        demand(_PIECES.fullmatch(name) is not None, f"{name!r:.80} is no name of a file of pieces")
        room[name] = natural(file.bytes) - natural(file.header_bytes)
        natural(file.header_checksum)
        demand(room[name] >= 0 and file.header_bytes <= MAX_HEADER_BYTES, f"the header of {name} is too long")
    for entry in manifest.tensors.values():
        for piece in manifest.source.pieces[entry.key]:
            ranks = len(entry.shape) == len(piece.offset) == len(piece.shape)
            demand(ranks and piece.file in room, f"a piece of {title(entry)} is of no file or no box of it")
            for size, begin, length in zip(entry.shape, piece.offset, piece.shape, strict=True):
                demand(natural(begin) + natural(length) <= size, f"a piece of {title(entry)} sticks out")
            size_bytes = math.prod(piece.shape) * ITEM_BYTES[entry.dtype]
            room[piece.file] -= size_bytes
            file = manifest.source.files[piece.file]
            lies_within = file.header_bytes <= natural(piece.begin) <= file.bytes - size_bytes
            demand(
                lies_within and room[piece.file] >= 0,
                f"a piece of {title(entry)} lies outside of {piece.file}",
            )
            num_chunks = -(-size_bytes // manifest.chunk_bytes)
            demand(
                len(piece.checksums) == num_chunks and all(type(sum_) is int for sum_ in piece.checksums),
                f"a piece of {title(entry)} has not one checksum for each {manifest.chunk_bytes} bytes",
            )


def check_tiling(entry: Entry, pieces: Sequence[Piece], where: str = "") -> None:
    """Raises DamagedCheckpoint unless the pieces cover each element of the tensor exactly once."""
    if not _tiles([(p.offset, p.shape) for p in pieces if math.prod(p.shape)], entry.shape, 0):
        raise DamagedCheckpoint(
            f"{where}the pieces of {entry.name} ({entry.kind}) do not make up {entry.shape}"
        )


def _tiles(boxes: Sequence[tuple[Sequence[int], Sequence[int]]], shape: Sequence[int], axis: int) -> bool:
    """Whether boxes on a grid (cut along axis 0 first, then each slab along axis 1, ...) fill `shape`."""
    if not math.prod(shape):
        return not boxes
    if axis == len(shape):
        return len(boxes) == 1
    slabs: dict[tuple[int, int], list[tuple[Sequence[int], Sequence[int]]]] = {}
    for offset, sizes in boxes:
        slabs.setdefault((offset[axis], sizes[axis]), []).append((offset, sizes))
    end = 0
    for (begin, size), slab in sorted(slabs.items()):
        if begin != end or not _tiles(slab, shape, axis + 1):
            return False
        end = begin + size
    return end == shape[axis]
