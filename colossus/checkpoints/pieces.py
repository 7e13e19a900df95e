"""Where the boxes of a checkpoint's tensors lie, and by which checksums they are known. Nothing here imports
torch.

Of format 2 the rules say which writer has what, and an index is read when something of its file is asked for.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

from colossus.checkpoints.format import (
    ITEM_BYTES,
    DamagedCheckpoint,
    Entry,
    File,
    Lists,
    Manifest,
    Piece,
    Vouched,
    Writers,
    check_size,
    group_name,
    index_name,
    pieces_name,
    read_bytes,
)
from colossus.checkpoints.format1 import MAX_HEADER_BYTES, check_tiling
from colossus.checkpoints.index import (
    MAX_INDEX_BYTES,
    Index,
    decode_group,
    decode_index,
    digest,
    sorted_entries,
    split,
)
from colossus.checkpoints.manifest import read_claim
from colossus.cuts import Box, Cut, box_at, parts_within

KEPT_INDEXES = 4096  # of writers: a few KB each

Rule = tuple[int, tuple[Cut, ...]]
"""First writer, and cuts."""


@dataclass(frozen=True, slots=True)
class Check:
    """Bytes of a file, and their CRC32."""

    file: str
    what: str
    begin: int
    size: int
    checksum: int


class Pieces(Protocol):
    """Of one checkpoint. What is asked for raises DamagedCheckpoint where an index is none."""

    def within(self, entry: Entry, begin: Sequence[int], end: Sequence[int]) -> Iterator[Piece]:
        """Those of a tensor that have an element in the box from `begin` to `end`."""

    def names(self) -> Iterator[str]:
        """All files but the manifest and COMMITTED."""

    def check_sizes(self, rank: int = 0, size: int = 1) -> None:
        """Raises DamagedCheckpoint unless each file is there, as long as it was written. Of `size` ranks each
        looks at its share; so do those that ask for `headers`."""

    def glance(self) -> None:
        """The same of few files: of many writers, the indexes of groups alone are read. One process does
        this, while others may wait."""

    def headers(self, rank: int = 0, size: int = 1) -> Iterator[Check]:
        """Of the files of pieces."""

    def checks(self) -> Iterator[list[Check]]:
        """Every byte of every file of pieces."""


def pieces_of(path: Path, manifest: Manifest) -> Pieces:
    return Listed(path, manifest) if isinstance(manifest.source, Lists) else Ruled(path, manifest)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint that is committed and whole as far as a glance tells; data is not read.

    Raises DamagedCheckpoint, with the file at fault; UserError for a newer format.
    """
    manifest = read_claim(path)
    pieces_of(path, manifest).glance()
    return manifest


class Listed:
    """As a manifest of format 1 lists them."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        assert isinstance(manifest.source, Lists)
        self._path, self._manifest, self._lists = path, manifest, manifest.source
        for entry in manifest.tensors.values():
            check_tiling(entry, self._lists.pieces[entry.key], f"{path}: ")

    def within(self, entry: Entry, begin: Sequence[int], end: Sequence[int]) -> Iterator[Piece]:
        for piece in self._lists.pieces[entry.key]:
            bounds = zip(piece.offset, piece.shape, begin, end, strict=True)
            if all(max(a, low) < min(a + n, high) for a, n, low, high in bounds):
                yield piece

    def names(self) -> Iterator[str]:
        yield from self._lists.files

    def check_sizes(self, rank: int = 0, size: int = 1) -> None:
        for name, file in [*self._lists.files.items()][rank::size]:
            check_size(self._path / name, file.bytes)

    def glance(self) -> None:
        self.check_sizes()

    def headers(self, rank: int = 0, size: int = 1) -> Iterator[Check]:
        for name, file in [*self._lists.files.items()][rank::size]:
            yield Check(name, "the header", 0, file.header_bytes, file.header_checksum)

    def checks(self) -> Iterator[list[Check]]:
        yield list(self.headers())
        for entry in self._manifest.tensors.values():
            for piece in self._lists.pieces[entry.key]:
                yield list(_checks_of(entry, piece, self._manifest.chunk_bytes))


@dataclass(frozen=True, slots=True)
class _Held:
    """What a writer's file has. begins, checksums: of each tensor in order, its first byte and its first
    checksum."""

    file: File
    order: dict[tuple[str, str], int]
    begins: array[int]
    first_checksums: array[int]
    checksums: array[int]


class Ruled:
    """As the rules of format 2 say."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        assert isinstance(manifest.source, Writers)
        self._path, self._manifest, self._writers = path, manifest, manifest.source
        self._group = lru_cache(KEPT_INDEXES)(self._read_group)
        self._index = lru_cache(KEPT_INDEXES)(self._read_index)
        self._held = lru_cache(KEPT_INDEXES)(self._read_held)
        self._entries = lru_cache(KEPT_INDEXES)(self._in_file)
        self._digest = lru_cache(KEPT_INDEXES)(lambda rules: digest(self._entries(rules)))
        self._parts = lru_cache(KEPT_INDEXES)(self._find_parts)

    def within(self, entry: Entry, begin: Sequence[int], end: Sequence[int]) -> Iterator[Piece]:
        for places, box in self._parts(entry.shape, entry.cuts, tuple(begin), tuple(end)):
            yield self._piece(entry, entry.writer(places), self._checked(entry, box))

    def names(self) -> Iterator[str]:
        for writer in range(self._writers.num):
            yield pieces_name(writer)
            yield index_name(writer)
        if self._writers.group > 1:
            yield from (group_name(group) for group in range(len(self._writers.vouched)))

    def check_sizes(self, rank: int = 0, size: int = 1) -> None:
        for writer in range(rank, self._writers.num, size):
            check_size(self._path / pieces_name(writer), self._vouched(writer).bytes)
            if not (self._path / index_name(writer)).exists():
                raise DamagedCheckpoint(f"{self._path / index_name(writer)}: No such file or directory")

    def glance(self) -> None:
        if self._writers.group == 1:
            self.check_sizes()
        else:
            for group in range(len(self._writers.vouched)):
                self._group(group)

    def headers(self, rank: int = 0, size: int = 1) -> Iterator[Check]:
        for writer in range(rank, self._writers.num, size):
            file = self._index(writer).file
            yield Check(pieces_name(writer), "the header", 0, file.header_bytes, file.header_checksum)

    def checks(self) -> Iterator[list[Check]]:
        for writer in range(self._writers.num):
            found = list(self.headers(writer, self._writers.num))
            for entry, places in self._rules_at(writer):
                box = self._checked(entry, box_at(entry.shape, entry.cuts, places))
                found += _checks_of(entry, self._piece(entry, writer, box), self._manifest.chunk_bytes)
            yield found

    def _piece(self, entry: Entry, writer: int, box: Box) -> Piece:
        held = self._held(writer)
        number = held.order[entry.key]
        first = held.first_checksums[number]
        last = first + _num_chunks(_bytes_of(entry, box), self._manifest.chunk_bytes)
        return Piece(pieces_name(writer), *box, held.begins[number], tuple(held.checksums[first:last]))

    def _checked(self, entry: Entry, box: Box | None) -> Box:
        if box is None:
            raise DamagedCheckpoint(f"{self._path}: a part of {entry.name} ({entry.kind}) is no box")
        return box

    def _find_parts(
        self, shape: tuple[int, ...], cuts: tuple[Cut, ...], begin: tuple[int, ...], end: tuple[int, ...]
    ) -> list[tuple[tuple[int, ...], Box | None]]:
        return list(parts_within(shape, cuts, begin, end))

    def _read_held(self, writer: int) -> _Held:
        """The index of a writer, and by it where each piece begins."""
        index = self._index(writer)
        size, order = self._manifest.chunk_bytes, dict[tuple[str, str], int]()
        begins, firsts = array("Q"), array("Q")
        begin, first = index.file.header_bytes, 0
        for number, (entry, places) in enumerate(self._rules_at(writer)):
            order[entry.key] = number
            begins.append(begin)
            firsts.append(first)
            num_bytes = _bytes_of(entry, self._checked(entry, box_at(entry.shape, entry.cuts, places)))
            begin += num_bytes
            first += _num_chunks(num_bytes, size)
        found = (begin, first, self._digest(tuple(places_at(self._rules, writer))))
        if found != (index.file.bytes, len(index.checksums), index.rules):
            raise DamagedCheckpoint(f"{self._path / index_name(writer)}: of another file than the rules say")
        return _Held(index.file, order, begins, firsts, index.checksums)

    def _read_index(self, writer: int) -> Index:
        path, vouched = self._path / index_name(writer), self._vouched(writer)
        data = _read(path, vouched)
        try:
            index = decode_index(data)
        except ValueError as error:
            raise DamagedCheckpoint(f"{path} is no index: {error}") from None
        if index.file.bytes != vouched.bytes or index.file.header_bytes > MAX_HEADER_BYTES:
            raise DamagedCheckpoint(f"{path} is of a file of another length, or too long a header")
        return index

    def _vouched(self, writer: int) -> Vouched:
        group, place = divmod(writer, self._writers.group)
        return self._writers.vouched[group] if self._writers.group == 1 else self._group(group)[place]

    def _read_group(self, group: int) -> list[Vouched]:
        path, vouched = self._path / group_name(group), self._writers.vouched[group]
        data = _read(path, vouched)
        try:
            rows = decode_group(data).rows
        except ValueError as error:
            raise DamagedCheckpoint(f"{path} is no index: {error}") from None
        expected = min(self._writers.group, self._writers.num - group * self._writers.group)
        if len(rows) != expected or sum(row.bytes for row in rows) != vouched.bytes:
            raise DamagedCheckpoint(f"{path} is of other writers")
        return [row.vouched for row in rows]

    def _rules_at(self, writer: int) -> Iterator[tuple[Entry, tuple[int, ...]]]:
        """What a writer's file has a part of, in its order, and the places of these parts."""
        places = places_at(self._rules, writer)
        for entry in self._entries(tuple(places)):
            yield entry, places[entry.first, entry.cuts]

    def _in_file(self, rules: tuple[Rule, ...]) -> list[Entry]:
        return sorted_entries(entry for rule in rules for entry in self._rules[rule])

    @cached_property
    def _rules(self) -> dict[Rule, list[Entry]]:
        return by_rule(self._manifest.tensors.values())


def _read(path: Path, vouched: Vouched) -> bytes:
    try:
        data, _ = split(read_bytes(path, MAX_INDEX_BYTES))
    except ValueError:
        data = b""
    if hashlib.sha256(data).hexdigest() != vouched.sha256:
        raise DamagedCheckpoint(f"{path} changed since it was written")
    return data


def by_rule(entries: Iterable[Entry]) -> dict[Rule, list[Entry]]:
    """Entries that have the same writers, together."""
    found: dict[Rule, list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.first, entry.cuts), []).append(entry)
    return found


def places_at(rules: Iterable[Rule], writer: int) -> dict[Rule, tuple[int, ...]]:
    """The rules by which a writer has a part, and its places on their axes."""
    found: dict[Rule, tuple[int, ...]] = {}
    for first, cuts in rules:
        rest, places = writer - first, dict[int, int]()
        if rest < 0:
            continue
        for axis in sorted(range(len(cuts)), key=lambda axis: -cuts[axis].stride):
            places[axis] = min(rest // cuts[axis].stride, cuts[axis].parts - 1)
            rest -= places[axis] * cuts[axis].stride
        if not rest:
            found[first, cuts] = tuple(places[axis] for axis in range(len(cuts)))
    return found


def _bytes_of(entry: Entry, box: Box) -> int:
    return math.prod(box[1]) * ITEM_BYTES[entry.dtype]


def _num_chunks(num_bytes: int, chunk_bytes: int) -> int:
    return -(-num_bytes // chunk_bytes)


def _checks_of(entry: Entry, piece: Piece, chunk_bytes: int) -> Iterator[Check]:
    end = piece.begin + _bytes_of(entry, (piece.offset, piece.shape))
    for begin, checksum in zip(range(piece.begin, end, chunk_bytes), piece.checksums, strict=True):
        size = min(chunk_bytes, end - begin)
        yield Check(piece.file, f"{entry.name} ({entry.kind})", begin, size, checksum)
