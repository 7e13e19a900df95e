"""The format of a checkpoint on storage, version 2. Nothing here imports torch.

A checkpoint is a folder `RUN/checkpoints/step-00000100/`:

    pieces-00000.safetensors   the boxes of logical tensors that rank 0 wrote; one such file a writer
    pieces-00000.index         checksums of that file; one beside each
    group-00000.index          of more than LONGEST_LIST writers: what is known of the indexes of so many
    manifest.json              the tensors, by which rule each is cut, and the run's own `meta`
    COMMITTED                  written last: serial number, size and SHA-256 of the manifest

No list says where a box lies: the rule does (`Entry`, `colossus.cuts`), and the order in a file (`in_order`).
Every byte is covered: COMMITTED vouches for the manifest; that, or a group's index that it vouches for, for
each writer's index (SHA-256) and the length of its file; the index for the safetensors header (CRC32) and for
the data (CRC32 of every 512 KiB of a piece, so that reading a slice verifies no more than it needs).

An index is also what tells, while a save is under way, that its writer is done (see `index.DONE`);
`pieces-RRRRR.failed` that it has failed. Each file and folder is synced before the next is begun, no step
depends on a rename, no folder is written twice, and nothing is left to be done after COMMITTED: a checkpoint
without it does not exist. Whatever has another name is somebody else's: it is neither read nor deleted.

The *serial* number grows with every save of a run. It, not the step, says which checkpoint is the newest:
a run that fell back from a damaged checkpoint of step 100 to step 50 goes on from its new step 60.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossus.cuts import Cut
from colossus.errors import MachineError
from colossus.untrusted import num_bytes, read_file

FORMAT = 2
# Whoever reads a part of a chunk reads all of it, and neighbours in another layout read it twice: of Llama
# 3.1 405B, from 128 shards in 16 stages into 192 in 8, 2.4 times the data by chunks of 4 MiB. Smaller ones
# than these would make checksums more than the 50 MB that may describe such a checkpoint.
CHUNK_BYTES = 512 << 10
MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"
LONGEST_LIST = (
    64  # of files that one process waits for or vouches for, while groups of so many are few enough
)
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""Bytes of an element, by safetensors' name of the type."""

Key = tuple[str, str]
"""What a logical tensor is called: its name and its kind ("weight", "buffer", "exp_avg", ...)."""

_FOLDER = re.compile(r"step-(\d{8,18})(?:\.(?:[2-9]|[1-9]\d{1,8}))?", re.ASCII)
_OURS = re.compile(
    r"pieces-\d{5,9}\.(?:safetensors|index|failed|json)|group-\d{5,9}\.(?:index|failed)", re.ASCII
)
_COMMITTED_LINE = re.compile(r"colossus-checkpoint serial=(\d{12}) bytes=(\d{12}) sha256=([0-9a-f]{64})\n")
_COMMITTED_BYTES = 131  # of every marker: a shorter one is torn


class DamagedCheckpoint(MachineError):
    """A checkpoint is not whole: not committed, truncated, or changed since it was written."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a logical tensor, as it lies in one file: row-major, little-endian."""

    file: str
    offset: tuple[int, ...]  # of the box in the logical tensor
    shape: tuple[int, ...]
    begin: int  # first byte in the file
    checksums: tuple[int, ...]  # CRC32 of every CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class Entry:
    """A logical tensor, and the rule by which it is cut over its writers.

    The part at some places on the axes of `cuts` is `first` + the sum of place x stride's to write.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    first: int = 0
    cuts: tuple[Cut, ...] = ()

    @property
    def key(self) -> Key:
        return self.name, self.kind

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def writer(self, places: Iterable[int]) -> int:
        return self.first + sum(p * cut.stride for p, cut in zip(places, self.cuts, strict=True))


def in_order(entry: Entry) -> tuple[int, str, str]:
    """What pieces are sorted by in a file: the longest elements first, so that each is aligned."""
    return -ITEM_BYTES[entry.dtype], entry.name, entry.kind


@dataclass(frozen=True, slots=True)
class File:
    """A file of pieces: its length, and the checksum of the header in front of them."""

    bytes: int
    header_bytes: int
    header_checksum: int


@dataclass(frozen=True, slots=True)
class Vouched:
    """What is known of the index of a writer, or of a group: its SHA-256, and the bytes of the files of
    pieces that it is of."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Writers:
    """Those of a checkpoint: how many, how many of them a group has (1: there are no groups), and what the
    manifest knows of each group."""

    num: int
    group: int
    vouched: tuple[Vouched, ...]


@dataclass(frozen=True, slots=True)
class Lists:
    """What a manifest of format 1 has instead of rules: each file, and each piece."""

    files: dict[str, File]
    pieces: dict[Key, tuple[Piece, ...]]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint holds. `meta` is the run's own: plain JSON."""

    step: int
    serial: int
    meta: dict[str, Any]
    tensors: dict[Key, Entry]
    source: Writers | Lists
    chunk_bytes: int = CHUNK_BYTES
    format: int = FORMAT

    @property
    def num_bytes(self) -> int:
        """Of all files of pieces."""
        of = self.source.vouched if isinstance(self.source, Writers) else self.source.files.values()
        return sum(each.bytes for each in of)


def group_size(num_writers: int) -> int:
    """How many writers one group has: each process that waits for files waits for about as many."""
    return max(LONGEST_LIST, math.isqrt(max(num_writers - 1, 0)) + 1)


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


def index_name(rank: int) -> str:
    return f"pieces-{rank:05d}.index"


def group_name(group: int) -> str:
    return f"group-{group:05d}.index"


def failure_name(index: str) -> str:
    """Of the file that is there instead of an index where its writer has failed."""
    return index.removesuffix(".index") + ".failed"


def is_ours(name: str) -> bool:
    """Whether a save gives such a name to a file of a checkpoint."""
    return name in (MANIFEST, COMMITTED) or bool(_OURS.fullmatch(name))


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
    return int(read_marker(path).group(1))


def read_marker(path: Path) -> re.Match[str]:
    """The marker: serial number, bytes and SHA-256 of the manifest. Raises DamagedCheckpoint."""
    if not is_committed(path):
        raise DamagedCheckpoint(f"{path} has no {COMMITTED}: its save was cut short, or it is being deleted")
    marker = _COMMITTED_LINE.fullmatch(read_bytes(path / COMMITTED, 2 * _COMMITTED_BYTES).decode("latin-1"))
    if marker is None:
        raise DamagedCheckpoint(f"{path / COMMITTED} changed since it was written")
    return marker


def read_bytes(path: Path, limit: int) -> bytes:
    """A file of a checkpoint. Raises DamagedCheckpoint."""
    try:
        return read_file(path, limit)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from error


def check_size(path: Path, size: int) -> None:
    """Raises DamagedCheckpoint unless a file of a checkpoint is there, as long as it was written."""
    try:
        found = num_bytes(path)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from error
    if found != size:
        raise DamagedCheckpoint(f"{path} has {found} bytes instead of {size}")


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
