"""How a logical tensor lies over ranks, in plain integers: who writes which part of it, and who reads it.
Nothing here imports torch.

A save, a load and a dry run of either all follow what is said here.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from colossus.checkpoints.format import Entry, Key
from colossus.cuts import Cut


@dataclass(frozen=True, slots=True)
class Axis:
    """Of a mesh: so many ranks, each `stride` after the one before. cut: how they share the tensor, None:
    all of them hold the same."""

    size: int
    stride: int
    cut: Cut | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """A tensor over the ranks of a mesh: the one at some places on its axes is `first` + the sum of place x
    stride. Without axes every rank of the world holds all of it."""

    key: Key
    dtype: str
    shape: tuple[int, ...]
    first: int = 0
    axes: tuple[Axis, ...] = ()

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """With their strides."""
        return tuple(
            dataclasses.replace(axis.cut, stride=axis.stride)
            for axis in self.axes
            if axis.cut is not None and axis.size > 1
        )

    @property
    def copies(self) -> tuple[Axis, ...]:
        """The axes whose ranks hold the same."""
        return tuple(axis for axis in self.axes if axis.cut is None and axis.size > 1)

    def places(self, coordinate: Sequence[int]) -> list[int]:
        """Of a rank's places on all axes, those on the axes that cut."""
        where = zip(coordinate, self.axes, strict=True)
        return [place for place, axis in where if axis.cut is not None and axis.size > 1]

    def entry(self, num_writers: int) -> Entry:
        """The rule by which it is cut over its writers.

        The first `num_writers` ranks hold all of it. Where several of them hold the same they take turns by
        the tensor's name, so that each writes about as much.
        """
        if not self.axes:
            (first,) = turns(self.key, [num_writers])
        else:
            # An axis may lead to replicas that do not write.
            sizes = [max(1, min(axis.size, num_writers // axis.stride)) for axis in self.copies]
            places = turns(self.key, sizes)
            first = self.first % num_writers
            first += sum(p * axis.stride for p, axis in zip(places, self.copies, strict=True))
        return Entry(*self.key, self.dtype, self.shape, first, self.cuts)

    def teller(self, num_writers: int) -> int:
        """The first of its writers, who tells that one must have written it, where it doesn't itself."""
        return self.first % num_writers

    @property
    def reader(self) -> int:
        """The first of the ranks that read it, each its part, and pass it on to others that hold the same."""
        places = turns(self.key, [axis.size for axis in self.copies])
        return self.first + sum(p * axis.stride for p, axis in zip(places, self.copies, strict=True))


def turns(key: Key, sizes: Iterable[int]) -> Iterator[int]:
    """On each of some axes, of so many ranks that hold the same of a tensor: whose turn it is, by its
    name."""
    turn = zlib.crc32("/".join(key).encode())
    for size in sizes:
        turn, place = divmod(turn, size)
        yield place
