"""Which checkpoint of a run to go on from. Nothing here imports torch."""

from __future__ import annotations

import io
import os
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from colossus.checkpoints.claims import Say, committed, warn
from colossus.checkpoints.format import DamagedCheckpoint, Manifest, checkpoints_folder, is_committed
from colossus.checkpoints.manifest import read_claim
from colossus.checkpoints.pieces import Check, Pieces, pieces_of, read_manifest
from colossus.hardware.machine import available_cores
from colossus.untrusted import open_file

SHARE = 16  # chunks that a thread verifies in a row


def latest(run_folder: str | Path, say: Say = warn) -> Path | None:
    """The newest checkpoint that is committed and has all its bytes; None where nothing was ever committed.

    Damaged ones are skipped, each with one line to `say`. Data is not read: `latest_verified` does. Where
    more than 64 ranks wrote, not each file is looked at: who loads does.

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
    manifest = read_claim(path)
    pieces = pieces_of(path, manifest)
    pieces.check_sizes()
    with ThreadPoolExecutor(num_threads()) as pool:
        under_way = deque[Future[None]]()
        for checks in pieces.checks():
            for first in range(0, len(checks), SHARE):
                under_way.append(pool.submit(_check, path, checks[first : first + SHARE]))
            while len(under_way) > 2 * num_threads():
                under_way.popleft().result()
        for done in under_way:
            done.result()
    return manifest


def verify_files(path: Path, pieces: Pieces, rank: int = 0, size: int = 1) -> None:
    """What of a checkpoint `Checkpoint.load_into` does not look at: the length and the header of each file.
    Of `size` ranks, each takes its share. Raises DamagedCheckpoint."""
    pieces.check_sizes(rank, size)
    _check(path, list(pieces.headers(rank, size)))


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


def _check(path: Path, checks: list[Check]) -> None:
    buffer = memoryview(bytearray(max((check.size for check in checks), default=0)))
    for check in checks:
        try:
            with open_file(path / check.file) as stream:
                found = read_exactly(stream, buffer[: check.size], check.begin)
        except OSError as error:
            raise DamagedCheckpoint(
                f"{path / check.file}: {error.strerror}; it holds {check.what}"
            ) from error
        if found != check.checksum:
            raise DamagedCheckpoint(
                f"{path / check.file} is damaged: {check.what} changed since it was written"
            )


def read_exactly(stream: io.FileIO, out: memoryview, begin: int) -> int:
    """Fills `out` with the file's bytes from `begin` on; returns their CRC32 (of what there is). Several
    threads may read one file."""
    done = 0
    while done < len(out) and (read := os.preadv(stream.fileno(), [out[done:]], begin + done)):
        done += read
    return zlib.crc32(out[:done])


def num_threads() -> int:
    """Threads that read: reading and CRC32 both release the GIL."""
    return min(4, available_cores())
