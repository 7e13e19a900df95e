"""Ranks that hold the same read it once, and pass it on to each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from colossus.checkpoints.format import Key
from colossus.checkpoints.spread import turns

Tensors = Iterable[tuple[Key, torch.Tensor]]


def reads(key: Key, tensor: torch.Tensor) -> bool:
    """Whether this rank is the one of several equal holders that reads its part from storage. A plain tensor
    is read by all."""
    return all(place == reader for _, place, reader in _axes(key, tensor))


def pass_on(tensors: Tensors) -> None:
    """Brings what its reader has filled to all others that hold it, along one axis of their meshes after the
    other. Every rank calls this, with tensors in the same order."""
    todo = [(tensor, _axes(key, tensor)) for key, tensor in tensors]
    for axis in sorted({axis for _, axes in todo for axis, _, _ in axes}):
        under_way = [work for tensor, axes in todo for work in _broadcast(tensor, axes, axis)]
        for copy, local, work in under_way:
            work.wait()
            if copy is not local:
                local.copy_(copy)


def _axes(key: Key, tensor: torch.Tensor) -> list[tuple[int, int, int]]:
    """The axes whose ranks hold the same of a tensor, this rank's place, and the place of the one that reads:
    they take turns by the tensor's name."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is None:
        return []
    mesh = tensor.device_mesh
    axes = [
        a for a, placement in enumerate(tensor.placements) if placement.is_replicate() and mesh.size(a) > 1
    ]
    readers = turns(key, map(mesh.size, axes))
    return [(axis, mesh.get_local_rank(axis), reader) for axis, reader in zip(axes, readers, strict=True)]


def _broadcast(
    tensor: torch.Tensor, axes: list[tuple[int, int, int]], now: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, dist.Work]]:
    """Begins to pass a tensor on along an axis, among ranks of which one has it by now: the others of its
    places on later axes get it then."""
    along = next(((place, reader) for axis, place, reader in axes if axis == now), None)
    later = all(place == reader for axis, place, reader in axes if axis > now)
    if along is None or not later or not isinstance(tensor, DTensor):
        return
    local = tensor.to_local().detach()
    if local.numel():
        copy = local.contiguous()
        work = dist.broadcast(
            copy, group=tensor.device_mesh.get_group(now), group_src=along[1], async_op=True
        )
        assert work is not None
        yield copy, local, work
