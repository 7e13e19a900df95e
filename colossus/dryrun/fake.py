"""One rank of a world that is not there: PyTorch's process group that talks to nobody, and seams of PyTorch
that read what others would have said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules

from colossus.dryrun.routing import Routing, rows_of
from colossus.job import Job
from colossus.parallel import expert
from colossus.parallel.mesh import Meshes
from colossus.parallel.world import World


@contextmanager
def fake_world(job: Job, rank: int, routing: Routing | None = None) -> Iterator[World]:
    """This process as rank `rank` of the job's world. routing: of tokens to experts; None: all get alike."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    layout, device = job.layout, torch.device("cpu")
    assert 0 <= rank < layout.num_ranks, f"there is no such rank as {rank}"
    if layout.num_ranks == 1:
        yield World(0, 1, device, layout=layout)
        return
    assert not dist.is_initialized(), "this process is a rank already"
    dist.init_process_group("fake", rank=rank, world_size=layout.num_ranks, store=FakeStore())
    try:
        meshes = Meshes.build(layout, "cpu", experts=job.model.experts is not None, rank=rank)
        own = layout.of_replica(meshes.place.dp_replicate)
        with ExitStack() as stack:
            loads = [1.0] * layout.ep if routing is None else routing.loads(layout.ep)
            counts = partial(_row_counts, loads, meshes.place.ep(layout))
            stack.enter_context(patch.object(expert, "row_counts", counts))
            if hasattr(schedules._PipelineSchedule, "_warmup_p2p"):  # from PyTorch 2.13 on
                stack.enter_context(
                    patch.object(schedules._PipelineSchedule, "_warmup_p2p", _shapes_are_known)
                )
            yield World(rank, layout.num_ranks, device, meshes, own)
    finally:
        dist.destroy_process_group()


def _shapes_are_known(schedule: Any, stages: list[Any], has_backward: bool, p2p_done: bool) -> None:
    """In place of a vote, whose result comes from another rank: our stages say the shapes themselves."""
    from torch.distributed.pipelining._utils import InferenceMode

    for stage in stages:
        stage._inference_mode = InferenceMode.STATIC


def _row_counts(
    loads: list[float], rank: int, sums_2R: torch.Tensor, num_rows: int
) -> tuple[list[int], list[int]]:
    """In place of a router's choice, which no tensor here holds: each rank deals its rows out by the loads of
    all, and this one gets from every other what it keeps of its own."""
    sent = rows_of(loads, num_rows)
    return sent, [sent[rank]] * len(sent)
