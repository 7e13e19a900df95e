"""Matrices that ranks hold parts of, each worked on as a whole by one of them: its owner.

Parts travel to the owner and back along one axis of the mesh after the other, among the ranks of that axis: a
rank sends what it has once an axis, however many ranks there are. A rank that has a copy sends nothing.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

BUCKET_NUMEL = 2**24  # of whole matrices that an owner has at once, if one alone has not more

Read = Callable[[int], torch.Tensor]
Work = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Axis:
    """Ranks among which a matrix is spread: `sizes` of its dimension `dim`; None: each has a copy."""

    group: dist.ProcessGroup
    dim: int | None
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Matrix:
    """How one lies over ranks. rows, columns: of all of it."""

    rows: int
    columns: int
    axes: tuple[Axis, ...]

    @property
    def cost(self) -> int:
        """Of its orthogonalisation, in proportion."""
        return self.rows * self.columns * min(self.rows, self.columns)


def matrix_of(parameter: torch.Tensor) -> Matrix:
    """Of a parameter [..., out, in]; of a stack, each of those that this rank has a part of: ranks that have
    others of the stack are none of theirs."""
    axes = []
    if isinstance(parameter, DTensor):
        mesh, first = parameter.device_mesh, parameter.ndim - 2
        dims = [None if p.is_replicate() else int(getattr(p, "dim")) for p in parameter.placements]  # noqa: B009
        for index, dim in enumerate(dims):
            size = mesh.size(index)
            if size == 1 or (dim is not None and dim < first):
                continue
            sizes: tuple[int, ...] = ()
            if dim is not None:
                # FSDP, which comes first in the order of the mesh, cut what later axes had cut.
                later = [mesh.size(i) for i in range(index + 1, len(dims)) if dims[i] == dim]
                sizes = tuple(_chunks(parameter.shape[dim] // math.prod(later), size))
            axes.append(Axis(mesh.get_group(index), None if dim is None else dim - first, sizes))
    rows, columns = parameter.shape[-2:]
    return Matrix(rows, columns, tuple(axes))


def _chunks(total: int, num: int) -> Iterator[int]:
    """As `torch.chunk` cuts."""
    each = -(-total // num)
    return (max(0, min(each, total - each * index)) for index in range(num))


def at_owners(given: Sequence[Matrix], read: Read, work: Work) -> Iterator[tuple[int, torch.Tensor]]:
    """(index, this rank's part of what `work` makes of that matrix), in the order in which they are made.

    read: gives this rank's part of a matrix by its index. work: [N, rows, columns], of any N matrices of one
    shape, to the same shape. Every rank that has a part calls it, with its matrices in the same order.
    """
    families: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for index, matrix in enumerate(given):
        families.setdefault(tuple(axis.group for axis in matrix.axes), []).append(index)
    for groups, members in families.items():
        places = [(dist.get_rank(group), group.size()) for group in groups]
        for bucket in _buckets(given, members, math.prod(size for _, size in places)):
            yield from _together({i: read(i) for i in bucket}, given, places, work).items()


def _buckets(given: Sequence[Matrix], members: Sequence[int], num_owners: int) -> Iterator[list[int]]:
    """The largest first; as many at once as their owners have room for."""
    bucket: list[int] = []
    numel = 0
    for index in sorted(members, key=lambda i: -given[i].cost):
        size = given[index].rows * given[index].columns
        if len(bucket) >= num_owners and numel + size > BUCKET_NUMEL * num_owners:
            yield bucket
            bucket, numel = [], 0
        bucket.append(index)
        numel += size
    if bucket:
        yield bucket


def _together(
    held: dict[int, torch.Tensor], given: Sequence[Matrix], places: Sequence[tuple[int, int]], work: Work
) -> dict[int, torch.Tensor]:
    """Of matrices that are spread over the same axes. places: (this rank's number, ranks) of each."""
    owners = _owners({index: given[index].cost for index in held}, [size for _, size in places])
    like = next(iter(held.values()))
    shapes = []  # of what was held before each axis
    for a, (mine, _) in enumerate(places):
        axes = {index: given[index].axes[a] for index in held}
        shapes.append({index: part.shape for index, part in held.items()})
        held = _to_owners(held, axes, {index: owners[index][a] for index in held}, mine, like)
    by_shape: dict[torch.Size, list[int]] = {}
    for index, matrix in held.items():
        by_shape.setdefault(matrix.shape, []).append(index)
    for indices in by_shape.values():
        made = work(torch.stack([held[index] for index in indices]))
        held.update(zip(indices, made, strict=True))
    for a in reversed(range(len(places))):
        axes = {index: given[index].axes[a] for index in shapes[a]}
        held = _from_owners(held, axes, {index: owners[index][a] for index in axes}, shapes[a], like)
    return held


def _owners(costs: dict[int, int], sizes: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Where on each axis the owner of each matrix stands: the rank that has least to do so far."""
    free = [(0, place) for place in itertools.product(*map(range, sizes))]
    found = {}
    for index, cost in costs.items():
        load, found[index] = free[0]
        heapq.heapreplace(free, (load + cost, found[index]))
    return found


def _to_owners(
    held: dict[int, torch.Tensor],
    axes: dict[int, Axis],
    owners: dict[int, int],
    mine: int,
    like: torch.Tensor,
) -> dict[int, torch.Tensor]:
    """What rank `mine` of an axis owns of what the ranks of the axis hold; where these are copies, its own.
    axes, owners: of each matrix; all of one group."""
    spread = [index for index in held if axes[index].dim is not None]
    if not spread:
        return {index: part for index, part in held.items() if owners[index] == mine}
    group = axes[spread[0]].group
    here = [index for index in spread if owners[index] == mine]
    ranks = range(group.size())
    rows = _exchange(
        [[held[i] for i in spread if owners[i] == rank] for rank in ranks],
        [[_cut(held[i].shape, axes[i], rank) for i in here] for rank in ranks],
        group,
        like,
    )
    arrived = dict(zip(here, zip(*rows, strict=True), strict=True)) if here else {}
    return {
        index: part if (dim := axes[index].dim) is None else torch.cat(arrived[index], dim=dim)
        for index, part in held.items()
        if owners[index] == mine
    }


def _from_owners(
    held: dict[int, torch.Tensor],
    axes: dict[int, Axis],
    owners: dict[int, int],
    shapes: dict[int, torch.Size],
    like: torch.Tensor,
) -> dict[int, torch.Tensor]:
    """The other way: of each matrix in `shapes` a part of that shape, from its owner, which holds it."""
    if not shapes:
        return {}
    group = next(iter(axes.values())).group
    sent = {index: _parts(matrix, axes[index]) for index, matrix in held.items()}
    order = [[i for i in shapes if owners[i] == rank] for rank in range(group.size())]
    rows = _exchange(
        [[parts[rank] for parts in sent.values()] for rank in range(group.size())],
        [[shapes[i] for i in some] for some in order],
        group,
        like,
    )
    found = {
        i: part for some, row in zip(order, rows, strict=True) for i, part in zip(some, row, strict=True)
    }
    return {index: found[index] for index in shapes}


def _cut(shape: torch.Size, axis: Axis, rank: int) -> torch.Size:
    """Of the part that a rank of the axis has, where this rank's has `shape`."""
    assert axis.dim is not None
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
) -> list[list[torch.Tensor]]:
    """Sends each rank some tensors and receives as many of these `shapes` from each."""
    sizes = [[math.prod(shape) for shape in some] for some in shapes]
    flat = torch.cat([t.flatten() for some in sent for t in some]) if any(sent) else like.new_empty(0)
    got = like.new_empty(sum(map(sum, sizes)))
    dist.all_to_all_single(
        got, flat, [sum(some) for some in sizes], [sum(t.numel() for t in some) for some in sent], group=group
    )
    pieces = iter(got.split([size for some in sizes for size in some]))
    return [[next(pieces).view(shape) for shape in some] for some in shapes]
