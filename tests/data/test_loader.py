"""Batches of a rank, read ahead."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.architecture import IGNORED
from colossus.data.loader import Batches, micro_batches, rank_rows
from colossus.data.order import BatchSchedule, Order, Phase
from tests.data.streams import Stream, counting, one_phase

SOURCES = [counting(400), counting(900, first=10_000)]


def order_of(seed: int = 0, seq_len: int = 8) -> Order:
    return one_phase([source.num_tokens for source in SOURCES], seq_len, seed)


def rows(batch: Any) -> list[list[int]]:
    """Token rows that have targets."""
    keep = (batch.targets_BT != IGNORED).any(1)
    return batch.tokens_BT[keep].tolist()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 13), st.integers(1, 4), st.integers(0, 9))
def test_all_ranks_together_read_the_global_batch(
    size: int, batch: int, micro_batch: int, start_step: int
) -> None:
    """In its order, whatever the number of ranks; equally many rows each."""
    order, schedule = order_of(), BatchSchedule([(0, batch), (start_step + 1, 2 * batch)])
    parts = [
        Batches(SOURCES, order, schedule, start_step=start_step, rank=r, size=size, micro_batch=micro_batch)
        for r in range(size)
    ]
    for step in (start_step, start_step + 1):  # the batch doubles in between
        batches = [part.next(step) for part in parts]
        first = schedule.first_sample(step)
        places = order.locate_many(first, first + schedule.batch(step)).tolist()
        expected = [SOURCES[c].tokens(8 * w, 8 * w + 8).tolist() for c, _, w in places]
        assert [row for b in batches for row in rows(b)] == expected
        assert len({len(b.tokens_BT) for b in batches}) == 1
        assert len(batches[0].tokens_BT) % micro_batch == 0
        assert sum(b.num_targets for b in batches) == 8 * schedule.batch(step)
        assert {b.num_tokens_global for b in batches} == {8 * schedule.batch(step)}
        assert {b.first_sample for b in batches} == {first}
    for part in parts:
        part.close()


def test_padding_rows_have_no_targets() -> None:
    with Batches(SOURCES, order_of(), BatchSchedule([(0, 5)]), rank=2, size=3, micro_batch=4) as batches:
        batch = batches.next(0)
    assert batch.tokens_BT.shape == (4, 8)
    assert batch.num_targets == 8
    assert (batch.targets_BT[1:] == IGNORED).all()
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64


def test_a_rank_without_samples_has_padding_only() -> None:
    with Batches(SOURCES, order_of(), BatchSchedule([(0, 2)]), rank=3, size=4, micro_batch=2) as batches:
        batch = batches.next(0)
    assert batch.tokens_BT.shape == (2, 8)
    assert batch.num_targets == 0


@pytest.mark.parametrize("size", [1, 3])
def test_a_resume_reads_what_the_run_would_have_read(size: int) -> None:
    schedule = BatchSchedule([(0, 6), (4, 12)])
    order = Order(
        5,
        [Phase(0, 8, (1.0, 2.0), ("a", "b")), Phase(30, 16, (1.0, 1.0), ("a", "b"))],
        [source.num_tokens for source in SOURCES],
        skips=[(7, 19)],
    )
    for rank in range(size):
        with Batches(SOURCES, order, schedule, rank=rank, size=size) as whole:
            expected = [whole.next(step) for step in range(9)]
        for at in range(9):
            with Batches(SOURCES, order, schedule, start_step=at, rank=rank, size=size) as resumed:
                batch = resumed.next(at)
            assert torch.equal(batch.tokens_BT, expected[at].tokens_BT)
            assert torch.equal(batch.targets_BT, expected[at].targets_BT)
            assert batch.first_sample == expected[at].first_sample


def test_documents_come_along_where_they_are_kept_apart() -> None:
    with Batches(SOURCES, order_of(), BatchSchedule([(0, 4)]), mask_documents=True) as batches:
        batch = batches.next(0)
    assert batch.documents_BT is not None
    inside = batch.documents_BT[:, 1:] == batch.documents_BT[:, :-1]
    assert not inside.all()
    assert (batch.targets_BT[:, :-1][~inside] == IGNORED).all()
    assert (batch.targets_BT[:, :-1][inside] != IGNORED).all()


def test_micro_batches_are_the_rows_in_order() -> None:
    with Batches(SOURCES, order_of(), BatchSchedule([(0, 6)]), micro_batch=4) as batches:
        batch = batches.next(0)
    parts = micro_batches(batch, 4)
    assert [len(tokens) for tokens, _, _ in parts] == [4, 4]
    assert torch.equal(torch.cat([tokens for tokens, _, _ in parts]), batch.tokens_BT)
    assert torch.equal(torch.cat([targets for _, targets, _ in parts]), batch.targets_BT)
    assert parts[0][2] is None


class Slow(Stream):
    """Reading takes `seconds`, and fails from window `fails` on."""

    seconds = 0.0
    fails = 10**9
    reads = 0

    def tokens(self, start: int, stop: int) -> np.ndarray:
        time.sleep(self.seconds)
        self.reads += 1
        if self.reads > self.fails:
            raise OSError("gone")
        return super().tokens(start, stop)


def slow(**values: Any) -> Slow:
    plain = counting(900)
    source = Slow(plain.ids, plain.starts)
    for name, value in values.items():
        setattr(source, name, value)
    return source


def test_batches_are_read_ahead_and_waiting_is_measured() -> None:
    source = slow(seconds=0.02)
    with Batches([source], one_phase([900]), BatchSchedule([(0, 1)])) as batches:
        time.sleep(0.3)
        ready = source.reads
        assert ready >= 5
        assert min(batches.next(step).wait_seconds for step in range(4)) < 0.015  # they were there
        for step in range(4, 40):
            waited = batches.next(step).wait_seconds
        assert waited > 0.005  # the last one was not


def test_read_ahead_is_bounded() -> None:
    source = slow()
    with Batches([source], one_phase([900]), BatchSchedule([(0, 1)])):
        time.sleep(0.3)
        assert source.reads <= 18


def test_what_reading_raises_is_raised_by_next_in_its_turn() -> None:
    source = slow(fails=3)
    with Batches([source], one_phase([900]), BatchSchedule([(0, 1)])) as batches:
        for step in range(3):
            batches.next(step)
        for _ in range(2):  # and it stays so
            with pytest.raises(OSError, match="gone"):
                batches.next(3)


def test_steps_are_asked_for_in_order() -> None:
    with (
        Batches(SOURCES, order_of(), BatchSchedule([(0, 1)]), start_step=3) as batches,
        pytest.raises(AssertionError, match="asked for step 5, the next is 3"),
    ):
        batches.next(5)


def test_closing_ends_the_thread() -> None:
    before = {thread.ident for thread in threading.enumerate()}
    batches = Batches(SOURCES, order_of(), BatchSchedule([(0, 4)]))
    started = [t for t in threading.enumerate() if t.ident not in before]
    assert [thread.name for thread in started] == ["data"]
    batches.close()
    assert not started[0].is_alive()
    batches.close()


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [  # of 4 ranks, two a replica where there are two: which rows, and how many there may be
        (8, (1, 3), [(0, 1, 1), (1, 2, 1), (2, 5, 3), (5, 8, 3)]),
        (8, (3, 1), [(0, 3, 3), (3, 6, 3), (6, 7, 1), (7, 8, 1)]),
        (10, (2, 3), [(0, 2, 2), (2, 4, 2), (4, 7, 3), (7, 10, 3)]),
        (7, (1, 1), [(0, 2, 2), (2, 3, 2), (3, 5, 2), (5, 7, 2)]),
        (7, (1,), [(0, 2, 2), (2, 4, 2), (4, 6, 2), (6, 7, 2)]),
        (3, (1,), [(0, 1, 1), (1, 2, 1), (2, 3, 1), (3, 3, 1)]),
    ],
)
def test_replicas_take_their_shares(
    count: int, shares: tuple[int, ...], expected: list[tuple[int, int, int]]
) -> None:
    found = [rank_rows(count, rank, 4, shares) for rank in range(4)]
    assert [(rows.start, rows.stop, share) for rows, share in found] == expected
