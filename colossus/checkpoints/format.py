"""The format of a checkpoint on storage, version 1. Nothing here imports torch.

A checkpoint is a folder `RUN/checkpoints/step-00000100/`:

    pieces-00000.safetensors   the boxes of logical tensors that rank 0 held; one such file a rank
    manifest.json              what is where, with checksums, and the run's own `meta`
    COMMITTED                  written last: serial number, size and SHA-256 of the manifest

While a save of several ranks is under way, `pieces-RRRRR.json` tells rank 0 what rank R wrote; they are
removed after the commit. Every byte is covered: COMMITTED vouches for the manifest, the manifest for each
file's length, for its safetensors header (CRC32) and for its data (CRC32 of every 4 MiB of a piece, so that
reading a slice verifies no more than it needs). Each file and folder is synced before the next is begun, no
step depends on a rename, and no folder is written twice: a checkpoint without COMMITTED does not exist.
Whatever has another name is somebody else's: it is neither read nor deleted.

The *serial* number grows with every save of a run. It, not the step, says which checkpoint is the newest:
a run that fell back from a damaged checkpoint of step 100 to step 50 goes on from its new step 60.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossus.errors import MachineError, UserError
from colossus.untrusted import MIB, num_bytes, parse_json, read_file

FORMAT = 1
CHUNK_BYTES = 4 << 20
MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""Bytes of an element, by safetensors' name of the type."""

Key = tuple[str, str]
"""What a logical tensor is called: its name and its kind ("weight", "buffer", "exp_avg", ...)."""

MAX_MANIFEST_BYTES = 2048 * MIB
MAX_DIMENSIONS = 64
MAX_HEADER_BYTES = 100_000_000  # of safetensors; the limit of its own library
MAX_CHUNK_BYTES = 64 * MIB
_FOLDER = re.compile(r"step-(\d{8,18})(?:\.(?:[2-9]|[1-9]\d{1,8}))?", re.ASCII)
_PIECES = re.compile(r"pieces-\d{5,9}\.safetensors", re.ASCII)
_ANNOUNCEMENT = re.compile(r"pieces-\d{5,9}\.json", re.ASCII)
_COMMITTED_LINE = re.compile(r"colossus-checkpoint serial=(\d{12}) bytes=(\d{12}) sha256=([0-9a-f]{64})\n")
_COMMITTED_BYTES = 131  # of every marker: a shorter one is torn


class DamagedCheckpoint(MachineError):
    """A checkpoint is not whole: not committed, truncated, or changed since it was written."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a logical tensor, as it lies in one file: row-major, little-endian."""

    file: str
    key: str  # in the safetensors header
    offset: tuple[int, ...]  # of the box in the logical tensor
    shape: tuple[int, ...]
    begin: int  # first byte in the file
    checksums: tuple[int, ...]  # CRC32 of every CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class Entry:
    """A logical tensor and the pieces that tile it."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class File:
    """A file of pieces: its length, and the checksum of the header in front of them."""

    bytes: int
    header_bytes: int
    header_checksum: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint holds. `meta` is the run's own: plain JSON."""

    step: int
    serial: int
    meta: dict[str, Any]
    files: dict[str, File]
    tensors: dict[Key, Entry]
    chunk_bytes: int = CHUNK_BYTES
    format: int = FORMAT

    @property
    def num_bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


def checkpoints_folder(run_folder: str | Path) -> Path:
    return Path(run_folder) / "checkpoints"


def folder_name(step: int, again: int = 1) -> str:
    """Of the checkpoint of a step; `again`: it is the so manieth of that step."""
    return f"step-{step:08d}" + (f".{again}" if again > 1 else "")


def step_of(name: str) -> int | None:
    """The step of a checkpoint, from the name of its folder; None where no save gives such a name."""
    match = _FOLDER.fullmatch(name)
    return int(match.group(1)) if match is not None else None


def pieces_name(rank: int) -> str:
    return f"pieces-{rank:05d}.safetensors"


def announcement_name(rank: int) -> str:
    return f"pieces-{rank:05d}.json"


def is_ours(name: str) -> bool:
    """Whether a save gives such a name to a file of a checkpoint."""
    return name in (MANIFEST, COMMITTED) or bool(_PIECES.fullmatch(name) or _ANNOUNCEMENT.fullmatch(name))


def encode(manifest: Manifest) -> bytes:
    """The manifest as it is stored. Raises ValueError where `meta` is not plain JSON."""
    tree = {
        "format": manifest.format,
        "step": manifest.step,
        "serial": manifest.serial,
        "chunk_bytes": manifest.chunk_bytes,
        "meta": manifest.meta,
        "files": {name: dataclasses.asdict(file) for name, file in manifest.files.items()},
        "tensors": entries_to_json(manifest.tensors.values()),
    }
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode()


def decode(data: bytes) -> Manifest:
    """The manifest from its stored form; whatever its numbers say can be read without a further look.

    Raises:
        UserError: a format newer than this program's.
        ValueError: it is none, or contradicts itself.
    """
    tree = parse_json(data)
    try:
        if _natural(tree["format"]) > FORMAT:
            raise UserError(
                f"the checkpoint is of format {tree['format']}; this version of colossus reads up to {FORMAT}"
            )
        entries = entries_from_json(tree["tensors"])
        manifest = Manifest(
            step=_natural(tree["step"]),
            serial=_natural(tree["serial"]),
            meta=tree["meta"],
            files={name: File(**file) for name, file in tree["files"].items()},
            tensors={(entry.name, entry.kind): entry for entry in entries},
            chunk_bytes=_natural(tree["chunk_bytes"]),
            format=tree["format"],
        )
        _check(manifest, len(entries))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} at {error}") from None
    return manifest


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} where a natural number is expected")
    return value


def _check(manifest: Manifest, num_entries: int) -> None:
    """Raises ValueError where a manifest is none that a save writes."""

    def demand(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(what)

    demand(isinstance(manifest.meta, dict), "meta is no table")
    demand(0 < manifest.chunk_bytes <= MAX_CHUNK_BYTES, f"chunk_bytes is {manifest.chunk_bytes}")
    demand(len(manifest.tensors) == num_entries, "a tensor occurs twice")
    room = {}
    for name, file in manifest.files.items():
        demand(_PIECES.fullmatch(name) is not None, f"{name!r:.80} is no name of a file of pieces")
        room[name] = _natural(file.bytes) - _natural(file.header_bytes)
        _natural(file.header_checksum)
        demand(room[name] >= 0 and file.header_bytes <= MAX_HEADER_BYTES, f"the header of {name} is too long")
    for entry in manifest.tensors.values():
        demand(isinstance(entry.name, str) and isinstance(entry.kind, str), "a tensor has no name")
        title = f"{entry.name!r:.80} ({entry.kind!r:.40})"
        demand(entry.dtype in ITEM_BYTES, f"{title} is of the type {entry.dtype!r:.40}")
        for piece in entry.pieces:
            ranks = len(entry.shape) == len(piece.offset) == len(piece.shape) <= MAX_DIMENSIONS
            demand(ranks and piece.file in room, f"a piece of {title} is of no file or no box of it")
            for size, begin, length in zip(entry.shape, piece.offset, piece.shape, strict=True):
                demand(_natural(begin) + _natural(length) <= _natural(size), f"a piece of {title} sticks out")
            size_bytes = math.prod(piece.shape) * ITEM_BYTES[entry.dtype]
            room[piece.file] -= size_bytes
            file = manifest.files[piece.file]
            lies_within = file.header_bytes <= _natural(piece.begin) <= file.bytes - size_bytes
            demand(lies_within and room[piece.file] >= 0, f"a piece of {title} lies outside of {piece.file}")
            num_chunks = -(-size_bytes // manifest.chunk_bytes)
            demand(
                len(piece.checksums) == num_chunks and all(type(sum_) is int for sum_ in piece.checksums),
                f"a piece of {title} has not one checksum for each {manifest.chunk_bytes} bytes",
            )


def entries_to_json(entries: Any) -> list[dict[str, Any]]:
    return [dataclasses.asdict(entry) for entry in entries]


def entries_from_json(tree: list[dict[str, Any]]) -> list[Entry]:
    return [
        Entry(
            name=entry["name"],
            kind=entry["kind"],
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            pieces=tuple(
                Piece(
                    file=piece["file"],
                    key=piece["key"],
                    offset=tuple(piece["offset"]),
                    shape=tuple(piece["shape"]),
                    begin=piece["begin"],
                    checksums=tuple(piece["checksums"]),
                )
                for piece in entry["pieces"]
            ),
        )
        for entry in tree
    ]


def committed_line(serial: int, manifest: bytes) -> str:
    """The content of COMMITTED."""
    digest = hashlib.sha256(manifest).hexdigest()
    return f"colossus-checkpoint serial={serial:012d} bytes={len(manifest):012d} sha256={digest}\n"


def is_committed(path: Path) -> bool:
    """Whether `path` claims to be a checkpoint. A kill may leave a torn marker: that claims nothing."""
    try:
        return num_bytes(path / COMMITTED) >= _COMMITTED_BYTES
    except (OSError, ValueError):  # ValueError: a path that no file can have
        return False


def read_serial(path: Path) -> int:
    """The serial number of a committed checkpoint. Raises DamagedCheckpoint."""
    return int(_read_marker(path).group(1))


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint that is committed and whole as far as sizes tell; its data is not read.

    Raises DamagedCheckpoint, with the file at fault; UserError for a newer format.
    """
    manifest = read_claim(path)
    for name in manifest.files:
        check_size(path, name, manifest)
    return manifest


def read_claim(path: Path) -> Manifest:
    """The manifest of a committed checkpoint, of whose other files nothing is known yet. Raises as
    `read_manifest`."""
    marker = _read_marker(path)
    data = _read_bytes(path / MANIFEST, min(int(marker.group(2)), MAX_MANIFEST_BYTES))
    if committed_line(int(marker.group(1)), data) != marker.group(0):
        raise DamagedCheckpoint(f"{path / MANIFEST} changed since it was written ({COMMITTED} disagrees)")
    try:
        manifest = decode(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ValueError as error:
        raise DamagedCheckpoint(f"{path / MANIFEST} is no manifest: {error}") from None
    if manifest.serial != int(marker.group(1)):
        raise DamagedCheckpoint(f"{path / COMMITTED} changed since it was written")
    return manifest


def check_size(path: Path, name: str, manifest: Manifest) -> None:
    """Raises DamagedCheckpoint unless a file of the checkpoint is there, as long as it was written."""
    try:
        found = num_bytes(path / name)
    except OSError as error:
        raise DamagedCheckpoint(f"{path / name}: {error.strerror}") from error
    if found != manifest.files[name].bytes:
        raise DamagedCheckpoint(f"{path / name} has {found} bytes instead of {manifest.files[name].bytes}")


def _read_marker(path: Path) -> re.Match[str]:
    if not is_committed(path):
        raise DamagedCheckpoint(f"{path} has no {COMMITTED}: its save was cut short, or it is being deleted")
    marker = _COMMITTED_LINE.fullmatch(_read_bytes(path / COMMITTED, 2 * _COMMITTED_BYTES).decode("latin-1"))
    if marker is None:
        raise DamagedCheckpoint(f"{path / COMMITTED} changed since it was written")
    return marker


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        return read_file(path, limit)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from error


def check_tiling(entry: Entry, path: Path | None = None) -> None:
    """Raises DamagedCheckpoint unless the pieces cover each element of the tensor exactly once."""
    if not _tiles([(p.offset, p.shape) for p in entry.pieces if math.prod(p.shape)], entry.shape, 0):
        where = f"{path}: " if path is not None else ""
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


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new small file; its bytes and its name are on storage when this returns. Where that fails,
    nothing is left of it."""
    with new_file(path) as descriptor:
        while data:
            data = data[os.write(descriptor, data) :]


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[int]:
    """The descriptor of a new file, which is on storage when this is left; deleted where something fails.

    Raises:
        FileExistsError: somebody else's is there, which stays as it is.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable, where the file system knows how to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
