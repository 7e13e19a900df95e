"""Where text comes from. A corpus is a list of parts; each part yields documents, the same at every reading.

Parts are small descriptions that travel to worker processes; nothing is read before `documents()`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from colossus import named
from colossus.data.chats import Chat
from colossus.errors import UserError, nearest

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


def open_corpus(name: str, text_field: str = "text") -> Corpus:
    """The corpus that `name` stands for: `python`, `hf:NAME[:SPLIT]`, `package.module:Name`, or a path.

    Raises:
        UserError: there is no such thing, or nothing in it can be read.
    """
    check_corpus(name)
    if name == "python":
        from colossus.data.python_corpus import python_corpus

        return python_corpus()
    if name.startswith("hf:"):
        from colossus.data.hugging_face import stream_corpus

        return stream_corpus(name, text_field)
    if _is_there(path := _path(name)):
        from colossus.data.files import local_corpus

        return local_corpus(name, path, text_field)
    return _users_own(name)


def check_corpus(name: str) -> None:
    """Raises the UserError of `open_corpus` where a path is not there or the user's own cannot be imported.

    Reads nothing, so it can be asked before anything that takes long.
    """
    if name == "python" or name.startswith("hf:") or _is_there(path := _path(name)):
        return
    if ":" not in name or "/" in name:
        raise _no_such_path(name, path)
    named.find("data.corpus", name)


def _path(name: str) -> Path:
    return Path(name.removeprefix("file://")).expanduser()


def _is_there(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110  # Path.exists raises for a name that no file can have


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


def _no_such_path(name: str, path: Path) -> UserError:
    folder = path.parent
    siblings = [str(folder / p.name) for p in folder.iterdir()] if os.path.isdir(folder) else []  # noqa: PTH112
    guess = nearest(str(path), [*siblings, "python"])
    hint = f"; did you mean {guess!r}?" if guess else ""
    return UserError(
        f"data.corpus={name}: no such file or folder; python, a path, hf:NAME or package.module:Name{hint}"
    )


def _users_own(name: str) -> Corpus:
    """`package.module:Name`: called without arguments, it gives an iterable of documents."""
    named.find("data.corpus", name)
    documents = _Called(name)
    source = inspect.getsourcefile(sys.modules[name.partition(":")[0]])
    code = zlib.crc32(Path(source).read_bytes()) if source else 0
    return Corpus(name, (Part(name, 0, documents),), fingerprint_of([(name, code)]), masked=True)


@dataclass(frozen=True)
class _Called:
    name: str

    def __call__(self) -> Iterator[Document]:
        for document in named.find("data.corpus", self.name)():
            if not isinstance(document, str) and not _is_pieces(document):
                raise UserError(
                    f"data.corpus={self.name}: yields {type(document).__name__} {document!r:.60}; "
                    "text, or a list of (text, learned) pieces"
                )
            yield document


def _is_pieces(document: Any) -> bool:
    return isinstance(document, list) and all(
        isinstance(piece, tuple) and len(piece) == 2 and isinstance(piece[0], str) for piece in document
    )
