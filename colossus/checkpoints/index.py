"""The indexes of a checkpoint: of one writer's file, and of a group of writers. Nothing here imports torch.

Each is a line of JSON and, behind it, numbers as they are, little-endian. A tensor's entry stands in the
index of its first writer, where the commit finds it. DONE is written behind an index once that is on storage:
who waits for it must not take it before, or what vouches for it might be there first.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from colossus.checkpoints.format import Entry, File, Key, Vouched, in_order
from colossus.checkpoints.format1 import natural
from colossus.cuts import Cut
from colossus.untrusted import parse_json

MAX_INDEX_BYTES = 256 << 20  # of one writer: 16 TiB
DONE = b"\n"
_ROW = struct.Struct("<QQ32s")


@dataclass(frozen=True, slots=True)
class Index:
    """What a writer says of its file.

    save: which save it is of. file: its file of pieces. rules: `digest` of the entries of which the file has
    pieces. entries: those whose first writer this is. held: some of those that this rank holds, and another
    one must have written. checksums: CRC32 of the chunks of all pieces, in order.
    """

    save: str
    file: File
    rules: int
    entries: tuple[Entry, ...]
    held: tuple[Key, ...]
    checksums: array[int]


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of one writer's index: see `Vouched`; and of the rules that it followed."""

    bytes: int
    rules: int
    sha256: str

    @property
    def vouched(self) -> Vouched:
        return Vouched(self.bytes, self.sha256)


@dataclass(frozen=True, slots=True)
class Group:
    """What the first writer of a group says of all in it. listing: the writers whose indexes have entries.
    held: those of all their indexes."""

    save: str
    listing: tuple[int, ...]
    held: tuple[Key, ...]
    rows: tuple[Row, ...]


def digest(entries: Iterable[Entry]) -> int:
    """64 bits by which writers that followed the same rules are known. entries: in the order of a file."""
    data = json.dumps([astuple(entry) for entry in entries], separators=(",", ":")).encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def encode_index(index: Index) -> bytes:
    head = {
        "save": index.save,
        "file": [index.file.bytes, index.file.header_bytes, index.file.header_checksum],
        "rules": index.rules,
        "tensors": [entry_to_json(entry) for entry in index.entries],
        "held": index.held,
    }
    return _encoded(head, _bytes(index.checksums))


def decode_index(data: bytes) -> Index:
    """Raises ValueError where it is none."""
    try:
        head, rest = _head(data)
        checksums = array("I")
        checksums.frombytes(rest)
        if sys.byteorder == "big":
            checksums.byteswap()
        file = File(*(natural(value) for value in head["file"]))
        entries = tuple(entry_from_json(entry) for entry in head["tensors"])
        return Index(head["save"], file, natural(head["rules"]), entries, _held(head), checksums)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} at {error}") from None


def encode_group(group: Group) -> bytes:
    head = {
        "save": group.save,
        "listing": group.listing,
        "held": group.held,
    }
    rows = (_ROW.pack(row.bytes, row.rules, bytes.fromhex(row.sha256)) for row in group.rows)
    return _encoded(head, b"".join(rows))


def decode_group(data: bytes) -> Group:
    """Raises ValueError where it is none."""
    try:
        head, rest = _head(data)
        rows = tuple(Row(size, rules, sha.hex()) for size, rules, sha in _ROW.iter_unpack(rest))
        listing = tuple(natural(writer) for writer in head["listing"])
        return Group(head["save"], listing, _held(head), rows)
    except (KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{type(error).__name__} at {error}") from None


def entry_to_json(entry: Entry, cuts: object = None) -> dict[str, Any]:
    """cuts: what stands for them."""
    return {
        "name": entry.name,
        "kind": entry.kind,
        "dtype": entry.dtype,
        "shape": entry.shape,
        "first": entry.first,
        "cuts": [astuple(cut) for cut in entry.cuts] if cuts is None else cuts,
    }


def entry_from_json(tree: dict[str, Any], cuts: Sequence[Cut] | None = None) -> Entry:
    """Raises ValueError, KeyError or TypeError where it is none."""
    cuts = cuts_from_json(tree["cuts"]) if cuts is None else cuts
    return Entry(
        tree["name"], tree["kind"], tree["dtype"], tuple(tree["shape"]), natural(tree["first"]), tuple(cuts)
    )


def cuts_from_json(tree: list[list[int]]) -> tuple[Cut, ...]:
    return tuple(Cut(*(natural(value) for value in cut)) for cut in tree)


def sorted_entries(entries: Iterable[Entry]) -> list[Entry]:
    """As their pieces lie in a file."""
    return sorted(entries, key=in_order)


def _held(head: dict[str, Any]) -> tuple[Key, ...]:
    return tuple((name, kind) for name, kind in head["held"])


def split(data: bytes) -> tuple[bytes, bool]:
    """An index of what a file holds, and whether that says that it is on storage. Raises ValueError where it
    is none."""
    line, _, _ = data.partition(b"\n")
    head = parse_json(line)
    if not isinstance(head, dict) or type(head.get("rest")) is not int:
        raise ValueError("no index")
    end = len(line) + 1 + natural(head["rest"])
    if len(data) < end or data[end:] not in (b"", DONE):
        raise ValueError("cut, or with more behind it")
    return data[:end], data[end:] == DONE


def _encoded(head: dict[str, Any], rest: bytes) -> bytes:
    return json.dumps(head | {"rest": len(rest)}, separators=(",", ":")).encode() + b"\n" + rest


def _head(data: bytes) -> tuple[dict[str, Any], bytes]:
    line, _, rest = data.partition(b"\n")
    head = parse_json(line)
    if not isinstance(head, dict):
        raise ValueError("no table")
    return head, rest


def _bytes(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers = array("I", numbers)
        numbers.byteswap()
    return numbers.tobytes()
