"""What is read and written here: tensors by name, a box at a time.

A `Readable` is whatever can give any box of itself: a tensor as it lies in a file, one that is stored
quantised, a tensor in memory, a view of others (`views.py`). Whoever assembles a checkpoint sees no more of
it than name, shape, type and `read`, so a tensor of any size passes through a few bands of bounded size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

BAND_BYTES = 8 << 20  # long enough that a disk reads in sequence, and two of them are little memory

Box = tuple[range, ...]
"""For each dimension of a tensor, which of its indices: ascending, in even steps."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What is known of a tensor before any of its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Readable(Spec, ABC):
    """A tensor of which any box can be read, from several threads at once too."""

    def read(self, slices: Sequence[slice] = ()) -> torch.Tensor:
        """A box as a new tensor, contiguous, on the CPU, in the tensor's own type.

        Args:
            slices: of the leading dimensions, in steps of 1 or more; the dimensions without one are whole.

        Raises:
            MachineError: the storage failed, or a file is no longer what its header says.
        """
        out = torch.empty(sizes_of(box_of(self.shape, slices)), dtype=self.dtype)
        self.read_into(out, slices)
        return out

    def read_into(self, out: torch.Tensor, slices: Sequence[slice] = ()) -> None:
        """Reads a box into a tensor of its shape, of any strides, type and device.

        Takes less than 16 MiB of memory, however large the box is. Args and raises: as `read`.
        """
        box = box_of(self.shape, slices)
        assert sizes_of(box) == tuple(out.shape), f"{self.name}: {sizes_of(box)} into {tuple(out.shape)}"
        if out.numel():
            self.fill(out.detach(), box)

    @abstractmethod
    def fill(self, out: torch.Tensor, box: Box) -> None:
        """What `read_into` does; `out` has the box's sizes and is not empty."""


@dataclass(frozen=True, slots=True)
class InMemory(Readable):
    """A tensor that is there already."""

    values: torch.Tensor

    @classmethod
    def of(cls, name: str, values: torch.Tensor) -> InMemory:
        return cls(name, tuple(values.shape), values.dtype, values.detach())

    def fill(self, out: torch.Tensor, box: Box) -> None:
        out.copy_(self.values[slices_of(box)])


def box_of(shape: Sequence[int], slices: Sequence[slice]) -> Box:
    """The box that slices of the leading dimensions cut out of a tensor."""
    assert len(slices) <= len(shape), f"{len(slices)} slices of {len(shape)} dimensions"
    box = within(tuple(range(size) for size in shape), slices)
    assert all(r.step > 0 for r in box), "boxes are read forwards"
    return box


def within(box: Box, slices: Sequence[slice]) -> Box:
    """The box that slices of the leading dimensions cut out of another."""
    return (*(r[part] for r, part in zip(box, slices, strict=False)), *box[len(slices) :])


def slices_of(box: Box) -> tuple[slice, ...]:
    return tuple(slice(r.start, r.stop, r.step) for r in box)


def sizes_of(box: Box) -> tuple[int, ...]:
    return tuple(len(r) for r in box)


def bytes_of(values: torch.Tensor) -> memoryview[Any]:
    """The memory of a contiguous tensor on the CPU, as bytes."""
    assert values.is_contiguous()
    if not values.numel():
        return memoryview(b"")
    flat = values.as_strided((values.numel(),), (1,))  # a single element counts as contiguous in any stride
    return flat.view(torch.uint8).numpy().data


def bands(
    shape: tuple[int, ...], item_bytes: int, max_bytes: int = BAND_BYTES
) -> Iterator[tuple[slice, ...]]:
    """Cuts a tensor into boxes of at most `max_bytes`, as slices of its leading dimensions.

    One after the other they are the tensor's row-major bytes: what a file of it holds, from begin to end.
    """
    row_bytes = math.prod(shape[1:]) * item_bytes
    if not shape or shape[0] * row_bytes <= max_bytes:
        yield ()
    elif row_bytes <= max_bytes:
        rows = max_bytes // row_bytes
        for first in range(0, shape[0], rows):
            yield (slice(first, min(first + rows, shape[0])),)
    else:
        for index in range(shape[0]):
            for rest in bands(shape[1:], item_bytes, max_bytes):
                yield (slice(index, index + 1), *rest)
