"""Which checkpoint of a run to go on from. Nothing here imports torch."""

from __future__ import annotations

import io
import logging
import math
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from colossus.checkpoints.format import (
    ITEM_BYTES,
    DamagedCheckpoint,
    Manifest,
    check_tiling,
    checkpoints_folder,
    is_committed,
    read_manifest,
    read_serial,
)
from colossus.hardware.machine import available_cores

Say = Callable[[str], None]


def warn(message: str) -> None:
    """The default of `say`: standard error, unless the program set up logging otherwise."""
    logging.getLogger(__name__).warning(message)


def latest(run_folder: str | Path, say: Say = warn) -> Path | None:
    """The newest checkpoint that is committed and has all its bytes; None where nothing was ever committed.

    Damaged ones are skipped, each with one line to `say`. Data is not read: `latest_verified` does.

    Raises:
        DamagedCheckpoint: there are committed checkpoints, but none is whole.
        UserError: the newest is of a format that this program does not know.
    """
    return _newest(run_folder, read_manifest, say)


def latest_verified(run_folder: str | Path, say: Say = warn) -> Path | None:
    """As `latest`, but every byte is read and verified (8 GB/s on two cores from the page cache)."""
    return _newest(run_folder, _verify, say)


def verify(path: str | Path) -> Manifest:
    """Reads a checkpoint whole. Raises DamagedCheckpoint, naming the file and tensor at fault."""
    return _verify(Path(path))


def committed(run_folder: str | Path, say: Say = warn) -> list[Path]:
    """All that claim to be checkpoints of a run, the newest first."""
    return [path for _, path in sorted(_claims(checkpoints_folder(run_folder), say), reverse=True)]


def _claims(folder: Path, say: Say) -> Iterator[tuple[int, Path]]:
    for path in sorted(folder.glob("step-[0-9]*")) if folder.is_dir() else ():
        try:
            if is_committed(path):
                yield read_serial(path), path
        except DamagedCheckpoint as error:
            if is_committed(path):  # else it was deleted meanwhile
                say(f"skipped a damaged checkpoint: {error}")


def _newest(run_folder: str | Path, check: Callable[[Path], Manifest], say: Say) -> Path | None:
    told: list[str] = []

    def tell(message: str) -> None:
        told.append(message)
        say(message)

    look_again = True
    while look_again:
        look_again = False
        for path in committed(run_folder, tell):
            try:
                check(path)
                return path
            except DamagedCheckpoint as error:
                if is_committed(path):
                    tell(f"skipped a damaged checkpoint: {error}")
                else:  # deleted meanwhile, so a newer one is there
                    look_again = True
        if told:
            raise DamagedCheckpoint(f"no checkpoint in {checkpoints_folder(run_folder)} is whole; {told[0]}")
    return None


def _verify(path: Path) -> Manifest:
    manifest = read_manifest(path)
    checks: list[tuple[Path, str, int, int, int]] = []  # file, what, first byte, bytes, CRC32
    for name, file in manifest.files.items():
        checks.append((path / name, "the header", 0, file.header_bytes, file.header_checksum))
    for entry in manifest.tensors.values():
        check_tiling(entry)
        for piece in entry.pieces:
            end = piece.begin + math.prod(piece.shape) * ITEM_BYTES[entry.dtype]
            for begin, checksum in zip(
                range(piece.begin, end, manifest.chunk_bytes), piece.checksums, strict=True
            ):
                size = min(manifest.chunk_bytes, end - begin)
                checks.append((path / piece.file, f"{entry.name} ({entry.kind})", begin, size, checksum))
    checks.sort(key=lambda check: (check[0], check[2]))
    with ThreadPoolExecutor(num_threads()) as pool:
        share = -(-len(checks) // num_threads())
        for result in [
            pool.submit(_check, checks[first : first + share]) for first in range(0, len(checks), share)
        ]:
            result.result()
    return manifest


def _check(checks: list[tuple[Path, str, int, int, int]]) -> None:
    buffer = memoryview(bytearray(max((size for *_, size, _ in checks), default=0)))
    for file, what, begin, size, checksum in checks:
        try:
            with file.open("rb", buffering=0) as stream:
                found = read_exactly(stream, buffer[:size], begin)
        except OSError as error:
            raise DamagedCheckpoint(f"{file}: {error.strerror}; it holds {what}") from error
        if found != checksum:
            raise DamagedCheckpoint(f"{file} is damaged: {what} changed since it was written")


def read_exactly(stream: io.FileIO, out: memoryview, begin: int) -> int:
    """Fills `out` with the file's bytes from `begin` on; returns their CRC32 (of what there is)."""
    stream.seek(begin)
    done = 0
    while done < len(out) and (read := stream.readinto(out[done:])):
        done += read
    return zlib.crc32(out[:done])


def num_threads() -> int:
    """Threads that read: reading and CRC32 both release the GIL."""
    return min(4, available_cores())
