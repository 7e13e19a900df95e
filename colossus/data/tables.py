"""Rows of Arrow tables, as Parquet and `datasets` hold them, as the JSON values that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossus.data.chats import FIELD
from colossus.data.corpus import Document
from colossus.data.records import Rows
from colossus.errors import UserError

BATCH_ROWS = 256  # that are read at once

_Reader = Callable[[Any], Any]


def rows_of(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a table or a batch.

    All records of a column have the same fields, at every depth: those that one lacks are null there. They
    are left out, but for the columns themselves. What a column of JSON text holds is read; its nulls stay.

    Raises:
        ValueError: a column of JSON text holds something else.
    """
    readers = {field.name: _reader(field.type) for field in table.schema}
    for row in table.to_pylist():
        yield {name: _read(readers[name], value) for name, value in row.items()}


def _read(reader: _Reader | None, value: Any) -> Any:
    return value if reader is None or value is None else reader(value)


def _reader(kind: Any) -> _Reader | None:
    """What makes of a Python value of an Arrow type that of JSON; None where it is that."""
    import pyarrow

    kind = _stored(kind)
    if isinstance(kind, pyarrow.BaseExtensionType):
        return json.loads
    if pyarrow.types.is_struct(kind):
        readers = {field.name: _reader(field.type) for field in kind}
        return lambda record: {k: _read(readers[k], v) for k, v in record.items() if v is not None}
    if pyarrow.types.is_map(kind):
        item = _reader(kind.item_type)
        return lambda pairs: {key: _read(item, value) for key, value in pairs}
    if is_list(kind):
        item = _reader(kind.value_type)
        return None if item is None else lambda items: [_read(item, value) for value in items]
    return None


def _stored(kind: Any) -> Any:
    """A type without what is only a way of storing it: dictionaries, and extensions but for JSON text."""
    import pyarrow

    while True:
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        elif isinstance(kind, pyarrow.BaseExtensionType) and kind.extension_name != "arrow.json":
            kind = kind.storage_type
        else:
            return kind


def is_list(kind: Any) -> bool:
    """Whether an Arrow type is a list of any form, but no map."""
    import pyarrow

    names = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    return any(getattr(pyarrow.types, name)(kind) for name in names)


def is_text(kind: Any) -> bool:
    """Whether values of an Arrow type are texts, or may be: also of a column that holds nothing."""
    import pyarrow

    kind = _stored(kind)
    names = ("is_string", "is_large_string", "is_string_view", "is_null")
    return isinstance(kind, pyarrow.BaseExtensionType) or any(
        getattr(pyarrow.types, name)(kind) for name in names
    )


def first_of_parquet(file: Path) -> dict[str, Any] | None:
    """An empty value of each column's kind, as far as matters to tell what the rows are; of a column of
    messages that is no list, the first there is. None where the file cannot be read."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            kinds = {field.name: field.type for field in table.schema_arrow}
            row: dict[str, Any] = {name: [] if is_list(kind) else "" for name, kind in kinds.items()}
            if FIELD in kinds and not is_list(kinds[FIELD]):
                for batch in table.iter_batches(batch_size=1, columns=[FIELD]):
                    return row | next(rows_of(batch), {})
            return row
    except (OSError, ValueError, pyarrow.ArrowException):
        return None


@dataclass(frozen=True)
class Parquet:
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
        names = table.schema_arrow.names
        for name in self.rows.columns:
            if names.count(name) > 1:
                raise UserError(
                    f"data.corpus: {self.path}: {names.count(name)} columns are named {name}; it cannot be "
                    "told which is meant: give each a name of its own"
                )
        texts = [name for name, kind in kinds.items() if is_text(kind)]
        if not self.rows.chats and (field := self.rows.text_field) not in texts:
            raise UserError.field(
                "data.text_field", field, f"no column of text in {self.path}; it has {list(kinds)}", texts
            )
        number = 0
        try:
            for row in self._rows(table, [name for name in self.rows.columns if name in kinds]):
                number += 1
                yield self.rows.document(row, f"{self.path}, row {number}")
        except UserError:
            raise
        except (OSError, pyarrow.ArrowException, ValueError) as error:
            raise UserError(f"data.corpus: {self.path}: cannot be read ({error})") from None

    def _rows(self, table: Any, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            yield from rows_of(batch)
