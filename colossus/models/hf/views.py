"""Tensors made of others: what a mapping says of how one tensor is assembled from published ones, or back.

Nothing is read until a box is asked for, and then each element once, straight to where it belongs. Views of
views are views: `Stacked.of(name, [transposed(part(...)), ...])`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from colossus.models.hf.tensors import Box, Readable, box_of, sizes_of, slices_of, within


@dataclass(frozen=True, slots=True)
class Renamed(Readable):
    """The same under another name."""

    source: Readable

    @classmethod
    def of(cls, name: str, source: Readable) -> Renamed:
        return cls(name, source.shape, source.dtype, source)

    def fill(self, out: torch.Tensor, box: Box) -> None:
        self.source.fill(out, box)


@dataclass(frozen=True, slots=True)
class Transposed(Readable):
    """The last two dimensions exchanged."""

    source: Readable

    @classmethod
    def of(cls, name: str, source: Readable) -> Transposed:
        *outer, rows, columns = source.shape
        return cls(name, (*outer, columns, rows), source.dtype, source)

    def fill(self, out: torch.Tensor, box: Box) -> None:
        *outer, columns, rows = box
        self.source.fill(out.transpose(-1, -2), (*outer, rows, columns))


@dataclass(frozen=True, slots=True)
class Part(Readable):
    """A box of another tensor: a range of rows, every second column."""

    source: Readable
    part: Box

    @classmethod
    def of(cls, name: str, source: Readable, slices: Sequence[slice]) -> Part:
        part = box_of(source.shape, slices)
        return cls(name, sizes_of(part), source.dtype, source, part)

    def fill(self, out: torch.Tensor, box: Box) -> None:
        self.source.fill(out, within(self.part, slices_of(box)))


@dataclass(frozen=True, slots=True)
class Stacked(Readable):
    """Equal tensors side by side along a new first dimension: experts [X, ...]."""

    sources: tuple[Readable, ...]

    @classmethod
    def of(cls, name: str, sources: Sequence[Readable]) -> Stacked:
        kinds = {(source.shape, source.dtype) for source in sources}
        assert len(kinds) == 1, f"{name}: {kinds} cannot be stacked"
        shape, dtype = kinds.pop()
        return cls(name, (len(sources), *shape), dtype, tuple(sources))

    def fill(self, out: torch.Tensor, box: Box) -> None:
        for index, place in enumerate(box[0]):
            self.sources[place].fill(out[index], box[1:])


@dataclass(frozen=True, slots=True)
class Joined(Readable):
    """Tensors one after the other along a dimension: q, k and v as one."""

    sources: tuple[Readable, ...]
    axis: int

    @classmethod
    def of(cls, name: str, sources: Sequence[Readable], axis: int = 0) -> Joined:
        first = sources[0]
        shape = (*first.shape[:axis], sum(s.shape[axis] for s in sources), *first.shape[axis + 1 :])
        for source in sources:
            other = (*source.shape[:axis], first.shape[axis], *source.shape[axis + 1 :])
            assert (other, source.dtype) == (first.shape, first.dtype), f"{name}: {source.shape} does not fit"
        return cls(name, shape, first.dtype, tuple(sources), axis)

    def fill(self, out: torch.Tensor, box: Box) -> None:
        wanted, begin, done = box[self.axis], 0, 0
        for source in self.sources:
            end = begin + source.shape[self.axis]
            count = len(range(wanted.start, min(wanted.stop, end), wanted.step)) - done
            if count > 0:
                first = wanted[done] - begin
                here = range(first, first + (count - 1) * wanted.step + 1, wanted.step)
                inner = (*box[: self.axis], here, *box[self.axis + 1 :])
                source.fill(out.narrow(self.axis, done, count), inner)
                done += count
            begin = end


@dataclass(frozen=True, slots=True)
class Reordered(Readable):
    """Indices of a dimension in another order: row i is the source's row order[i].

    Read in as few boxes as there are even runs, in the order of either side: rows of heads interleaved from
    two halves, or parted into them, are one box a half.
    """

    source: Readable
    axis: int
    order: tuple[int, ...]

    @classmethod
    def of(cls, name: str, source: Readable, order: Sequence[int], axis: int = 0) -> Reordered:
        size = source.shape[axis]
        assert all(0 <= index < size for index in order), (
            f"{name}: an index beyond the {size} of {source.name}"
        )
        shape = (*source.shape[:axis], len(order), *source.shape[axis + 1 :])
        return cls(name, shape, source.dtype, source, axis, tuple(order))

    def fill(self, out: torch.Tensor, box: Box) -> None:
        wanted = np.array(self.order)[box[self.axis].start : box[self.axis].stop : box[self.axis].step]
        here = np.arange(len(wanted))
        by_source = np.argsort(wanted, kind="stable")
        for there, places in min(_runs(wanted, here), _runs(wanted[by_source], by_source), key=len):
            inner = (*box[: self.axis], there, *box[self.axis + 1 :])
            target = (*(slice(None),) * self.axis, slice(places.start, places.stop, places.step))
            self.source.fill(out[target], inner)


def _runs(there: NDArray[np.int64], here: NDArray[np.int64]) -> list[tuple[range, range]]:
    """Cuts pairs of indices into runs in which both grow in even steps."""
    found, first = list[tuple[range, range]](), 0
    steps = np.diff(there), np.diff(here)
    grows = (steps[0] > 0) & (steps[1] > 0)
    same = np.append((np.diff(steps[0]) == 0) & (np.diff(steps[1]) == 0), False)
    while first < len(there):
        last = first
        if first < len(grows) and grows[first]:
            breaks = np.flatnonzero(~same[first:])
            last = first + 1 + int(breaks[0])
        ranges = []
        for indices in (there, here):
            step = int(indices[last] - indices[first]) // max(last - first, 1)
            ranges.append(range(int(indices[first]), int(indices[last]) + 1, max(step, 1)))
        found.append((ranges[0], ranges[1]))
        first = last + 1
    return found
