"""Which ranks belong together: one group an axis, and no group of others.

Ranks count through (dp_replicate, pp, dp_shard, cp, tp), tp fastest: a replica is one block of ranks, which a
pool of equal machines holds, and the ranks of tp are neighbours in a node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from colossus.layout import Layout

Group = dist.ProcessGroup
LONGEST_RING = 64  # ranks of several axes that sum figures together: gloo passes a sum from one to the next


@dataclass(frozen=True)
class Place:
    """Where a rank stands on each axis, by counting alone."""

    dp_replicate: int
    pp: int
    dp_shard: int
    cp: int
    tp: int

    @classmethod
    def of(cls, layout: Layout, rank: int) -> Place:
        rank, tp = divmod(rank, layout.tp)
        rank, cp = divmod(rank, layout.cp)
        rank, dp_shard = divmod(rank, layout.dp_shard)
        dp_replicate, pp = divmod(rank, layout.pp)
        return cls(dp_replicate, pp, dp_shard, cp, tp)

    def dp(self, layout: Layout) -> int:
        """Of the ranks that see different samples, which this is."""
        return self.dp_replicate * layout.dp_shard + self.dp_shard

    def ep(self, layout: Layout) -> int:
        """Of the ranks that share a set of experts, which this is."""
        rank = (self.dp_shard * layout.cp + self.cp) * layout.tp + self.tp
        return rank // layout.etp % layout.ep


@dataclass(frozen=True)
class Meshes:
    """The meshes and groups of one rank's stage of the pipeline.

    dense: (dp_replicate, fsdp, tp), where fsdp = dp_shard x cp; of all parameters but experts'.
    expert: (dp_replicate, efsdp, ep, etp), of experts' parameters; None where the model has none.
    sequence: the ranks among which one sequence's tokens are spread: cp x tp.
    sums: to sum over each of them is to sum over the world; the longest first. For figures alone, so that
        these wait for no gradient.
    ends: the first and the last stage, which share tied embeddings; None on other ranks.
    """

    place: Place
    dense: DeviceMesh
    expert: DeviceMesh | None
    pp: Group
    cp: Group
    tp: Group
    sequence: Group
    sums: tuple[Group, ...]
    ends: Group | None

    @classmethod
    def build(cls, layout: Layout, device: str, *, experts: bool, rank: int) -> Meshes:
        """Meets the ranks of this one's own groups; every rank of the job calls it."""
        place = Place.of(layout, rank)
        world = torch.arange(layout.num_ranks, dtype=torch.int32).view(
            layout.dp_replicate, layout.pp, layout.dp_shard, layout.cp, layout.tp
        )
        stage = world[:, place.pp]
        groups = _Groups(rank)
        dense = groups.mesh(device, stage.flatten(1, 2), ("dp_replicate", "fsdp", "tp"))
        expert = None
        if experts:
            cut = stage.reshape(layout.dp_replicate, -1, layout.ep, layout.etp)
            expert = groups.mesh(device, cut, ("dp_replicate", "efsdp", "ep", "etp"))
        replica = world[place.dp_replicate]
        pipe = replica[:, place.dp_shard, place.cp, place.tp].tolist()
        is_end = layout.pp > 1 and place.pp in (0, layout.pp - 1)
        return cls(
            place,
            dense,
            expert,
            pp=groups.of(pipe, "pp"),
            cp=groups.of(replica[place.pp, place.dp_shard, :, place.tp].tolist(), "cp"),
            tp=dense.get_group("tp"),
            sequence=groups.of(replica[place.pp, place.dp_shard].flatten().tolist(), "sequence"),
            sums=groups.for_sums(world),
            # At last: groups are named by how many a rank has, and only some ranks have this one.
            ends=groups.of([pipe[0], pipe[-1]], "ends") if is_end else None,
        )


class _Groups:
    """Groups by their ranks, each made once; those of the whole world are the default one. What a group is
    called (its axis; where two have the same ranks, the first) is what flight recorders and ledgers show."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._made: dict[tuple[int, ...], Group] = {}

    def of(self, ranks: list[int], name: str) -> Group:
        key = tuple(ranks)
        if key not in self._made:
            if len(key) == dist.get_world_size():
                assert dist.group.WORLD is not None
                dist.group.WORLD._set_group_desc(name)
                self._made[key] = dist.group.WORLD
            else:
                self._made[key] = _meet(ranks, name)
        return self._made[key]

    def mesh(self, device: str, ranks: torch.Tensor, names: tuple[str, ...]) -> DeviceMesh:
        groups = [self.of(axis, name) for axis, name in zip(self._axes(ranks), names, strict=True)]
        return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=names)

    def for_sums(self, world: torch.Tensor) -> tuple[Group, ...]:
        """Groups of their own, which nothing else uses: of neighbouring axes while they have few ranks."""
        sizes: list[int] = []
        for size in reversed(world.shape):
            if sizes and sizes[0] * size <= LONGEST_RING:
                sizes[0] *= size
            else:
                sizes.insert(0, size)
        axes = sorted(self._axes(world.reshape(sizes)), key=len, reverse=True)
        return tuple(_meet(axis, "figures") for axis in axes if len(axis) > 1)

    def _axes(self, ranks: torch.Tensor) -> list[list[int]]:
        """The ranks that differ from this one in one axis alone, for each axis."""
        where = [int(i) for i in (ranks == self._rank).nonzero()[0]]
        indices = (
            [slice(None) if a == axis else i for a, i in enumerate(where)] for axis in range(ranks.ndim)
        )
        return [ranks[tuple(index)].tolist() for index in indices]


def _meet(ranks: list[int], name: str) -> Group:
    """Waits for the ranks of this group alone. All make their groups in the same order of axes."""
    return dist.new_group(ranks, use_local_synchronization=True, group_desc=name)


@contextlib.contextmanager
def shared_slices() -> Iterator[None]:
    """Within, each slice of a mesh, and each join of slices, is one object.

    FSDP2 asks for a slice and a join for every parameter, and each of PyTorch's meshes lists the ranks of
    the mesh that it was cut from: at 200,000 ranks and 723 parameters that took 12 GB and 44 s, and meshes
    that are not the same object are compared rank by rank. There is no public way to give it meshes.
    """
    slice_, join = DeviceMesh.__getitem__, DeviceMesh._concatenate
    slices: dict[tuple[int, tuple[str, ...]], tuple[DeviceMesh, DeviceMesh]] = {}
    joins: dict[tuple[int, ...], tuple[Sequence[DeviceMesh], DeviceMesh]] = {}

    # What a key's ids belong to is kept beside what was made of it, so that no id is given away again.
    def one_slice(mesh: DeviceMesh, names: str | tuple[str, ...]) -> DeviceMesh:
        key = (id(mesh), (names,) if isinstance(names, str) else tuple(names))
        if key not in slices:
            slices[key] = (mesh, slice_(mesh, key[1]))
        return slices[key][1]

    def one_join(meshes: list[DeviceMesh]) -> DeviceMesh:
        key = tuple(map(id, meshes))
        if key not in joins:
            joins[key] = (meshes, join(meshes))
        return joins[key][1]

    setattr(DeviceMesh, "__getitem__", one_slice)  # noqa: B010
    setattr(DeviceMesh, "_concatenate", staticmethod(one_join))  # noqa: B010
    try:
        yield
    finally:
        setattr(DeviceMesh, "__getitem__", slice_)  # noqa: B010
        setattr(DeviceMesh, "_concatenate", staticmethod(join))  # noqa: B010
