"""Which ranks of a world do different things, what each of these needs, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from colossus.dryrun.price import Price, price, problem_of
from colossus.dryrun.rank import Traced
from colossus.dryrun.reads import Reads
from colossus.dryrun.routing import Routing
from colossus.dryrun.tracer import Moment
from colossus.dryrun.work import stream_of
from colossus.dryrun.worker import traces
from colossus.errors import UserError
from colossus.hardware.catalogue import Accelerator
from colossus.hardware.fleets import Hardware
from colossus.job import Job
from colossus.layout import ONE_STAGE, check
from colossus.parallel.mesh import Place
from colossus.perf.corrections import Corrections
from colossus.planner.columns import Layouts
from colossus.planner.memory import TALKING, memory, reserved_bytes

Key = TypeVar("Key")
BEYOND = 2  # micro batches that a pipeline is traced with, beyond its stages
AFFINE = ("1f1b", "interleaved_1f1b")  # schedules in which each further micro batch adds the same


@dataclass(frozen=True)
class Kind:
    """Ranks that do the same: `count` of them, of which `rank` stands for all.

    Those that differ by their shard alone (a dimension that ranks do not share equally) count as alike: it
    is the one with the largest. num_rows: sequences of a step that each sees. load: rows that its experts
    get, over the mean. is_waited_for: no rank of its stage gets more.
    """

    rank: int
    count: int
    replica: int
    stage: int
    num_rows: int
    accelerator: Accelerator
    load: float = 1.0
    is_waited_for: bool = True


@dataclass(frozen=True)
class Judged:
    """What a kind of ranks needs. reserved: with what lies around its tensors, by estimate, and without the
    `fused` bytes that compiled layers need not hold: they are run as they are written."""

    kind: Kind
    traced: Traced
    reserved: float
    fused: float = 0.0

    @property
    def fits(self) -> bool:
        return self.reserved <= self.kind.accelerator.memory

    @property
    def margin(self) -> float:
        """Bytes that are left; below 0 where it does not fit."""
        return self.kind.accelerator.memory - self.reserved


@dataclass(frozen=True)
class DryRun:
    """What the program would need as each kind of rank, of a job whose layout is given.

    mend: what would make it fit, as words of a job, and the ranks with it; None: it fits, nothing that was
    tried does, or nobody has asked (`mend.mended`). notes: what the figures leave out. price: what a step
    takes; None where not every stage of the pipeline was run. reads: what its start reads of the checkpoint
    that it goes on from, where one was named. routing: of tokens to experts; None: all get alike.
    """

    job: Job
    hardware: Hardware
    ranks: tuple[Judged, ...]
    notes: tuple[str, ...]
    mend: tuple[str, DryRun] | None = None
    price: Price | None = None
    reads: Reads | None = None
    routing: Routing | None = None

    @property
    def fits(self) -> bool:
        return all(judged.fits for judged in self.ranks)

    @property
    def worst(self) -> Judged:
        """The one that has least room."""
        return min(self.ranks, key=lambda judged: judged.margin)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        layout = self.job.layout
        found: dict[str, Any] = {
            "fits": self.fits,
            "layout": layout.model_dump(exclude_none=True),
            "price": None if self.price is None else self.price.to_dict(),
            "reads": None if self.reads is None else self.reads.to_dict(),
            "expert_shares": None if self.routing is None else list(self.routing.shares),
            "ranks": [],
            "notes": list(self.notes),
        }
        for judged in self.ranks:
            traced = judged.traced
            found["ranks"].append(
                {
                    "rank": judged.kind.rank,
                    "place": vars(traced.place),
                    "alike": judged.kind.count,
                    "expert_load": judged.kind.load,
                    "accelerator": judged.kind.accelerator.name,
                    "micro_batches": traced.num_micro_batches,
                    "peak_bytes": traced.peak.num_bytes,
                    "peak_phase": traced.peak.phase,
                    "peak_by_use": traced.peak.by_use,
                    "peak_by_module": [
                        {"module": use.owner, "use": use.what, "bytes": size}
                        for use, size in traced.peak.largest()
                    ],
                    "at_rest_bytes": sum(traced.at_rest.values()),
                    "at_rest_by_use": traced.at_rest,
                    "reserved_bytes": judged.reserved,
                    "fused_bytes": judged.fused,
                    "memory_bytes": judged.kind.accelerator.memory,
                    "flops": traced.flops,
                    "messages": [
                        {
                            "axis": axis,
                            "operation": operation,
                            "ranks": size,
                            "times": times,
                            "bytes": said,
                            "stream": stream_of(axis, operation),
                        }
                        for (axis, operation, size), (times, said) in traced.said().items()
                    ],
                    "host_reads": traced.host_reads,
                }
            )
            if self.reads is not None:
                kind = judged.kind
                found["ranks"][-1]["reads"] = self.reads.of_kind(kind.replica, kind.stage, kind.count)
        if self.mend is not None:
            found["mend"] = {"words": self.mend[0], **self.mend[1].to_dict()}
        return found


def dry_run(
    job: Job,
    hardware: Hardware,
    rank: int | None = None,
    *,
    routing: Routing | None = None,
    say: Callable[[str], None] = lambda line: None,
    notes: Sequence[str] = (),
    stages: Collection[int] | None = None,
    corrections: Corrections | None = None,
) -> DryRun:
    """Runs one step of a job as every kind of rank of its world, or as `rank` alone.

    job: with its model, layout, type, batch and length known. routing: of tokens to experts; None: all get
    alike. stages: ranks of its pipelines that are looked at; None: all. say: is told what is being traced.
    notes: what is known already of how the job came about. corrections: what was measured of the fleet's
    accelerators.

    Raises:
        UserError: the layout is not legal, the fleet has too few accelerators, or there is no such rank.
    """
    layout = job.layout.filled()
    layout = layout.model_copy(update={"pools": list(layout.pools)})
    # What it chooses by the device it chooses by that of the fleet, whatever this machine is.
    job = replace(job, layout=layout).put({"fleet.device": hardware.accelerator.device}, "derived")
    seq_len = max(length for _, _, length in job.shapes())
    batch = max(sequences for _, sequences, _ in job.shapes(job.run.global_batch or 0))
    check(layout, job.model, global_batch=batch, seq_len=seq_len, node_size=hardware.node_size)
    if layout.num_ranks > hardware.count:
        most = hardware.count // (layout.num_ranks // layout.dp_shard)
        near = f"; at most layout.dp_shard={most}" if most else ""
        raise UserError(f"layout: {layout.num_ranks:,} ranks; {hardware.name} has {hardware.count:,}{near}")
    if rank is not None and not 0 <= rank < layout.num_ranks:
        raise UserError(
            f"--rank {rank}: the layout has {layout.num_ranks:,} ranks; 0 to {layout.num_ranks - 1}"
        )
    kinds = [k for k in kinds_of(job, hardware, batch, rank, routing) if stages is None or k.stage in stages]
    wanted = [(kind, rows) for kind in kinds for rows in rows_of(job, kind)]
    steps = traces(
        [(job, kind.rank, rows, seq_len, routing) for kind, rows in wanted],
        lambda index: say(f"rank {wanted[index][0].rank:,} ({index + 1} of {len(wanted)} steps)"),
    )
    found = []
    for kind in kinds:
        of_kind = [traced for (other, _), traced in zip(wanted, steps, strict=True) if other is kind]
        found.append(_judged(job, hardware, kind, of_kind))
    priced = _price(job, hardware, corrections, found)
    said = (*notes, *_notes(job, routing))
    return DryRun(job, hardware, tuple(found), said, price=priced, routing=routing)


def _price(
    job: Job, hardware: Hardware, corrections: Corrections | None, ranks: Sequence[Judged]
) -> Price | None:
    """Of a step, where each stage of the pipeline was run in each pool, as the rank that others wait for."""
    by_pool: dict[int, list[Judged]] = {}
    for judged in (judged for judged in ranks if judged.kind.is_waited_for):
        by_pool.setdefault(judged.kind.replica, []).append(judged)
    num_pools = max(1, len(job.layout.pools or ()))
    if len(by_pool) < num_pools or any(len(pool) < job.layout.pp for pool in by_pool.values()):
        return None
    pools = [(pool[0].kind.accelerator, [one.traced for one in pool]) for pool in by_pool.values()]
    load = max(judged.kind.load for judged in ranks)
    return price(job, hardware, corrections, pools, load)


def kinds_of(
    job: Job, hardware: Hardware, batch: int, rank: int | None = None, routing: Routing | None = None
) -> Iterator[Kind]:
    """The kinds of ranks of a world: a stage of a replica of each pool, and of that those whose experts get
    most rows and the others; or that of `rank` alone, as it is."""
    layout = job.layout
    loads, spread = [1.0] * layout.ep, [(0, layout.ep)]
    if routing is not None:
        loads, spread = routing.loads(layout.ep), routing.kinds(layout.ep)
    each = layout.num_ranks // layout.dp_replicate
    pools = layout.pools or []
    sizes = [pool.replicas for pool in pools] or [layout.dp_replicate]
    begins = [sum(sizes[:index]) for index in range(len(sizes))]
    shares = [pool.share or -(-batch // layout.dp_replicate) for pool in pools] or [
        -(-batch // layout.dp_replicate)
    ]
    by_count = sorted(hardware.pools, key=lambda pool: -pool.count)
    for index, (begin, size, share) in enumerate(zip(begins, sizes, shares, strict=True)):
        accelerator = by_count[min(index, len(by_count) - 1)].accelerator
        for stage in range(layout.pp):
            first = begin * each + stage * (each // layout.pp)
            alike, num_rows = size * each // layout.pp, -(-share // layout.dp_shard)
            found = [(first + ep * layout.etp, ep, alike // layout.ep * count) for ep, count in spread]
            if rank is not None:
                place = Place.of(layout, rank)
                if place.pp != stage or not begin <= place.dp_replicate < begin + size:
                    continue
                ep = place.ep(layout)
                found = [(rank, ep, alike // layout.ep * loads.count(loads[ep]))]
            for stands, ep, count in found:
                is_most = loads[ep] == max(loads)
                yield Kind(stands, count, begin, stage, num_rows, accelerator, loads[ep], is_most)


def rows_of(job: Job, kind: Kind) -> list[int]:
    """The steps that tell of a kind's, by their sequences: its own; of many micro batches two shorter ones,
    since each more adds the same."""
    layout = job.layout.of_replica(kind.replica)
    micro_batch, stages = layout.micro_batch, layout.pp
    many = -(-kind.num_rows // micro_batch)
    if stages > 1 and layout.schedule not in AFFINE:
        return [kind.num_rows]
    # Some beyond the rounds of the pipeline after which nothing new begins; interleaved schedules ask for as
    # many beyond whole rounds as there are.
    one_stage = layout.schedule in ONE_STAGE or stages == 1
    few = stages + BEYOND if one_stage else 3 * stages + (many - 1) % stages + 1
    more = 1 if one_stage else stages
    if many <= 2 * few + more:  # two steps take no less
        return [kind.num_rows]
    return [few * micro_batch, (few + more) * micro_batch]


def _judged(job: Job, hardware: Hardware, kind: Kind, steps: Sequence[Traced]) -> Judged:
    traced, *longer = steps
    if longer:
        micro_batch = job.layout.of_replica(kind.replica).micro_batch
        traced = extended(traced, longer[0], -(-kind.num_rows // micro_batch))
    groups = sum(getattr(job.layout, axis) > 1 for axis in TALKING)
    reserved = reserved_bytes(traced.peak.num_bytes, groups, kind.accelerator.device)
    fused = _fused_bytes(job, hardware, kind) if job.layout.compile else 0.0
    return Judged(kind, traced, reserved - fused, fused)


def _fused_bytes(job: Job, hardware: Hardware, kind: Kind) -> float:
    """That compiled layers need less than those that are run as they are written."""
    problem = problem_of(job, hardware, None)
    layout = Layouts.of_layout(job.layout.of_replica(kind.replica))
    eager, compiled = (memory(problem.as_ours(flag), layout).reserved[0] for flag in (False, True))
    return max(0.0, float(eager - compiled))


def extended(short: Traced, longer: Traced, many: int) -> Traced:
    """What `many` micro batches come to, of two steps of fewer: every count is affine in their number."""
    steps = (many - longer.num_micro_batches) / (longer.num_micro_batches - short.num_micro_batches)

    def far(was: int, now: int) -> int:
        return round(now + steps * (now - was))

    def all_far(was: dict[Key, int], now: dict[Key, int]) -> dict[Key, int]:
        return {key: far(was.get(key, 0), size) for key, size in now.items()}

    before = short.said()
    totals = {
        key: (far(before[key][0], times), far(before[key][1], num_bytes))
        for key, (times, num_bytes) in longer.said().items()
    }
    return replace(
        longer,
        num_micro_batches=many,
        peak=Moment(
            longer.peak.phase,
            far(short.peak.num_bytes, longer.peak.num_bytes),
            all_far(short.peak.by_owner, longer.peak.by_owner),
        ),
        at_rest=all_far(short.at_rest, longer.at_rest),
        flops=all_far(short.flops, longer.flops),
        totals=totals,
        host_reads=far(short.host_reads, longer.host_reads),
        num_operators=short.num_operators + longer.num_operators,
        seconds=short.seconds + longer.seconds,
    )


def _notes(job: Job, routing: Routing | None) -> Iterator[str]:
    if job.layout.compile:
        yield "layers are traced as they are written; what compiled ones need less is the planner's estimate"
    if job.model.experts is not None and job.layout.ep > 1:
        if routing is None:
            yield "every rank of ep gives every other as many rows: routers are taken to be balanced"
        else:
            most = max(routing.loads(job.layout.ep))
            yield (
                f"{routing.said}, in every layer: of {job.layout.ep} ranks of ep one gets {most:.2f} times "
                "the mean of rows, and the others wait for it"
            )
    elif routing is not None:
        yield f"{routing.said}: that changes nothing, since each rank has all experts (layout.ep=1)"
    if job.layout.pools and job.layout.pools[0].share is None:
        yield "layout.pools: taken to have equal shares; a run gives each what its speed deserves"
    if job.fleet.device == "cuda":
        yield "around the tensors: CUDA's context, NCCL's buffers and gaps between blocks, by estimate"
