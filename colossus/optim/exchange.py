"""Parts of matrices travel to their owners and, when these have worked on them, back: along one axis of the
mesh after the other, among the ranks of that axis. A rank sends what it has once an axis, however many ranks
there are; one that has a copy sends nothing to the owner.

Buckets travel in turns. In each turn every bucket that is under way goes on by one exchange, and one of them
is worked on meanwhile: so the next ones arrive and the last ones return beside the work. An exchange is begun
in one turn and waited for in the next: on a GPU by the stream of the work, which has by then work of a turn
before it, and by no host. An owner has at most three buckets at once: one that arrives, one that it works on,
one that returns; with two axes, the part that has crossed the first of them of a fourth and a fifth.

What a turn does depends on the buckets of the family alone, and families follow each other in one order: all
ranks of a group begin its exchanges in the same order, whatever else they have.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
import torch.distributed as dist

from colossus.optim.owners import Axis, Bucket

Read = Callable[[int], torch.Tensor]
Work = Callable[[torch.Tensor], torch.Tensor]
Parts = dict[int, torch.Tensor]


def at_owners(families: Iterable[Sequence[Bucket]], read: Read, work: Work) -> Iterator[Parts]:
    """This rank's parts of what `work` makes of matrices, by their index: of each turn those that came back,
    at first none. Until the next turn is asked for, exchanges go on.

    read: gives this rank's part of a matrix by its index. work: [N, rows, columns], of any N matrices of one
    shape, to the same shape. Every rank that has a part calls it, with its matrices in the same order.
    """
    alone = [family for family in families if not family[0].groups]
    here = (parts for family in alone for parts in _in_turns(family, read, work))
    for family in families:
        if family[0].groups:
            for parts in _in_turns(family, read, work):
                yield parts
                yield from islice(here, 1)  # what is nobody else's fills the time
    yield from here


def _in_turns(buckets: Sequence[Bucket], read: Read, work: Work) -> Iterator[Parts]:
    """The newest goes on first: so the exchanges of those after it have begun when one is worked on, and
    those of the ones before it are waited for afterwards."""
    coming = (_travel(bucket, read, work) for bucket in buckets)
    under_way: deque[Iterator[Parts | None]] = deque()
    while True:
        under_way.extendleft(islice(coming, 1))
        if not under_way:
            return
        back: Parts = {}
        for travel in list(under_way):
            parts = next(travel)
            if parts is not None:
                under_way.remove(travel)
                back |= parts
        yield back


def _travel(bucket: Bucket, read: Read, work: Work) -> Iterator[Parts | None]:
    """None while an exchange goes on; at last this rank's parts."""
    held = {index: read(index) for index in bucket.matrices}
    like = next(iter(held.values())).new_empty(0)
    shapes = []  # of what was held before each axis
    for axis in range(len(bucket.groups)):
        shapes.append({index: part.shape for index, part in held.items()})
        yield from _to_owners(held, bucket, axis, like)
    _work_on(held, work)
    for axis in reversed(range(len(bucket.groups))):
        yield from _from_owners(held, bucket, axis, shapes[axis], like)
    yield held


def _work_on(held: Parts, work: Work) -> None:
    """Puts in the place of matrices what is made of them, those of one shape at once."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, matrix in held.items():
        by_shape.setdefault(matrix.shape, []).append(index)
    for indices in by_shape.values():
        if len(indices) == 1:  # large ones come alone: no copy
            made = work(held.pop(indices[0]).unsqueeze(0))
        else:
            made = work(torch.stack([held.pop(index) for index in indices]))
        held.update(zip(indices, made, strict=True))


def _to_owners(held: Parts, bucket: Bucket, axis: int, like: torch.Tensor) -> Iterator[None]:
    """Leaves in `held` what this rank owns of what the ranks of an axis hold, of copies its own. like: an
    empty tensor of their kind."""
    group = bucket.groups[axis]
    ranks, mine = range(group.size()), dist.get_rank(group)
    axes = {index: bucket.matrices[index].axes[axis] for index in held}
    sent: list[list[torch.Tensor]] = [[] for _ in ranks]
    here: dict[int, torch.Size] = {}  # what comes: of each the shape of this rank's part
    for index in axes:
        place = bucket.owners[index][axis]
        if axes[index].dim is not None:
            if place == mine:
                here[index] = held[index].shape
            sent[place].append(held.pop(index))
        elif place != mine:
            del held[index]
    is_spread = any(sent)
    if is_spread:
        shapes = [[_part(shape, axes[index], rank) for index, shape in here.items()] for rank in ranks]
        arrived = _exchange(sent, shapes, group, like)
    sent.clear()
    if any(matrix.axes[axis].dim is not None for matrix in bucket.matrices.values()):
        yield  # also where this group has none of them: all ranks of the family take as many turns
    if is_spread:
        for index, *pieces in zip(here, *arrived(), strict=True):
            dim = axes[index].dim
            assert dim is not None
            held[index] = torch.cat(pieces, dim=dim)


def _from_owners(
    held: Parts, bucket: Bucket, axis: int, shapes: dict[int, torch.Size], like: torch.Tensor
) -> Iterator[None]:
    """The other way: leaves in `held` a part of each matrix in `shapes`, of that shape, from its owner, which
    held it."""
    group = bucket.groups[axis]
    ranks = range(group.size())
    order = [[index for index in shapes if bucket.owners[index][axis] == rank] for rank in ranks]
    if shapes:
        mine = order[dist.get_rank(group)]
        parts = [_parts(held.pop(index), bucket.matrices[index].axes[axis]) for index in mine]
        sent = [[part[rank] for part in parts] for rank in ranks]
        arrived = _exchange(sent, [[shapes[index] for index in some] for some in order], group, like)
        del parts, sent
    yield
    if shapes:
        rows = zip(order, arrived(), strict=True)
        found = {index: part for some, row in rows for index, part in zip(some, row, strict=True)}
        held.update({index: found[index] for index in shapes})


def _part(shape: torch.Size, axis: Axis, rank: int) -> torch.Size:
    """Of the part that a rank of the axis has, where this rank's has `shape`."""
    return torch.Size(axis.sizes[rank] if dim == axis.dim else size for dim, size in enumerate(shape))


def _parts(matrix: torch.Tensor, axis: Axis) -> Sequence[torch.Tensor]:
    """Of each rank of the axis."""
    if axis.dim is None:
        return [matrix] * axis.group.size()
    return matrix.split(axis.sizes, dim=axis.dim)


def _exchange(
    sent: Sequence[Sequence[torch.Tensor]],
    shapes: Sequence[Sequence[torch.Size]],
    group: dist.ProcessGroup,
    like: torch.Tensor,
) -> Callable[[], list[list[torch.Tensor]]]:
    """Begins to send each rank some tensors, and to receive as many of these `shapes` from each. What it
    gives waits for them; on a GPU the stream does, and until then PyTorch keeps what the message reads."""
    sizes = [[math.prod(shape) for shape in some] for some in shapes]
    flat = torch.cat([t.flatten() for some in sent for t in some]) if any(sent) else like
    got = like.new_empty(sum(map(sum, sizes)))
    message = dist.all_to_all_single(
        got,
        flat,
        [sum(some) for some in sizes],
        [sum(t.numel() for t in some) for some in sent],
        group=group,
        async_op=True,
    )
    assert message is not None

    def arrived() -> list[list[torch.Tensor]]:
        message.wait()
        pieces = iter(got.split([size for some in sizes for size in some]))
        return [[next(pieces).view(shape) for shape in some] for some in shapes]

    return arrived
