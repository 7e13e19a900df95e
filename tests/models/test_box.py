"""Which part of a tensor a rank holds: against PyTorch's own chunks of the indices."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from colossus.models.box import _chunk, _chunks, _joined


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
        runs = [run for piece in _chunks(runs, pieces) for run in _chunk(piece, ranks, rank)]
    assert [i for start, end in runs for i in range(start, end)] == index.tolist()
    joined = _joined(runs)
    assert [i for start, end in joined for i in range(start, end)] == index.tolist()
    assert all(end < start for (_, end), (start, _) in pairwise(joined))
