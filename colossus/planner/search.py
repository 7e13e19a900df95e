"""The search: all legal layouts priced by columns, the best checked for memory, the first of them refined by
the exact timeline of their pipeline; unequal pools share the batch by their speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colossus.errors import UserError
from colossus.hardware.fleets import Hardware
from colossus.layout import V_SHAPED
from colossus.perf.price import Pricer
from colossus.perf.schedule import timeline
from colossus.perf.software import OURS, OURS_EAGER
from colossus.planner.columns import Layouts
from colossus.planner.estimate import Estimate, Problem, estimate
from colossus.planner.formulas import RECOMPUTE
from colossus.planner.memory import Memory, memory
from colossus.planner.space import Limits, layouts_of

CHUNK = 65536  # layouts that are priced at once
CHECKED = 4096  # layouts whose memory is computed at once, from the quickest on
REFINED = 16  # layouts whose pipeline is run in time, compiled and not
WORTH = 1.1  # times the seconds of the best so far, up to which others are
REPLICAS = 8  # at least so many in the smallest of several pools
LEAN = {"recompute": 2.0, "micro_batch": 1, "reshard": True, "schedule": "1f1b"}  # what needs least memory
ALIKE = ("tp", "cp", "pp", "ep", "etp", "schedule", "stages_per_rank", "micro_batch", "recompute")
TABLE = 8  # layouts that a report shows
EXACT_ROUNDS = (
    4  # micro-batches, in ranks of the pipeline, that an exact timeline takes; the rest repeats them
)


@dataclass(frozen=True)
class PoolShare:
    """What the replicas of one pool do."""

    accelerator: str
    replicas: int
    share: int
    micro_batch: int
    recompute: str
    seconds: float
    reserved: float
    capacity: float


@dataclass(frozen=True)
class Choice:
    """One layout with what it costs. parts: seconds of a step by what they are; memory: bytes of the rank
    that needs most, by use. row: values of `layout.Layout`."""

    row: dict[str, Any]
    ranks: int
    seconds: float
    mfu: float
    parts: dict[str, float]
    memory: dict[str, float]
    allocated: float
    reserved: float
    micro_batches: int
    compiled: bool
    pools: tuple[PoolShare, ...] = ()

    @property
    def name(self) -> str:
        """The layout in a line."""
        row = self.row
        axes = [
            f"{axis}={row[axis]}"
            for axis in ("dp_replicate", "dp_shard", "pp", "cp", "tp", "ep")
            if row[axis] > 1
        ]
        if row["pp"] > 1:
            axes.append(
                f"{row['schedule']}" + (f" x{row['stages_per_rank']}" if row["stages_per_rank"] > 1 else "")
            )
        return " ".join([*axes, f"micro_batch={row['micro_batch']}", f"recompute={row['recompute']}"])


@dataclass(frozen=True)
class Found:
    """What a search found, the best first. priced: layouts. memory_binds: it ruled quicker ones out."""

    choices: tuple[Choice, ...]
    priced: int
    memory_binds: bool
    quickest_without_memory: float = field(default=float("inf"))


class NothingFits(UserError):
    """No legal layout fits the memory of the fleet. The command line ends with exit code 1."""


def search(problem: Problem, limits: Limits) -> Found:
    """The best layouts for a model on a fleet.

    Raises:
        NothingFits: none fits, or none is legal.
    """
    hardware = problem.pricer.hardware
    if len(hardware.pools) > 1:
        return _mixed(problem, limits)
    found: list[Choice] = []
    priced, quickest, skipped = 0, float("inf"), 0
    fixed = limits.fixed.get("compile")
    for compiled in (True, False) if fixed is None else (bool(fixed),):
        mine = replace(problem, pricer=_pricer(problem, compiled))
        space = layouts_of(mine, hardware.count, limits, compiled=compiled)
        if not len(space):
            continue
        seconds = _seconds(mine, space)
        priced += len(space)
        quickest = min(quickest, float(seconds.min()))
        best, passed = _fitting(mine, space, seconds, REFINED)
        skipped += passed
        if found:
            worth = WORTH * min(choice.seconds for choice in found)
            best = [i for i in best if seconds[i] <= worth]
        if best:
            found += all_refined(mine, space.take(np.array(best)), compiled)
    if not found:
        raise NothingFits(_why(problem, priced))
    found.sort(key=lambda choice: choice.seconds)
    return Found(tuple(_distinct(found)[:TABLE]), priced, skipped > 0, quickest)


def _pricer(problem: Problem, compiled: bool) -> Pricer:
    return replace(problem.pricer, software=OURS if compiled else OURS_EAGER)


def _seconds(problem: Problem, space: Layouts) -> NDArray[np.float64]:
    parts = [
        estimate(problem, space.take(slice(start, start + CHUNK))).seconds
        for start in range(0, len(space), CHUNK)
    ]
    return np.concatenate(parts)


def _fitting(
    problem: Problem, space: Layouts, seconds: NDArray[np.float64], wanted: int
) -> tuple[list[int], int]:
    """The quickest layouts that fit, and how many quicker ones did not."""
    order = np.argsort(seconds, kind="stable")
    best: list[int] = []
    passed = 0
    for start in range(0, len(order), CHECKED):
        index = order[start : start + CHECKED]
        fits = memory(problem, space.take(index)).fits(problem.pricer.hardware.accelerator)
        if not best:
            passed += int(np.argmax(fits)) if fits.any() else len(index)
        best += [int(i) for i in index[fits][: wanted - len(best)]]
        if len(best) >= wanted:
            break
    return best, passed


def _distinct(choices: list[Choice]) -> list[Choice]:
    """Without those that differ from a better one in the split of its data-parallel ranks alone."""
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for choice in choices:
        row = choice.row
        key = tuple(row[name] for name in ALIKE)
        if key not in seen:
            seen.add(key)
            kept.append(choice)
    return kept


def refined(problem: Problem, one: Layouts, compiled: bool) -> Choice:
    """One layout with the exact timeline of its pipeline in place of the closed form."""
    return all_refined(problem, one, compiled)[0]


def all_refined(problem: Problem, layouts: Layouts, compiled: bool) -> list[Choice]:
    """Of each layout: see `refined`."""
    made, needs = estimate(problem, layouts), memory(problem, layouts)
    part = problem.pricer.hardware.accelerator
    peak = part.peak(problem.precision if part.device == "cpu" else "bf16") / part.shared_by
    choices = []
    for i in range(len(layouts)):
        parts = {name: float(column[i]) for name, column in made.parts.items()}
        exact = exact_pipeline(problem, layouts.row(i), made, i)
        if exact is not None:
            work = sum(parts[name] for name in ("products", "attention", "memory-bound", "recomputation",
                                                "tensor, context and expert messages"))  # fmt: skip
            parts["bubble"] = max(0.0, exact - work)
            parts["pipeline messages"] = 0.0
            parts["slowest node"] = (float(made.slowest[i]) - 1) * (work + parts["bubble"])
        seconds = sum(parts.values())
        ranks = float(layouts.ranks[i])
        choices.append(
            Choice(
                row=_row(layouts.row(i)),
                ranks=int(ranks),
                seconds=seconds,
                mfu=problem.model_flops / (seconds * ranks * peak),
                parts=parts,
                memory={name: float(column[i]) for name, column in needs.parts.items()},
                allocated=float(needs.allocated[i]),
                reserved=float(needs.reserved[i]),
                micro_batches=int(made.micro_batches[i]),
                compiled=compiled,
            )
        )
    return choices


def exact_pipeline(problem: Problem, row: Mapping[str, Any], made: Estimate, i: int) -> float | None:
    """Seconds of all micro-batches through the pipeline of layout `i`, stage by stage with their own seconds;
    None without a pipeline."""
    pp = int(row["pp"])
    if pp == 1:
        return None
    schedule = row["schedule"]
    chunks = 2 if schedule in V_SHAPED else int(row["stages_per_rank"])
    cut = problem.shape(schedule, pp, chunks)
    seconds = {key: float(column[i]) for key, column in made.phases.items()}

    def of(phase: str) -> NDArray[np.float64]:
        out = cut.by_stage @ np.array([seconds[phase, kind] for kind in cut.kinds])
        out[0] += seconds[phase, "first"]
        out[-1] += seconds[phase, "last"]
        return np.asarray(out)

    forward, weights = of("forward"), of("weights")
    backward = of("backward") + of("recompute")
    m = int(made.micro_batches[i])
    few = min(m, EXACT_ROUNDS * pp)
    if schedule == "gpipe":
        few = m
    elif few < m:
        few += m % pp
    line = timeline(
        schedule, pp, chunks, few, forward.tolist(), backward.tolist(), weights.tolist(), float(made.send[i])
    )
    if few == m:
        return line.seconds
    slowest = float(np.max(np.bincount(cut.owner, forward + backward + weights)))
    return line.seconds + (m - few) * slowest


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A layout as values of `layout.Layout`."""
    zero = row.pop("zero")
    row.pop("sp")
    row["reshard"] = bool(zero >= 3)
    row["compile"], row["async_tp"] = bool(row["compile"]), bool(row["async_tp"])
    if row["pp"] == 1:
        row["schedule"], row["stages_per_rank"] = "1f1b", 1
    return row


def _why(problem: Problem, priced: int) -> str:
    """What keeps every layout out, and the smallest fleet that works."""
    hardware = problem.pricer.hardware
    part, model = hardware.accelerator, problem.arch.preset or "the model"
    least = smallest_fleet(problem)
    if least is not None and least <= hardware.count:
        seen = "legal" if not priced else "both legal and small enough"
        return (
            f"fleet.count={hardware.count}: with the fields of layout that are fixed, no layout of {model} "
            f"is {seen}; leave some open"
        )
    room = f"{part.memory / 2**30:.0f} GiB of {part.name}"
    words = f"fleet.count={hardware.count}: {model} fits no layout in {room}"
    if least is None:
        return f"{words}; memory binds, and no larger fleet of them helps"
    return f"{words}; memory binds: {least} of them are the fewest that hold it"


def smallest_fleet(problem: Problem, most: int = 65536) -> int | None:
    """The fewest accelerators, by powers of two and then by servers, on which a layout fits; None beyond
    `most`."""
    hardware = problem.pricer.hardware

    def fits(count: int) -> bool:
        batch = max(problem.global_batch, 1)
        mine = replace(
            problem,
            global_batch=batch,
            pricer=replace(_pricer(problem, True), hardware=hardware.with_count(count)),
        )
        space = layouts_of(mine, count, Limits(LEAN), compiled=True)
        for start in range(0, len(space), CHECKED):
            if memory(mine, space.take(slice(start, start + CHECKED))).fits(hardware.accelerator).any():
                return True
        return False

    size = hardware.node_size
    count = 1
    while count <= most and not fits(count):
        count *= 2
    if count > most:
        return None
    low = count // 2
    step = 1 if count <= size else size
    for candidate in range(low + step, count, step):
        if count > 16 * size:
            break
        if fits(candidate):
            return candidate
    return count


# ---------------------------------------------------------------------- unequal pools


def _mixed(problem: Problem, limits: Limits) -> Found:
    """Replicas of one shape on every pool: the largest pool chooses the shape, each its own micro-batch and
    recomputation, and sequences go by speed."""
    hardware = problem.pricer.hardware
    pools = sorted(hardware.pools, key=lambda pool: -pool.count)
    alone = [replace(hardware, pools=(pool,)) for pool in pools]
    share = problem.global_batch * pools[0].count / hardware.count
    first = replace(
        problem,
        global_batch=max(1, round(share)),
        pricer=replace(problem.pricer, hardware=alone[0], software=OURS),
    )
    spares = round(limits.spares * pools[0].count / hardware.count)
    space = layouts_of(first, pools[0].count, replace(limits, spares=spares), compiled=True)
    # replicas so small that the smallest pool has several, and loses few accelerators that make no whole one
    whole = space.ranks / space.number("dp_replicate")
    space = space.take(whole * REPLICAS <= pools[-1].count)
    if not len(space):
        raise NothingFits(_why(first, 0))
    seconds = _seconds(first, space)
    best, passed = _fitting(first, space, seconds, REFINED)
    if not best:
        raise NothingFits(_why(first, len(space)))
    choices, priced = [], len(space)
    for i in best:
        row = space.take(np.array([i])).row(0)
        choice, looked = _pools_of(problem, row, alone, limits)
        priced += looked
        if choice is not None:
            choices.append(choice)
    if not choices:
        raise NothingFits(_why(first, priced))
    choices.sort(key=lambda choice: choice.seconds)
    return Found(tuple(_distinct(choices)[:TABLE]), priced, passed > 0, float(seconds.min()))


def _pools_of(
    problem: Problem, row: dict[str, Any], alone: list[Hardware], limits: Limits
) -> tuple[Choice | None, int]:
    """A shape on all pools: for each its best micro-batch and recomputation, and shares that end together."""
    whole = row["tp"] * row["cp"] * row["pp"] * row["dp_shard"]
    total = problem.pricer.hardware.count
    replicas = [
        int((h.count - round(limits.spares * h.count / total)) // whole) if i else int(row["dp_replicate"])
        for i, h in enumerate(alone)
    ]
    if min(replicas) < 1:
        return None, 0
    each = problem.global_batch / sum(replicas)
    ways, looked = [], 0
    for hardware, count in zip(alone, replicas, strict=True):
        mine = replace(
            problem, global_batch=max(1, round(each * count)),
            pricer=replace(problem.pricer, hardware=hardware, software=OURS),
        )  # fmt: skip
        options = Layouts.of(
            [
                row | {"dp_replicate": count, "micro_batch": micro, "recompute": again}
                for micro in (1, 2, 4, 8)
                for again in RECOMPUTE
                if micro * row["dp_shard"] <= each + row["dp_shard"]
            ]
        )
        looked += len(options)
        seconds = estimate(mine, options).seconds
        fits = memory(mine, options).fits(hardware.accelerator)
        if not fits.any():
            return None, looked
        ways.append((mine, options.take(np.array([int(np.argmin(np.where(fits, seconds, np.inf)))])), count))
    choice = _shared(problem, ways)
    return choice, looked


def _shared(problem: Problem, ways: list[tuple[Problem, Layouts, int]]) -> Choice:
    """Sequences to pools by their speed, whole ones to a replica, so that the slowest ends soonest."""
    rates = []
    for mine, option, count in ways:
        seconds = float(estimate(mine, option).seconds[0])
        rates.append(mine.global_batch / count / seconds)  # sequences a second of one replica
    ideal = problem.global_batch / sum(rate * way[2] for rate, way in zip(rates, ways, strict=True))
    best: tuple[float, list[int], list[Choice]] | None = None
    grains = [int(option["dp_shard"][0] * option["micro_batch"][0]) for _, option, _ in ways]
    for shift in range(-2, 3):
        first = max(grains[0], (round(rates[0] * ideal / grains[0]) + shift) * grains[0])
        rest = problem.global_batch - first * ways[0][2]
        if rest <= 0:
            continue
        shares = [first]
        others = sum(rate * way[2] for rate, way in zip(rates[1:], ways[1:], strict=True))
        shares += [max(1, round(rest * rate / others)) for rate in rates[1:]]
        done = [
            refined(replace(mine, global_batch=share * count), option, True)
            for (mine, option, count), share in zip(ways, shares, strict=True)
        ]
        slowest = max(choice.seconds for choice in done)
        if best is None or slowest < best[0]:
            best = (slowest, shares, done)
    assert best is not None
    slowest, shares, done = best
    lead = max(done, key=lambda choice: choice.seconds)
    replicas = sum(count for *_, count in ways)
    ranks = sum(choice.ranks for choice in done)
    peak = problem.pricer.hardware.accelerator.peak("bf16")
    sequences = sum(share * way[2] for share, way in zip(shares, ways, strict=True))
    pools = tuple(
        PoolShare(
            mine.pricer.hardware.accelerator.name, count, share, int(option["micro_batch"][0]),
            str(option.row(0)["recompute"]), choice.seconds, choice.reserved,
            mine.pricer.hardware.accelerator.memory,
        )
        for (mine, option, count), share, choice in zip(ways, shares, done, strict=True)
    )  # fmt: skip
    flops = problem.model_flops * sequences / problem.global_batch
    return replace(
        lead, row=done[0].row | {"dp_replicate": replicas}, ranks=ranks, seconds=slowest,
        mfu=flops / (slowest * ranks * peak), pools=pools,
    )  # fmt: skip


def fixed_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a layout that the user gave, as the space reads them."""
    found = {name: value for name, value in values.items() if value is not None}
    if "recompute" in found:
        found["recompute"] = float(RECOMPUTE[found["recompute"]])
    return found


__all__ = ["Choice", "Found", "Limits", "Memory", "NothingFits", "PoolShare", "fixed_of", "refined", "search"]
