"""Local files as a corpus: text, JSON and Parquet, compressed or not; large ones in several parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from colossus.data.corpus import Corpus, Document, Part, fingerprint_of
from colossus.data.decompress import ENDINGS, FAILURES, open_bytes
from colossus.data.json_files import JsonLines, JsonValues, first_line, records_in
from colossus.data.records import Rows, reading
from colossus.data.tables import Parquet, first_of_parquet
from colossus.errors import UserError

CUT_BYTES = 2 * 2**20  # text files beyond it are cut into documents
CUT_TO_BYTES = 2**15  # several windows long, and small beside what is held out of such a file
RANGE_BYTES = 8 * 2**20  # of a large file that become a part of their own
MAX_RANGES = 4096
HEAD_BYTES = 2**20  # of a file that are looked at to tell whether it is text
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
OTHER_KINDS = {".jsonlines": "jsonl"}


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
    plain: list[str] = []
    listing: list[tuple[Any, ...]] = []
    for file in files:
        label = str(file.relative_to(path)) if file != path else file.name
        kind, first = _kind_of(file, text_field, alone=file == path)
        listing.append((str(file.relative_to(path)), *_stamp_of(file), *_reading(file, kind)))
        if kind == "text" and (where := _binary_byte(file)) is not None:
            if file == path:
                raise UserError(f"data.corpus={name}: not text (byte {where} is not UTF-8); a file of text")
            skipped.append(label)
            continue
        if kind == "text" and _ending(file) == ".json":
            plain.append(label)
        rows = Rows.like(first, text_field)
        chats |= rows.chats
        parts += _parts_of(file, label, kind, rows)
    if not parts:
        raise UserError(f"data.corpus={name}: empty; it holds no file with text")
    notes = {
        "files that are not text, left out": skipped,
        f"files of JSON without records of {text_field!r}, learned as they are": plain,
    }
    fingerprint = fingerprint_of([*listing, (text_field,), *reading(chats)])
    said = tuple(_listed(note, labels) for note, labels in notes.items() if labels)
    return Corpus(name, tuple(parts), fingerprint, said, masked=chats, chats=chats)


def _listed(note: str, labels: list[str]) -> str:
    some = ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
    return f"{note}: {len(labels):,} ({some})"


def _visible(file: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(root).parts)


def _ending(file: Path) -> str:
    """In small letters, without that of a compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in ENDINGS]
    return suffixes[-1] if suffixes else ""


def _is_compressed(file: Path) -> bool:
    return file.suffix.lower() in ENDINGS


def _kind_of(file: Path, text_field: str, alone: bool) -> tuple[str, Any]:
    """("text", "jsonl", "values" or "parquet"; of records the first, or what of it tells what they are)."""
    ending = _ending(file)
    kind = (KINDS | OTHER_KINDS).get(ending)
    if kind is not None:
        return kind, first_of_parquet(file) if kind == "parquet" else first_line(file)
    found = records_in(file, text_field, alone) if ending == ".json" else None
    return found if found is not None else ("text", None)


def _stamp_of(file: Path) -> tuple[int, int]:
    """Changes where the file does."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _reading(file: Path, kind: str) -> tuple[Any, ...]:
    """How a file is read, where it once was read in another way: for fingerprints."""
    if kind == "text":
        return (CUT_TO_BYTES,) if _is_compressed(file) or file.stat().st_size > CUT_BYTES else ()
    return () if any(KINDS.get(suffix) == kind for suffix in file.suffixes) else (kind,)


def _parts_of(file: Path, label: str, kind: str, rows: Rows) -> list[Part]:
    size = file.stat().st_size
    if kind == "parquet":
        return [Part(label, size, Parquet(str(file), rows))]
    if kind == "values":
        return [Part(label, size, JsonValues(str(file), rows))]
    reader: Callable[..., Callable[[], Iterator[Document]]] = (
        partial(JsonLines, str(file), rows) if kind == "jsonl" else partial(_Text, str(file))
    )
    if _is_compressed(file) or size <= CUT_BYTES:
        return [Part(label, size, reader(0, None))]
    step = max(RANGE_BYTES, -(-size // MAX_RANGES))
    ranges = [(start, min(size, start + step)) for start in range(0, size, step)]
    return [Part(f"{label}@{a}", b - a, reader(a, b)) for a, b in ranges]


def _binary_byte(file: Path) -> int | None:
    """Where the beginning stops being text; None where it is text."""
    try:
        with open_bytes(str(file)) as stream:
            head = stream.read(HEAD_BYTES)
    except FAILURES as error:
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
    """A file is a document; a large one is cut between paragraphs, lines or words.

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
            end = _piece_end(held)
        yield _decoded(held[:end], path, offset)
        offset += end
        held = held[end:]


def _piece_end(data: bytes) -> int:
    """Where a piece of CUT_TO_BYTES, or of half as many at least, ends well."""
    for mark in (b"\n\n", b"\n", b" "):
        if (at := data.rfind(mark, CUT_TO_BYTES // 2, CUT_TO_BYTES)) >= 0:
            return at + len(mark)
    return _character_end(data, CUT_TO_BYTES)


def _character_end(data: bytes, near: int) -> int:
    """The last place up to `near` that is not inside a character."""
    return next((i for i in range(near, near - 4, -1) if data[i] & 0xC0 != 0x80), near)


def _decoded(data: bytes, path: str, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data.corpus: {path}: byte {offset + error.start} is not UTF-8 text") from None
