"""The work of one process of a build: some parts of a corpus to one finished shard of each split."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from colossus.data.corpus import Document, Part
from colossus.data.shards import Shard, write_synced
from colossus.data.tokenizer import BytesTokenizer, JsonTokenizer, load_tokenizer
from colossus.errors import MachineError

BATCH_BYTES = 2**21  # of text that is encoded at once


@dataclass(frozen=True)
class Task:
    """Parts that become shard `index`. held_out: the share of documents that go to validation."""

    index: int
    parts: tuple[Part, ...]
    folder: Path
    tokenizer: Path
    held_out: float
    dtype: str
    masked: bool
    quick: bool

    @property
    def journal(self) -> Path:
        """Written when the shard is whole; a build that goes on takes it as it is."""
        return self.folder / f"part-{self.index:05}.json"


def text_of(document: Document) -> str:
    """The whole text of a document."""
    return document if isinstance(document, str) else "".join(text for text, _ in document)


def is_held_out(text: str, share: float) -> bool:
    """By the text alone, so that equal documents lie on the same side whatever the order."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") < share * 2**64


def sizes_of(data: bytes) -> list[int]:
    """A key that shuffles, and the sizes of a document: plain, and by gzip -9, bz2 -9, xz -9e."""
    key = int.from_bytes(hashlib.blake2b(data, digest_size=7, key=b"order").digest(), "little")
    extreme = 9 | lzma.PRESET_EXTREME
    packed = (gzip.compress(data, 9), bz2.compress(data, 9), lzma.compress(data, preset=extreme))
    return [key, len(data), *map(len, packed)]


def encode_task(task: Task) -> dict[str, Any]:
    """Encodes the task's parts and returns its journal.

    Raises:
        MachineError: a file cannot be written. UserError: a part cannot be read.
    """
    if task.journal.is_file():
        return json.loads(task.journal.read_text())
    tokenizer = load_tokenizer(task.tokenizer)
    if task.quick and isinstance(tokenizer, JsonTokenizer):
        tokenizer.quicken([])
    try:
        with _Writer(task, "train", tokenizer) as train, _Writer(task, "validation", tokenizer) as validation:
            for batch in _batches(task.parts):
                sides = [is_held_out(text_of(document), task.held_out) for document in batch]
                train.add([d for d, out in zip(batch, sides, strict=True) if not out])
                validation.add([d for d, out in zip(batch, sides, strict=True) if out], sizes=True)
            done = {"train": train.finish(), "validation": validation.finish(), "sizes": validation.sizes}
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
            raise MachineError(f"{task.folder}: cannot be written ({error.strerror})") from None
        raise
    write_synced(task.journal, json.dumps(done).encode())
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

    def __init__(self, task: Task, split: str, tokenizer: JsonTokenizer | BytesTokenizer) -> None:
        stem = f"{split}-{task.index:05}"
        self._task, self._tokenizer = task, tokenizer
        self._names = {"tokens": f"{stem}.bin", "starts": f"{stem}.starts.npy"}
        if task.masked:
            self._names["mask"] = f"{stem}.mask"
        self._files = {k: (task.folder / n).open("wb") for k, n in self._names.items() if k != "starts"}
        self._crc = dict.fromkeys(self._files, 0)
        self._starts: list[int] = []
        self._num_tokens = self._num_bytes = 0
        self.sizes: list[list[int]] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, documents: list[Document], sizes: bool = False) -> None:
        for document, (ids, mask) in zip(documents, self._encoded(documents), strict=True):
            self._starts.append(self._num_tokens)
            self._num_tokens += len(ids)
            self._put("tokens", ids.astype(self._task.dtype).tobytes())
            if self._task.masked:
                self._put("mask", mask.tobytes())
            data = text_of(document).encode()
            self._num_bytes += len(data)
            if sizes:
                self.sizes.append(sizes_of(data))

    def finish(self) -> dict[str, Any]:
        """Closes the shard, all of it on disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        path = self._task.folder / self._names["starts"]
        with path.open("wb") as file:
            np.save(file, np.array(self._starts, np.int64))
            file.flush()
            os.fsync(file.fileno())
        crc = self._crc | {"starts": zlib.crc32(path.read_bytes())}
        files = {
            kind: {"name": name, "bytes": (self._task.folder / name).stat().st_size, "crc32": crc[kind]}
            for kind, name in self._names.items()
        }
        return asdict(Shard(self._num_tokens, len(self._starts), self._num_bytes, files))

    def _put(self, kind: str, data: bytes) -> None:
        self._files[kind].write(data)
        self._crc[kind] = zlib.crc32(data, self._crc[kind])

    def _encoded(self, documents: list[Document]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids between the tokens that begin and end a document, and which of them are learned."""
        tokenizer = self._tokenizer
        begin, end = np.array([tokenizer.bos_id], np.uint32), np.array([tokenizer.eos_id], np.uint32)
        pieces = [[(d, True)] if isinstance(d, str) else d for d in documents]
        ids = iter(self._ids([text for document in pieces for text, _ in document]))
        for document in pieces:
            encoded = [(next(ids), learned) for _, learned in document]
            last = encoded[-1][1] if encoded else True
            masks = [np.full(len(part), learned, np.uint8) for part, learned in encoded]
            mask = np.concatenate([np.zeros(1, np.uint8), *masks, np.array([last], np.uint8)])
            yield np.concatenate([begin, *(part for part, _ in encoded), end]), mask

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        if isinstance(self._tokenizer, JsonTokenizer):
            return self._tokenizer.encode_many(texts)
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
