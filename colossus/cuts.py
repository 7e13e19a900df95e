"""How a tensor is cut over the axes of a mesh, in plain integers: which box of it lies at which place.

PyTorch's rule: an axis of so many ranks cuts a dimension as `chunk` does, all parts of one size but the last
ones, which may be smaller or empty; `_StridedShard` (FSDP over tensor parallel) first cuts it into pieces and
gives each rank its chunk of every piece. The next axis cuts what the one before has left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and sizes."""
Runs = list[tuple[int, int]]
"""Neighbours along a dimension: [start, end)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """An axis that cuts the dimension `dim`: each of `pieces` into `parts`. stride: from a rank of it to the
    next one."""

    dim: int
    pieces: int
    parts: int
    stride: int


def box_at(shape: Sequence[int], cuts: Sequence[Cut], places: Sequence[int]) -> Box | None:
    """The box of the part at `places`, one place an axis; perhaps an empty one. None: the part is no box."""
    here: dict[int, Runs] = {}
    for cut, place in zip(cuts, places, strict=True):
        runs = here.get(cut.dim, [(0, shape[cut.dim])])
        here[cut.dim] = part(runs, cut.pieces, cut.parts, place)
    return _box(shape, here)


def parts_within(
    shape: Sequence[int], cuts: Sequence[Cut], begin: Sequence[int], end: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], Box | None]]:
    """Places and boxes of the parts that have an element in the box from `begin` to `end`."""

    def follow(
        axis: int, here: dict[int, Runs], places: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], Box | None]]:
        if axis == len(cuts):
            yield places, _box(shape, here)
            return
        cut = cuts[axis]
        low, high = begin[cut.dim], end[cut.dim]
        runs = here.get(cut.dim, [(0, shape[cut.dim])])
        for place in _candidates(runs, cut, low, high):
            mine = part(runs, cut.pieces, cut.parts, place)
            if any(start < high and low < stop for start, stop in mine):
                yield from follow(axis + 1, here | {cut.dim: mine}, (*places, place))

    if all(low < min(size, high) for size, low, high in zip(shape, begin, end, strict=True)):
        yield from follow(0, {}, ())


def part(runs: Runs, pieces: int, parts: int, place: int) -> Runs:
    """What one of an axis' ranks has of these runs."""
    if pieces == 1:
        return chunk(runs, parts, place)
    return [run for piece in chunks(runs, pieces) for run in chunk(piece, parts, place)]


def chunks(runs: Runs, num: int) -> list[Runs]:
    """As many equal parts as PyTorch's `chunk` makes: all but the last of one size, and perhaps fewer."""
    return [chunk(runs, num, index) for index in range(num)]


def chunk(runs: Runs, num: int, index: int) -> Runs:
    """One of these parts; empty where there is none."""
    total = sum(end - start for start, end in runs)
    size = -(-total // num)
    first, last = size * index, size * (index + 1)
    found, passed = [], 0
    for start, end in runs:
        begin, stop = max(start, start + first - passed), min(end, start + last - passed)
        if begin < stop:
            found.append((begin, stop))
        passed += end - start
    return found


def joined(runs: Runs) -> Runs:
    """The same in as few runs as there can be; one that is empty where there is nothing."""
    found: Runs = []
    for start, end in runs:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found or [(0, 0)]


def _box(shape: Sequence[int], here: dict[int, Runs]) -> Box | None:
    places = [joined(here[dim]) if dim in here else [(0, size)] for dim, size in enumerate(shape)]
    if any(len(runs) != 1 for runs in places):
        return None
    return tuple(runs[0][0] for runs in places), tuple(runs[0][1] - runs[0][0] for runs in places)


def _candidates(runs: Runs, cut: Cut, low: int, high: int) -> Sequence[int]:
    """Places that may have something from `low` to `high`: of one run, no more than do."""
    if len(runs) != 1 or low >= high:
        return range(cut.parts)
    (start, end) = runs[0]
    low, high = max(low, start), min(high, end)
    size = max(1, -(-(end - start) // cut.pieces))
    found = set[int]()
    for piece in range((low - start) // size, -(-(high - start) // size)):
        first = start + piece * size
        each = max(1, -(-(min(first + size, end) - first) // cut.parts))
        found.update(range(max(0, low - first) // each, -(-(min(high, first + size) - first) // each)))
    return sorted(place for place in found if place < cut.parts)
