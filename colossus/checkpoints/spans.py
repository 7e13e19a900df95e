"""Which bytes of a piece a box of it lies in, and which are read for that. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a piece, from its first on: a box lies from `first` to `last`, in rows of which it may have a
    part. Read are those from `begin` to `end`: whole chunks, each of which has a checksum."""

    first: int
    last: int
    begin: int
    end: int


def span(
    shape: Sequence[int], item_bytes: int, low: Sequence[int], high: Sequence[int], chunk_bytes: int
) -> Span:
    """Of the box from `low` to `high` in a piece of such a shape."""
    depth = stacked([b - a for a, b in zip(low, high, strict=True)])
    before = sum(low[dim] * math.prod(shape[dim + 1 :]) for dim in range(depth))
    rows, row = (low[depth], high[depth]) if shape else (0, 1), math.prod(shape[depth + 1 :])
    first, last = ((before + number * row) * item_bytes for number in rows)
    whole = math.prod(shape) * item_bytes
    return Span(first, last, first - first % chunk_bytes, min(-(-last // chunk_bytes) * chunk_bytes, whole))


def overlap(
    offset: Sequence[int], shape: Sequence[int], low: Sequence[int], high: Sequence[int]
) -> tuple[list[int], list[int]]:
    """What a piece has of the tensor's box from `low` to `high`: begin and end within the piece."""
    begin = [max(a, b) - a for a, b in zip(offset, low, strict=True)]
    end = [min(a + n, b) - a for a, n, b in zip(offset, shape, high, strict=True)]
    return begin, end


def stacked(sizes: Sequence[int]) -> int:
    """How many dimensions, but for the last, a box is one element wide in: one of a stack, of which no other
    need be read."""
    depth = 0
    while depth < len(sizes) - 1 and sizes[depth] == 1:
        depth += 1
    return depth
