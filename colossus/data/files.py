"""Local files as a corpus: text, JSON lines and Parquet, compressed or not; large ones in several parts."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from colossus.data.corpus import Corpus, Document, Part, fingerprint_of
from colossus.data.records import Rows
from colossus.errors import UserError

CUT_BYTES = 2 * 2**20  # text files beyond it are cut into documents, at line ends
CUT_TO_BYTES = 2**20
RANGE_BYTES = 8 * 2**20  # of a large file that become a part of their own
MAX_RANGES = 4096
HEAD_BYTES = 2**20  # of a file that are looked at to tell whether it is text
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


def local_corpus(name: str, path: Path, text_field: str) -> Corpus:
    """A file, or all visible files below a folder.

    Raises:
        UserError: nothing in it is text, or the only file is not.
    """
    if any((path / marker).is_file() for marker in ("dataset_info.json", "dataset_dict.json")):
        from colossus.data.hugging_face import stream_corpus

        return stream_corpus(f"hf:{path}", text_field)
    files = (
        [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _visible(p, path))
    )
    files = [file for file in files if file.stat().st_size]
    parts: list[Part] = []
    chats = False
    skipped: list[str] = []
    for file in files:
        label = str(file.relative_to(path)) if file != path else file.name
        kind = _kind(file)
        if kind == "text" and (where := _binary_byte(file)) is not None:
            if file == path:
                raise UserError(f"data.corpus={name}: not text (byte {where} is not UTF-8); a file of text")
            skipped.append(label)
            continue
        rows = Rows.like(_first_row(file, kind), text_field)
        chats |= rows.chats
        parts += _parts_of(file, label, kind, rows)
    notes = []
    if skipped:
        some = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        notes.append(f"files that are not text, left out: {len(skipped):,} ({some})")
    if not parts:
        raise UserError(f"data.corpus={name}: empty; it holds no file with text")
    listing = [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    fingerprint = fingerprint_of([*listing, (text_field,)])
    return Corpus(name, tuple(parts), fingerprint, tuple(notes), masked=chats, chats=chats)


def _visible(file: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(root).parts)


def _kind(file: Path) -> str:
    suffixes = [suffix for suffix in file.suffixes if suffix not in COMPRESSIONS]
    return KINDS.get(suffixes[-1] if suffixes else "", "text")


def _parts_of(file: Path, label: str, kind: str, rows: Rows) -> list[Part]:
    size = file.stat().st_size
    if kind == "parquet":
        return [Part(label, size, _Parquet(str(file), rows))]
    reader: Callable[..., Callable[[], Iterator[Document]]] = (
        partial(_Jsonl, str(file), rows) if kind == "jsonl" else partial(_Text, str(file))
    )
    if file.suffix in COMPRESSIONS or size <= CUT_BYTES:
        return [Part(label, size, reader(0, None))]
    step = max(RANGE_BYTES, -(-size // MAX_RANGES))
    ranges = [(start, min(size, start + step)) for start in range(0, size, step)]
    return [Part(f"{label}@{a}", b - a, reader(a, b)) for a, b in ranges]


def open_bytes(path: str) -> BinaryIO:
    """The bytes of a file, decompressed by its ending."""
    openers: dict[str, Callable[[str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    suffix = Path(path).suffix
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd"), 2**20)
    return openers.get(suffix, lambda p: Path(p).open("rb"))(path)


def _first_row(file: Path, kind: str) -> Any:
    """The first row of a table, or as much of it as tells what it is; None where that cannot be read."""
    try:
        if kind == "jsonl":
            with open_bytes(str(file)) as stream:
                return json.loads(next((line for line in stream if line.strip()), b"null"))
        return _first_of_parquet(file) if kind == "parquet" else None
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        return None  # reading all of it will say what is wrong


def _first_of_parquet(file: Path) -> dict[str, Any] | None:
    """An empty value of each column's kind, as far as matters here."""
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(file)
    except pyarrow.ArrowException:
        return None
    lists = pyarrow.types.is_list, pyarrow.types.is_large_list
    return {field.name: [] if any(test(field.type) for test in lists) else "" for field in schema}


def _binary_byte(file: Path) -> int | None:
    """Where the beginning stops being text; None where it is text."""
    try:
        with open_bytes(str(file)) as stream:
            head = stream.read(HEAD_BYTES)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"data.corpus={file}: cannot be read ({error})") from None
    if (nul := head.find(b"\0")) >= 0:
        return nul
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        cut = len(head) == HEAD_BYTES and error.start >= len(head) - 3  # inside a character
        return None if cut else error.start
    return None


@dataclass(frozen=True)
class _Text:
    """A file is a document; a large one is cut at line ends.

    start, stop: bytes of a file that is read in ranges; a range begins at a line, where there is one near.
    """

    path: str
    start: int
    stop: int | None

    def __call__(self) -> Iterator[Document]:
        with open_bytes(self.path) as stream:
            if self.stop is None:
                head = stream.read(CUT_BYTES + 1)
                if len(head) <= CUT_BYTES:
                    yield _decoded(head, self.path, 0)
                    return
                yield from _cut(stream, head, None, self.path, 0)
            else:
                begin, end = _next_line(stream, self.start), _next_line(stream, self.stop)
                stream.seek(begin)
                yield from _cut(stream, b"", end - begin, self.path, begin)


def _next_line(stream: BinaryIO, offset: int) -> int:
    """The begin of the first line at `offset` or behind it; of a character, where no line ends near."""
    if offset == 0:
        return 0
    stream.seek(offset - 1)
    near = stream.read(CUT_TO_BYTES)
    if (end := near.find(b"\n")) >= 0:
        return offset + end
    inside = (i for i, byte in enumerate(near[1:]) if byte & 0xC0 != 0x80)
    return offset + next(inside, max(0, len(near) - 1))


def _cut(stream: BinaryIO, held: bytes, length: int | None, path: str, offset: int) -> Iterator[str]:
    """`held` and what follows in the stream (`length` bytes, or all), cut to CUT_TO_BYTES or less."""
    left = length if length is not None else -1
    while True:
        if len(held) < 2 * CUT_TO_BYTES and left:
            more = stream.read(4 * CUT_TO_BYTES if left < 0 else min(left, 4 * CUT_TO_BYTES))
            left = 0 if not more else left if left < 0 else left - len(more)
            held += more
        if not held:
            return
        end = len(held)
        if end > CUT_TO_BYTES:
            end = held.rfind(b"\n", 0, CUT_TO_BYTES) + 1 or _character_end(held, CUT_TO_BYTES)
        yield _decoded(held[:end], path, offset)
        offset += end
        held = held[end:]


def _character_end(data: bytes, near: int) -> int:
    """The last place up to `near` that is not inside a character."""
    return next((i for i in range(near, near - 4, -1) if data[i] & 0xC0 != 0x80), near)


def _decoded(data: bytes, path: str, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data.corpus: {path}: byte {offset + error.start} is not UTF-8 text") from None


@dataclass(frozen=True)
class _Jsonl:
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
            row = json.loads(line)
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
class _Parquet:
    """Batch by batch, of the columns that are read."""

    path: str
    rows: Rows

    def __call__(self) -> Iterator[Document]:
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(self.path)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"data.corpus: {self.path}: not a Parquet file ({error})") from None
        kinds = {field.name: field.type for field in table.schema_arrow}
        texts = [name for name, kind in kinds.items() if kind in (pyarrow.string(), pyarrow.large_string())]
        if not self.rows.chats and (field := self.rows.text_field) not in texts:
            raise UserError.field(
                "data.text_field", field, f"no column of text in {self.path}; it has {list(kinds)}", texts
            )
        columns = [name for name in self.rows.columns if name in kinds]
        number = 0
        try:
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield self.rows.document(row, f"{self.path}, row {number}")
        except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"data.corpus: {self.path}: cannot be read ({error})") from None
