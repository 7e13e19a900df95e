"""Which part of a tensor a rank holds."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

Box = tuple[tuple[int, ...], tuple[int, ...]]


def box(tensor: torch.Tensor) -> Box:
    """Offset and sizes of this rank's part, of a DTensor; parts may be uneven or empty. Else: all of it.

    `_StridedShard` (FSDP over tensor parallel) first cuts into `split_factor` pieces and takes its chunk of
    each. What follows on later axes of the mesh must make that one box again, as FSDP's placements do.
    """
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    coordinates = tensor.device_mesh.get_coordinate()
    if coordinates is None:
        return (0,) * tensor.ndim, (0,) * tensor.ndim
    indices = dict[int, torch.Tensor]()  # by dimension: which of its elements are here
    for axis, placement in enumerate(tensor.placements):
        assert not placement.is_partial(), "sums that are not reduced yet are no part"
        if not placement.is_replicate():
            dim, pieces = getattr(placement, "dim"), getattr(placement, "split_factor", 1)  # noqa: B009
            index = indices.setdefault(dim, torch.arange(tensor.shape[dim], device="cpu"))
            chunks = [piece.chunk(tensor.device_mesh.size(axis)) for piece in index.chunk(pieces)]
            here = [chunk[coordinates[axis]] for chunk in chunks if coordinates[axis] < len(chunk)]
            indices[dim] = torch.cat(here) if here else index[:0]
    offset, sizes = [0] * tensor.ndim, list(tensor.shape)
    for dim, index in indices.items():
        sizes[dim] = len(index)
        offset[dim] = int(index[0]) if len(index) else 0
        assert not len(index) or int(index[-1]) == offset[dim] + len(index) - 1, (
            f"the local part of a DTensor placed as {tensor.placements} is no box"
        )
    return tuple(offset), tuple(sizes)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part itself; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The logical tensor of which `part` is what this rank holds, as it holds its part of `like`; every rank
    that has a part calls it. Axis by axis in the order of the mesh, in which FSDP cut what others had cut."""
    if not isinstance(like, DTensor):
        return part
    mesh, sizes = like.device_mesh, list(box(like)[1])
    for axis, placement in enumerate(like.placements):
        if placement.is_replicate() or mesh.size(axis) == 1:
            continue
        dim: int = getattr(placement, "dim")  # noqa: B009
        later = [
            getattr(p, "dim", None) == dim and mesh.size(a) for a, p in enumerate(like.placements) if a > axis
        ]
        sizes[dim] = like.shape[dim] // math.prod(size for size in later if size)
        each = -(-sizes[dim] // mesh.size(axis))
        padded = part.new_zeros([each if d == dim else n for d, n in enumerate(part.shape)])
        padded.narrow(dim, 0, part.shape[dim]).copy_(part)
        gathered = [torch.empty_like(padded) for _ in range(mesh.size(axis))]
        dist.all_gather(gathered, padded, group=mesh.get_group(axis))
        part = torch.cat(gathered, dim=dim).narrow(dim, 0, sizes[dim])
    return part
