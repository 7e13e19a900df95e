"""Opens a published checkpoint: a folder with `config.json` and safetensors files, one or several.

Only headers are read at first. Tensors are read with `pread`, in boxes that the caller chooses: what is
touched of a mapped file would count as this process's memory, and a tensor of 5 GB need never be there whole.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from colossus.errors import MachineError, UserError, nearest
from colossus.models.hf.elsewhere import other_form
from colossus.models.hf.header import read_header
from colossus.models.hf.quantised import dequantised
from colossus.models.hf.tensors import Box, Readable, bytes_of
from colossus.untrusted import MIB, parse_json, read_file

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
STAGING_BYTES = 1 << 20  # little enough that a transposed copy of it stays in the cache
MAX_JSON_BYTES = 256 * MIB  # of an index; one of a trillion parameters has 20
GAP_BYTES = 16 << 10  # a call costs about as much as copying this from the page cache


class Source(Mapping[str, Readable]):
    """A published checkpoint, opened: its tensors by name, and its `config.json`.

    Quantised tensors appear under the name and shape they'd have if they weren't, in bf16.
    """

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, Readable]) -> None:
        self.path = path
        self.config = config
        self._tensors = tensors

    def __getitem__(self, name: str) -> Readable:
        """Raises UserError where there is no such tensor."""
        tensor = self._tensors.get(name)
        if tensor is None:
            guess = nearest(name, self._tensors)
            hint = f"; did you mean {guess!r}?" if guess else ""
            raise UserError(f"{self.path} holds no tensor {name!r}{hint}")
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_source(path: str | Path) -> Source:
    """Opens a folder as `transformers` writes it; tensors are read when asked for.

    Raises:
        UserError: it is no such folder, or holds a type or a quantisation that is not read here.
        MachineError: a file is missing, cut short or damaged; named, with the tensor.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no Hugging Face checkpoint: there is no such folder")
    config = read_json(path / CONFIG) if (path / CONFIG).exists() else {}
    if (path / ONE_FILE).exists():
        stored = stored_in(path / ONE_FILE)
    elif (path / INDEX).exists():
        stored = _stored_by_index(path)
    else:
        why = f"it has neither {ONE_FILE} nor {INDEX}{other_form(path)}"
        raise UserError(f"{path} is no Hugging Face checkpoint: {why}")
    return Source(path, config, dequantised(stored, config, path))


def stored_in(file: Path) -> dict[str, Readable]:
    scratch = Scratch()
    return {
        name: Stored(place.spec.name, place.spec.shape, place.spec.dtype, file, place.begin, scratch)
        for name, place in read_header(file).items()
    }


def _stored_by_index(path: Path) -> dict[str, Readable]:
    """The tensors that the index names, each from the file that it names."""
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise MachineError(f"{path / INDEX} is damaged: it has no weight_map of names to files")
    names: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        names.setdefault(file, []).append(name)
    found: dict[str, Readable] = {}
    for file in sorted(names):
        if Path(file).name != file:
            raise MachineError(f"{path / INDEX} is damaged: {file!r} is no file of this folder")
        if not (path / file).exists():
            raise MachineError(f"{path / file} is missing; {INDEX} says that it holds {names[file][0]}")
        held = stored_in(path / file)
        for name in names[file]:
            if name not in held:
                raise MachineError(f"{path / file} holds no {name}, although {INDEX} says so")
            found[name] = held[name]
    return found


def read_json(file: Path) -> dict[str, Any]:
    try:
        tree = parse_json(read_file(file, MAX_JSON_BYTES))
    except OSError as error:
        raise MachineError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise MachineError(f"{file} is damaged: {error}") from error
    if not isinstance(tree, dict):
        raise MachineError(f"{file} is damaged: it is no JSON object")
    return tree


class Scratch(threading.local):
    """Memory to read into, each thread its own, kept: fresh pages cost many times a copy's time."""

    def __init__(self) -> None:
        self._bytes: torch.Tensor | None = None

    def take(self, num_bytes: int) -> torch.Tensor:
        assert num_bytes <= STAGING_BYTES
        if self._bytes is None:
            self._bytes = torch.empty(STAGING_BYTES, dtype=torch.uint8)
        return self._bytes[:num_bytes]


@dataclass(frozen=True, slots=True)
class Stored(Readable):
    """A tensor as it lies in a file, from the byte `begin` on."""

    file: Path
    begin: int
    scratch: Scratch

    def fill(self, out: torch.Tensor, box: Box) -> None:
        strides = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        first = sum(r.start * stride for r, stride in zip(box, strides, strict=True))
        steps = [r.step * stride for r, stride in zip(box, strides, strict=True)]
        if not box:
            out, steps = out[None], [1]
        try:
            descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._fill(descriptor, out, self.begin + first * self.dtype.itemsize, steps)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise MachineError(f"{self.file}: {error.strerror}; it holds {self.name}") from error

    def _fill(self, descriptor: int, out: torch.Tensor, begin: int, steps: Sequence[int]) -> None:
        """Fills `out` from elements that lie in the file in these steps, the first of them at byte `begin`.

        Straight, where rows lie in the file as they do in `out`; else by way of scratch memory, many rows at
        a time. What lies between rows is read too, if it is short, and left out in copying. Long rows with
        gaps in them are looked at one by one.
        """
        item, step = self.dtype.itemsize, steps[0]
        row = 1 + sum((size - 1) * inner for size, inner in zip(out.shape[1:], steps[1:], strict=True))
        gapless = row * len(out) == out.numel()
        apart = (step - row) * item > GAP_BYTES
        straight = gapless and out.is_contiguous() and out.dtype == self.dtype and out.device.type == "cpu"
        if straight and (apart or step == row or len(out) == 1):
            self._read_rows(descriptor, bytes_of(out), begin, row * item, step * item)
        elif row * item > (STAGING_BYTES if gapless else 2 * GAP_BYTES) and out.ndim > 1:
            for index in range(len(out)):
                self._fill(descriptor, out[index], begin + index * step * item, steps[1:])
        else:
            pitch = row if apart else step  # of the rows in scratch memory
            rows = (STAGING_BYTES // item - row) // pitch + 1
            for low in range(0, len(out), rows):
                part = out[low : low + rows]
                staged = self.scratch.take((row + (len(part) - 1) * pitch) * item)
                row_bytes = row * item if apart else len(staged)
                self._read_rows(
                    descriptor, bytes_of(staged), begin + low * step * item, row_bytes, step * item
                )
                part.copy_(staged.view(self.dtype).as_strided(part.shape, (pitch, *steps[1:])))

    def _read_rows(
        self, descriptor: int, out: memoryview[Any], begin: int, row_bytes: int, step_bytes: int
    ) -> None:
        """Fills `out` with rows of the file, the first from the byte `begin` on."""
        if row_bytes == step_bytes:
            row_bytes = len(out)
        for low in range(0, len(out), row_bytes):
            room, end = out[low : low + row_bytes], begin
            while room:
                read = os.preadv(descriptor, [room], end)
                if not read:
                    size = os.fstat(descriptor).st_size
                    raise MachineError(
                        f"{self.file} was cut short meanwhile: it has {size} bytes; it held {self.name}"
                    )
                room, end = room[read:], end + read
            begin += step_bytes
