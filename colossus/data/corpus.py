"""What a corpus is: a list of parts, each of which yields documents, the same at every reading.

Parts are small descriptions that travel to worker processes; nothing is read before `documents()`.
`data.open` says which corpus a name stands for.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from colossus.data.chats import Chat
from colossus.errors import UserError

# Text, pieces of text with whether each is learned, or a conversation.
Document = str | list[tuple[str, bool]] | Chat


@dataclass(frozen=True)
class Part:
    """A stretch of a corpus. name: stable, for errors and fingerprints. num_bytes: 0 where unknown."""

    name: str
    num_bytes: int
    read: Callable[[], Iterator[Document]]

    def documents(self) -> Iterator[Document]:
        """Its documents, empty ones left out.

        Raises:
            UserError: it cannot be read, or ends in the middle.
        """
        try:
            for document in self.read():
                if text_of(document):
                    yield _encodable(document)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"data.corpus: {self.name}: cannot be read ({error})") from None


@dataclass(frozen=True)
class Corpus:
    """name: as the user calls it. fingerprint: changes when the listing changes. notes: said once.

    masked: some of its documents may not be learned whole. chats: some are conversations.
    """

    name: str
    parts: tuple[Part, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()
    masked: bool = False
    chats: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes on disk where they are known."""
        return sum(part.num_bytes for part in self.parts)

    def documents(self) -> Iterator[Document]:
        """The documents of all parts, in order."""
        for part in self.parts:
            yield from part.documents()


def fingerprint_of(entries: list[tuple[Any, ...]]) -> str:
    """A short hash of a listing."""
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def text_of(document: Document) -> str:
    """The whole text of a document; of a chat, what stands for it before it is rendered."""
    if isinstance(document, str):
        return document
    return document.text if isinstance(document, Chat) else "".join(text for text, _ in document)


def _encodable(document: Document) -> Document:
    """The document with lone surrogates, which JSON can spell and UTF-8 cannot, replaced."""
    if isinstance(document, str):
        return _valid(document)
    if isinstance(document, Chat):
        return replace(document, messages=_all_valid(document.messages), tools=_all_valid(document.tools))
    return [(_valid(text), learned) for text, learned in document]


def _all_valid(value: Any) -> Any:
    """A JSON value, its texts valid."""
    if isinstance(value, dict):
        return {_valid(key): _all_valid(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_all_valid(item) for item in value]
    return _valid(value) if isinstance(value, str) else value


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
