"""Unequal pools: replicas of one shape on all of them; each pool has its own micro-batch and recomputation,
and takes sequences by its speed, so that all end together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from colossus.hardware.fleets import Hardware
from colossus.planner.choice import Choice, PoolShare, refined
from colossus.planner.columns import ALL, Layouts
from colossus.planner.estimate import Problem
from colossus.planner.fitting import Search, fits, fitting, price
from colossus.planner.space import MICRO_BATCHES, NONE, Limits, layouts_of, legal

REPLICAS = 8  # at least so many in the smallest of several pools, where there are such shapes
FEWER = 4  # replicas that a pool may leave idle so that whole sequences come out
TRIED = 3  # ways to share the batch whose pipelines are run in time
UNLIMITED = 2**60  # bytes


@dataclass(frozen=True)
class _Way:
    """What the replicas of one pool do: the layout of one such pool, and sequences a second of a replica."""

    problem: Problem
    layout: Layouts
    replicas: int
    rate: float

    @property
    def grain(self) -> int:
        """Sequences that a replica computes at once."""
        return int(self.layout["dp_shard"][0] * self.layout["micro_batch"][0])

    def with_share(self, replicas: int, share: int) -> _Way:
        """So many replicas, each with so many sequences."""
        layout = self.layout.with_columns(dp_replicate=np.array([replicas]))
        problem = replace(self.problem, global_batch=replicas * share)
        return replace(self, problem=problem, layout=layout, replicas=replicas)

    def stands(self, limits: Limits, compiled: bool) -> bool:
        """Whether it is legal and fits."""
        there = self.layout.ranks[0] <= self.problem.pricer.hardware.count
        if not there or not len(legal(self.problem, self.layout, compiled)):
            return False
        # A later batch is shared in the same proportions, and a replica's part is rounded by itself.
        share = replace(self.problem, global_batch=self.problem.global_batch // self.replicas)
        one = self.layout.with_columns(dp_replicate=np.array([1]))
        if not len(legal(share, one, compiled)):
            return False
        return bool(fits(self.problem, self.layout, limits)[0])

    def seconds(self, share: int) -> float:
        """Of so many sequences a replica, padded to whole micro-batches."""
        return -(-share // self.grain) * self.grain / self.rate


def shared(problem: Problem, limits: Limits, wanted: int, run: Search) -> tuple[list[Choice], Choice | None]:
    """The best layouts on several pools, and the best if memory were no limit: the largest pool chooses the
    shape; see the module."""
    hardware = problem.pricer.hardware
    compiled = limits.fixed.get("compile") is not False
    pools = sorted(hardware.pools, key=lambda pool: -pool.count)
    alone = [replace(hardware, pools=(pool,)) for pool in pools]
    batch = max(1, round(problem.global_batch * pools[0].count / hardware.count))
    first = replace(problem.as_ours(compiled).on(alone[0]), global_batch=batch)
    spares = round(limits.spares * pools[0].count / hardware.count)
    shape = {name: value for name, value in limits.fixed.items() if name != "dp_replicate"}
    mine = replace(limits, fixed=shape, spares=spares, whole=False)
    space = layouts_of(first, pools[0].count, mine, compiled=compiled)
    space = space.take(_replicas_of(space, pools[-1].count) >= 1)
    several = _replicas_of(space, pools[-1].count) >= REPLICAS
    space = space.take(several) if several.any() else space
    rests = space.ranks <= pools[0].count - spares
    space = space.take(rests) if rests.any() else space
    if not len(space):
        return [], None
    priced = price(first, space, run)
    best = fitting(first, priced, mine, wanted, compiled, run).layouts
    choices: list[Choice] = []
    for i in range(len(best)):
        if choices and run.is_late():
            break
        choice = _pools_of(problem, best.row(i), alone, limits, compiled, run)
        choices += [] if choice is None else [choice]
    larger = [_with_memory(hardware) for hardware in alone]
    quickest = priced.best(1).layouts.row(0)
    return choices, _pools_of(problem, quickest, larger, limits, compiled, run)


def _replicas_of(space: Layouts, count: int) -> Any:
    """That so many accelerators have room for."""
    return count // (space.ranks / space.number("dp_replicate"))


def _with_memory(hardware: Hardware) -> Hardware:
    pool = hardware.pools[0]
    return replace(hardware, pools=(replace(pool, accelerator=replace(pool.accelerator, memory=UNLIMITED)),))


def _pools_of(
    problem: Problem,
    row: dict[str, Any],
    alone: list[Hardware],
    limits: Limits,
    compiled: bool,
    run: Search,
) -> Choice | None:
    """A shape on all pools: for each its best micro-batch and recomputation, and shares that end together."""
    whole = row["tp"] * row["cp"] * row["pp"] * row["dp_shard"]
    total = problem.pricer.hardware.count
    most = [int((h.count - round(limits.spares * h.count / total)) // whole) for h in alone]
    most = most if min(most) >= 1 else [int(h.count // whole) for h in alone]
    if replicas := limits.fixed.get("dp_replicate"):
        if not len(alone) <= replicas <= sum(most):
            return None
        most = [min(n, max(1, round(replicas * n / sum(most)))) for n in most]
    ways = []
    for hardware, count in zip(alone, most, strict=True):
        batch = max(1, round(problem.global_batch * count / sum(most)))
        mine = replace(problem.as_ours(compiled).on(hardware), global_batch=batch)
        micro = [limits.fixed["micro_batch"]] if limits.fixed.get("micro_batch") else MICRO_BATCHES
        again = [row["recompute"]] if _is_fixed(limits) else [NONE]
        options = Layouts.of(
            [
                row | {"dp_replicate": count, "micro_batch": size, "recompute": recompute,
                       "recompute_layers": limits.fixed.get("recompute_layers")}
                for size in micro
                for recompute in again
            ]
        )  # fmt: skip
        options = legal(mine, options, compiled)
        best = fitting(mine, price(mine, options, run), limits, 1, compiled, run)
        if not len(best):
            return None
        ways.append(_Way(mine, best.layouts, count, batch / count / float(best.seconds[0])))
    ways = _alike(ways)
    made: list[Choice] = []
    for replicas, shares in _shares(ways, problem.global_batch, limits.fixed.get("dp_replicate")):
        pools = [way.with_share(*these) for way, *these in zip(ways, replicas, shares, strict=True)]
        if all(pool.stands(limits, compiled) for pool in pools):
            made.append(_made(pools, shares, compiled))
        if len(made) == TRIED:
            break
    return min(made, key=lambda choice: choice.seconds, default=None)


def _is_fixed(limits: Limits) -> bool:
    return any(limits.fixed.get(name) is not None for name in ("recompute", "recompute_layers"))


def _alike(ways: list[_Way]) -> list[_Way]:
    """With one count of recomputed layers for all pools that recompute any: the largest."""
    again = [way for way in ways if way.layout["recompute"][0] != NONE]
    layers = max((int(way.layout["recompute_layers"][0]) for way in again), default=ALL)
    return [replace(way, layout=way.layout.with_columns(recompute_layers=np.array([layers]))) for way in ways]


def _shares(
    ways: Sequence[_Way], batch: int, replicas: int | None
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(replicas, sequences of a replica) of each pool, the quickest first; they add up to the batch, where
    such numbers are near."""
    more = 0 if replicas is None else 1  # what was rounded down for one pool
    counts = [range(max(1, way.replicas - FEWER), way.replicas + more + 1) for way in ways]
    exact: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []
    rough: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []
    for chosen in product(*counts):
        if replicas is not None and sum(chosen) != replicas:
            continue
        ideal = batch / sum(way.rate * count for way, count in zip(ways, chosen, strict=True))
        options = [
            sorted({max(1, round(way.rate * ideal / grain) * grain + shift * grain)
                    for grain in (1, way.grain) for shift in range(-2, 3)})
            for way in ways[:-1]
        ]  # fmt: skip
        for shares in product(*options):
            left = batch - sum(count * share for count, share in zip(chosen, shares, strict=False))
            last = max(1, -(-left // chosen[-1]))
            these = (*shares, last)
            seconds = max(way.seconds(share) for way, share in zip(ways, these, strict=True))
            (exact if left == last * chosen[-1] else rough).append((seconds, chosen, these))
    found = sorted(exact or rough)
    return [(chosen, shares) for _, chosen, shares in found]


def _made(ways: Sequence[_Way], shares: Sequence[int], compiled: bool) -> Choice:
    """What a step costs with these shares: the slowest pool ends it."""
    done = [refined(way.problem, way.layout, compiled) for way in ways]
    lead = max(done, key=lambda choice: choice.seconds)
    pools = tuple(
        PoolShare(
            way.problem.pricer.hardware.accelerator.name, way.replicas, share, choice.row["micro_batch"],
            choice.row["recompute"], choice.seconds, choice.reserved,
            way.problem.pricer.hardware.accelerator.memory,
        )
        for way, share, choice in zip(ways, shares, done, strict=True)
    )  # fmt: skip
    peak = sum(choice.ranks * way.problem.peak for choice, way in zip(done, ways, strict=True))
    flops = sum(way.problem.model_flops for way in ways)
    again = next((c.row["recompute_layers"] for c in done if c.row["recompute"] != "none"), None)
    row = done[0].row | {"dp_replicate": sum(way.replicas for way in ways), "recompute_layers": again}
    return replace(
        lead,
        row=row,
        ranks=sum(choice.ranks for choice in done),
        mfu=flops / (lead.seconds * peak),
        pools=pools,
    )
