"""Who owns a matrix, and which matrices travel together; without ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

from colossus.optim.owners import Axis, Bucket, Matrix, families_of


class Group:
    """As much of a process group as is asked for."""

    def __init__(self, group_desc: str, num_ranks: int) -> None:
        self.group_desc, self.num_ranks = group_desc, num_ranks

    def size(self) -> int:
        return self.num_ranks


FSDP, TP, COPIES = Group("fsdp", 4), Group("tp", 2), Group("dp_replicate", 2)


def matrix(rows: int, columns: int, *groups: Group) -> Matrix:
    axes = tuple(Axis(cast(Any, group), None, ()) for group in groups)
    return Matrix(rows, columns, axes)


def loads(buckets: list[Bucket]) -> Counter[tuple[int, ...]]:
    found = Counter[tuple[int, ...]]()
    for bucket in buckets:
        for index, owner in bucket.owners.items():
            found[owner] += bucket.matrices[index].cost
    return found


def test_owners_have_as_much_to_do_over_all_buckets() -> None:
    """Twelve large ones and twelve small ones over eight ranks: four have two large ones, and the others one
    and three of a fourth of the work."""
    given = [matrix(8, 8, FSDP, TP) for _ in range(12)] + [matrix(8, 4, FSDP, TP) for _ in range(12)]
    (buckets,) = families_of(given, room=64)
    assert [len(bucket.matrices) for bucket in buckets] == [8, 12, 4]
    assert sorted(index for bucket in buckets for index in bucket.matrices) == list(range(24))
    large, small = 8 * 8 * 8, 8 * 4 * 4
    assert sorted(loads(buckets).values()) == [large + 3 * small] * 4 + [2 * large] * 4


def test_a_bucket_has_what_its_owners_have_room_for() -> None:
    given = [matrix(4, 4, FSDP) for _ in range(24)]
    assert [len(b.matrices) for b in families_of(given, room=32)[0]] == [8, 8, 8]
    assert [len(b.matrices) for b in families_of(given, room=1)[0]] == [4] * 6
    assert [len(b.matrices) for b in families_of(given)[0]] == [24]


def test_the_largest_come_first() -> None:
    given = [matrix(2, 2, FSDP), matrix(4, 4, FSDP), matrix(8, 4, FSDP)]
    ((bucket,),) = families_of(given)
    assert list(bucket.matrices) == [2, 1, 0]


def test_a_rank_that_lacks_some_has_the_others_families_in_their_order() -> None:
    """An expert that only some ranks have comes first there, and is of the last family."""
    both = [matrix(4, 4, FSDP), matrix(4, 4, TP), matrix(4, 4, COPIES, FSDP)]
    here, there = families_of([matrix(4, 4, TP), *both]), families_of(both)
    order = [[group.group_desc for group in family[0].groups] for family in here]
    assert order == [[group.group_desc for group in family[0].groups] for family in there]
    assert order == [["dp_replicate", "fsdp"], ["fsdp"], ["tp"]]
