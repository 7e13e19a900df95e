"""Where text comes from. A corpus is a list of parts; each part yields documents, the same at every reading.

Parts are small descriptions that travel to worker processes; nothing is read before `documents()`.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib
import io
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from colossus.errors import UserError, nearest

Document = str | list[tuple[str, bool]]  # text, or pieces of text with whether each is learned
CUT_BYTES = 8 * 2**20  # text files beyond it are cut at line ends
CUT_TO_BYTES = 2**20
RANGE_BYTES = 32 * 2**20  # of a JSONL file that one worker reads
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class Part:
    """A stretch of a corpus. name: stable, for errors and fingerprints. num_bytes: 0 where unknown."""

    name: str
    num_bytes: int
    read: Callable[[], Iterator[Document]]

    def documents(self) -> Iterator[Document]:
        """Its documents, empty ones left out."""
        return (document for document in self.read() if document)


@dataclass(frozen=True)
class Corpus:
    """name: as the user calls it. fingerprint: changes when the listing changes. notes: said once."""

    name: str
    parts: tuple[Part, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes on disk where they are known."""
        return sum(part.num_bytes for part in self.parts)


def open_corpus(name: str, text_field: str = "text") -> Corpus:
    """The corpus that `name` stands for: `python`, `hf:NAME[:SPLIT]`, `package.module:Name`, or a path.

    Raises:
        UserError: there is no such thing, or nothing in it can be read.
    """
    if name == "python":
        from colossus.data.python_corpus import python_corpus

        return python_corpus()
    if name.startswith("hf:"):
        return _hugging_face(name, text_field)
    path = Path(name.removeprefix("file://")).expanduser()
    if path.exists():
        return _local(name, path, text_field)
    if ":" in name and "/" not in name:
        return _users_own(name)
    raise _no_such_path(name, path)


def fingerprint_of(entries: list[tuple[Any, ...]]) -> str:
    """A short hash of a listing."""
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def _no_such_path(name: str, path: Path) -> UserError:
    folder = path.parent
    siblings = [str(folder / p.name) for p in folder.iterdir()] if folder.is_dir() else []
    guess = nearest(str(path), [*siblings, "python"])
    hint = f"; did you mean {guess!r}?" if guess else ""
    return UserError(
        f"data.corpus={name}: no such file or folder; python, a path, hf:NAME or package.module:Name{hint}"
    )


def _local(name: str, path: Path, text_field: str) -> Corpus:
    files = (
        [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _visible(p, path))
    )
    if path.is_dir() and (path / "dataset_info.json").is_file():
        return _hugging_face(f"hf:{path}", text_field)
    parts: list[Part] = []
    skipped: list[str] = []
    for file in files:
        label = str(file.relative_to(path)) if file != path else file.name
        kind = _kind(file)
        if kind == "text" and (where := _binary_byte(file)) is not None:
            if file == path:
                raise UserError(f"data.corpus={name}: not text (byte {where} is not UTF-8); a file of text")
            skipped.append(label)
            continue
        parts += _parts_of(file, label, kind, text_field)
    notes = []
    if skipped:
        notes.append(f"{len(skipped)} files are not text and were left out ({', '.join(skipped[:3])}, ...)")
    if not parts or not any(part.num_bytes for part in parts):
        raise UserError(f"data.corpus={name}: empty; it holds no file with text")
    listing = [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return Corpus(name, tuple(parts), fingerprint_of([*listing, (text_field,)]), tuple(notes))


def _visible(file: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(root).parts)


def _kind(file: Path) -> str:
    suffixes = [s for s in file.suffixes if s not in COMPRESSIONS]
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(
        suffixes[-1] if suffixes else "", "text"
    )


def _parts_of(file: Path, label: str, kind: str, text_field: str) -> list[Part]:
    size = file.stat().st_size
    if kind == "jsonl" and file.suffix not in COMPRESSIONS:
        ranges = [(start, min(size, start + RANGE_BYTES)) for start in range(0, size, RANGE_BYTES)]
        return [Part(f"{label}@{a}", b - a, _Jsonl(str(file), text_field, a, b)) for a, b in ranges]
    reader: Callable[[], Iterator[Document]]
    if kind == "jsonl":
        reader = _Jsonl(str(file), text_field, 0, None)
    elif kind == "parquet":
        reader = _Parquet(str(file), text_field)
    else:
        reader = _Text(str(file))
    return [Part(label, size, reader)]


def open_bytes(path: str) -> BinaryIO:
    """The bytes of a file, decompressed by its ending."""
    openers: dict[str, Callable[[str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    suffix = Path(path).suffix
    if suffix == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd")
    return openers.get(suffix, lambda p: open(p, "rb"))(path)


def _binary_byte(file: Path) -> int | None:
    """Where the first MiB stops being text; None where it is text."""
    try:
        with open_bytes(str(file)) as stream:
            head = stream.read(2**20)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"data.corpus={file}: cannot be read ({error})") from None
    if (nul := head.find(b"\0")) >= 0:
        return nul
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start if error.start < len(head) - 4 else None
    return None


@dataclass(frozen=True)
class _Text:
    """A file is a document; a large one is cut at line ends."""

    path: str

    def __call__(self) -> Iterator[Document]:
        with open_bytes(self.path) as stream:
            head = stream.read(CUT_BYTES + 1)
            if len(head) <= CUT_BYTES:
                yield _decoded(head, self.path, 0)
                return
            done = 0
            while head:
                end = head.rfind(b"\n", 0, CUT_TO_BYTES) + 1 or head.find(b"\n") + 1 or len(head)
                yield _decoded(head[:end], self.path, done)
                done += end
                head = head[end:]
                if len(head) < 2 * CUT_TO_BYTES:
                    head += stream.read(CUT_BYTES)


def _decoded(data: bytes, path: str, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data.corpus: {path}: byte {offset + error.start} is not UTF-8 text") from None


@dataclass(frozen=True)
class _Jsonl:
    """Lines that begin in [start, stop) of the file; the text is in field `text_field`."""

    path: str
    text_field: str
    start: int
    stop: int | None

    def __call__(self) -> Iterator[Document]:
        with open_bytes(self.path) as raw:
            stream = io.BufferedReader(raw, 2**20) if self.stop is None else raw  # type: ignore[type-var]
            if self.start:
                stream.seek(self.start - 1)
                stream.readline()
            while self.stop is None or stream.tell() < self.stop:
                begin = stream.tell() if self.stop is not None else -1
                line = stream.readline()
                if not line:
                    return
                if line.strip():
                    yield self._document(line, begin)

    def _document(self, line: bytes, begin: int) -> str:
        where = f"{self.path}" + (f", byte {begin}" if begin >= 0 else "")
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"data.corpus: {where}: not a JSON line ({error})") from None
        names = list(row) if isinstance(row, dict) else []
        if self.text_field not in names or not isinstance(row[self.text_field], str):
            raise UserError.field(
                "data.text_field",
                self.text_field,
                f"no text under this name at {where}; it has {names}",
                names,
            )
        return row[self.text_field]


@dataclass(frozen=True)
class _Parquet:
    """The column `text_field`, batch by batch."""

    path: str
    text_field: str

    def __call__(self) -> Iterator[Document]:
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(self.path)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise UserError(f"data.corpus: {self.path}: not a Parquet file ({error})") from None
        names = table.schema_arrow.names
        if self.text_field not in names:
            raise UserError.field(
                "data.text_field", self.text_field, f"no such column in {self.path}; it has {names}", names
            )
        for batch in table.iter_batches(batch_size=256, columns=[self.text_field]):
            yield from (text for text in batch.column(0).to_pylist() if text)


def _hugging_face(name: str, text_field: str) -> Corpus:
    """Streamed; `hf:NAME:SPLIT`, where NAME may be a local folder. Its shards are the parts."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"data.corpus={name}: needs the extra: pip install 'colossus-train[hf]'") from None
    where, _, split = name.removeprefix("hf:").partition(":")
    count = _stream(where, split or "train").num_shards
    parts = [
        Part(f"{where}@{index}", 0, _Streamed(where, split or "train", text_field, index, count))
        for index in range(count)
    ]
    entries: list[tuple[Any, ...]] = [(where, split, count, datasets.__version__)]
    if Path(where).is_dir():
        entries += [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(Path(where).iterdir())]
    return Corpus(name, tuple(parts), fingerprint_of(entries))


def _stream(where: str, split: str) -> Any:
    import datasets

    try:
        if (Path(where) / "dataset_info.json").is_file():
            stored = datasets.load_from_disk(where)
            return stored.to_iterable_dataset(num_shards=max(1, min(64, len(stored) // 1000)))
        return datasets.load_dataset(where, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise UserError(f"data.corpus=hf:{where}:{split}: cannot be opened ({error})") from None


@dataclass(frozen=True)
class _Streamed:
    where: str
    split: str
    text_field: str
    index: int
    count: int

    def __call__(self) -> Iterator[Document]:
        for row in _stream(self.where, self.split).shard(num_shards=self.count, index=self.index):
            if self.text_field not in row:
                raise UserError.field(
                    "data.text_field",
                    self.text_field,
                    f"no such field in hf:{self.where}; it has {list(row)}",
                    row,
                )
            yield row[self.text_field]


def _users_own(name: str) -> Corpus:
    """`package.module:Name`: called without arguments, it gives an iterable of documents."""
    documents = _Called(*name.split(":", 1))
    documents.find()
    return Corpus(name, (Part(name, 0, documents),), fingerprint_of([(name,)]))


@dataclass(frozen=True)
class _Called:
    module: str
    attribute: str

    def find(self) -> Callable[[], Any]:
        try:
            module = importlib.import_module(self.module)
        except ImportError as error:
            raise UserError(
                f"data.corpus={self.module}:{self.attribute}: cannot be imported ({error})"
            ) from None
        if not callable(getattr(module, self.attribute, None)):
            raise UserError.field(
                "data.corpus",
                f"{self.module}:{self.attribute}",
                f"{self.module} has no such callable",
                dir(module),
            )
        return getattr(module, self.attribute)

    def __call__(self) -> Iterator[Document]:
        for document in self.find()():
            if not isinstance(document, (str, list)):
                raise UserError(
                    f"data.corpus={self.module}:{self.attribute}: yields {type(document).__name__}; "
                    "text, or a list of (text, learned) pieces"
                )
            yield document
