"""Any layout loads what any other saved. The ranks take turns in one process; real ones are in `ranks`.

Saving and loading use no collectives, so a process group that only knows its rank and size is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from colossus.checkpoints.format import Key
from colossus.checkpoints.load import newest_whole, open_checkpoint, verify
from colossus.checkpoints.save import Saver
from colossus.checkpoints.shards import shard_of
from colossus.errors import MachineError
from colossus.layout import Layout as Spread
from colossus.parallel.world import World
from tests.checkpoints.samples import equal

Layout = tuple[tuple[int, ...], tuple[Placement, ...]]  # the mesh, and the placements on it
LAYOUTS: dict[str, Layout] = {
    "one rank": ((1,), (Replicate(),)),
    "replicas": ((3,), (Replicate(),)),
    "rows on 2": ((2,), (Shard(0),)),
    "rows on 5, uneven": ((5,), (Shard(0),)),
    "columns on 3": ((3,), (Shard(1),)),
    "replicas of rows": ((2, 2), (Replicate(), Shard(0))),
    "rows by columns": ((2, 3), (Shard(0), Shard(1))),
    "rows of rows (FSDP of TP)": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
}
STATE: dict[Key, torch.Tensor] = {
    ("w", "weight"): torch.arange(70, dtype=torch.float32).view(10, 7),
    ("w", "exp_avg"): -torch.arange(70, dtype=torch.float32).view(10, 7),
    ("small", "weight"): torch.arange(6, dtype=torch.bfloat16).view(3, 2),  # some ranks hold nothing of it
    ("plain", "buffer"): torch.tensor(3.0),
    ("also plain", "buffer"): torch.arange(4),
}


class Turns:
    """Ranks that take turns in one process; rank 0 is asked first."""

    def __init__(self, size: int, told: list[Any], rank: int, num_writers: int | None = None) -> None:
        self.size, self.rank, self._told = size, rank, told
        self.num_writers = num_writers or size

    def broadcast(self, value: Any) -> Any:
        if self.rank == 0:
            self._told.append(value)
        return self._told[-1]

    def any(self, flag: bool) -> bool:
        raise NotImplementedError

    def first_error(self, error: Exception | None) -> Exception | None:
        raise NotImplementedError


@contextmanager
def mesh_of(rank: int, sizes: tuple[int, ...]) -> Iterator[DeviceMesh]:
    size = int(torch.tensor(sizes).prod())
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield init_device_mesh("cpu", sizes)
    finally:
        dist.destroy_process_group()


def distributed(tensor: torch.Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    """A DTensor of zeros as FSDP and tensor parallel make them: the local part, no communication."""
    empty = torch.zeros(tensor.shape, dtype=tensor.dtype, device="meta")
    local = empty
    coordinates = mesh.get_coordinate()
    assert coordinates is not None
    for axis in reversed(range(mesh.ndim)) if isinstance(placements[0], _StridedShard) else range(mesh.ndim):
        placement = placements[axis]
        if not placement.is_replicate():
            assert isinstance(placement, (Shard, _StridedShard))
            chunks = list(torch.chunk(local, mesh.size(axis), dim=placement.dim))
            rank = coordinates[axis]
            local = chunks[rank] if rank < len(chunks) else local.narrow(placement.dim, 0, 0)
    local = torch.zeros(local.shape, dtype=tensor.dtype)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def laid_out(mesh: DeviceMesh, placements: tuple[Placement, ...], fill: bool) -> dict[Key, torch.Tensor]:
    """The state in a layout: zeros, or this rank's part of its values."""
    tensors: dict[Key, torch.Tensor] = {}
    for key, tensor in STATE.items():
        if key[1] == "buffer":
            tensors[key] = tensor.clone() if fill else torch.zeros_like(tensor)
            continue
        tensors[key] = distributed(tensor, mesh, placements)
        if fill:
            shard = shard_of(key, tensors[key])
            shard.values.copy_(expected(key, shard.offset, tuple(shard.values.shape)))
    return tensors


def expected(key: Key, offset: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    return STATE[key][tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))]


def save(run: Path, layout: Layout, skip: int | None = None, num_writers: int | None = None) -> None:
    sizes, placements = layout
    world_size = int(torch.tensor(sizes).prod())
    told: list[Any] = []
    turns = [Turns(world_size, told, rank, num_writers) for rank in range(world_size)]
    savers = [Saver(run, turn, patience_seconds=0.2) for turn in turns]
    for rank in reversed(range(world_size)):  # rank 0 last: it waits for the others' parts
        if rank != skip:
            with mesh_of(rank, sizes) as mesh:
                savers[rank].save(1, laid_out(mesh, placements, fill=True), {"from": str(rank)})
                savers[rank].wait()


def check_load(run: Path, layout: Layout) -> None:
    sizes, placements = layout
    told: list[Any] = []
    world_size = int(torch.tensor(sizes).prod())
    for rank in range(world_size):
        with mesh_of(rank, sizes) as mesh:
            checkpoint = newest_whole(run, Turns(world_size, told, rank))
            assert checkpoint is not None
            assert checkpoint.meta == {"from": "0"}
            tensors = laid_out(mesh, placements, fill=False)
            checkpoint.load_into(tensors)
            for key, tensor in tensors.items():
                shard = shard_of(key, tensor)
                assert equal(shard.values, expected(key, shard.offset, tuple(shard.values.shape)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_value_is_written_once(name: str, tmp_path: Path) -> None:
    save(tmp_path, LAYOUTS[name])
    written = 0
    for file in (tmp_path / "checkpoints" / "step-00000001").glob("*.safetensors"):
        with safe_open(file, "pt") as pieces:
            written += sum(pieces.get_tensor(key).nbytes for key in pieces.keys())  # noqa: SIM118
    assert written == sum(tensor.nbytes for tensor in STATE.values())


@pytest.mark.parametrize("shape", [(12, 12), (10, 7), (3, 2), (1, 5)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_boxes_are_those_of_torch(name: str, shape: tuple[int, ...]) -> None:
    sizes, placements = LAYOUTS[name]
    for rank in range(int(torch.tensor(sizes).prod())):
        with mesh_of(rank, sizes) as mesh:
            shard = shard_of(("w", "weight"), distributed(torch.zeros(shape), mesh, placements))
            local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
            assert tuple(shard.values.shape) == tuple(local)
            assert shard.offset == tuple(offset) or not shard.values.numel()


def test_what_is_no_box_is_refused() -> None:
    with mesh_of(0, (2, 2)) as mesh, pytest.raises(AssertionError, match="is no box"):
        every_second = (Shard(0), _StridedShard(0, split_factor=2))
        shard_of(
            ("w", "weight"),
            DTensor.from_local(
                torch.zeros(2), mesh, every_second, run_check=False, shape=torch.Size((8,)), stride=(1,)
            ),
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_loads_what_any_other_saved(tmp_path: Path, name: str) -> None:
    save(tmp_path, LAYOUTS[name])
    for layout in LAYOUTS.values():
        check_load(tmp_path, layout)


def test_every_element_is_stored_once_and_by_turns(tmp_path: Path) -> None:
    save(tmp_path, ((2, 2), (Replicate(), Shard(0))))
    path = tmp_path / "checkpoints" / "step-00000001"
    assert verify(path).num_bytes < sum(t.nbytes for t in STATE.values()) + 4 * 2000  # and four headers
    checkpoint = open_checkpoint(path)
    writers = {piece.file for key in STATE for piece in checkpoint.pieces(*key)}
    assert len(writers) >= 3


@pytest.mark.parametrize(
    ("axes", "num_writers"),
    [
        ({"tp": 8, "pp": 16, "dp_shard": 128, "dp_replicate": 12}, 16_384),
        ({"dp_shard": 40, "dp_replicate": 3}, 40),
        ({"dp_shard": 24, "dp_replicate": 3}, 48),
        ({"dp_replicate": 4}, 4),
        ({"tp": 2, "dp_shard": 3}, 6),
    ],
)
def test_one_replica_writes_and_of_small_ones_as_many_as_are_few(
    axes: dict[str, int], num_writers: int
) -> None:
    layout = Spread.model_validate(axes).filled()
    assert World(0, layout.num_ranks, torch.device("cpu"), layout=layout).num_writers == num_writers


@pytest.mark.parametrize("num_writers", [2, 4, 6])
def test_of_many_replicas_the_first_ones_write(num_writers: int, tmp_path: Path) -> None:
    """Three of two ranks each, of which one, two or all share it."""
    layout: Layout = ((3, 2), (Replicate(), Shard(0)))
    save(tmp_path, layout, num_writers=num_writers)
    path = tmp_path / "checkpoints" / "step-00000001"
    assert sorted(p.name for p in path.glob("*.safetensors")) == [
        f"pieces-{rank:05d}.safetensors" for rank in range(num_writers)
    ]
    check_load(tmp_path, layout)


def test_a_rank_that_writes_nothing_prevents_the_commit(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"rank 1 wrote no part in 0 s; nothing of this run is saved"):
        save(tmp_path, LAYOUTS["rows on 2"], skip=1)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_rank_that_fails_is_named(tmp_path: Path) -> None:
    told: list[Any] = []
    first, second = (Saver(tmp_path, Turns(2, told, rank), patience_seconds=5) for rank in range(2))
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir()
    (folder / "pieces-00001.safetensors").mkdir()  # in the way
    second.save(1, STATE, {})
    with pytest.raises(MachineError, match="File exists"):
        second.wait()
    first.save(1, STATE, {})
    with pytest.raises(MachineError, match="rank 1: File exists; nothing of this run is saved yet"):
        first.wait()
    for saver in (second, first):  # and the next save is agreed upon without a word
        saver.save(1, STATE, {})
        saver.wait()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {folder.name, "step-00000001.2"}
    assert [path.name for path in folder.iterdir()] == ["pieces-00001.safetensors"]  # nobody's to delete


def test_an_error_of_rank_0_reaches_all(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    told: list[Any] = []
    for rank in range(2):
        with pytest.raises(MachineError, match="cannot save"):
            Saver(tmp_path, Turns(2, told, rank))
