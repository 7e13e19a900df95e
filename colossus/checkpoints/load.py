"""Reads checkpoints: any box of any logical tensor, verified, into any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from colossus.checkpoints.claims import Say, committed, warn
from colossus.checkpoints.find import latest, latest_verified, verify, verify_files
from colossus.checkpoints.format import (
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
from colossus.checkpoints.reading import Need, read, title
from colossus.checkpoints.shards import shard_of
from colossus.checkpoints.spans import overlap
from colossus.errors import MachineError, UserError, nearest
from colossus.models.hf.header import TYPES

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
        # Read once for all: of 200,000 ranks, each would read a megabyte of the same file.
        manifest, damage = world.broadcast(_tried(read_claim, path) if world.rank == 0 else None)
        if manifest is not None:
            checkpoint, error = _tried(_open, path, manifest, world)
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


def _open(path: Path, manifest: Manifest, world: Ranks) -> Checkpoint:
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
                files that the box lies in are read, rounded to chunks of 512 KiB.

        Raises:
            UserError: there is no such tensor.
            DamagedCheckpoint: what was read isn't what was written; names the file and the tensor.
        """
        entry = self._entry((name, kind))
        offset, sizes = _box(entry.shape, slices or ())
        out = torch.empty(sizes, dtype=TYPES[entry.dtype])
        read(self.path, self._needs(entry, out, offset), self.manifest.chunk_bytes)
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
        entries = [entry_for(shard.entry, self.manifest, self.path) for shard, _ in shards]
        needs = list[Need]()
        for entry, (shard, is_read) in zip(entries, shards, strict=True):
            if is_read:
                needs += self._needs(entry, shard.values, shard.offset)
        read(self.path, needs, self.manifest.chunk_bytes)

    def _entry(self, key: Key) -> Entry:
        return _named(key, self.manifest, self.path)

    def _needs(self, entry: Entry, out: torch.Tensor, offset: Sequence[int]) -> Iterator[Need]:
        """What is read to fill `out` with the box of the tensor that begins at `offset`."""
        last = [a + n for a, n in zip(offset, out.shape, strict=True)]
        for piece in self._pieces.within(entry, offset, last):
            low, high = overlap(piece.offset, piece.shape, offset, last)
            there = tuple(map(slice, low, high))
            moved = [a - b for a, b in zip(piece.offset, offset, strict=True)]
            here = tuple(slice(a + by, b + by) for a, b, by in zip(low, high, moved, strict=True))
            yield Need(entry, piece, there, out[here])


def entry_for(wanted: Entry, manifest: Manifest, path: Path) -> Entry:
    """The tensor of a checkpoint from which `wanted` can be filled. Raises UserError where it has none, or
    one of another shape or type."""
    entry = _named(wanted.key, manifest, path)
    if entry.shape != wanted.shape:
        raise UserError(f"{path}: {title(entry)} is {entry.shape}, not {wanted.shape}")
    there, here = TYPES[entry.dtype], TYPES[wanted.dtype]
    if there != here and not (there.is_floating_point and here.is_floating_point):
        raise UserError(f"{path}: {title(entry)} is {there}, not {here}")
    return entry


def _named(key: Key, manifest: Manifest, path: Path) -> Entry:
    entry = manifest.tensors.get(key)
    if entry is None:
        name, kind = key
        guess = nearest(name, [other for other, of in manifest.tensors if of == kind])
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise UserError(f"{path} holds no {name} ({kind}){hint}")
    return entry


def _box(shape: Sequence[int], slices: Sequence[slice]) -> tuple[list[int], list[int]]:
    """Offset and sizes of a box given by slices of the leading dimensions."""
    assert len(slices) <= len(shape), f"{len(slices)} slices of {len(shape)} dimensions"
    bounds = [s.indices(size) for s, size in zip(slices, shape, strict=False)]
    assert all(step == 1 for _, _, step in bounds), "slices with steps are not read"
    bounds += [(0, size, 1) for size in shape[len(slices) :]]
    return [begin for begin, _, _ in bounds], [max(end - begin, 0) for begin, end, _ in bounds]
