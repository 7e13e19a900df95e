"""Matrices that ranks hold parts or copies of, each worked on as a whole by one of them: its owner. Who that
is, and which matrices travel together, follows from how they lie: all ranks find the same.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from colossus.perf.parts import MUON_BUCKET


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


@dataclass(frozen=True)
class Bucket:
    """Matrices that travel together, by their index, all spread over ranks of the same groups. owners: where
    on each of these axes the owner of each stands."""

    matrices: dict[int, Matrix]
    owners: dict[int, tuple[int, ...]]

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        return _groups(next(iter(self.matrices.values())))


def families_of(given: Sequence[Matrix], room: int = MUON_BUCKET) -> list[list[Bucket]]:
    """Buckets of those that are spread over ranks of the same groups, the largest matrices first. Ranks that
    share a group have the same of its families, in the same order: that of the names of the groups.

    room: elements that an owner may have in a bucket.
    """
    families: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for index, matrix in enumerate(given):
        families.setdefault(_groups(matrix), []).append(index)
    found = []
    for groups in sorted(families, key=lambda groups: [group.group_desc for group in groups]):
        members = sorted(families[groups], key=lambda index: -given[index].cost)
        sizes = [group.size() for group in groups]
        owners = _owners({index: given[index].cost for index in members}, sizes)
        found.append([
            Bucket({i: given[i] for i in some}, {i: owners[i] for i in some})
            for some in _cut(given, members, math.prod(sizes), room)
        ])  # fmt: skip
    return found


def _groups(matrix: Matrix) -> tuple[dist.ProcessGroup, ...]:
    return tuple(axis.group for axis in matrix.axes)


def _cut(given: Sequence[Matrix], members: Iterable[int], num_owners: int, room: int) -> Iterator[list[int]]:
    """As many at once as their owners have room for, and no fewer than there are owners."""
    bucket: list[int] = []
    numel = 0
    for index in members:
        size = given[index].rows * given[index].columns
        if len(bucket) >= num_owners and numel + size > room * num_owners:
            yield bucket
            bucket, numel = [], 0
        bucket.append(index)
        numel += size
    if bucket:
        yield bucket


def _owners(costs: dict[int, int], sizes: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Where on each axis the owner of each matrix stands: the rank that has least to do so far."""
    free = [(0, place) for place in itertools.product(*map(range, sizes))]
    found = {}
    for index, cost in costs.items():
        load, found[index] = free[0]
        heapq.heapreplace(free, (load + cost, found[index]))
    return found
