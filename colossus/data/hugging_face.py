"""Data sets of Hugging Face's `datasets` as a corpus, streamed: from its hub, or from a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from colossus.data.chats import FIELD
from colossus.data.corpus import Corpus, Document, Part, fingerprint_of
from colossus.data.records import Rows, reading
from colossus.data.tables import BATCH_ROWS, rows_of
from colossus.errors import UserError

ROWS_A_PART = 1000  # of a data set that was saved whole, which is cut into up to MAX_PARTS
MAX_PARTS = 64


def stream_corpus(name: str, text_field: str) -> Corpus:
    """`hf:NAME[:SPLIT]`, where NAME may be a local folder. Its shards are the parts.

    Raises:
        UserError: the extra is not installed, or there is no such data set or split.
    """
    check_extra(name)
    import datasets

    where, _, split = name.removeprefix("hf:").partition(":")
    split = split or "train"
    stream = _stream(where, split)
    count = stream.num_shards
    rows = Rows.like(_first_row(stream), text_field)
    entries: list[tuple[Any, ...]] = [(where, split, text_field, count, datasets.__version__)]
    size = int(getattr((stream.info.splits or {}).get(split), "num_bytes", None) or 0)
    if Path(where).is_dir():
        files = [(p, p.stat()) for p in sorted(Path(where).rglob("*")) if p.is_file()]
        entries += [(str(p.relative_to(where)), stat.st_size, stat.st_mtime_ns) for p, stat in files]
        size = sum(stat.st_size for _, stat in files)
    parts = [
        Part(f"{where}@{index}", size // count, _Streamed(where, split, rows, index, count))
        for index in range(count)
    ]
    return Corpus(
        name,
        tuple(parts),
        fingerprint_of([*entries, *reading(rows.chats)]),
        masked=rows.chats,
        chats=rows.chats,
    )


def check_extra(name: str) -> None:
    """Raises UserError where `datasets`, which `hf:` needs, is not installed."""
    if find_spec("datasets") is None:
        raise UserError(f"data.corpus={name}: needs the extra: pip install 'colossus-train[hf]'")


def _first_row(stream: Any) -> Any:
    """The first row of a data set that may hold chats."""
    if stream.features is not None and FIELD not in stream.features:
        return None
    try:
        return next(_rows(stream, 1), None)
    except (OSError, ValueError):
        return None  # reading all of it will say what is wrong


def _stream(where: str, split: str) -> Any:
    import datasets

    try:
        if any((Path(where) / marker).is_file() for marker in ("dataset_info.json", "dataset_dict.json")):
            stored = datasets.load_from_disk(where)
            if isinstance(stored, datasets.DatasetDict):
                if split not in stored:
                    raise UserError.field(
                        "data.corpus", f"hf:{where}:{split}", f"its splits are {list(stored)}", stored
                    )
                stored = stored[split]
            return stored.to_iterable_dataset(num_shards=max(1, min(MAX_PARTS, len(stored) // ROWS_A_PART)))
        return datasets.load_dataset(where, split=split, streaming=True)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"data.corpus=hf:{where}:{split}: cannot be opened ({error})") from None


def _rows(stream: Any, batch: int) -> Iterator[dict[str, Any]]:
    """The rows of a stream, by way of Arrow, which tells nulls of a table from those of JSON text."""
    for table in stream.with_format("arrow").iter(batch_size=batch):
        yield from rows_of(table)


@dataclass(frozen=True)
class _Streamed:
    where: str
    split: str
    rows: Rows
    index: int
    count: int

    def __call__(self) -> Iterator[Document]:
        stream = _stream(self.where, self.split).shard(num_shards=self.count, index=self.index)
        for number, row in enumerate(_rows(stream, BATCH_ROWS), 1):
            place = f"hf:{self.where}:{self.split}, shard {self.index}, row {number}"
            yield self.rows.document(row, f"hf:{self.where}", place)
