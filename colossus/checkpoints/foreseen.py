"""The files of a checkpoint that nobody has written, by the rules alone. Nothing here imports torch."""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colossus.checkpoints.format import (
    CHUNK_BYTES,
    ITEM_BYTES,
    Entry,
    File,
    Key,
    Manifest,
    Vouched,
    Writers,
    group_size,
)
from colossus.checkpoints.index import Group, Index, Row, digest, sorted_entries
from colossus.checkpoints.pieces import Rule, by_rule, places_at
from colossus.checkpoints.spread import Spread
from colossus.checkpoints.write import file_header
from colossus.cuts import box_at

SAVE = "0" * 32 + "-0"  # as long as the name of a save is
SHA256 = "0" * 64


@dataclass(frozen=True)
class _Part:
    """A box of a tensor, of which nothing but its size is known."""

    entry: Entry
    sizes: tuple[int, ...]
    num_bytes: int

    def parts(self) -> Iterable[memoryview]:
        raise AssertionError("there is nothing to write")


class Foreseen:
    """What `num_writers` ranks write of some tensors, but for the checksums of data.

    told: of a rank, what it tells that another one must have written (see `Index.held`).
    """

    def __init__(
        self, entries: Iterable[Entry], num_writers: int, told: Mapping[int, list[Key]] | None = None
    ) -> None:
        self.entries = {entry.key: entry for entry in entries}
        self.num_writers, self._told = num_writers, told or {}
        self._rules = by_rule(self.entries.values())
        self._in_file: dict[tuple[Rule, ...], tuple[list[Entry], int]] = {}
        self._files: dict[object, tuple[File, int]] = {}  # many writers have parts of the same sizes

    @classmethod
    def of(cls, spreads: Iterable[Spread], num_writers: int) -> Foreseen:
        """spreads: of a rank of each stage."""
        entries, told = list[Entry](), dict[int, list[Key]]()
        for spread in spreads:
            entry, teller = spread.entry(num_writers), spread.teller(num_writers)
            entries.append(entry)
            if entry.first != teller:
                told.setdefault(teller, []).append(spread.key)
        return cls(entries, num_writers, told)

    def index(self, writer: int) -> Index:
        """Of a writer's file of pieces. Its checksums are all 0."""
        places = places_at(self._rules, writer)
        key = tuple(places)
        if key not in self._in_file:
            entries = sorted_entries(entry for rule in places for entry in self._rules[rule])
            self._in_file[key] = entries, digest(entries)
        entries, rules = self._in_file[key]
        boxes = dict[object, tuple[int, ...]]()
        for entry in entries:
            kind = (entry.shape, entry.first, entry.cuts)
            if kind not in boxes:
                box = box_at(entry.shape, entry.cuts, places[entry.first, entry.cuts])
                assert box is not None, f"a part of {entry.name} ({entry.kind}) is no box"
                boxes[kind] = box[1]
        sizes = (key, tuple(boxes.values()))
        if sizes not in self._files:
            self._files[sizes] = _file([(e, boxes[e.shape, e.first, e.cuts]) for e in entries])
        file, num_chunks = self._files[sizes]
        listed = tuple(entry for entry in entries if entry.first == writer)
        held = tuple(self._told.get(writer, ()))
        return Index(SAVE, file, rules, listed, held, array("I", bytes(4 * num_chunks)))

    @property
    def group(self) -> int:
        """How many writers a group has; 1: there are no groups."""
        size = group_size(self.num_writers)
        return size if self.num_writers > size else 1

    def manifest(self, meta: dict[str, Any], indexes: Sequence[Index]) -> Manifest:
        """Of the whole checkpoint, with `meta` as what the run says. Its SHA-256 are all 0."""
        sizes, group = [index.file.bytes for index in indexes], self.group
        vouched = tuple(Vouched(sum(sizes[n : n + group]), SHA256) for n in range(0, len(sizes), group))
        return Manifest(0, 1, meta, self.entries, Writers(self.num_writers, group, vouched))

    def groups(self, indexes: Sequence[Index]) -> list[Group]:
        """What the first writer of each says of all in it."""
        found, size = list[Group](), self.group
        for first in range(0, self.num_writers, size) if size > 1 else ():
            members = range(first, min(first + size, self.num_writers))
            listing = tuple(writer for writer in members if indexes[writer].entries)
            held = dict.fromkeys(key for writer in members for key in indexes[writer].held)
            rows = (Row(indexes[w].file.bytes, indexes[w].rules, SHA256) for w in members)
            found.append(Group(SAVE, listing, tuple(held), tuple(rows)))
        return found


def _file(parts: Iterable[tuple[Entry, tuple[int, ...]]]) -> tuple[File, int]:
    """A file of these parts, in order, and how many chunks they have."""
    found = [_Part(entry, sizes, math.prod(sizes) * ITEM_BYTES[entry.dtype]) for entry, sizes in parts]
    header = file_header(found)
    size = len(header) + sum(part.num_bytes for part in found)
    chunks = sum(-(-part.num_bytes // CHUNK_BYTES) for part in found)
    return File(size, len(header), zlib.crc32(header)), chunks
