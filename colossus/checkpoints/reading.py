"""Reads what a rank needs of a checkpoint's files: each is opened once, and every chunk verified."""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from colossus.checkpoints.find import num_threads, read_exactly
from colossus.checkpoints.format import ITEM_BYTES, DamagedCheckpoint, Entry, Piece
from colossus.checkpoints.shards import bytes_of
from colossus.checkpoints.spans import Span, span, stacked
from colossus.models.hf.header import TYPES
from colossus.untrusted import open_file

MOST_OPEN = 64  # files at once


@dataclass(frozen=True, slots=True)
class Need:
    """A box of a piece of a tensor, and where it goes."""

    entry: Entry
    piece: Piece
    box: tuple[slice, ...]
    out: torch.Tensor

    @property
    def title(self) -> str:
        """Of the tensor, in messages."""
        return title(self.entry)


def title(entry: Entry) -> str:
    return f"{entry.name} ({entry.kind})"


def read(path: Path, needs: Iterable[Need], chunk_bytes: int) -> None:
    """Fills what is needed from the files of the checkpoint at `path`, several at a time.

    Raises DamagedCheckpoint, naming the file and the tensor, where what was read isn't what was written.
    """
    by_file: dict[str, list[Need]] = {}
    for need in needs:
        by_file.setdefault(need.piece.file, []).append(need)
    files = list(by_file)
    for first in range(0, len(files), MOST_OPEN):
        with ExitStack() as stack:
            todo = list[tuple[io.FileIO, Need]]()
            for name in files[first : first + MOST_OPEN]:
                stream = stack.enter_context(_opened(path / name, by_file[name][0]))
                todo += [(stream, need) for need in by_file[name]]
            todo.sort(key=lambda each: -each[1].out.numel())  # the long ones first: the threads end together
            pool = stack.enter_context(ThreadPoolExecutor(num_threads()))
            for done in [pool.submit(_fill, path, stream, need, chunk_bytes) for stream, need in todo]:
                done.result()


def _opened(path: Path, need: Need) -> io.FileIO:
    try:
        return open_file(path)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}; it holds {need.title}") from error


@torch.no_grad()
def _fill(path: Path, stream: io.FileIO, need: Need, chunk_bytes: int) -> None:
    """Reads straight into `out` where its bytes lie there as they do in the file."""
    dtype, shape, out, box = TYPES[need.entry.dtype], need.piece.shape, need.out, need.box
    low, high = [side.start for side in box], [side.stop for side in box]
    where = span(shape, ITEM_BYTES[need.entry.dtype], low, high, chunk_bytes)
    depth = stacked(out.shape)
    shape, out, box = shape[depth:], out[(0,) * depth], box[depth:]
    whole_rows = tuple(out.shape[1:]) == shape[1:]
    if whole_rows and out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous():
        _read_span(path, stream, need, where, chunk_bytes, bytes_of(out))
        return
    scratch = torch.empty((len(out) if box else 1, *shape[1:]), dtype=dtype)
    _read_span(path, stream, need, where, chunk_bytes, bytes_of(scratch))
    out.copy_(scratch[:, *box[1:]] if box else scratch[0])


def _read_span(
    path: Path, stream: io.FileIO, need: Need, where: Span, chunk_bytes: int, out: memoryview
) -> None:
    """Fills `out` with the bytes from `first` to `last`; verifies every chunk that they lie in."""
    file = path / need.piece.file
    for begin in range(where.begin, where.end, chunk_bytes):
        end = min(begin + chunk_bytes, where.end)
        low, high = max(begin, where.first), min(end, where.last)
        whole = (low, high) == (begin, end)
        part = slice(low - where.first, high - where.first)
        room = out[part] if whole else memoryview(bytearray(end - begin))
        try:
            found = read_exactly(stream, room, need.piece.begin + begin)
        except OSError as error:
            raise DamagedCheckpoint(f"{file}: {error.strerror}; it holds {need.title}") from error
        if found != need.piece.checksums[begin // chunk_bytes]:
            raise DamagedCheckpoint(f"{file} is damaged: {need.title} changed since it was written")
        if not whole:
            out[part] = room[low - begin : high - begin]
