"""Files of JSON as a corpus: lines of records, or records that stretch over lines, in an array or not."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from colossus.data.chats import is_chat
from colossus.data.corpus import Document
from colossus.data.decompress import FAILURES, open_bytes
from colossus.data.records import Rows
from colossus.errors import UserError
from colossus.untrusted import parse_json

CHUNK_BYTES = 2**20  # that are read at once of records that stretch over lines
FIRST_BYTES = 2**24  # of the first record at most, where it is looked for to tell what a file holds
RECORD_BYTES = 2**28  # of any other
_BLANKS = re.compile(r"[ \t\n\r]*")


def records_in(file: Path, text_field: str, alone: bool) -> tuple[str, Any] | None:
    """How to read a file whose name ends in .json, "jsonl" or "values", and its first record; None where it
    holds no records, and is a text.

    Records are objects with the field of texts, or with messages. Where each line holds an object, or the
    file is a corpus `alone`, any objects are: reading them will say what field is missing.
    """

    def is_record(value: Any) -> bool:
        return isinstance(value, dict) and (alone or text_field in value or is_chat(value, text_field))

    try:
        with open_bytes(str(file)) as stream:
            lines = [parse_json(line) for line in _two_lines(stream)]
        if lines and all(isinstance(line, dict) for line in lines):
            return ("jsonl", lines[0]) if len(lines) == 2 or is_record(lines[0]) else None
    except (*FAILURES, ValueError):
        pass  # a line is no value
    try:
        with open_bytes(str(file)) as stream:
            first = next(_values(stream, FIRST_BYTES), None)
    except (*FAILURES, ValueError):
        return None  # reading it as a text will say what is wrong
    return ("values", first) if is_record(first) else None


def _two_lines(stream: BinaryIO) -> list[bytes]:
    """The first two that are not blank; of one that is longer than a first record may be, its begin."""
    found: list[bytes] = []
    while len(found) < 2 and (line := stream.readline(FIRST_BYTES)):
        found += [line] if line.strip() else []
    return found


def first_line(file: Path) -> Any:
    """The value of the first line that is not blank; None where that cannot be read."""
    try:
        with open_bytes(str(file)) as stream:
            return parse_json(next((line for line in stream if line.strip()), b"null"))
    except (*FAILURES, ValueError):
        return None  # reading all of it will say what is wrong


@dataclass(frozen=True)
class JsonLines:
    """Lines that begin in [start, stop) of the file."""

    path: str
    rows: Rows
    start: int
    stop: int | None

    def __call__(self) -> Iterator[Document]:
        with open_bytes(self.path) as stream:
            if self.start:
                stream.seek(self.start - 1)
                stream.readline()
            begin = stream.tell() if self.stop is not None else 0
            while (self.stop is None or begin < self.stop) and (line := stream.readline()):
                if line.strip():
                    yield self._document(line, begin)
                begin += len(line)

    def _document(self, line: bytes, begin: int) -> Document:
        where = f"{self.path}, byte {begin}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"data.corpus: {where}: not a JSON line ({error})") from None
        return self.rows.document(row if isinstance(row, dict) else {}, where, _Line(self.path, begin))


@dataclass(frozen=True)
class _Line:
    """The line of a file that begins at byte `begin`. Counted when it is said."""

    path: str
    begin: int

    def __str__(self) -> str:
        number, left = 1, self.begin
        with open_bytes(self.path) as stream:
            while left and (chunk := stream.read(min(left, 2**20))):
                number, left = number + chunk.count(b"\n"), left - len(chunk)
        return f"{self.path}, line {number}"


@dataclass(frozen=True)
class JsonValues:
    """Records one after another, or in one array."""

    path: str
    rows: Rows

    def __call__(self) -> Iterator[Document]:
        number = 1
        with open_bytes(self.path) as stream:
            try:
                for number, row in enumerate(_values(stream, RECORD_BYTES), 1):
                    yield self.rows.document(
                        row if isinstance(row, dict) else {}, f"{self.path}, record {number}"
                    )
            except UserError:
                raise
            except ValueError as error:
                raise UserError(
                    f"data.corpus: {self.path}, behind record {number}: not JSON ({error})"
                ) from None


def _values(stream: BinaryIO, limit: int) -> Iterator[Any]:
    """The JSON values that a stream holds one after another, or in one array.

    Raises:
        ValueError: there is something else, or a value takes more than `limit` bytes.
    """
    text = _Ahead(stream, limit)
    in_array = text.skips("[")
    while text.next() and not (in_array and text.skips("]")):
        yield text.value()
        if in_array and not text.skips(",") and text.next() != "]":
            raise ValueError("neither , nor ] behind a value of the array")
    if text.next():
        raise ValueError("something follows the array")


class _Ahead:
    """The text of a stream of UTF-8, read as far ahead as its values need."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream, self._limit = stream, limit
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._json = json.JSONDecoder()
        self._held, self._at = "", 0

    def next(self) -> str:
        """The next character that is not blank; none at the end."""
        while True:
            self._at = _BLANKS.match(self._held, self._at).end()  # type: ignore[union-attr]  # matches nothing too
            if self._at < len(self._held) or not self._read():
                return self._held[self._at : self._at + 1]

    def skips(self, character: str) -> bool:
        """Whether that is the next one, which is behind us then."""
        found = self.next() == character
        self._at += found
        return found

    def value(self) -> Any:
        """The value that begins at the next character."""
        while True:
            try:
                value, self._at = self._json.raw_decode(self._held, self._at)
                return value
            except RecursionError as error:
                raise ValueError(str(error)) from None
            except ValueError:  # also of one that goes on behind what is held
                if not self._read():
                    raise

    def _read(self) -> bool:
        """Whether there was more; as much is read as is held, so that a long value is begun rarely."""
        rest = self._held[self._at :]
        if len(rest) > self._limit:
            raise ValueError(f"a value of more than {self._limit:,} bytes")
        data = self._stream.read(max(CHUNK_BYTES, len(rest)))
        self._held, self._at = rest + self._decode(data, final=not data), 0
        return bool(data)
