import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.evaluation.windows import NUM_LENGTHS, batches, windows

documents = st.lists(st.integers(1, 60), min_size=1, max_size=8)


@given(documents, st.integers(2, 17))
@settings(deadline=None)
def test_every_token_is_predicted_once_with_half_a_window_of_context(num_tokens, seq_len):
    table = windows(np.array(num_tokens), seq_len)
    scored = {}
    for document, begin, length, first in zip(
        table.document, table.begin, table.length, table.first_scored, strict=True
    ):
        assert 1 <= length <= seq_len and begin + length < num_tokens[document]
        for offset in range(first, length):
            target = begin + offset + 1
            assert (document, target) not in scored
            scored[document, target] = offset + 1
    assert set(scored) == {(d, t) for d, n in enumerate(num_tokens) for t in range(1, n)}
    assert all(context >= min(target, seq_len / 2) for (_, target), context in scored.items())


@given(st.lists(st.integers(1, 64), min_size=1, max_size=50), st.integers(1, 500))
@settings(deadline=None)
def test_batches_hold_every_window_once_in_few_shapes(lengths, batch_tokens):
    lengths = np.array(lengths)
    parts = batches(lengths, 64, batch_tokens)
    assert sorted(i for rows, _ in parts for i in rows) == list(range(len(lengths)))
    assert len({length for _, length in parts}) <= NUM_LENGTHS
    for rows, length in parts:
        assert length <= 64 and (lengths[rows] <= length).all()
        assert len(rows) == 1 or len(rows) * length <= batch_tokens


def test_many_windows_are_planned_quickly(benchmark_seconds=2.0):
    import time

    num_tokens = np.random.default_rng(0).integers(2, 5000, 100_000)
    started = time.process_time()
    table = windows(num_tokens, 512)
    parts = batches(table.length, 512, 8192)
    assert time.process_time() - started < benchmark_seconds
    padded = sum(len(rows) * length for rows, length in parts)
    assert padded / table.length.sum() < 1.05


@pytest.mark.parametrize("seq_len", [1, 2, 3])
def test_tiny_windows(seq_len):
    table = windows(np.array([5]), seq_len)
    assert (table.length - table.first_scored).sum() == 4
