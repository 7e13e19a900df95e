"""Which part of a tensor lies at which place: against PyTorch's own chunks of the indices."""

from __future__ import annotations

from itertools import pairwise, product

import torch
from hypothesis import given
from hypothesis import strategies as st

from colossus.cuts import Cut, box_at, joined, part, parts_within

cut = st.builds(Cut, st.just(0), st.integers(1, 4), st.integers(1, 5), st.just(1))


@given(
    size=st.integers(0, 40),
    cuts=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 4)), max_size=3),
)
def test_runs_are_what_chunks_of_the_indices_are(size: int, cuts: list[tuple[int, int, int]]) -> None:
    """(pieces, ranks, rank) one after the other, as placements are: pieces first, a chunk of each."""
    index, runs = torch.arange(size), [(0, size)]
    for pieces, ranks, asked in cuts:
        rank = asked % ranks
        chunks = [piece.chunk(ranks) for piece in index.chunk(pieces)]
        here = [chunk[rank] for chunk in chunks if rank < len(chunk)]
        index = torch.cat(here) if here else index[:0]
        runs = part(runs, pieces, ranks, rank)
    assert [i for start, end in runs for i in range(start, end)] == index.tolist()
    neighbours = joined(runs)
    assert [i for start, end in neighbours for i in range(start, end)] == index.tolist()
    assert all(end < start for (_, end), (start, _) in pairwise(neighbours))


@given(
    shape=st.tuples(st.integers(0, 30), st.integers(1, 6)),
    rows=st.lists(cut, max_size=2),
    columns=st.lists(st.builds(Cut, st.just(1), st.just(1), st.integers(1, 3), st.just(1)), max_size=1),
    box=st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 6), st.integers(0, 6)),
)
def test_parts_within_a_box_are_those_that_share_an_element_with_it(
    shape: tuple[int, int], rows: list[Cut], columns: list[Cut], box: tuple[int, int, int, int]
) -> None:
    cuts = [*rows, *columns]
    low, high = (min(box[:2]), min(box[2:])), (max(box[:2]), max(box[2:]))
    wanted = torch.zeros(31, 7, dtype=torch.bool)
    wanted[low[0] : high[0], low[1] : high[1]] = True
    expected = {}
    for places in product(*(range(each.parts) for each in cuts)):
        runs = [[(0, size)] for size in shape]
        for each, place in zip(cuts, places, strict=True):
            runs[each.dim] = part(runs[each.dim], each.pieces, each.parts, place)
        if any(wanted[a:b, c:d].any() for a, b in runs[0] for c, d in runs[1]):
            expected[places] = box_at(shape, cuts, places)
    assert dict(parts_within(shape, cuts, low, high)) == expected
