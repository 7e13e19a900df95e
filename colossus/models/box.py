"""Which part of a tensor a rank holds."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from colossus.cuts import Box, Cut, box_at


def box(tensor: torch.Tensor) -> Box:
    """Offset and sizes of this rank's part, of a DTensor; parts may be uneven or empty. Else: all of it.

    In plain integers: tensors that hold no numbers (a dry run's) have parts, too.
    """
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    coordinates = tensor.device_mesh.get_coordinate()
    if coordinates is None:
        return (0,) * tensor.ndim, (0,) * tensor.ndim
    cuts = cuts_of(tensor)
    found = box_at(
        tensor.shape,
        [cut for cut in cuts if cut is not None],
        [place for place, cut in zip(coordinates, cuts, strict=True) if cut is not None],
    )
    assert found is not None, f"the local part of a DTensor placed as {tensor.placements} is no box"
    return found


def cuts_of(tensor: DTensor) -> list[Cut | None]:
    """How each axis of its mesh cuts a tensor; None: that axis' ranks hold the same. A stride is what the
    caller knows of the mesh: 0 here."""
    found: list[Cut | None] = []
    for axis, placement in enumerate(tensor.placements):
        assert not placement.is_partial(), "sums that are not reduced yet are no part"
        if placement.is_replicate():
            found.append(None)
        else:
            dim, pieces = getattr(placement, "dim"), getattr(placement, "split_factor", 1)  # noqa: B009
            found.append(Cut(dim, pieces, tensor.device_mesh.size(axis), 0))
    return found


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part itself; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
