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
from torch.distributed.distributed_c10d import _abort_process_group  # no other name has it yet

from colossus.checkpoints.format import LONGEST_LIST
from colossus.errors import UserError
from colossus.hardware.machine import ranks_here
from colossus.layout import Layout
from colossus.parallel.ending import Ending, handlers_given_back
from colossus.parallel.meeting import after_first, all_come, meet
from colossus.parallel.mesh import Meshes, Place
from colossus.words import plural

TIMEOUT = timedelta(minutes=10)
LETTING_GO_SECONDS = 0.1


def check_size(layout: Layout) -> None:
    """Raises `UserError` where another number of processes was started than `layout` has ranks."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != layout.num_ranks:
        others = layout.num_ranks // (layout.dp_shard or 1)
        or_else = f", or set layout.dp_shard={started // others}" if started % others == 0 else ""
        raise UserError(
            f"layout: needs {plural(layout.num_ranks, 'rank')} (dp_replicate x dp_shard x pp x cp x tp), but "
            f"{started} were started; start {layout.num_ranks}{or_else}"
        )


@dataclass(frozen=True)
class World:
    """This process among the ranks of its job. A world of one has no process group and no mesh.

    layout: as this rank's replica has it. store: where the ranks met.
    """

    rank: int
    size: int
    device: torch.device
    meshes: Meshes | None = None
    layout: Layout = field(default_factory=lambda: Layout().filled())
    store: Any = None

    @classmethod
    @contextlib.contextmanager
    def join(cls, layout: Layout, device: str, *, experts: bool = False) -> Iterator[World]:
        """Meets the other ranks, whose number and addresses the launcher put into the environment.

        experts: whether the model has any, whose parameters have a mesh of their own.

        Raises:
            UserError: so many processes were not started as the layout has ranks.
            MachineError: not all of them came, or others have gone. Of what the ranks raise within, one tells
                (see `Ending`).
        """
        check_size(layout)
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        place = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(place)
            _repeat_to_the_bit()
        if layout.num_ranks == 1:
            yield cls(0, 1, place)
            return
        # Ranks connect when they first talk: else each of 200,000 would connect with every other at once.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        store, rank, size = meet("world")
        ending = Ending(store, rank, size)
        with handlers_given_back(), ending.settled():
            try:
                dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)
                layout = layout.filled()
                meshes = Meshes.build(layout, device, experts=experts, rank=rank)
                layout = layout.of_replica(meshes.place.dp_replicate)
                yield cls(rank, size, place, meshes, layout, store)
            except BaseException as error:
                if isinstance(error, Exception):
                    ending.claim(error)
                leave(device, failed=True)
                raise
            else:
                leave(device, failed=False)
            finally:
                # A thread of gloo lets go of its last tensors a moment after the collective has ended, and
                # needs Python's lock for it. Where Python is being taken down by then, that aborts the
                # process.
                time.sleep(LETTING_GO_SECONDS)

    @property
    def place(self) -> Place:
        return self.meshes.place if self.meshes is not None else Place(0, 0, 0, 0, 0)

    @property
    def num_writers(self) -> int:
        """Ranks that write what a run saves: those of the first replica, which come first and hold all of it
        between them; of the next ones, too, as long as these are few."""
        replicas = self.layout.dp_replicate or 1
        each = self.size // replicas
        return each * max(1, min(replicas, LONGEST_LIST // each))

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

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The value of a rank, by default of the first, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
        return box[0]

    def first_error(self, error: Exception | None) -> Exception | None:
        """The error of the first rank that has one, on every rank. Every rank calls this."""
        if not self.any(error is not None):
            return None
        failed = [0.0] * self.size
        failed[self.rank] = float(error is not None)
        first: Exception = self.broadcast(error, source=self.sum(failed).index(1.0))
        return first

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks in float64."""
        return self.begin_sum(values).wait()

    def begin_sum(self, values: Sequence[float] | torch.Tensor) -> Sum:
        """As `sum`, to be waited for where it is needed, by whom it concerns. All ranks begin their sums in
        one order. A tensor is summed where it is; on a GPU no rank waits for that."""
        total = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return Sum(total)
        assert self.meshes is not None
        longest, *others = self.meshes.sums
        work = dist.all_reduce(total, group=longest, async_op=True)
        for group in others:
            work.wait()  # one sum is of the other: gloo's ranks stand still for it, NCCL's streams follow
            work = dist.all_reduce(total, group=group, async_op=True)
        return Sum(total, work)

    def sum_here(self, value: float) -> float:
        """A value summed over the ranks that share this machine. Every rank calls this."""
        here = ranks_here(self.size)
        values = [0.0] * int(os.environ.get("GROUP_WORLD_SIZE", -(-self.size // here)))
        machine = int(os.environ.get("GROUP_RANK", self.rank // here))
        values[machine] = value
        return self.sum(values)[machine]

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return self.sum([float(flag)])[0] > 0

    def all_come(self, purpose: str, seconds: float) -> bool:
        """Whether all ranks call this with the same `purpose`, waiting no longer than so; every one is told
        the same. No collective: others may be in another one, or gone. Once for a purpose."""
        return self.size == 1 or all_come(self.store, purpose, self.size, seconds)

    def after_first(self) -> None:
        """Waits until rank 0 has come, however long that takes; a collective has a limit. Every rank calls
        this."""
        if self.size > 1:
            after_first(self.store, self.rank)


def leave(device: str, *, failed: bool) -> None:
    """Ends this rank's process groups, if there are any. Ranks that leave NCCL together wait for each other's
    work; where this one has failed the others may never come, and all groups are aborted at once."""
    if not dist.is_initialized():
        return
    if not failed or device != "cuda":
        dist.destroy_process_group()
        return
    with contextlib.suppress(RuntimeError):  # why it failed is told, not what more fails because of it
        _abort_process_group()


def _repeat_to_the_bit() -> None:
    """Has a GPU's kernels add up in one order: a run that goes on is the run that never stopped."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would cost a pass, and nothing reads such memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class Sum:
    """A sum over the ranks that has begun."""

    def __init__(self, total: torch.Tensor, work: dist.Work | None = None) -> None:
        self._total, self._work = total, work

    @property
    def total(self) -> torch.Tensor:
        """What is summed, where it is: what comes after it in this rank's stream finds it there."""
        work, self._work = self._work, None
        if work is not None:
            work.wait()
        return self._total

    def wait(self) -> list[float]:
        """What is summed, in numbers."""
        return self.total.tolist()


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
