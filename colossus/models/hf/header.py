"""The header of a safetensors file: what it holds, and where.

The format (huggingface/safetensors, README): 8 bytes with the length of the header, little-endian; the
header, JSON that gives for each name `dtype`, `shape` and `data_offsets` (begin and end, counted from the end
of the header); the tensors, row-major and little-endian.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from colossus.errors import MachineError, UserError
from colossus.models.hf.tensors import Spec
from colossus.untrusted import open_file, parse_json

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TYPES = {name: dtype for dtype, name in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor as the header of its file tells of it. begin: of its first byte in the file."""

    spec: Spec
    begin: int


def read_header(path: Path) -> dict[str, Place]:
    """What a file holds, by name, in the order of its bytes; none of the tensors is read.

    Raises:
        MachineError: the file cannot be read, is cut short, or its header contradicts itself.
        UserError: a tensor has a type that is not read here.
    """
    try:
        with open_file(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 + length:
                raise MachineError(f"{path} is cut short: it has {size} bytes, its header alone {8 + length}")
            if length > MAX_HEADER_BYTES:
                raise MachineError(f"{path} is no safetensors file: its header would have {length} bytes")
            text = stream.read(length)
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror}") from error
    try:
        tree = parse_json(text, object_pairs_hook=_without_twins)
        if not isinstance(tree, dict):
            raise ValueError("not an object")
    except ValueError as error:  # of JSON, and of UTF-8
        raise MachineError(f"{path} is damaged or no safetensors file: its header: {error}") from error
    tree.pop("__metadata__", None)
    places = [_place(path, name, entry, 8 + length) for name, entry in tree.items()]
    places.sort(key=lambda place: (place.begin, place.spec.num_bytes))
    end, before = 8 + length, ""
    for place in places:
        if place.begin < end:
            raise MachineError(f"{path} is damaged: {place.spec.name} overlaps {before or 'the header'}")
        end, before = place.begin + place.spec.num_bytes, place.spec.name
        if end > size:
            raise MachineError(f"{path} is cut short: {before} ends at byte {end}, the file has {size} bytes")
    if end < size:
        raise MachineError(f"{path} is damaged: its header tells of {end} bytes, the file has {size}")
    return {place.spec.name: place for place in places}


def encode_header(specs: Sequence[Spec]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that will hold these tensors in this order, and where each of them begins."""
    tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    begins, end = dict[str, int](), 0
    for spec in specs:
        begins[spec.name] = end
        end += spec.num_bytes
        tree[spec.name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begins[spec.name], end],
        }
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: first + begin for name, begin in begins.items()}


def _place(path: Path, name: str, entry: Any, first: int) -> Place:
    """One entry of a header, checked by itself."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError) as error:
        raise MachineError(f"{path} is damaged: the header's entry of {name} is {entry!r:.200}") from error
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise MachineError(f"{path} is damaged: the header's entry of {name} is {entry!r:.200}")
    if dtype not in TYPES:
        raise UserError(f"{path}: {name} has the type {dtype!r}; types that are read: {', '.join(TYPES)}")
    spec = Spec(name, tuple(shape), TYPES[dtype])
    if end - begin != spec.num_bytes:
        raise MachineError(
            f"{path} is damaged: {name} has {end - begin} bytes; {dtype} {list(shape)} takes {spec.num_bytes}"
        )
    return Place(spec, first + begin)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it tells twice of {next(name for name in names if names.count(name) > 1)!r}")
    return found
