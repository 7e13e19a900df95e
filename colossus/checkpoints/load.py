"""Reads checkpoints: any box of any logical tensor, verified, into any layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from colossus.checkpoints.claims import Say, committed, warn
from colossus.checkpoints.find import latest, latest_verified, num_threads, read_exactly, verify, verify_files
from colossus.checkpoints.format import (
    ITEM_BYTES,
    DamagedCheckpoint,
    Entry,
    Key,
    Manifest,
    Piece,
    checkpoints_folder,
)
from colossus.checkpoints.manifest import read_claim
from colossus.checkpoints.passing import reads
from colossus.checkpoints.pieces import Pieces, pieces_of
from colossus.checkpoints.ranks import OneRank, Ranks
from colossus.checkpoints.shards import bytes_of, shard_of
from colossus.errors import MachineError, UserError, nearest
from colossus.models.hf.header import TYPES
from colossus.untrusted import open_file

Found = TypeVar("Found")
__all__ = ["Checkpoint", "DamagedCheckpoint", "latest", "newest_whole", "open_checkpoint", "verify"]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a committed checkpoint; tensors are read when asked for.

    Raises:
        UserError: there is no such folder, or its format is newer than this program.
        DamagedCheckpoint: it is not committed, or a file is missing, cut or (the manifest) changed; of more
            than 64 writers that is seen when a file is read.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no checkpoint: there is no such folder")
    manifest = read_claim(path)
    pieces = pieces_of(path, manifest)
    pieces.glance()
    return Checkpoint(path, manifest, pieces)


def newest_whole(run_folder: str | Path, world: Ranks | None = None, say: Say = warn) -> Checkpoint | None:
    """The newest checkpoint of which every byte is as it was written; None where the run never saved.

    Damaged ones are skipped, and said in one line each. In a world of several ranks all call this; rank 0
    looks and all open what it found, of which nothing is read before it is loaded (see `candidates`).

    Raises:
        MachineError: there are checkpoints, but none is whole (on every rank).
        UserError: the newest is of a newer format (on every rank).
    """
    world = world if world is not None else OneRank()
    found: Path | Exception | None = None
    if world.rank == 0:
        try:
            found = latest_verified(run_folder, say) if world.size == 1 else latest(run_folder, say)
        except (MachineError, UserError) as error:
            found = error
    found = world.broadcast(found)
    if isinstance(found, Exception):
        raise found
    return open_checkpoint(found) if found is not None else None


def candidates(
    run_folder: str | Path, world: Ranks, say: Say = warn, damaged: list[Path] | None = None
) -> Iterator[Checkpoint]:
    """What a run may go on from, the newest first: every rank loads its part of the first, and who goes on to
    the next one has agreed with all ranks that this one is damaged (`load_agreed`). Nothing where the run
    never saved.

    damaged: is told of each that was skipped.

    No rank reads more than its share: of each file's header here, of tensors what it loads.

    Raises (on every rank):
        DamagedCheckpoint: there are checkpoints, but none is whole.
        UserError: the newest is of a newer format, or they lie elsewhere.
    """
    paths, told, error = list[Path](), list[str](), None
    if world.rank == 0:
        found, error = _tried(committed, run_folder, told.append)
        paths = found or []
        for message in told:
            say(message)
    paths, told, error = world.broadcast((paths, told, error))
    if error is not None:
        raise error
    for path in paths:
        checkpoint, error = _tried(_open, path, world)
        damage = world.first_error(error)
        if damage is None:
            assert checkpoint is not None
            yield checkpoint
            damage = checkpoint.damage
        assert damage is not None, "the next one is asked for where this one is damaged"
        if not isinstance(damage, DamagedCheckpoint):
            raise damage
        told.append(f"skipped a damaged checkpoint: {damage}")
        if damaged is not None:
            damaged.append(path)
        if world.rank == 0:
            say(told[-1])
    if told:
        raise DamagedCheckpoint(f"no checkpoint in {checkpoints_folder(run_folder)} is whole; {told[0]}")


def load_agreed(checkpoint: Checkpoint, load: Callable[[Checkpoint], None], world: Ranks) -> bool:
    """Whether `load` found the checkpoint whole on every rank. `load` must not wait for other ranks.

    Raises:
        UserError: on every rank, where it was raised on one.
    """
    checkpoint.damage = error = world.first_error(_tried(load, checkpoint)[1])
    if error is not None and not isinstance(error, DamagedCheckpoint):
        raise error
    return error is None


def _open(path: Path, world: Ranks) -> Checkpoint:
    manifest = read_claim(path)
    pieces = pieces_of(path, manifest)
    verify_files(path, pieces, world.rank, world.size)
    return Checkpoint(path, manifest, pieces)


def _tried(act: Callable[..., Found], *arguments: Any) -> tuple[Found | None, Exception | None]:
    """What `act` returned, and what it raised."""
    try:
        return act(*arguments), None
    except (MachineError, UserError) as error:
        return None, error


class Checkpoint:
    """A committed checkpoint. Whatever is read is compared with its checksums first."""

    def __init__(self, path: Path, manifest: Manifest, pieces: Pieces) -> None:
        self.path = path
        self.manifest = manifest
        self.damage: Exception | None = None  # that a rank found while it loaded
        self._pieces = pieces

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def meta(self) -> dict[str, Any]:
        """What the run keeps beside tensors: plain JSON."""
        return self.manifest.meta

    def names(self, kind: str | None = None) -> list[Key]:
        """(name, kind) of every tensor, or of those of one kind."""
        return [key for key in self.manifest.tensors if kind in (None, key[1])]

    def pieces(self, name: str, kind: str = "weight") -> list[Piece]:
        """Where a tensor lies."""
        entry = self._entry((name, kind))
        return list(self._pieces.within(entry, (0,) * len(entry.shape), entry.shape))

    def shape(self, name: str, kind: str = "weight") -> tuple[int, ...]:
        return self._entry((name, kind)).shape

    def read(self, name: str, kind: str = "weight", slices: Sequence[slice] | None = None) -> torch.Tensor:
        """A tensor or a box of it, in the type it was saved in, on the CPU.

        Args:
            slices: of the leading dimensions, without steps; None is the whole tensor. Only the parts of
                files that the box lies in are read, rounded to chunks of 4 MiB.

        Raises:
            UserError: there is no such tensor.
            DamagedCheckpoint: what was read isn't what was written; names the file and the tensor.
        """
        entry = self._entry((name, kind))
        offset, sizes = _box(entry.shape, slices or ())
        out = torch.empty(sizes, dtype=TYPES[entry.dtype])
        self._fill(entry, out, offset)
        return out

    def load_into(
        self, tensors: Mapping[Key, torch.Tensor] | Iterable[tuple[Key, torch.Tensor]], *, share: bool = False
    ) -> None:
        """Fills tensors in place: plain ones whole, DTensors of any layout with this rank's part.

        Several may be asked for by one key. Floating-point types are converted to the tensor's own; other
        types must be equal.

        share: of what other ranks hold, too, this one reads what is its turn; `pass_on` brings it the rest.

        Raises:
            UserError: the checkpoint has no such tensor, or one of another shape or type; nothing is filled.
            DamagedCheckpoint: as `read`; some tensors may be filled by then.
        """
        pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
        shards = [(shard_of(key, tensor), not share or reads(key, tensor)) for key, tensor in pairs]
        tasks = []
        for shard, is_read in shards:
            entry = self._entry(shard.entry.key)
            if entry.shape != shard.entry.shape:
                raise UserError(f"{self.path}: {_title(entry)} is {entry.shape}, not {shard.entry.shape}")
            dtype = TYPES[entry.dtype]
            convertible = dtype.is_floating_point and shard.values.dtype.is_floating_point
            if dtype != shard.values.dtype and not convertible:
                raise UserError(f"{self.path}: {_title(entry)} is {dtype}, not {shard.values.dtype}")
            if is_read and shard.values.numel():
                tasks.append((entry, shard.values, shard.offset))
        tasks.sort(key=lambda task: -task[1].numel())  # the long ones first: the threads end together
        with ThreadPoolExecutor(num_threads()) as pool:
            for done in [pool.submit(self._fill, *task) for task in tasks]:
                done.result()

    def _entry(self, key: Key) -> Entry:
        entry = self.manifest.tensors.get(key)
        if entry is None:
            name, kind = key
            guess = nearest(name, [other for other, _ in self.names(kind)])
            hint = f"; did you mean {guess!r}?" if guess else ""
            raise UserError(f"{self.path} holds no {name} ({kind}){hint}")
        return entry

    def _fill(self, entry: Entry, out: torch.Tensor, offset: Sequence[int]) -> None:
        """Fills `out` with the box of the tensor that begins at `offset`."""
        last = [a + n for a, n in zip(offset, out.shape, strict=True)]
        with torch.no_grad():
            for piece in self._pieces.within(entry, offset, last):
                begin = [max(a, b) for a, b in zip(piece.offset, offset, strict=True)]
                end = [min(a + n, b) for a, n, b in zip(piece.offset, piece.shape, last, strict=True)]
                here = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, offset, strict=True))
                there = [slice(a - o, b - o) for a, b, o in zip(begin, end, piece.offset, strict=True)]
                self._copy(entry, piece, there, out[here])

    def _copy(self, entry: Entry, piece: Piece, box: list[slice], out: torch.Tensor) -> None:
        """Reads a box of a piece; straight into `out` where its bytes lie there as they do in the file."""
        dtype, shape, first = TYPES[entry.dtype], piece.shape, 0
        while len(box) > 1 and len(out) == 1:  # one of a stack, of which no other need be read
            first += box[0].start * math.prod(shape[1:]) * ITEM_BYTES[entry.dtype]
            box, shape, out = box[1:], shape[1:], out[0]
        rows = box[0] if box else slice(0, 1)
        first += rows.start * math.prod(shape[1:]) * ITEM_BYTES[entry.dtype]
        whole_rows = tuple(out.shape[1:]) == shape[1:]
        if whole_rows and out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous():
            self._read_bytes(entry, piece, first, bytes_of(out))
            return
        scratch = torch.empty((rows.stop - rows.start, *shape[1:]), dtype=dtype)
        self._read_bytes(entry, piece, first, bytes_of(scratch))
        out.copy_(scratch[:, *box[1:]] if box else scratch[0])

    def _read_bytes(self, entry: Entry, piece: Piece, first: int, out: memoryview) -> None:
        """Fills `out` with the bytes of a piece from `first` on; verifies every chunk that they lie in."""
        num_bytes = math.prod(piece.shape) * ITEM_BYTES[entry.dtype]
        size = self.manifest.chunk_bytes
        last = first + len(out)
        path = self.path / piece.file
        try:
            with open_file(path) as stream:
                for chunk in range(first // size, -(-last // size)):
                    begin, end = chunk * size, min((chunk + 1) * size, num_bytes)
                    low, high = max(begin, first), min(end, last)
                    whole = (low, high) == (begin, end)
                    room = out[low - first : high - first] if whole else memoryview(bytearray(end - begin))
                    if read_exactly(stream, room, piece.begin + begin) != piece.checksums[chunk]:
                        raise DamagedCheckpoint(
                            f"{path} is damaged: {_title(entry)} changed since it was written"
                        )
                    if not whole:
                        out[low - first : high - first] = room[low - begin : high - begin]
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: {error.strerror}; it holds {_title(entry)}") from error


def _box(shape: Sequence[int], slices: Sequence[slice]) -> tuple[list[int], list[int]]:
    """Offset and sizes of a box given by slices of the leading dimensions."""
    assert len(slices) <= len(shape), f"{len(slices)} slices of {len(shape)} dimensions"
    bounds = [s.indices(size) for s, size in zip(slices, shape, strict=False)]
    assert all(step == 1 for _, _, step in bounds), "slices with steps are not read"
    bounds += [(0, size, 1) for size in shape[len(slices) :]]
    return [begin for begin, _, _ in bounds], [max(end - begin, 0) for begin, end, _ in bounds]


def _title(entry: Entry) -> str:
    return f"{entry.name} ({entry.kind})"
