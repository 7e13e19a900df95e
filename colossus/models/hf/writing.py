"""Writes a published checkpoint as `transformers` reads it, a band at a time; all of it or nothing.

The plan (names, shapes, types) is known first, so that every byte of every file has its place before the
first tensor is there. Everything goes into a folder beside the destination, `.NAME.partial-...`, is synced,
and the folder takes its name at the end.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import TracebackType

import torch

from colossus.errors import MachineError, UserError
from colossus.models.hf.header import encode_header
from colossus.models.hf.reading import INDEX, ONE_FILE
from colossus.models.hf.tensors import BAND_BYTES, Readable, Spec, bands, box_of, bytes_of, sizes_of

SHARD_BYTES = 5_000_000_000


def write_checkpoint(
    path: str | Path,
    tensors: Iterable[Readable],
    files: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
    band_bytes: int = BAND_BYTES,
) -> None:
    """Writes tensors as a checkpoint of `transformers`, reading one band while another is written.

    Args:
        files: small ones to lie beside them (`config.json`, `tokenizer.json`), by name.
        shard_bytes: at most so much of tensors in a file, unless one tensor alone is more.
        band_bytes: of each of two buffers; 8, the largest element, is the least.

    Raises:
        UserError: the destination exists and is not an empty folder.
        MachineError: the storage failed, or a tensor could not be read; nothing is left of what was written.
    """
    tensors = list(tensors)
    rooms = cycle([torch.empty(band_bytes, dtype=torch.uint8), torch.empty(band_bytes, dtype=torch.uint8)])
    with Writer(path, tensors, shard_bytes) as writer:
        for name, data in (files or {}).items():
            writer.add_file(name, data)
        for tensor in tensors:
            for band in bands(tensor.shape, tensor.dtype.itemsize, band_bytes):
                sizes = sizes_of(box_of(tensor.shape, band))
                num_bytes = math.prod(sizes) * tensor.dtype.itemsize
                room = next(rooms)[:num_bytes].view(tensor.dtype).view(sizes)
                tensor.read_into(room, band)
                writer.append(tensor.name, room)


class Writer:
    """A checkpoint under way; leaving the `with` block completes it, or, on an exception, removes it.

    Tensors may come in any order and in turns; the bands of each in row-major order (`tensors.bands`).
    """

    def __init__(self, path: str | Path, plan: Sequence[Spec], shard_bytes: int = SHARD_BYTES) -> None:
        """Lays out the files. Raises UserError for the destination, MachineError of the storage."""
        assert len({spec.name for spec in plan}) == len(plan), "a name is planned twice"
        self.path = _free_destination(Path(path))
        self._places: dict[str, _Place] = {}
        self._files: list[_File] = []
        self._pending: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1)  # writes one band while the caller prepares the next
        self._partial = self.path.with_name(f".{self.path.name}.partial-{secrets.token_hex(4)}")
        try:
            _check_room(self.path.parent, sum(spec.num_bytes for spec in plan))
            self._partial.mkdir()
            self._lay_out(plan, shard_bytes)
        except BaseException as error:
            self._abandon()
            if isinstance(error, OSError):
                raise self._failed(error) from error
            raise

    def append(self, name: str, values: torch.Tensor) -> None:
        """Adds the next elements of a tensor, in its own type.

        They are written while the caller goes on: they may change only after the next `append` has returned.
        Raises MachineError where this or an earlier band could not be written.
        """
        place = self._places[name]
        assert values.dtype == place.spec.dtype, f"{name} is {place.spec.dtype}, not {values.dtype}"
        begin = place.end
        place.end += values.numel() * values.element_size()
        assert place.end <= place.begin + place.spec.num_bytes, f"{name} is longer than planned"
        self._pending.append(self._pool.submit(place.file.write, begin, values))
        self._wait(most=1)

    def add_file(self, name: str, data: bytes) -> None:
        """Adds a small file, such as `config.json`, also in a folder below. Raises MachineError."""
        path = self._partial / name
        assert {"..", "/"}.isdisjoint(Path(name).parts), f"{name!r} is no name of a file"
        try:
            path.parent.mkdir(exist_ok=True)
            _write_synced(path, data)
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._complete()
        finally:
            self._abandon()

    def _lay_out(self, plan: Sequence[Spec], shard_bytes: int) -> None:
        """Creates the files with their headers, and the index where there are several."""
        shards = _shards(plan, shard_bytes)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = ONE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            shard = sorted(shard, key=lambda spec: -spec.dtype.itemsize)  # so that each begins aligned
            header, begins = encode_header(shard)
            self.add_file(name, header)
            file = _File(self._partial / name, sum(spec.num_bytes for spec in shard))
            self._files.append(file)
            for spec in shard:
                self._places[spec.name] = _Place(spec, file, begins[spec.name], begins[spec.name])
                weight_map[spec.name] = name
        if len(shards) > 1:
            total = sum(spec.num_bytes for spec in plan)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self.add_file(INDEX, (json.dumps(index, indent=2) + "\n").encode())

    def _wait(self, most: int) -> None:
        """Until no more than `most` bands are still to be written. Raises what went wrong with one."""
        try:
            while len(self._pending) > most:
                self._pending.popleft().result()
        except OSError as error:
            raise self._failed(error) from error

    def _complete(self) -> None:
        """Gives the folder its name when everything in it is on storage."""
        self._wait(most=0)
        for place in self._places.values():
            missing = place.begin + place.spec.num_bytes - place.end
            assert not missing, f"{missing} bytes of {place.spec.name} were never given"
        try:
            _sync_folder(self._partial)
            self._partial.rename(self.path)  # refused where the destination is no longer free
            _sync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error) from error

    def _abandon(self) -> None:
        """Lets go of everything; what has not got its name is removed. After `_complete`, that is nothing."""
        self._pool.shutdown(cancel_futures=True)
        for file in self._files:
            file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _failed(self, error: OSError) -> MachineError:
        return MachineError(f"cannot write {self.path}: {error.strerror}; nothing is left of it")


class _File:
    """A file of tensors: open from its first band to its last, then on storage."""

    def __init__(self, path: Path, missing: int) -> None:
        self._path = path
        self._missing = missing  # bytes of tensors that are still to come
        self._descriptor: int | None = None

    def write(self, begin: int, values: torch.Tensor) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        data = bytes_of(values.detach().cpu().contiguous())
        self._missing -= len(data)
        while data:
            written = os.pwrite(self._descriptor, data, begin)
            data, begin = data[written:], begin + written
        if not self._missing:
            os.fsync(self._descriptor)
            self.close()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@dataclass(slots=True)
class _Place:
    """Where a tensor goes, and how far it has come. begin, end: bytes of the file."""

    spec: Spec
    file: _File
    begin: int
    end: int


def _shards(plan: Sequence[Spec], shard_bytes: int) -> list[list[Spec]]:
    """Tensors file by file, in the order of the plan; a file is full when the next would be too much."""
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in plan:
        if shards[-1] and size + spec.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return shards


def _free_destination(path: Path) -> Path:
    """The destination, links followed. Raises UserError unless a folder can take that name at the end."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        if any(path.iterdir()):
            raise UserError(f"{path} exists and is not empty: name a new folder")
        if path.is_mount():
            raise UserError(f"{path} is the root of a file system: name a new folder in it")
    elif path.exists():
        raise UserError(f"{path} exists and is no folder: name a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror}") from error
    return path


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise MachineError(
            f"{folder} has {free / 1e9:.1f} GB free; the checkpoint takes {num_bytes / 1e9:.1f} GB"
        )


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb", buffering=0) as stream:
        while data:
            data = data[stream.write(data) :]
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
