"""Token shards on disk, read through memory maps.

A folder holds one corpus: `manifest.json` (written last; without it there is nothing), and for each shard
of each split the tokens (`.bin`, 16 or 32 bits), where documents start (`.starts`, 64 bits) and, where not
every token is learned, a mask (`.mask`, one byte a token). Held-out documents come in a fixed shuffled order
with the sizes in bytes of what is learned of them, plain and compressed (`validation.documents`). Files have
no headers.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import tempfile
import zlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from colossus.data.compressors import COMPRESSORS
from colossus.errors import MachineError, UserError
from colossus.untrusted import MIB, locate, num_bytes, open_file, parse_json, read_file

SCHEMA = 2
REMEDY = "remove the folder and build the data again"
MAX_MANIFEST_BYTES = 256 * MIB
TOKENS = {"uint16": 2, "uint32": 4}  # bytes of one
STARTS = np.dtype(np.int64)
HELD_OUT = np.dtype([(n, np.int64) for n in ("start", "num_bytes", *(f"{c}_bytes" for c in COMPRESSORS))])


@dataclass(frozen=True)
class Shard:
    """One stretch of a split: files by name, each with its size and CRC32."""

    num_tokens: int
    num_documents: int
    num_bytes: int  # of text
    files: dict[str, dict[str, Any]]  # "tokens", "starts", "mask" -> {name, bytes, crc32}


class ShardedTokens:
    """One split of a corpus as a single stream of tokens. A `TokenSource`.

    Raises:
        UserError: there is no whole corpus at `folder`, or a file has another size than was written.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        manifest = read_manifest(folder)
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        # Shards of a time when this was not written have two tokens between documents.
        self.separated_once: bool = manifest["tokenizer"].get("separated_once", False) is True
        self._dtype = np.dtype(manifest["dtype"])
        self.shards = [Shard(**shard) for shard in manifest["splits"][split]]
        self._files = [file for shard in self.shards for file in shard.files.values()]
        if split == "validation":
            self._files.append(manifest["documents"])
        for file in self._files:
            path = folder / file["name"]
            size = _size_of(path)
            if size != file["bytes"]:
                found = "missing" if size < 0 else f"{size} bytes"
                raise UserError(f"{path}: {found}, written with {file['bytes']}; {REMEDY}")
        _allow_open_files(len(self._files))
        self._first = np.cumsum([0] + [s.num_tokens for s in self.shards]).tolist()
        self._tokens = [self._map(s, "tokens", self._dtype, s.num_tokens) for s in self.shards]
        self._masks = [self._map(s, "mask", np.dtype(np.uint8), s.num_tokens) for s in self.shards]
        self._has_mask = any("mask" in shard.files for shard in self.shards)
        self._starts = [self._map(s, "starts", STARTS, s.num_documents) for s in self.shards]

    @property
    def num_tokens(self) -> int:
        return self._first[-1]

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of the text that the tokens stand for."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def num_file_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file["bytes"] for file in self._files)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop`: a view where one shard holds them."""
        return self._slice(self._tokens, start, stop)

    def mask(self, start: int, stop: int) -> np.ndarray | None:
        """1 where a token is learned; None where all are."""
        return self._slice(self._masks, start, stop) if self._has_mask else None

    def scored(self, start: int, stop: int) -> np.ndarray | None:
        """1 where a held-out token counts; None where all do. What is not learned does not, but in shards
        of a time when the sizes of documents were of their whole text."""
        return self.mask(start, stop) if self.manifest["documents"].get("of") == "learned" else None

    @property
    def num_lost_bytes(self) -> int:
        """Bytes of the held-out text that its tokens do not give back, as far as that was looked at."""
        return int(self.manifest["documents"].get("lost_bytes", 0))

    @property
    def num_learned(self) -> int:
        """Tokens that are learned. Reads the whole mask, where there is one."""
        pairs = zip(self._masks, self.shards, strict=True)
        return sum(
            int(np.count_nonzero(mask)) if "mask" in shard.files else shard.num_tokens
            for mask, shard in pairs
        )

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions in [start, stop) where a document begins."""
        found = []
        for i in range(bisect_right(self._first, start) - 1, len(self.shards)):
            first = self._first[i]
            if first >= stop:
                break
            low, high = np.searchsorted(self._starts[i], [start - first, stop - first])
            found.append(self._starts[i][low:high] + first)
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def documents(self) -> np.ndarray:
        """The held-out documents (dtype HELD_OUT), in the order that makes any first n a fair part."""
        self._verify(self.manifest["documents"])
        return np.fromfile(self.folder / self.manifest["documents"]["name"], HELD_OUT)

    def verify(
        self, progress: Callable[[int], None] = lambda num_bytes: None, rank: int = 0, size: int = 1
    ) -> None:
        """Reads every byte, or the share of one of `size` ranks. Raises UserError that names the file whose
        bytes changed.

        progress: called with the bytes of every file that was read.
        """
        for file in self._files[rank::size]:
            self._verify(file)
            progress(file["bytes"])

    def _verify(self, file: dict[str, Any]) -> None:
        path = self.folder / file["name"]
        if crc32(path) != file["crc32"]:
            raise UserError(f"{path}: its bytes changed since it was built; {REMEDY}")

    def _slice(self, arrays: list[Any], start: int, stop: int) -> np.ndarray:
        i = bisect_right(self._first, start) - 1
        first = self._first[i]
        if stop <= self._first[i + 1]:
            return arrays[i][start - first : stop - first]
        pieces = []
        while start < stop:
            first, end = self._first[i], min(stop, self._first[i + 1])
            pieces.append(arrays[i][start - first : end - first])
            start, i = end, i + 1
        return np.concatenate(pieces)

    def _map(self, shard: Shard, kind: str, dtype: np.dtype, count: int) -> np.ndarray:
        if kind not in shard.files:
            return np.broadcast_to(np.ones((), dtype), (count,))  # of ones, in no memory
        path = self.folder / shard.files[kind]["name"]
        return np.memmap(locate(path), dtype, mode="r", shape=(count,))


def _size_of(path: Path) -> int:
    """The bytes of a file of the folder; -1 where there is none."""
    try:
        return num_bytes(path)
    except FileNotFoundError:
        return -1
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {REMEDY}") from None


def _allow_open_files(count: int) -> None:
    """Makes room for `count` more: a map holds its file open, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = count + len([*Path("/dev/fd").iterdir()]) + 256
    if wanted > soft:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a corpus, checked against its own checksum.

    Raises:
        UserError: there is none (nothing was built, or a build did not end), or it was changed.
    """
    path = folder / "manifest.json"
    try:
        manifest = parse_json(read_file(path, MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        raise UserError(f"{folder}: no token shards here (no manifest.json); build them first") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    checksum = manifest.pop("checksum", None) if isinstance(manifest, dict) else None
    if checksum != _checksum(manifest):
        raise UserError(f"{path}: its bytes changed since it was built; {REMEDY}")
    if manifest.get("schema") != SCHEMA:
        raise UserError(f"{path}: of another version of Colossus (schema {manifest.get('schema')}); {REMEDY}")
    try:
        _check(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: no manifest of shards ({error}); {REMEDY}") from None
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    """Raises ValueError and its like where a manifest tells of what cannot be, or lies elsewhere."""

    def demand(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(what)

    demand(manifest["dtype"] in TOKENS, f"tokens of the type {manifest['dtype']!r:.40}")
    sizes = {"tokens": TOKENS[manifest["dtype"]], "starts": STARTS.itemsize, "mask": 1}
    files = [manifest["documents"]]
    for shard in (Shard(**shard) for split in ("train", "validation") for shard in manifest["splits"][split]):
        for kind, file in shard.files.items():
            count = shard.num_documents if kind == "starts" else shard.num_tokens
            demand(file["bytes"] == count * sizes[kind], f"{file['name']!r:.80} of {file['bytes']} bytes")
        demand({"tokens", "starts"} <= shard.files.keys(), "a shard lacks a file")
        files += shard.files.values()
    for file in files:
        name, numbers = file["name"], (file["bytes"], file["crc32"])
        demand(
            name == Path(name).name and name not in ("", ".", ".."), f"{name!r:.80} is no file of the folder"
        )
        demand(all(type(n) is int and n >= 0 for n in numbers), f"{name!r:.80} has no size or no checksum")
    lost = manifest["documents"].get("lost_bytes", 0)
    demand(type(lost) is int and lost >= 0, f"{lost!r:.40} lost bytes")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest last and whole: from then on the folder is a corpus."""
    text = json.dumps(manifest | {"checksum": _checksum(manifest)}, indent=1)
    replace_synced(folder / "manifest.json", text.encode())


def replace_synced(path: Path, data: bytes) -> None:
    """Writes a file that is either whole or not there.

    Raises:
        MachineError: no space, no permission.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.unlink(missing_ok=True)  # what a kill left, or a link or pipe that somebody put there
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error.strerror})") from error


def try_to_write(folder: Path) -> None:
    """Raises the OSError that making `folder`, or a file in it, would. Nothing is left of the attempt."""
    there = folder
    while not _has_name(there):
        there = there.parent
    with tempfile.TemporaryDirectory(prefix=".colossus-", dir=there):
        pass


def _has_name(path: Path) -> bool:
    """Whether anything is called so, also a link that leads nowhere. Raises OSError where nothing can be."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def crc32(path: Path) -> int:
    """CRC32 of a file's bytes."""
    value = 0
    with open_file(path) as file:
        while chunk := file.read(2**22):
            value = zlib.crc32(chunk, value)
    return value


def fingerprint(splits: dict[str, list[dict[str, Any]]], tokenizer: str) -> str:
    """What these shards hold: it changes with any byte of them."""
    return hashlib.sha256(json.dumps([splits, tokenizer], sort_keys=True).encode()).hexdigest()[:32]


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
