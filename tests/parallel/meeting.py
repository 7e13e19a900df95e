"""What real ranks hear in their groups; imports little, since each of them imports this."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from colossus.layout import Layout
from colossus.parallel import mesh
from colossus.parallel.mesh import Meshes
from colossus.parallel.world import World


def groups_of(meshes: Meshes) -> dict[str, Any]:
    assert meshes.expert is not None
    return {
        **{axis: meshes.dense.get_group(axis) for axis in ("dp_replicate", "fsdp", "tp")},
        **{axis: meshes.expert.get_group(axis) for axis in ("efsdp", "ep", "etp")},
        "replicas of experts": meshes.expert.get_group("dp_replicate"),
        "cp": meshes.cp,
        "pp": meshes.pp,
        "sequence": meshes.sequence,
    }


def meet(axes: dict[str, int]) -> dict[str, Any]:
    """What a real rank hears from its groups."""
    mesh.LONGEST_RING = 3  # of this process
    layout = Layout(**axes).filled()
    with World.join(layout, "cpu", experts=True) as world:
        assert world.meshes is not None
        heard: dict[str, Any] = {"rank": world.rank, "rings": len(world.meshes.sums)}
        for name, group in groups_of(world.meshes).items():
            said: list[Any] = [None] * group.size()
            dist.all_gather_object(said, world.rank, group=group)
            heard[name] = said
        if world.meshes.ends is not None:
            dist.all_reduce(torch.ones(1), group=world.meshes.ends)
        first, second = world.begin_sum([world.rank, 0.5]), world.begin_sum([2.0**53 - 2])
        heard["sums"] = [first.wait(), second.wait(), world.sum([1.0])]
        heard["data"] = world.data.sum([1.0])
    return heard
