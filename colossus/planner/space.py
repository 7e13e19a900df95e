"""The legal layouts of a model on a number of accelerators, as columns: the rules of `layout.py`, at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colossus.architecture import num_parameters
from colossus.layout import RULES, ZERO_BUBBLE, model_row
from colossus.planner.columns import Layouts
from colossus.planner.estimate import Problem

MICRO_BATCHES = (1, 2, 4, 8, 16)
MOST_CP, MOST_PP, MOST_EP, MOST_STAGES = 64, 64, 64, 16
STATE_BYTES = 12.0  # of a weight and both moments in fp32; its gradient may take an activation's place
MOST_SHARD = 2048  # ranks over which weights are sharded; more only lengthens the rings
RECOMPUTE = (0.0, 1.0, 2.0)
SMALL_FLEET = 64  # accelerators up to which every layout is looked at


@dataclass(frozen=True)
class Limits:
    """What the user fixed: layout field -> value. spares: accelerators that stay idle. whole: all others
    work; else as many as is best."""

    fixed: Mapping[str, Any]
    spares: int = 0
    whole: bool = False


def _pipelines(num_layers: int, count: int) -> list[int]:
    """Ranks of a pipeline: all up to 8, then those that layers (or they and both ends) divide by, and powers
    of two. On small fleets all."""
    most = min(MOST_PP, num_layers)
    small = count <= SMALL_FLEET
    return [
        pp
        for pp in range(1, most + 1)
        if small or pp <= 8 or num_layers % pp == 0 or (num_layers + 2) % pp == 0 or pp & (pp - 1) == 0
    ]


def divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def layouts_of(problem: Problem, count: int, limits: Limits, *, compiled: bool) -> Layouts:
    """Every legal layout that uses as many of `count` accelerators as its shape allows.

    compiled: those whose layers are compiled; zero-bubble schedules can't be.
    """
    blocks = [block for block in _blocks(problem, count, limits, compiled) if block is not None]
    if not blocks:
        return _empty()
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    layouts = Layouts(columns)
    if limits.whole:
        layouts = layouts.take(layouts.ranks == count - limits.spares)
    return legal(problem, layouts.take(_may_fit(problem, layouts)), compiled)


def _may_fit(problem: Problem, layouts: Layouts) -> NDArray[np.bool_]:
    """Whether the mean rank has room for weights, gradients and moments: no layout that fits is left out."""
    part = problem.pricer.hardware.accelerator
    ranks = layouts.ranks / layouts.number("dp_replicate")
    return np.asarray(STATE_BYTES * num_parameters(problem.arch) / ranks <= part.memory)


def _empty() -> Layouts:
    return Layouts.of([{}]).take(np.zeros(0, dtype=int))


def legal(problem: Problem, layouts: Layouts, compiled: bool) -> Layouts:
    """Those that break no rule."""
    row: dict[str, Any] = dict(layouts.columns) | model_row(problem.arch)
    row |= {
        "global_batch": problem.global_batch,
        "seq_len": problem.seq_len,
        "node_size": problem.pricer.hardware.node_size,
        "has_symmetric_memory": 0,
        "compile": np.full(len(layouts), int(compiled)),
        "async_tp": np.zeros(len(layouts), dtype=int),
        "reshard": (layouts["zero"] >= 3).astype(int),
    }
    holds = np.ones(len(layouts), dtype=bool)
    for rule in RULES:
        holds &= np.broadcast_to(np.asarray(rule.holds(row)), holds.shape).astype(bool)
    return layouts.take(holds)


def _blocks(
    problem: Problem, count: int, limits: Limits, compiled: bool
) -> Iterator[dict[str, NDArray[Any]] | None]:
    """One block for each way to cut a replica: the other fields multiplied out."""
    arch, fixed = problem.arch, limits.fixed
    node = problem.pricer.hardware.node_size
    row = model_row(arch)

    def choice(name: str, all_of: list[int]) -> list[int]:
        return [int(fixed[name])] if fixed.get(name) is not None else all_of

    usable = count - limits.spares
    tps = choice("tp", [t for t in divisors(row["num_heads"], node) if row["num_kv_heads"] % t == 0])
    cps = choice(
        "cp", [c for c in (1, 2, 4, 8, 16, 32, 64) if c <= MOST_CP and problem.seq_len % (2 * c) == 0]
    )
    pps = choice("pp", _pipelines(arch.num_layers, usable))
    eps = choice("ep", divisors(row["num_experts"], MOST_EP) if row["num_experts"] else [1])
    for tp, cp, pp in product(tps, cps, pps):
        if tp * cp * pp > usable:
            continue
        for etp in choice("etp", sorted({1, tp}) if row["num_experts"] else [1]):
            yield _block(
                problem,
                usable // (tp * cp * pp),
                (tp, cp, pp, etp),
                eps,
                fixed,
                compiled,
                usable <= SMALL_FLEET,
            )


def _block(
    problem: Problem,
    most_dp: int,
    shape: tuple[int, int, int, int],
    eps: list[int],
    fixed: Mapping[str, Any],
    compiled: bool,
    whole: bool,
) -> dict[str, NDArray[Any]] | None:
    """The layouts of one replica's shape: (dp_replicate, dp_shard), then the rest multiplied out."""
    tp, cp, pp, etp = shape
    pairs = [
        pair
        for pair in data_parallel(most_dp, problem.global_batch, whole)
        if all(
            fixed.get(name) in (None, value)
            for name, value in zip(("dp_replicate", "dp_shard"), pair, strict=True)
        )
    ]
    if fixed.get("dp_replicate") and fixed.get("dp_shard"):
        pairs = [(int(fixed["dp_replicate"]), int(fixed["dp_shard"]))]
    schedules = [
        pair
        for pair in _schedules(problem.arch.num_layers, pp, compiled, whole, fixed)
        if all(
            fixed.get(name) in (None, value) or (name == "schedule" and pp == 1)  # which says nothing there
            for name, value in zip(("schedule", "stages_per_rank"), pair, strict=True)
        )
    ]
    micro = [int(fixed["micro_batch"])] if fixed.get("micro_batch") else list(MICRO_BATCHES)
    again = [fixed["recompute"]] if fixed.get("recompute") is not None else list(RECOMPUTE)
    zeros = [2.0, 3.0] if fixed.get("reshard") is None else [3.0 if fixed["reshard"] else 2.0]
    axes = [len(pairs), len(schedules), len(micro), len(again), len(zeros), len(eps)]
    if 0 in axes:
        return None
    grid = np.indices(axes).reshape(len(axes), -1)
    replicate, shard = (np.array(values)[grid[0]] for values in zip(*pairs, strict=True))
    names, chunks = zip(*schedules, strict=True)
    size = grid.shape[1]
    columns: dict[str, NDArray[Any]] = {
        "tp": np.full(size, tp), "cp": np.full(size, cp), "pp": np.full(size, pp), "etp": np.full(size, etp),
        "ep": np.array(eps)[grid[5]], "dp_replicate": replicate, "dp_shard": shard,
        "schedule": np.array(names)[grid[1]], "stages_per_rank": np.array(chunks)[grid[1]],
        "micro_batch": np.array(micro)[grid[2]], "recompute": np.array(again)[grid[3]],
        "zero": np.array(zeros)[grid[4]], "sp": np.ones(size),
        "cp_method": np.full(size, fixed.get("cp_method") or "gather"),
        "compile": np.full(size, int(compiled)), "async_tp": np.zeros(size, dtype=int),
    }  # fmt: skip
    # without sharding there is nothing to let go of, and one of both ways is enough
    keep = (columns["zero"] == zeros[0]) | (shard * cp > 1)
    # more than a rank's share of sequences is no micro-batch
    keep &= (
        columns["micro_batch"] * replicate * shard
        <= -(-problem.global_batch // (replicate * shard)) * replicate * shard
    )
    return {name: column[keep] for name, column in columns.items()}


def data_parallel(most: int, global_batch: int, whole: bool) -> list[tuple[int, int]]:
    """(dp_replicate, dp_shard). On small fleets every pair; else the most ranks that there are, rounder
    numbers close below and one that divides the batch, sharded over powers of four, a server or all."""
    most = min(most, global_batch)
    if whole:
        totals, steps = set(range(1, most + 1)), range(1, most + 1)
        return [(total // shard, shard) for total in sorted(totals) for shard in steps if total % shard == 0]
    totals = {most, most // 8 * 8 or most, most // 64 * 64 or most}
    totals |= set([d for d in range(most, most - most // 8, -1) if global_batch % d == 0][:1])
    found = []
    for total in sorted(totals):
        shards = {n for n in (1, 4, 8, 16, 64, 256, 1024) if total % n == 0}
        shards |= {total} if total <= MOST_SHARD else set()
        found += [(total // shard, shard) for shard in sorted(shards)]
    return found


def _schedules(
    num_layers: int, pp: int, compiled: bool, whole: bool, fixed: Mapping[str, Any]
) -> list[tuple[str, int]]:
    """Schedules with the stages of a rank: those that can be compiled, or, where it is not fixed that nothing
    is, those alone that can't. The one that is never better than another is looked at where it is fixed."""
    eager = not compiled and fixed.get("compile") is None
    if pp == 1:
        return [] if eager else [("1f1b", 1)]
    most = num_layers // pp
    several = list(range(2, min(most, MOST_STAGES) + 1))
    if not whole:  # those that layers divide by, or as many stages as there can be
        even = [v for v in several if num_layers % (pp * v) in (0, pp * v - 2)]
        several = sorted({*even[-3:], *even[:1], *several[-1:]})
    one = "gpipe" if fixed.get("schedule") == "gpipe" else "1f1b"
    plain = [(one, 1), *(("interleaved_1f1b", v) for v in several)]
    if compiled:
        return plain
    return [
        *([] if eager else plain),
        *(("interleaved_zero_bubble", v) for v in several),
        *((name, 2) for name in ZERO_BUBBLE if name != "interleaved_zero_bubble" and most >= 2),
    ]
