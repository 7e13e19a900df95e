"""The legal layouts of a model on a number of accelerators, as columns.

What is legal the rules of `layout.py` say, and nothing here: values are multiplied out axis by axis, and
those are dropped that break a rule which asks for no more than is known by then. What is named here is what
is *looked at*, of what is legal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colossus.architecture import num_parameters
from colossus.layout import RULES, SCHEDULES, SIMPLEST, broken, model_row
from colossus.planner.columns import ALL, Layouts
from colossus.planner.estimate import Problem

MICRO_BATCHES = (1, 2, 4, 8, 16)
MOST_CP, MOST_PP, MOST_EP, MOST_STAGES, MOST_MICRO_BATCH = 64, 64, 64, 16, 16
STATE_BYTES = 12.0  # of a weight and both moments in fp32; its gradient may take an activation's place
SHARDS = (1, 4, 8, 16, 64, 256, 1024)  # ranks over which weights are sharded, beside all of dp
MOST_SHARD = 2048  # more only lengthens the rings
SMALL_FLEET = 64  # accelerators up to which every layout is looked at
NONE, SELECTIVE, FULL = 0.0, 1.0, 2.0
Grid = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Limits:
    """What holds for every layout. fixed: layout field -> the user's value.

    spares: accelerators that are better idle, in reserve, where that costs little. whole: all accelerators
    must work; else as many as is best. activation_bytes: the most that activations may take on a rank, for
    which layers are recomputed in full.
    """

    fixed: Mapping[str, Any]
    spares: int = 0
    whole: bool = False
    activation_bytes: float = float("inf")

    @property
    def kinds(self) -> tuple[float, ...]:
        """Of recomputation, that layouts which do not fit without are tried with."""
        if self.fixed.get("recompute") is not None:
            return ()
        return (SELECTIVE, FULL) if math.isinf(self.activation_bytes) else (FULL,)


def layouts_of(problem: Problem, count: int, limits: Limits, *, compiled: bool) -> Layouts:
    """Every legal layout that is looked at, of those that use as many of `count` accelerators, or of those
    that spares leave of them, as their shape allows.

    Where nothing says what is recomputed, nothing is: `search` goes on from there. compiled: those whose
    layers are compiled; zero-bubble schedules can't be.
    """
    blocks = list(_Space(problem, count, limits, compiled).blocks())
    if not blocks:
        return Layouts.of([{}]).take(np.zeros(0, dtype=int))
    layouts = Layouts({name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]})
    if limits.whole:
        layouts = layouts.take(layouts.ranks == count)
    return legal(problem, layouts.take(_may_fit(problem, layouts)), compiled)


def legal(problem: Problem, layouts: Layouts, compiled: bool) -> Layouts:
    """Those that break no rule."""
    row = {**layouts.columns, **facts_of(problem, compiled)}
    holds = np.ones(len(layouts), dtype=bool)
    for number, shape in enumerate(problem.occurring()):
        for rule in RULES:
            if not number or rule.asks & shape.keys():
                holds &= np.broadcast_to(np.asarray(rule.holds(row | shape)), holds.shape).astype(bool)
    return layouts.take(holds)


def facts_of(problem: Problem, compiled: bool) -> dict[str, Any]:
    """What rules ask for that is the same for all layouts, and at every shape of the run."""
    return model_row(problem.arch) | {
        "node_size": problem.pricer.hardware.node_size,
        "has_symmetric_memory": 0,
        "async_tp": 0,
        "compile": int(compiled),
    }


def _may_fit(problem: Problem, layouts: Layouts) -> NDArray[np.bool_]:
    """Whether the mean rank has room for weights, gradients and moments: no layout that fits is left out."""
    part = problem.pricer.hardware.accelerator
    ranks = layouts.ranks / layouts.number("dp_replicate")
    return np.asarray(STATE_BYTES * num_parameters(problem.arch) / ranks <= part.memory)


class _Space:
    def __init__(self, problem: Problem, count: int, limits: Limits, compiled: bool) -> None:
        self.fixed, self.count, self.compiled = limits.fixed, count, compiled
        self.facts = facts_of(problem, compiled) | {"cp_method": self.fixed.get("cp_method") or "gather"}
        self.occurring = problem.occurring()
        self.layers, self.has_experts = problem.arch.num_layers, problem.arch.experts is not None
        self.every = count <= SMALL_FLEET
        self.counts = sorted({count, count - limits.spares} if not limits.whole else {count})
        # how many ranks may have different samples
        ranks = np.arange(1, count + 1)
        self.legal_dp = ranks[self.stand({"dp_replicate": ranks, "dp_shard": np.ones_like(ranks)})]
        self.batch = problem.global_batch

    def stand(self, columns: Grid) -> NDArray[np.bool_]:
        """Where no rule is broken of those that ask for nothing else."""
        stands = np.ones(len(next(iter(columns.values()))), dtype=bool)
        for shape in self.occurring:
            for rule, where in broken(self.facts | shape | columns):
                if rule.asks & columns.keys():
                    stands &= ~np.broadcast_to(np.asarray(where, dtype=bool), stands.shape)
        return stands

    def choice(self, name: str, all_of: Sequence[Any]) -> list[Any]:
        """The user's value, or all."""
        return [self.fixed[name]] if self.fixed.get(name) is not None else list(all_of)

    def multiplied(self, **values: Sequence[Any]) -> Grid:
        """All combinations that stand."""
        arrays = [np.array(column) for column in values.values()]
        grid = np.indices([len(array) for array in arrays]).reshape(len(arrays), -1)
        columns = {name: array[at] for name, array, at in zip(values, arrays, grid, strict=True)}
        kept = self.stand(columns)
        return {name: column[kept] for name, column in columns.items()}

    def blocks(self) -> Iterator[Grid]:
        """One block for each way to cut a replica, its data-parallel ranks and the rest multiplied out."""
        node = int(self.facts["node_size"])
        shapes = self.multiplied(
            tp=self.choice("tp", range(1, node + 1)),
            cp=self.choice("cp", range(1, MOST_CP + 1)),
            pp=self.choice("pp", self.pipelines()),
            etp=self.choice("etp", range(1, node + 1) if self.has_experts else [1]),
        )
        micro = range(1, MOST_MICRO_BATCH + 1) if self.every else MICRO_BATCHES
        shared: Mapping[str, Sequence[Any]] = {
            "micro_batch": self.choice("micro_batch", micro),
            "zero": self.choice("zero", (1, 2, 3)),
            "recompute": self.recompute(),
        }
        schedules: dict[int, Grid] = {}
        for tp, cp, pp, etp in zip(*(column.tolist() for column in shapes.values()), strict=True):
            pairs = self.data_parallel([count // (tp * cp * pp) for count in self.counts])
            if pp not in schedules:
                schedules[pp] = self.schedules(pp)
            if not pairs or not len(schedules[pp]["schedule"]):
                continue
            size = len(pairs)
            groups = self.with_experts(
                {"tp": np.full(size, tp), "cp": np.full(size, cp), "pp": np.full(size, pp),
                 "etp": np.full(size, etp), "dp_replicate": np.array([pair[0] for pair in pairs]),
                 "dp_shard": np.array([pair[1] for pair in pairs])}
            )  # fmt: skip
            yield self.block(groups, schedules[pp], shared)

    def with_experts(self, columns: Grid) -> Grid:
        """Each with every count of ranks that may share its experts."""
        eps = self.choice("ep", range(1, MOST_EP + 1) if self.has_experts else [1])
        size = len(columns["tp"])
        columns = {name: np.repeat(column, len(eps)) for name, column in columns.items()}
        columns["ep"] = np.tile(np.array(eps), size)
        kept = self.stand(columns)
        return {name: column[kept] for name, column in columns.items()}

    def block(self, groups: Grid, schedules: Grid, shared: Mapping[str, Sequence[Any]]) -> Grid:
        sizes = [len(groups["tp"]), len(schedules["schedule"]), *map(len, shared.values())]
        at = np.indices(sizes).reshape(len(sizes), -1)
        columns = {name: column[at[0]] for name, column in groups.items()}
        columns |= {name: column[at[1]] for name, column in schedules.items()}
        for name, values, index in zip(shared, shared.values(), at[2:], strict=True):
            columns[name] = np.array(values)[index]
        layers = self.fixed.get("recompute_layers")
        size = at.shape[1]
        columns |= {
            "recompute_layers": np.full(size, ALL if layers is None else layers),
            "sp": np.ones(size),
            "cp_method": np.full(size, self.facts["cp_method"]),
            "compile": np.full(size, int(self.compiled)),
            "async_tp": np.zeros(size, dtype=int),
        }
        # without sharding there is nothing to let go of, and one of both ways is enough
        several = columns["dp_shard"] * columns["cp"] > 1
        kept = (columns["zero"] == shared["zero"][0]) | several
        return {name: column[kept] for name, column in columns.items()}

    def recompute(self) -> list[float]:
        if self.fixed.get("recompute") is not None:
            return [float(self.fixed["recompute"])]
        return [NONE] if self.fixed.get("recompute_layers") is None else [SELECTIVE, FULL]

    def pipelines(self) -> list[int]:
        """Ranks of a pipeline: all up to 8, then those that layers (or they and both ends) divide by, and
        powers of two. On small fleets all."""
        return [
            pp
            for pp in range(1, MOST_PP + 1)
            if self.every or pp <= 8 or self.layers % pp == 0 or (self.layers + 2) % pp == 0
            or pp & (pp - 1) == 0
        ]  # fmt: skip

    def schedules(self, pp: int) -> Grid:
        """Schedules with the stages of a rank. GPipe, which is never better than 1F1B, where it is fixed;
        without compiling those alone that can't be compiled, unless it is fixed that nothing is."""
        names = [SIMPLEST["schedule"]] if pp == 1 else [name for name in SCHEDULES if name != "gpipe"]
        if pp > 1:
            names = self.choice("schedule", names)
        stages = self.choice("stages_per_rank", range(1, MOST_STAGES + 1))
        found = self.multiplied(pp=[pp], schedule=names, stages_per_rank=stages)
        if not self.compiled and self.fixed.get("compile") is None:
            compiled = self.stand(found | {"compile": np.ones(len(found["pp"]), dtype=int)})
            found = {name: column[~compiled] for name, column in found.items()}
        return {name: found[name][self.looked_at(found)] for name in ("schedule", "stages_per_rank")}

    def looked_at(self, found: Grid) -> NDArray[np.bool_]:
        """Of a schedule with any number of stages: on large fleets those that layers divide by, or as many
        stages as there can be."""
        kept = np.ones(len(found["pp"]), dtype=bool)
        if self.every:
            return kept
        for name in np.unique(found["schedule"]):
            mine = found["schedule"] == name
            counts = found["stages_per_rank"][mine].tolist()
            even = [v for v, pp in zip(counts, found["pp"][mine].tolist(), strict=True)
                    if self.layers % (pp * v) in (0, pp * v - 2)]  # fmt: skip
            kept[mine] = np.isin(counts, [*even[-3:], *even[:1], *counts[-1:]])
        return kept

    def data_parallel(self, most: Sequence[int]) -> list[tuple[int, int]]:
        """(dp_replicate, dp_shard) of at most so many ranks, in several readings of how many there are."""
        replicate, shard = self.fixed.get("dp_replicate"), self.fixed.get("dp_shard")
        if replicate and shard:
            return [(int(replicate), int(shard))] if replicate * shard <= max(most) else []
        found: set[tuple[int, int]] = set()
        for ranks in most:
            legal = self.legal_dp[: np.searchsorted(self.legal_dp, ranks, side="right")]
            if not len(legal):
                continue
            unit = int(replicate or shard or 1)
            for number in self.totals(int(legal[-1]) // unit, unit):
                if replicate:
                    found.add((unit, number))
                elif shard:
                    found.add((number, unit))
                else:
                    shards = range(1, number + 1) if self.every else (*SHARDS, min(number, MOST_SHARD))
                    found |= {(number // n, n) for n in shards if number % n == 0}
        return sorted(found)

    def totals(self, most: int, unit: int) -> list[int]:
        """How many times `unit` ranks: on small fleets every number; else the most that there are, rounder
        numbers close below, and the most close below whose ranks divide the batch."""
        if self.every:
            return list(range(1, most + 1))
        even = [n for n in range(most, most - most // 8 - 1, -1) if n and self.batch % (n * unit) == 0][:1]
        return sorted({most, most // 8 * 8 or most, most // 64 * 64 or most, *even} - {0})
