"""Which bytes a box of a piece lies in, beside what numpy says of every element."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from colossus.checkpoints.spans import overlap, span

CHUNK, ITEM = 12, 4


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (3, 4, 2)], ids=str)
def test_a_box_lies_in_its_rows_and_these_in_their_chunks(shape: tuple[int, ...]) -> None:
    """No chunk is read in which none of its rows lies; of a stack no other is."""
    flat = np.arange(int(np.prod(shape))).reshape(shape)
    sides = [[(a, b) for a in range(size) for b in range(a + 1, size + 1)] for size in shape]
    for box in itertools.product(*sides):
        depth = next((d for d, (a, b) in enumerate(box[:-1]) if b - a > 1), max(0, len(box) - 1))
        rows = flat[tuple(slice(a, b) for a, b in box[: depth + 1])]  # with all columns
        found = span(shape, ITEM, [a for a, _ in box], [b for _, b in box], CHUNK)
        assert (found.first, found.last) == (ITEM * int(rows.min()), ITEM * (int(rows.max()) + 1))
        chunks = {int(byte) // CHUNK for byte in range(found.first, found.last)}
        assert (found.begin, found.end) == (
            CHUNK * min(chunks),
            min(CHUNK * (max(chunks) + 1), ITEM * flat.size),
        )


def test_what_a_piece_has_of_a_box() -> None:
    assert overlap((4, 0), (3, 5), (2, 1), (6, 9)) == ([0, 1], [2, 5])
