"""What a rank of a world that is not there has of a run's state: how each tensor lies over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

from colossus import optim
from colossus.checkpoints.shards import Grids
from colossus.checkpoints.spread import Spread
from colossus.dryrun.fake import fake_world
from colossus.dryrun.rank import as_traced
from colossus.job import Job
from colossus.parallel.apply import transformed
from colossus.precision import torch_type
from colossus.trainer.state import TrainState


@dataclass(frozen=True)
class Held:
    """Of a rank, and so of all that have its stages: what it saves, and what it loads. num_writers: ranks of
    its world that write."""

    saved: tuple[Spread, ...]
    loaded: tuple[Spread, ...]
    num_writers: int


def held(job: Job, rank: int) -> Held:
    """By the program itself, on tensors without memory. In a process in which no other rank was."""
    job = as_traced(job)
    with fake_world(job, rank) as world:
        model = transformed(job, world)
        optimizer = optim.build(model, job.model, job.optimizer, torch_type(job.precision.type))
        mesh = None if world.meshes is None else world.meshes.dense
        state, grids = TrainState(job.model, model, optimizer, mesh=mesh), Grids()
        return Held(
            tuple(grids.spread(key, tensor) for key, tensor in state.tensors().items()),
            tuple(grids.spread(key, tensor) for key, tensor in state.held()),
            world.num_writers,
        )
