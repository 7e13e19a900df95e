"""The ranks of a job, and what they say to each other."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from colossus.errors import UserError
from colossus.layout import Layout
from colossus.parallel.meeting import meet
from colossus.parallel.mesh import Meshes, Place

TIMEOUT = timedelta(minutes=10)
LETTING_GO_SECONDS = 0.1


def check_started(layout: Layout) -> None:
    """Raises `UserError` where another number of processes was started than `layout` has ranks."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != layout.num_ranks:
        raise UserError(
            f"layout: needs {layout.num_ranks} ranks (dp_replicate x dp_shard x pp x cp x tp), but {started} "
            f"were started; start {layout.num_ranks}, or set layout.dp_shard={started}"
        )


@dataclass(frozen=True)
class World:
    """This process among the ranks of its job. A world of one has no process group and no mesh.

    layout: as this rank's replica has it.
    """

    rank: int
    size: int
    device: torch.device
    meshes: Meshes | None = None
    layout: Layout = field(default_factory=lambda: Layout().filled())

    @classmethod
    @contextlib.contextmanager
    def join(cls, layout: Layout, device: str, *, experts: bool = False) -> Iterator[World]:
        """Meets the other ranks, whose number and addresses the launcher put into the environment.

        experts: whether the model has any, whose parameters have a mesh of their own.

        Raises:
            UserError: so many processes were not started as the layout has ranks.
            MachineError: not all of them came.
        """
        check_started(layout)
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        place = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(place)
        if layout.num_ranks == 1:
            yield cls(0, 1, place)
            return
        # Ranks connect when they first talk: else each of 200,000 would connect with every other at once.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        store, rank, size = meet("world")
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)
        try:
            layout = layout.filled()
            meshes = Meshes.build(layout, device, experts=experts, rank=dist.get_rank())
            layout = layout.of_replica(meshes.place.dp_replicate)
            yield cls(dist.get_rank(), dist.get_world_size(), place, meshes, layout)
        finally:
            dist.destroy_process_group()
            # A thread of gloo lets go of its last tensors a moment after the collective has ended, and needs
            # Python's lock for it. Where Python is being taken down by then, that aborts the process.
            time.sleep(LETTING_GO_SECONDS)

    @property
    def place(self) -> Place:
        return self.meshes.place if self.meshes is not None else Place(0, 0, 0, 0, 0)

    @property
    def data(self) -> DataRank:
        """This one among the ranks that share rows of a batch, as who reads or evaluates them sees it. Ranks
        of cp and pp add up to what comes of the rows; those of tp have the same."""
        return self._data_rank(counts=self.place.tp == 0)

    @property
    def rows(self) -> DataRank:
        """The same where each rank has all that comes of its rows, not a part of it."""
        return self._data_rank(counts=self.place.pp == self.place.cp == self.place.tp == 0)

    def _data_rank(self, counts: bool) -> DataRank:
        if self.meshes is None:
            return DataRank(self, 0, 1, counts)
        return DataRank(self, self.place.dp(self.layout), self.layout.dp, counts)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks in float64."""
        return self.begin_sum(values).wait()

    def begin_sum(self, values: Sequence[float]) -> Sum:
        """As `sum`, to be waited for when it is needed. All ranks begin their sums in one order, and wait for
        them in one order."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return Sum(total)
        assert self.meshes is not None
        longest, *others = self.meshes.sums
        return Sum(total, dist.all_reduce(total, group=longest, async_op=True), others)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return self.sum([float(flag)])[0] > 0


class Sum:
    """A sum over the ranks that has begun.

    Gloo passes a sum around a ring of ranks: one of 131,072 takes 262,142 messages in turn, and rings of 128,
    16, 8 and 8 ranks one after another 312. The longest is summed meanwhile.
    """

    def __init__(
        self, total: torch.Tensor, work: dist.Work | None = None, others: Sequence[dist.ProcessGroup] = ()
    ) -> None:
        self._total, self._work, self._others = total, work, others

    def wait(self) -> list[float]:
        """What is summed; called once."""
        if self._work is not None:
            self._work.wait()
        for group in self._others:
            dist.all_reduce(self._total, group=group)
        return self._total.tolist()


@dataclass(frozen=True)
class DataRank:
    """A rank among those that see different rows. Ranks of one pipeline, of cp and of tp see the same.

    counts: whether what this rank has is no copy of what another has.
    """

    world: World
    rank: int
    size: int
    counts: bool

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks that count."""
        return self.world.sum([value if self.counts else 0.0 for value in values])
