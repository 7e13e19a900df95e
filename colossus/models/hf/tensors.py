"""What is read and written here: tensors by name, a box at a time.

A `Readable` is whatever can give any box of itself: a tensor as it lies in a file, one that is stored
quantised, a view of others (`views.py`), a tensor in memory. Whoever assembles a checkpoint sees no more of
it than name, shape, type and `read`, so a tensor of any size passes through a few bands of bounded size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

BAND_BYTES = 8 << 20  # long enough that a disk reads in sequence, and a few of them are little memory

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
    """A tensor of which any box can be read. Reading from several threads at once is allowed."""

    @abstractmethod
    def read(self, slices: Sequence[slice] = ()) -> torch.Tensor:
        """A box of the tensor, on the CPU, in its own type.

        Takes the memory of the box and at most some 16 MiB more. The result may be strided (a transposed
        view); it is the caller's alone.

        Args:
            slices: of the leading dimensions, in steps of 1 or more; the dimensions without one are whole.

        Raises:
            MachineError: the storage failed, or a file is not what its header says.
        """

    def read_into(self, out: torch.Tensor, slices: Sequence[slice] = ()) -> None:
        """Reads a box into `out`, which has its shape; values are converted to the type of `out`.

        Takes no more memory than a band at a time. Raises as `read`.
        """
        box = box_of(self.shape, slices)
        assert sizes_of(box) == tuple(out.shape), f"{self.name}: {sizes_of(box)} into {tuple(out.shape)}"
        with torch.no_grad():
            for band in bands(tuple(out.shape), self.dtype.itemsize):
                inner = [r[s] for r, s in zip(box, band, strict=False)]
                here = [slice(r.start, r.stop, r.step) for r in (*inner, *box[len(band) :])]
                out[tuple(band)].copy_(self.read(here))


@dataclass(frozen=True, slots=True)
class InMemory(Readable):
    """A tensor that is there already."""

    values: torch.Tensor

    @classmethod
    def of(cls, name: str, values: torch.Tensor) -> InMemory:
        return cls(name, tuple(values.shape), values.dtype, values.detach())

    def read(self, slices: Sequence[slice] = ()) -> torch.Tensor:
        return self.values[tuple(slices)].cpu().clone()


def box_of(shape: Sequence[int], slices: Sequence[slice]) -> Box:
    """The box that slices of the leading dimensions cut out of a tensor."""
    assert len(slices) <= len(shape), f"{len(slices)} slices of {len(shape)} dimensions"
    cut = [range(size)[part] for size, part in zip(shape, slices, strict=False)]
    assert all(r.step > 0 for r in cut), "boxes are read forwards"
    return (*cut, *(range(size) for size in shape[len(slices) :]))


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
