"""Which checkpoint of a run to go on from. Nothing here imports torch."""

from __future__ import annotations

import io
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from colossus.checkpoints.format import (
    ITEM_BYTES,
    DamagedCheckpoint,
    Manifest,
    check_size,
    check_tiling,
    checkpoints_folder,
    is_committed,
    read_manifest,
    read_serial,
    step_of,
)
from colossus.errors import UserError
from colossus.hardware.machine import available_cores
from colossus.untrusted import open_file

Say = Callable[[str], None]


def warn(message: str) -> None:
    """The default of `say`: standard error, unless the program set up logging otherwise."""
    logging.getLogger(__name__).warning(message)


def latest(run_folder: str | Path, say: Say = warn) -> Path | None:
    """The newest checkpoint that is committed and has all its bytes; None where nothing was ever committed.

    Damaged ones are skipped, each with one line to `say`. Data is not read: `latest_verified` does.

    Raises:
        DamagedCheckpoint: there are committed checkpoints, but none is whole.
        UserError: the newest is of a format that this program does not know, or they lie elsewhere.
    """
    return _newest(run_folder, read_manifest, say)


def latest_verified(run_folder: str | Path, say: Say = warn) -> Path | None:
    """As `latest`, but every byte is read and verified (8 GB/s on two cores from the page cache)."""
    return _newest(run_folder, verify, say)


def verify(path: str | Path) -> Manifest:
    """Reads a checkpoint whole. Raises DamagedCheckpoint, naming the file and tensor at fault."""
    path = Path(path)
    manifest = read_manifest(path)
    _verify_headers(path, manifest, [*manifest.files])
    _verify_tensors(path, manifest)
    return manifest


def verify_files(path: Path, manifest: Manifest, rank: int = 0, size: int = 1) -> None:
    """What of a checkpoint `Checkpoint.load_into` does not look at: the length and the header of each file.
    Of `size` ranks, each takes its share. Raises DamagedCheckpoint."""
    names = [*manifest.files][rank::size]
    for name in names:
        check_size(path, name, manifest)
    _verify_headers(path, manifest, names)


def committed(run_folder: str | Path, say: Say = warn) -> list[Path]:
    """All that claim to be checkpoints of a run, the newest first.

    Raises:
        UserError: they lie elsewhere, where a link leads.
    """
    folder = checkpoints_folder(run_folder)
    there = Path(os.path.realpath(folder))  # unlike Path.resolve also of a link that leads to itself
    if folder.is_symlink() and not there.is_relative_to(os.path.realpath(run_folder)):
        raise UserError(f"{folder}: a link that leads out of the run; move the whole run, and link that")
    if folder.is_symlink() and not folder.is_dir():
        raise UserError(f"{folder}: a link that leads to no folder; remove it, and begin the run anew")
    return [path for _, path in sorted(_claims(folder, say), reverse=True)]


def _claims(folder: Path, say: Say) -> Iterator[tuple[int, Path]]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if step_of(path.name) is None:  # a copy, an export: nothing that a save made
            continue
        if path.is_symlink():
            say(f"passed over {path}: a link, and no checkpoint itself")
            continue
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


def _verify_headers(path: Path, manifest: Manifest, names: list[str]) -> None:
    files = [(path / name, manifest.files[name]) for name in names]
    _check([(name, "the header", 0, file.header_bytes, file.header_checksum) for name, file in files])


def _verify_tensors(path: Path, manifest: Manifest) -> None:
    checks: list[tuple[Path, str, int, int, int]] = []  # file, what, first byte, bytes, CRC32
    for entry in manifest.tensors.values():
        check_tiling(entry, path)
        for piece in entry.pieces:
            end = piece.begin + math.prod(piece.shape) * ITEM_BYTES[entry.dtype]
            for begin, checksum in zip(
                range(piece.begin, end, manifest.chunk_bytes), piece.checksums, strict=True
            ):
                size = min(manifest.chunk_bytes, end - begin)
                checks.append((path / piece.file, f"{entry.name} ({entry.kind})", begin, size, checksum))
    checks.sort(key=lambda check: (check[0], check[2]))
    with ThreadPoolExecutor(num_threads()) as pool:
        share = max(1, -(-len(checks) // num_threads()))
        for result in [
            pool.submit(_check, checks[first : first + share]) for first in range(0, len(checks), share)
        ]:
            result.result()


def _check(checks: list[tuple[Path, str, int, int, int]]) -> None:
    buffer = memoryview(bytearray(max((size for *_, size, _ in checks), default=0)))
    for file, what, begin, size, checksum in checks:
        try:
            with open_file(file) as stream:
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
