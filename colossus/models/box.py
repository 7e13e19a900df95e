"""Which part of a tensor a rank holds."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
Runs = list[tuple[int, int]]  # of neighbours: [start, end)


def box(tensor: torch.Tensor) -> Box:
    """Offset and sizes of this rank's part, of a DTensor; parts may be uneven or empty. Else: all of it.

    `_StridedShard` (FSDP over tensor parallel) first cuts into `split_factor` pieces and takes its chunk of
    each. What follows on later axes of the mesh must make that one box again, as FSDP's placements do. In
    plain integers: tensors that hold no numbers (a dry run's) have parts, too.
    """
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    coordinates = tensor.device_mesh.get_coordinate()
    if coordinates is None:
        return (0,) * tensor.ndim, (0,) * tensor.ndim
    here = {dim: [(0, size)] for dim, size in enumerate(tensor.shape)}  # its elements: runs of them
    for axis, placement in enumerate(tensor.placements):
        assert not placement.is_partial(), "sums that are not reduced yet are no part"
        if not placement.is_replicate():
            dim, pieces = getattr(placement, "dim"), getattr(placement, "split_factor", 1)  # noqa: B009
            parts, mine = tensor.device_mesh.size(axis), coordinates[axis]
            cut = [_chunk(piece, parts, mine) for piece in _chunks(here[dim], pieces)]
            here[dim] = [run for piece in cut for run in piece]
    places = [_joined(runs) for runs in here.values()]
    assert all(len(runs) == 1 for runs in places), (
        f"the local part of a DTensor placed as {tensor.placements} is no box"
    )
    return tuple(runs[0][0] for runs in places), tuple(runs[0][1] - runs[0][0] for runs in places)


def _chunks(runs: Runs, num: int) -> list[Runs]:
    """As many equal parts as PyTorch's `chunk` makes: all but the last of one size, and perhaps fewer."""
    return [_chunk(runs, num, index) for index in range(num)]


def _chunk(runs: Runs, num: int, index: int) -> Runs:
    """One of these parts; empty where there is none."""
    total = sum(end - start for start, end in runs)
    size = -(-total // num)
    first, last = size * index, size * (index + 1)
    found, passed = [], 0
    for start, end in runs:
        begin, stop = max(start, start + first - passed), min(end, start + last - passed)
        if begin < stop:
            found.append((begin, stop))
        passed += end - start
    return found


def _joined(runs: Runs) -> Runs:
    """The same in as few runs as there can be; one that is empty where there is nothing."""
    found: Runs = []
    for start, end in runs:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found or [(0, 0)]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part itself; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
