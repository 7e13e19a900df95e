"""This rank's part of logical tensors: plain tensors and DTensors as boxes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from colossus.checkpoints.format import Entry, Key
from colossus.checkpoints.spread import Axis, Spread
from colossus.models.box import box, cuts_of
from colossus.models.hf.header import DTYPES


@dataclass(frozen=True, slots=True)
class Shard:
    """The box of a logical tensor that this rank holds, and its values. entry: `Entry`'s rule is known where
    it is to be written (`shards_to_write`)."""

    entry: Entry
    offset: tuple[int, ...]
    values: torch.Tensor

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
    values = tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()
    offset, sizes = box(tensor)
    assert sizes == tuple(values.shape), f"{key}: the local part is {tuple(values.shape)}, not {sizes}"
    return Shard(Entry(*key, DTYPES[values.dtype], tuple(tensor.shape)), offset, values)


class Grids:
    """Where the ranks of meshes stand: the first one's number, and each axis' stride. Ours are all cut from
    one count of the ranks, so that two numbers an axis tell all of a mesh. Each is looked at once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[DeviceMesh, int, list[int]]] = {}

    def spread(self, key: Key, tensor: torch.Tensor) -> Spread:
        """How it lies over its ranks: a DTensor over those of its mesh, a plain tensor, equal, over all."""
        dtype, shape = DTYPES[tensor.dtype], tuple(tensor.shape)
        if not isinstance(tensor, DTensor):
            return Spread(key, dtype, shape)
        mesh = tensor.device_mesh
        first, strides = self._of(mesh)
        axes = map(Axis, mesh.shape, strides, cuts_of(tensor))
        return Spread(key, dtype, shape, first, tuple(axes))

    def _of(self, mesh: DeviceMesh) -> tuple[int, list[int]]:
        if id(mesh) not in self._known:
            ranks = mesh.mesh
            zeros = (0,) * ranks.ndim
            first = int(ranks[zeros])
            strides = [
                int(ranks[(*zeros[:axis], 1, *zeros[axis + 1 :])]) - first if size > 1 else 0
                for axis, size in enumerate(ranks.shape)
            ]
            regular = torch.full_like(ranks, first)
            for axis, (size, stride) in enumerate(zip(ranks.shape, strides, strict=True)):
                steps = torch.arange(size, dtype=ranks.dtype) * stride
                regular += steps.view([-1 if a == axis else 1 for a in range(ranks.ndim)])
            assert torch.equal(ranks, regular), f"the ranks of {mesh} are not evenly spaced"
            self._known[id(mesh)] = (mesh, first, strides)  # the mesh, so that its id is not given away
        return self._known[id(mesh)][1:]


def shards_to_write(
    tensors: Mapping[Key, torch.Tensor], rank: int, num_writers: int
) -> tuple[list[Shard], list[Key]]:
    """What of these tensors is this rank's to write, with the rules; and what another one must have written:
    of each mesh the first rank tells that, and of plain tensors every one."""
    grids, shards, held = Grids(), list[Shard](), list[Key]()
    for key, tensor in tensors.items() if rank < num_writers else ():
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        coordinate = mesh.get_coordinate() if mesh is not None else ()
        if coordinate is None:
            continue
        spread = grids.spread(key, tensor)
        entry = spread.entry(num_writers)
        if entry.writer(spread.places(coordinate)) == rank:
            shards.append(dataclasses.replace(shard_of(key, tensor), entry=entry))
        elif mesh is None or spread.teller(num_writers) == rank:
            held.append(key)
    return shards, held


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
