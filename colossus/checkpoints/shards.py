"""This rank's part of logical tensors: plain tensors and DTensors as boxes."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from colossus.checkpoints.format import Key
from colossus.models.box import box
from colossus.models.hf.header import DTYPES


@dataclass(frozen=True, slots=True)
class Shard:
    """The box of a logical tensor that this rank holds, and its values."""

    key: Key
    shape: tuple[int, ...]  # of the logical tensor
    offset: tuple[int, ...]
    values: torch.Tensor

    @property
    def dtype(self) -> str:
        return DTYPES[self.values.dtype]

    @property
    def num_bytes(self) -> int:
        return self.values.numel() * self.values.element_size()

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def parts(self) -> Iterator[memoryview]:
        """Its row-major bytes."""
        yield bytes_of(self.values)

    def with_values(self, values: torch.Tensor) -> Shard:
        return dataclasses.replace(self, values=values)


def shard_of(key: Key, tensor: torch.Tensor) -> Shard:
    """A view of the local part of a plain tensor or a DTensor; shares its memory."""
    if not isinstance(tensor, DTensor):
        return Shard(key, tuple(tensor.shape), (0,) * tensor.ndim, tensor.detach())
    local = tensor.to_local().detach()
    offset, sizes = box(tensor)
    assert sizes == tuple(local.shape), f"{key}: the local part is {tuple(local.shape)}, not {sizes}"
    return Shard(key, tuple(tensor.shape), offset, local)


def writes(key: Key, tensor: torch.Tensor, rank: int, world_size: int) -> bool:
    """Whether this rank is the one of several equal holders that writes its part of `tensor`.

    The holders take turns by the tensor's name, so that each writes about as much. A plain tensor is held,
    equal, by every rank of the world; a DTensor by the ranks of its mesh.
    """
    turn = zlib.crc32("/".join(key).encode())
    if not isinstance(tensor, DTensor):
        return turn % world_size == rank
    coordinates = tensor.device_mesh.get_coordinate()
    if coordinates is None:
        return False
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            turn, chosen = divmod(turn, tensor.device_mesh.size(axis))
            if coordinates[axis] != chosen:
                return False
    return True


def bytes_of(values: torch.Tensor) -> memoryview[Any]:
    """The row-major bytes of a tensor; of its own memory where it is on the CPU and contiguous."""
    if not values.numel():
        return memoryview(b"")
    flat = values.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class Snapshot:
    """Copies of shards in memory that is kept and used again: fresh pages cost 20 times a copy's time.

    `prepare` touches that memory in a thread of its own, well before the first save needs it.
    """

    ALIGNMENT = 64

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, shards: list[Shard]) -> None:
        """Makes room for these shards and touches it (0.7 GB/s where the kernel must find new pages)."""
        size = sum(_aligned(shard.num_bytes) for shard in shards)
        if self._memory.numel() < size:
            self._memory = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is allocated
            pinned = any(shard.values.is_cuda for shard in shards)
            self._memory = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)

    def take(self, shards: list[Shard]) -> list[Shard]:
        """Copies all values; what it returns is valid until the next `take`."""
        self.reserve(shards)
        copies, begin = [], 0
        for shard in shards:
            room = self._memory[begin : begin + shard.num_bytes]
            copy = room.view(shard.values.dtype).view(shard.values.shape)
            copy.copy_(shard.values, non_blocking=shard.values.is_cuda)
            copies.append(shard.with_values(copy))
            begin += _aligned(shard.num_bytes)
        if any(shard.values.is_cuda for shard in shards):
            torch.cuda.synchronize()
        return copies


def _aligned(size: int) -> int:
    return math.ceil(size / Snapshot.ALIGNMENT) * Snapshot.ALIGNMENT
