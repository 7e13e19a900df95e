"""A node's host memory, checkpoints, and what a failure costs: bytes by what was traced, seconds as the
planner assumes them of the fleet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colossus.dryrun.ranks import DryRun, Judged
from colossus.planner.goodput import goodput

GIB = 2**30
SAVED = ("weights", "optimizer")  # uses of memory that are state
# Of a process: RSS after `import colossus.trainer.loop` with a CPU's build of PyTorch, as measured.
PROCESS = 0.31 * GIB
# The same with CUDA's libraries loaded, its context and NCCL's pinned buffers: assumed; not measured by us.
CUDA_PROCESS = 3.0 * GIB
READ_AHEAD = 64 * 2**20  # of each rank's loader: `data.loader.AHEAD_BYTES`


@dataclass(frozen=True)
class Host:
    """Of the node that needs most. ranks: on it. memory: bytes of its host by use, estimates all.

    checkpoint: bytes of a whole one; of_rank: what the rank with most of it writes, and reads at a start.
    save_seconds: that training stops for one; restart_seconds: from a failure until steps go on; interval:
    seconds between two checkpoints where failures are many, as a plan has them; None: nothing ever fails.
    """

    ranks: int
    memory: Mapping[str, float]
    checkpoint: int
    of_rank: int
    save_seconds: float
    restart_seconds: float
    interval: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "ranks": self.ranks,
            "host_memory_by_use": dict(self.memory),
            "checkpoint_bytes": self.checkpoint,
            "checkpoint_bytes_of_rank": self.of_rank,
            "save_seconds": self.save_seconds,
            "restart_seconds": self.restart_seconds,
            "checkpoint_interval_seconds": self.interval,
        }


def host_of(found: DryRun) -> Host:
    """Where every stage was run; else of those that were."""
    hardware, layout = found.hardware, found.job.layout
    ranks = min(hardware.node_size, layout.num_ranks)
    states = {judged.kind.rank: _state(judged) for judged in found.ranks}
    largest = max(states.values())
    first = found.ranks[0].kind.replica
    replicas = layout.pools[0].replicas if layout.pools else layout.dp_replicate
    whole = sum(
        states[judged.kind.rank] * judged.kind.count // replicas
        for judged in found.ranks
        if judged.kind.replica == first
    )
    on_gpus = hardware.accelerator.device == "cuda"
    many = goodput(hardware, layout.num_ranks, hardware.failures[1])
    return Host(
        ranks=ranks,
        memory={
            "copies of a checkpoint while it is written": float(ranks * largest),
            "processes": ranks * (CUDA_PROCESS if on_gpus else PROCESS),
            "batches that are read ahead": float(ranks * READ_AHEAD),
        },
        checkpoint=whole,
        of_rank=largest,
        save_seconds=hardware.save_seconds,
        restart_seconds=hardware.restart_seconds,
        interval=many.interval if many.failures_per_day else None,
    )


def _state(judged: Judged) -> int:
    return sum(judged.traced.at_rest.get(use, 0) for use in SAVED)
