"""The corpus that a name stands for."""

from __future__ import annotations

import inspect
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossus import named
from colossus.data.corpus import Corpus, Document, Part, fingerprint_of
from colossus.data.files import local_corpus
from colossus.data.hugging_face import check_extra, stream_corpus
from colossus.data.python_corpus import python_corpus
from colossus.errors import UserError, nearest


def open_corpus(name: str, text_field: str = "text") -> Corpus:
    """The corpus that `name` stands for: `python`, `hf:NAME[:SPLIT]`, `package.module:Name`, or a path.

    Raises:
        UserError: there is no such thing, or nothing in it can be read.
    """
    check_corpus(name)
    if name == "python":
        return python_corpus()
    if name.startswith("hf:"):
        return stream_corpus(name, text_field)
    if _is_there(path := _path(name)):
        return local_corpus(name, path, text_field)
    return _users_own(name)


def check_corpus(name: str, *, dry: bool = False) -> None:
    """Raises the UserError of `open_corpus` where a path is not there or is neither file nor
    folder, or where the user's own cannot be imported.

    Reads nothing, so it can be asked before anything that takes long. dry: nothing is imported either.
    """
    if name.startswith("hf:"):
        check_extra(name)
        return
    if name == "python":
        return
    if _is_there(path := _path(name)):
        if not (path.is_file() or path.is_dir()):  # a pipe, a device: reading it might never end
            raise UserError(
                f"data.corpus={name}: no regular file; python, the path of a file or folder, hf:NAME or "
                "package.module:Name"
            )
        return
    if ":" not in name or "/" in name:
        raise _no_such_path(name, path)
    (named.check if dry else named.find)("data.corpus", name)


def is_listed_here(name: str) -> bool:
    """Whether a corpus can be opened with what is on this machine, and no code of the user's."""
    return name == "python" or (not name.startswith("hf:") and _is_there(_path(name)))


def _path(name: str) -> Path:
    return Path(name.removeprefix("file://")).expanduser()


def _is_there(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110  # Path.exists raises for a name that no file can have


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
