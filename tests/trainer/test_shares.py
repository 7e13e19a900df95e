"""Replicas that are not alike take unequal parts of a batch, and the result is that of equal ones."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.data.loader import rank_rows
from colossus.layout import Layout, Pool
from colossus.trainer.shares import split


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 4)), min_size=1, max_size=5), st.integers(0, 40))
def test_no_other_split_is_done_sooner(replicas: list[tuple[float, int]], more: int) -> None:
    """Moving any sequence from the last one to be done to another does not help."""
    speeds, units = [s for s, _ in replicas], [u for _, u in replicas]
    total = len(replicas) + more
    parts = split(total, speeds, units)
    assert sum(parts) == total and min(parts) >= 1

    def seconds(index: int, part: int) -> float:
        return -(-part // units[index]) * units[index] / speeds[index]

    longest = max(seconds(i, p) for i, p in enumerate(parts))
    last = max(range(len(parts)), key=lambda i: seconds(i, parts[i]))
    spare = (parts[last] - 1) % units[last] + 1  # in its last pass
    if parts[last] - spare >= 1:
        room = 0
        for i, part in enumerate(parts):
            if i != last:
                grown = part
                while seconds(i, grown + 1) < longest * (1 - 1e-12):
                    grown += 1
                room += grown - part
        assert room < spare


def test_a_replica_that_is_half_as_quick_takes_half() -> None:
    assert split(12, [1.0, 2.0], [1, 1]) == [4, 8]
    assert split(12, [1.0, 2.0], [2, 4]) == [4, 8]
    assert split(3, [1.0, 100.0, 1.0], [1, 1, 1]) == [1, 1, 1]


@given(st.integers(1, 60), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 3))
def test_ranks_take_every_row_once(count: int, shares: list[int], ranks: int) -> None:
    size = ranks * len(shares)
    parts = [rank_rows(count, rank, size, shares) for rank in range(size)]
    assert [row for rows, _ in parts for row in rows] == list(range(count))
    for replica in range(len(shares)):
        own = parts[replica * ranks : (replica + 1) * ranks]
        assert len({share for _, share in own}) == 1 and all(len(rows) <= share for rows, share in own)


def test_a_replica_has_what_its_pool_says() -> None:
    layout = Layout(
        dp_replicate=3,
        micro_batch=2,
        recompute="none",
        pools=[Pool(replicas=2), Pool(replicas=1, micro_batch=4, recompute="full")],
    )
    assert [layout.of_replica(r).micro_batch for r in range(3)] == [2, 2, 4]
    assert [layout.of_replica(r).recompute for r in range(3)] == ["none", "none", "full"]
    assert Layout(micro_batch=2).of_replica(0).micro_batch == 2
