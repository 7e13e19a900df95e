"""Which part of a batch each replica takes, where they are not alike: a decision of the run."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence

import torch

from colossus.evaluation.eager import eagerly
from colossus.events import EventLog
from colossus.job import Job
from colossus.parallel.data import reshard
from colossus.parallel.world import World
from colossus.trainer.decisions import Decisions
from colossus.trainer.state import TrainState

PASSES = 3  # of which the quickest counts


def decide_shares(
    job: Job, state: TrainState, decisions: Decisions, step: int, world: World, log: EventLog | None
) -> list[int]:
    """Sequences of `run.global_batch` that each replica takes; [1] where all are alike. Every rank calls it.

    As the pools say, or in proportion to the measured speed; decided once, and again where a run goes on with
    other replicas.
    """
    pools = job.layout.pools
    if not pools:
        return [1]
    if pools[0].share is not None:
        return [pool.share or 0 for pool in pools for _ in range(pool.replicas)]
    known: list[int] | None = decisions.get("shares", step)
    if known is not None and len(known) == job.layout.dp_replicate:
        return known
    seconds = measure_replicas(job, state, world)

    def choose() -> list[int]:
        units = [
            job.layout.dp_shard * job.layout.of_replica(replica).micro_batch
            for replica in range(job.layout.dp_replicate)
        ]
        return split(job.run.global_batch, [1 / s for s in seconds], units)

    return decisions.decide("shares", step, choose, world, log)  # type: ignore[no-any-return]


def split(total: int, speeds: Sequence[float], units: Sequence[int]) -> list[int]:
    """`total` in parts, at least 1 each, so that the last one to be done is done soonest.

    A part takes part / speed, in whole units (passes of a replica's ranks, of so many sequences); each
    sequence in turn goes to whoever would have done it first.
    """
    assert total >= len(speeds), f"{total} sequences for {len(speeds)} replicas"

    def seconds(index: int, part: int) -> float:
        return -(-part // units[index]) * units[index] / speeds[index]

    parts = [1] * len(speeds)
    queue = [(seconds(index, 2), index) for index in range(len(speeds))]
    heapq.heapify(queue)
    for _ in range(total - len(speeds)):
        _, index = queue[0]
        parts[index] += 1
        heapq.heapreplace(queue, (seconds(index, parts[index] + 1), index))
    return parts


@torch.no_grad()
def measure_replicas(job: Job, state: TrainState, world: World) -> list[float]:
    """Seconds a sequence of each replica: of a forward pass of its ranks on tokens of no text, and what the
    backward pass takes by the rule of thumb (twice that; with recomputation three times)."""
    layout = job.layout.of_replica(world.place.dp_replicate)
    shape = (layout.micro_batch, job.data.seq_len)
    tokens_BT = torch.arange(shape[0] * shape[1], device=world.device).view(shape) % job.model.vocab_size
    best = float("inf")
    with eagerly():
        for _ in range(PASSES):
            started = time.perf_counter()
            state.model(tokens_BT, tokens_BT)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
    reshard(state.model)
    best *= 4 if layout.recompute == "full" else 3
    place = world.place
    first = place.pp == place.dp_shard == place.cp == place.tp == 0
    mine = [0.0] * job.layout.dp_replicate
    mine[place.dp_replicate] = first * best / (layout.micro_batch * job.layout.dp_shard)
    return world.sum(mine)
