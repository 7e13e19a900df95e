"""The work of one process of a build: some parts of a corpus to one finished shard of each split."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from colossus.data.chats import Chat
from colossus.data.corpus import Document, Part, text_of
from colossus.data.documents import Encoder
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.shards import STARTS, Shard, crc32, replace_synced
from colossus.data.split import Split, key_of, sizes_of
from colossus.data.tokenizer import load_tokenizer
from colossus.errors import MachineError
from colossus.untrusted import open_to_append

BATCH_BYTES = 2**21  # of text that is encoded at once


@dataclass(frozen=True)
class Task:
    """Parts that become shard `index` of each split. quick: tiktoken gives the same ids."""

    index: int
    parts: tuple[Part, ...]
    folder: Path
    tokenizer: Path
    split: Split
    dtype: str
    masked: bool
    chats: bool
    quick: bool

    @property
    def journal(self) -> Path:
        """Written when the shard is whole; a build that goes on takes it as it is."""
        return self.folder / f"part-{self.index:05}.json"

    def done(self) -> dict[str, Any]:
        """What the journal says."""
        return json.loads(self.journal.read_text())


def journals(folder: Path) -> list[Path]:
    """Those that lie in the folder of a corpus."""
    return list(folder.glob("part-*.json"))


def encoder_of(folder: Path, quick: bool) -> Encoder:
    """By the tokenizer of a folder, for all tasks of a build."""
    tokenizer = load_tokenizer(folder)
    if quick and isinstance(tokenizer, JsonTokenizer):
        tokenizer.quicken(proved=True)
    return Encoder(tokenizer)


def encode_task(task: Task, encoder: Encoder) -> dict[str, Any]:
    """Encodes the task's parts and returns its journal.

    Raises:
        MachineError: a file cannot be written. UserError: a part cannot be read.
    """
    if task.journal.is_file():
        return task.done()
    try:
        with _Writer(task, "train", encoder) as train, _Writer(task, "validation", encoder) as validation:
            if task.journal.is_file():  # finished meanwhile by a worker of a build that was killed
                return task.done()
            train.begin()
            validation.begin()
            for batch in _batches(task.parts):
                sides = [task.split.holds_out(document) for document in batch]
                train.add([d for d, out in zip(batch, sides, strict=True) if not out])
                validation.add([d for d, out in zip(batch, sides, strict=True) if out], sizes=True)
            done = {
                "train": train.finish(),
                "validation": validation.finish(),
                "sizes": validation.sizes,
                "lost_bytes": validation.num_lost_bytes,
            }
    except OSError as error:
        raise MachineError(f"{task.folder}: cannot be written ({error.strerror or error})") from error
    replace_synced(task.journal, json.dumps(done).encode())
    return done


def _batches(parts: Sequence[Part]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for part in parts:
        for document in part.documents():
            batch.append(document)
            size += len(text_of(document))
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Appends documents to one shard; memory stays at one batch and the documents' starts."""

    def __init__(self, task: Task, split: str, encoder: Encoder) -> None:
        stem = f"{split}-{task.index:05}"
        self._task, self._encoder = task, encoder
        self._is_stream = split == "train"  # held-out documents are scored each by itself
        self._behind_text = self._is_stream and task.index > 0 and not task.chats
        self._names = {"tokens": f"{stem}.bin", "starts": f"{stem}.starts"}
        if task.masked:
            self._names["mask"] = f"{stem}.mask"
        self._files = {
            k: os.fdopen(open_to_append(task.folder / n), "ab")
            for k, n in self._names.items()
            if k != "starts"
        }
        # A worker of a build that was killed may not have noticed yet: it ends before we write.
        fcntl.flock(self._files["tokens"], fcntl.LOCK_EX)
        self._crc = dict.fromkeys(self._files, 0)
        self._starts: list[int] = []
        self._num_tokens = self._num_bytes = self._num_learned = 0
        self.sizes: list[list[int]] = []
        self.num_lost_bytes = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # of bytes that a full disk does not take
                file.close()

    def begin(self) -> None:
        """Removes what a build that was killed had written."""
        for file in self._files.values():
            file.truncate(0)

    def add(self, documents: list[Document], sizes: bool = False) -> None:
        """sizes: of what is learned of each document, plain and compressed, are noted too, and what of it the
        tokenizer loses."""
        follows: list[bool] = []
        for document in documents:
            follows.append(self._behind_text)
            self._behind_text = self._is_stream and not isinstance(document, Chat)
        for document, encoded in zip(documents, self._encoder(documents, follows), strict=True):
            self._starts.append(self._num_tokens)
            self._num_tokens += len(encoded.ids)
            self._put("tokens", encoded.ids.astype(self._task.dtype).tobytes())
            if self._task.masked:
                self._put("mask", encoded.mask.tobytes())
                self._num_learned += int(encoded.mask.sum())
            self._num_bytes += len(encoded.text.encode())
            if sizes:
                self.num_lost_bytes += self._encoder.lost_bytes(encoded)
                self.sizes.append([key_of(text_of(document)) >> 1, *sizes_of(encoded.learned.encode())])

    def finish(self) -> dict[str, Any]:
        """Closes the shard, all of it on disk. A file that says nothing is removed."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        if self._num_learned == self._num_tokens and "mask" in self._names:
            (self._task.folder / self._names.pop("mask")).unlink()
        if not self._num_tokens:
            (self._task.folder / self._names["tokens"]).unlink()
            return asdict(Shard(0, 0, 0, {}))
        path = self._task.folder / self._names["starts"]
        replace_synced(path, np.array(self._starts, STARTS).tobytes())
        crc = self._crc | {"starts": crc32(path)}
        files = {
            kind: {"name": name, "bytes": (self._task.folder / name).stat().st_size, "crc32": crc[kind]}
            for kind, name in self._names.items()
        }
        return asdict(Shard(self._num_tokens, len(self._starts), self._num_bytes, files))

    def _put(self, kind: str, data: bytes) -> None:
        self._files[kind].write(data)
        self._crc[kind] = zlib.crc32(data, self._crc[kind])
