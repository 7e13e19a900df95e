"""Rows of tables as documents: each a text, or each a chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from colossus.data.chats import FIELD, chat_in, is_chat, read_json
from colossus.data.corpus import Document
from colossus.errors import UserError

CHATS = 3  # grows when chats are read as something else


def reading(chats: bool) -> list[tuple[Any, ...]]:
    """How records are read, for fingerprints: shards of another reading are not those of this one."""
    return [("chats", CHATS)] if chats else []


@dataclass(frozen=True)
class Rows:
    """What the rows of one table are: texts under `text_field`, or chats."""

    text_field: str
    chats: bool

    @classmethod
    def like(cls, first: Any, text_field: str) -> Rows:
        """What they are where the first is `first`."""
        return cls(text_field, isinstance(first, dict) and is_chat(read_json(first, text_field), text_field))

    @property
    def columns(self) -> list[str]:
        """What of a row is read."""
        return [FIELD, "tools"] if self.chats else [self.text_field]

    def document(self, row: dict[str, Any], where: object, place: object | None = None) -> Document:
        """The document that a row is; an empty text where that is null.

        where, place: of the row, for errors of texts and of chats; `str` of them says it.

        Raises:
            UserError: it is none, or of the other kind than the rows before it.
        """
        place = place or where
        row = read_json(row, self.text_field)
        if is_chat(row, self.text_field) != self.chats and (FIELD in row or self.text_field in row):
            kinds = [f"chats ({FIELD})", f"texts ({self.text_field})"]
            before, here = kinds if self.chats else kinds[::-1]
            raise UserError(
                f"data.corpus: {place}: the rows before are {before}, this one is of {here}; one kind a file"
            )
        return chat_in(row, place) if self.chats else text_in(row, self.text_field, where)


def text_in(row: dict[str, Any], text_field: str, where: object) -> str:
    """The text of a row of a table; none where it is null.

    Raises:
        UserError: it has no such field, or that holds something else.
    """
    if text_field in row and row[text_field] is None:
        return ""
    if not isinstance(row.get(text_field), str):
        texts = [name for name, value in row.items() if isinstance(value, str)]
        found = f"it has {list(row)}"
        if text_field in row:
            found = f"there is {_kind(row[text_field])}; texts are under {texts or 'no other name'}"
        raise UserError.field(
            "data.text_field", text_field, f"no text under this name at {where}; {found}", texts
        )
    text: str = row[text_field]
    return text


def _kind(value: object) -> str:
    """What a value of JSON is, in words."""
    known = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return known.get(type(value), f"a {type(value).__name__}")
