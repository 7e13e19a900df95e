"""What a traced step takes on the fleet's hardware: products, attention and messages as they were traced, at
the rates of `plan` (`perf.price`, `perf.communication`, `perf.passes`), pass by pass along the exact timeline
of the pipeline (`perf.schedule`).

What lies between products a compiler fuses, which no trace of layers as they are written shows: its bytes are
those of the planner's ledger, as is the optimizer's own arithmetic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from colossus.dryrun.muon import is_travel, share_shown
from colossus.dryrun.rank import Traced
from colossus.dryrun.rows import Rows, groups_of, times_of
from colossus.dryrun.work import ONCE, Message, Pass, Work
from colossus.hardware.catalogue import Accelerator
from colossus.hardware.fleets import Hardware
from colossus.job import Job
from colossus.layout import V_SHAPED, Layout
from colossus.perf.corrections import Corrections
from colossus.perf.ledger import COMMUNICATION, Ledger, Row
from colossus.perf.passes import exposed, pass_seconds
from colossus.perf.price import Pricer
from colossus.perf.schedule import Action, Timeline, timeline
from colossus.perf.software import OURS
from colossus.planner.estimate import Problem, accumulate_seconds, rank_weights

UNWAITED = ("figures",)  # groups whose messages nobody waits for within a step
CAUSES = ("products", "attention", "memory-bound", "recomputation", "host")
Cause = str  # one of these, "bubble", "update", or the axis and operation of a message that shows


@dataclass(frozen=True)
class Spent:
    """Seconds of a pass, or of what a step does once, by cause; they sum to its `seconds`. messages: seconds
    of all its messages, shown or hidden, by the causes that they are."""

    causes: Mapping[Cause, float]
    messages: Mapping[Cause, float]

    @cached_property
    def seconds(self) -> float:
        return sum(self.causes.values())


@dataclass(frozen=True)
class Piped:
    """The step of the replicas of one pool. spent: of every pass; once: of each rank of the pipeline, after
    its passes; send: seconds between two stages."""

    accelerator: Accelerator
    line: Timeline
    spent: Mapping[Action, Spent]
    once: tuple[Spent, ...]
    send: float

    @property
    def seconds(self) -> float:
        return self.line.seconds + max(spent.seconds for spent in self.once)

    @property
    def busiest(self) -> int:
        """The rank of the pipeline that works most."""
        return int(np.argmax(self.line.busy))

    def causes(self, rank: int) -> dict[Cause, float]:
        """Where a step of this pool goes on one rank of the pipeline; sums to `seconds`."""
        found: dict[Cause, float] = defaultdict(float)
        for where, _, _, action in self.line.events:
            if where == rank:
                for cause, seconds in self.spent[action].causes.items():
                    found[cause] += seconds
        for cause, seconds in self.once[rank].causes.items():
            found[cause] += seconds
        found["bubble"] = max(0.0, self.seconds - sum(found.values()))
        return dict(found)

    def messages(self, rank: int) -> dict[Cause, float]:
        """Seconds of all messages of one rank of the pipeline, hidden or not, by the causes that they are."""
        found: dict[Cause, float] = defaultdict(float)
        own = [self.spent[action] for where, _, _, action in self.line.events if where == rank]
        for spent in (*own, self.once[rank]):
            for cause, seconds in spent.messages.items():
                found[cause] += seconds
        return dict(found)


@dataclass(frozen=True)
class Price:
    """What a step takes on the whole fleet: its slowest pool's. pools: in the order of `layout.pools`."""

    seconds: float
    mfu: float
    tokens_per_second: float
    pools: tuple[Piped, ...]

    @property
    def slowest(self) -> Piped:
        return max(self.pools, key=lambda pool: pool.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        slowest = self.slowest
        return {
            "step_seconds": self.seconds,
            "mfu": self.mfu,
            "tokens_per_second": self.tokens_per_second,
            "stages": [
                {"seconds": float(busy), "causes": slowest.causes(rank)}
                for rank, busy in enumerate(slowest.line.busy)
            ],
        }


def problem_of(job: Job, hardware: Hardware, corrections: Corrections | None) -> Problem:
    """What is trained, as the planner prices it. job: as a dry run takes it, with all that it needs known."""
    seq_len = max(length for _, _, length in job.shapes())
    batch = max(sequences for _, sequences, _ in job.shapes(job.run.global_batch or 0))
    precision = "fp32" if job.precision.type in ("fp32", "fp64") else "bf16"
    pricer = Pricer.of(hardware, OURS, corrections)
    problem = Problem(job.model, seq_len, batch, precision, pricer, job.optimizer.name or "adamw")
    return problem.as_ours(bool(job.layout.compile))


def price(
    job: Job,
    hardware: Hardware,
    corrections: Corrections | None,
    pools: Sequence[tuple[Accelerator, Sequence[Traced]]],
    load: float = 1.0,
) -> Price:
    """Of a job with its layout. pools: of each the accelerator, and every rank of its pipeline as traced.
    load: rows that experts of these ranks get, over the mean of all ranks."""
    problem, ends = problem_of(job, hardware, corrections), [0]
    for pool in job.layout.pools or ():
        ends.append(ends[-1] + pool.replicas)
    piped = []
    for replica, (accelerator, ranks) in zip(ends, pools, strict=False):
        mine = replace(problem, pricer=problem.pricer.on(accelerator))
        piped.append(_Pipeline(mine, job.layout.of_replica(replica), ranks, load).run(accelerator))
    seconds = max(pool.seconds for pool in piped)
    peak = problem.peak if len(hardware.pools) == 1 else _mean_peak(problem, hardware)
    return Price(
        seconds=seconds,
        mfu=problem.model_flops / (seconds * job.layout.num_ranks * peak),
        tokens_per_second=problem.tokens / seconds,
        pools=tuple(piped),
    )


def _mean_peak(problem: Problem, hardware: Hardware) -> float:
    peaks = [replace(problem, pricer=problem.pricer.on(p.accelerator)).peak * p.count for p in hardware.pools]
    return sum(peaks) / hardware.count


class _Pipeline:
    """One pool's replicas. ranks: of the pipeline, in their order. load: see `price`."""

    def __init__(self, problem: Problem, layout: Layout, ranks: Sequence[Traced], load: float) -> None:
        self.problem, self.layout, self.ranks = problem, layout, ranks
        self.pricer = problem.pricer
        self.per_rank = 2 if layout.schedule in V_SHAPED and layout.pp > 1 else layout.stages_per_rank
        self.made = problem.shape(layout.schedule, layout.pp, self.per_rank)
        self.rows = Rows(problem, layout, self.made, load)
        self.known: dict[Any, Spent] = {}

    def run(self, accelerator: Accelerator) -> Piped:
        layout, many = self.layout, max(traced.num_micro_batches for traced in self.ranks)
        spent: dict[Action, Spent] = {}
        for traced in self.ranks:
            there = [at for at in traced.passes if at != ONCE]
            traced_many = 1 + max(at.micro_batch for at in there)
            for at in there:
                for index in standing_for(at.micro_batch, traced_many, many):
                    action = Action(at.work, at.stage, index)  # type: ignore[arg-type]
                    first, last = index == 0, index == many - 1
                    spent[action] = self.of_pass(at, traced.passes[at], first=first, last=last)
        send = self.send_seconds()
        work = {letter: [0.0] * len(self.made.owner) for letter in "FBIW"}
        schedule = layout.schedule if layout.pp > 1 else "1f1b"
        line = timeline(
            schedule, layout.pp, self.per_rank if layout.pp > 1 else 1, many,
            work["F"], work["I"], work["W"], send,
            own={action: found.seconds for action, found in spent.items()},
        )  # fmt: skip
        for *_, action in line.events:
            if action not in spent:  # nothing was given to the first stage that has a gradient
                assert action.work == "I" and action.stage == 0, f"{action} was not traced"
                spent[action] = Spent({}, {})
        once = tuple(self.at_end(rank, traced, many) for rank, traced in enumerate(self.ranks))
        return Piped(accelerator, line, spent, once, send)

    # ------------------------------------------------------------------ one pass

    def of_pass(self, at: Pass, work: Mapping[Work, int], *, first: bool, last: bool) -> Spent:
        key = (at.work, at.stage, first, last, frozenset(work.items()))
        if key not in self.known:
            self.known[key] = self.priced_pass(at, work, first=first, last=last)
        return self.known[key]

    def priced_pass(self, at: Pass, work: Mapping[Work, int], *, first: bool, last: bool) -> Spent:
        rows = [*self.rows.traced(work), *self.rows.between(at)]
        ledger, causes = Ledger.of(rows), dict.fromkeys(CAUSES, 0.0)
        seconds = (self.pricer.seconds(ledger, groups_of(rows)) * ledger.repeat)[:, 0].tolist()
        within = ~ledger.where(stream="sharding")
        found = pass_seconds(
            self.pricer, ledger, np.array(seconds)[:, None], within, self.rows.layouts.number("tp")
        )
        for row, value in zip(rows, seconds, strict=True):
            if row.kind not in COMMUNICATION:
                causes[_cause(row)] += value
        gaps = float(found.compute[0]) - sum(causes.values())  # between kernels
        causes["host"] += float(found.host[0]) + gaps
        told: dict[Cause, float] = defaultdict(float)
        for row, value in zip(rows, seconds, strict=True):
            if row.kind in COMMUNICATION:
                told[in_words(row.name, row.kind)] += value
        for stream, shown in found.exposed.items():
            self.share(causes, rows, seconds, stream, float(shown[0]))
        self.show_sharding(causes, rows, seconds, float(found.total[0]), first=first, last=last)
        return Spent({cause: value for cause, value in causes.items() if value > 0}, dict(told))

    def share(
        self,
        causes: dict[Cause, float],
        rows: Sequence[Row],
        seconds: Sequence[float],
        stream: str,
        shown: float,
    ) -> None:
        """What shows of a stream's messages, by what they are, in proportion."""
        mine = [(row, value) for row, value in zip(rows, seconds, strict=True) if row.stream == stream]
        total = sum(value for _, value in mine)
        for row, value in mine:
            if total:
                cause = in_words(row.name, row.kind)
                causes[cause] = causes.get(cause, 0.0) + shown * value / total

    def show_sharding(
        self,
        causes: dict[Cause, float],
        rows: Sequence[Row],
        seconds: Sequence[float],
        window: float,
        *,
        first: bool,
        last: bool,
    ) -> None:
        """FSDP gathers a layer ahead and sums a layer behind: all but the first gathering of a step and its
        last sum hide behind the work of their pass, as far as that goes. Sums over replicas, as sums."""
        hides = self.pricer.hardware.accelerator.device != "cpu"
        for kinds in (("all_gather", "reduce_scatter"), ("all_reduce",)):
            total = alone = 0.0
            for kind in kinds:
                mine = [
                    (row, value)
                    for row, value in zip(rows, seconds, strict=True)
                    if row.stream == "sharding" and row.kind == kind
                ]
                all_of_kind = sum(value for _, value in mine)
                messages = sum(times_of(row) for row, value in mine if value)
                total += all_of_kind
                if messages and (first if kind == "all_gather" else last):
                    alone += all_of_kind / messages
            if total:
                shown = float(exposed(np.array(total), np.array(window * hides), alone))
                for row, value in zip(rows, seconds, strict=True):
                    if row.stream == "sharding" and row.kind in kinds and value:
                        cause = in_words(row.name, row.kind)
                        causes[cause] = causes.get(cause, 0.0) + shown * value / total

    # ------------------------------------------------------------------ what a step does once

    def send_seconds(self) -> float:
        """Of the longest message from one stage to the next."""
        found = {each for traced in self.ranks for each in traced.passes.get(ONCE, {})}
        rows = [row for row in self.rows.traced(dict.fromkeys(found, 1)) if row.kind == "send"]
        if not rows:
            return 0.0
        return float(self.pricer.seconds(Ledger.of(rows), groups_of(rows)).max())

    def at_end(self, rank: int, traced: Traced, micro_batches: int) -> Spent:
        """Clipping, the update, and sums over both ends of a pipeline: nothing hides their messages, but work
        on matrices those of others."""
        work = {
            each: times
            for each, times in traced.passes.get(ONCE, {}).items()
            if not _is_sent(each) and getattr(each, "group", "") not in UNWAITED
        }
        rows = [(each, row) for each, times in work.items() for row in self.rows.traced({each: times})]
        causes: dict[Cause, float] = {"update": self.update(rank, traced, micro_batches)}
        told: dict[Cause, float] = defaultdict(float)
        if rows:
            ledger = Ledger.of([row for _, row in rows])
            seconds = (self.pricer.seconds(ledger, groups_of([row for _, row in rows])) * ledger.repeat)[:, 0]
            done = [(*each, value) for each, value in zip(rows, seconds.tolist(), strict=True)]
            shown = share_shown(done) if self.pricer.hardware.accelerator.device != "cpu" else 1.0
            for each, row, value in done:
                is_message = row.kind in COMMUNICATION
                cause = in_words(row.name, row.kind) if is_message else "update"
                causes[cause] = causes.get(cause, 0.0) + value * (shown if is_travel(each) else 1.0)
                if is_message:
                    told[cause] += value
        return Spent(causes, dict(told))

    def update(self, rank: int, traced: Traced, micro_batches: int) -> float:
        """Of the optimizer's own arithmetic on the weights that are here, and of adding up gradients."""
        here = np.array([traced.at_rest.get("weights", 0) / 4])
        seconds = float(self.pricer.update(here, here)[0])
        dense, routed = rank_weights(self.problem.arch, self.rows.layouts, self.made, rank)
        divided = np.array([self.layout.zero >= 2 and self.layout.dp_shard * self.layout.cp > 1])
        size = 4.0 if self.problem.precision == "fp32" else 2.0
        each = accumulate_seconds(self.pricer, here, dense + routed, divided, size)
        return seconds + (micro_batches - 1) * float(each[0])


def standing_for(index: int, traced: int, many: int) -> range:
    """The micro batches of a step of `many` that one of a traced step of fewer stands for: the first and the
    last are themselves, and in between each that follows is like the one before."""
    if index == traced - 1:
        return range(many - 1, many)
    return range(index, many - 1 if index == traced - 2 else index + 1)


def in_words(axis: str, kind: str) -> str:
    """The cause that a message is."""
    return f"{axis}: {kind.replace('_', ' ')}"


def _cause(row: Row) -> Cause:
    if row.phase == "recompute":
        return "recomputation"
    return {"product": "products", "fused_attention": "attention"}.get(row.kind, "memory-bound")


def _is_sent(each: Work) -> bool:
    return isinstance(each, Message) and each.operation in ("send", "recv_")
