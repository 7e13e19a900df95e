"""What Muon's update costs beside AdamW's: each matrix is sent to its owner, made orthogonal, and sent back,
bucket by bucket, and beside the work on one the next arrives and the last returns (`optim.exchange`). Of
experts each rank has whole ones, where there are enough for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import numpy as np

from colossus.architecture import Architecture, parameter_table
from colossus.perf import communication as comm
from colossus.perf.ledger import Columns, Ledger, Row
from colossus.perf.parts import MUON_BUCKET
from colossus.perf.passes import OVERLAP_COST
from colossus.perf.price import Pricer
from colossus.planner.columns import Layouts
from colossus.planner.formulas import layer_counts
from colossus.planner.stages import Shape

ITERATIONS = 5  # of Newton and Schulz, three products each


@lru_cache(maxsize=64)
def matrices(arch: Architecture, kind: str) -> dict[tuple[int, int, bool], int]:
    """(shorter side, longer side, whether it is an expert's) -> how many a layer of a kind has."""
    layer = layer_counts(arch)[kind][0]
    found: Counter[tuple[int, int, bool]] = Counter()
    for parameter in parameter_table(arch):
        if parameter.layer == layer and parameter.group in ("matrix", "expert"):
            short, long = sorted(parameter.shape[-2:])
            count = int(np.prod(parameter.shape[:-2])) if len(parameter.shape) > 2 else 1
            found[short, long, parameter.group == "expert"] += count
    return dict(found)


@dataclass(frozen=True)
class Update:
    """Seconds of a rank, [N]: of its products, of all its messages, and what of these no work hides."""

    work: Columns
    messages: Columns
    shown: Columns

    @property
    def seconds(self) -> Columns:
        return self.work + self.shown


def muon_update(
    arch: Architecture,
    layouts: Layouts,
    made: Shape,
    pricer: Pricer,
    precision: str,
    groups: comm.Groups,
) -> Update:
    """Of the pipeline rank that has most to do."""
    seconds = cache(partial(_seconds, pricer, precision))
    ranks = [_update(_shared(arch, layouts, made, rank, groups, seconds), pricer) for rank, *_ in made.alike]
    which = np.argmax(np.stack([rank.seconds for rank in ranks]), axis=0)
    return Update(
        *(np.choose(which, [getattr(rank, name) for rank in ranks]) for name in ("work", "messages", "shown"))
    )


def muon_bytes(
    arch: Architecture, layouts: Layouts, made: Shape, precision: str, groups: comm.Groups
) -> Columns:
    """Bytes of an owner's buckets, [pp, N]: of the one that it works on the matrices, a quotient and powers;
    of each that is on its way what is sent and what is received."""
    size = 4.0 if precision == "fp32" else 2.0
    found = np.zeros((len(made.first), len(layouts)))
    for ranks in made.alike:
        for shared in _shared(arch, layouts, made, ranks[0], groups, lambda *_: 0.0):
            share, columns = shared.numel / shared.owners, shared.columns.size
            bucket = np.maximum(share / shared.buckets, shared.largest)
            each = np.minimum(bucket, share)  # of a rank that holds parts
            working = (4 + np.maximum(4 + size, 3 * size)) * bucket
            whole = np.where(shared.shards.size * columns > 1, bucket + each, 0.0)
            halfway = np.where((shared.shards.size > 1) & (columns > 1), bucket / columns + each, 0.0)
            copies = np.where(shared.replicas.size > 1, 2 * shared.replicas.size * each, 0.0)
            # Beside this one the next arrives and the last returns; with two axes, two more are halfway.
            others, axes = shared.buckets - 1, (shared.shards.size > 1) + 1.0 * (columns > 1)
            beside = np.minimum(others, 2) * whole + np.clip(others - 2, 0, 2) * halfway
            while_working = working + 4 * (beside + np.where(others > axes, copies, 0.0))
            afterwards = 4 * (bucket + copies + np.where(others > axes, beside + copies, whole + halfway))
            most = np.maximum(while_working, afterwards)
            found[list(ranks)] = np.maximum(found[list(ranks)], most)
    return found


def shown_seconds(to: Columns, back: Columns, work: Columns, buckets: Columns) -> Columns:
    """What shows of the messages of buckets which take `to` and `back` seconds each: of the first bucket `to`
    and of the last `back`; the others go on beside the `work` on one bucket, as far as that goes, and take
    their share of its time."""
    beside = np.maximum(to - work, 0.0) + np.maximum(back - work, 0.0)
    beside = beside + (buckets - 2) * np.maximum(to + back - work, 0.0)
    shown = to + back + np.where(buckets > 1, beside, 0.0)
    return np.asarray(shown + OVERLAP_COST * (buckets * (to + back) - shown))


@dataclass(frozen=True)
class _Shared:
    """Matrices that the same ranks share: how many, the fp32 elements of all and of the largest, the seconds
    that one rank would need for all and for the largest, [N]. replicas, shards, columns: those ranks."""

    count: Columns
    numel: Columns
    largest: Columns
    seconds: Columns
    longest: Columns
    replicas: comm.Group
    shards: comm.Group
    columns: comm.Group

    @property
    def owners(self) -> Columns:
        return np.asarray(self.replicas.size * self.shards.size * self.columns.size)

    @property
    def buckets(self) -> Columns:
        """Each with a matrix for every owner at least."""
        by_room = np.minimum(self.count, np.ceil(self.numel / MUON_BUCKET)) / self.owners
        return np.maximum(1.0, np.ceil(by_room))

    @property
    def work(self) -> Columns:
        """Of the owner with most to do: its share, or the largest matrix."""
        return np.maximum(self.seconds / self.owners, self.longest)


def _update(families: list[_Shared], pricer: Pricer) -> Update:
    """Along each axis a rank sends its part once, and so it comes back; an owner is sent all of what it owns.
    Copies are sent by nobody, but to all replicas on the way back. A processor's ranks compute with the same
    cores that carry their messages."""
    hides = pricer.hardware.accelerator.device != "cpu"
    alone = sum(np.where(shared.owners == 1, shared.work, 0.0) for shared in families)
    messages = shown = np.zeros(len(families[0].count))
    for shared in families:
        buckets, cut = shared.buckets, shared.shards.size * shared.columns.size
        part, copies = shared.numel / shared.owners, shared.replicas.size
        over_shards = np.maximum(part, shared.largest / shared.columns.size)
        sent = [(shared.shards, over_shards), (shared.columns, np.maximum(part, shared.largest))]
        last = [(shared.replicas, np.maximum(shared.numel, copies * shared.largest) / cut)]
        to, copied = (
            np.sum(
                [pricer.messages("all_to_all", 4.0 * numel / buckets, group) for group, numel in some], axis=0
            )
            for some in (sent, last)
        )
        every = np.where(shared.count > 0, buckets * (2 * to + copied), 0.0)
        beside = shown_seconds(to, to + copied, (shared.work + alone) / buckets, buckets)
        messages = messages + every
        shown = shown + np.where(shared.count > 0, beside, 0.0) if hides else messages
    return Update(np.sum([shared.work for shared in families], axis=0), messages, shown)


def _shared(
    arch: Architecture,
    layouts: Layouts,
    made: Shape,
    rank: int,
    groups: comm.Groups,
    seconds_of: Callable[[str, int, int, bool], float],
) -> list[_Shared]:
    """Of a pipeline rank: of its layers' matrices, and of its experts'."""
    ones = np.ones(len(layouts))
    tp, shards, experts = groups["tp"], groups["fsdp"], groups["experts"]
    num_experts = arch.experts.num_experts if arch.experts is not None else 1
    ep, size = layouts.number("ep"), np.maximum(experts.size, 1.0)
    whole = (num_experts / ep) % size == 0  # see `parallel.data`
    found = []
    for is_expert in (False, True):
        count = numel = largest = seconds = longest = 0.0
        for kind, layers in zip(made.kinds, made.counts[rank], strict=True):
            for (short, long, of_expert), number in matrices(arch, kind).items():
                if of_expert is is_expert and layers:
                    each = seconds_of(kind, short, long, is_expert)
                    count, numel = count + layers * number, numel + layers * number * short * long
                    largest, longest = max(largest, float(short * long)), max(longest, each)
                    seconds += layers * number * each
        if is_expert:
            here = 1 / (ep * np.where(whole, size, 1.0))
            shards = comm.Group(np.where(whole, 1.0, size), experts.stride)
            tp = comm.Group(np.where(layouts.number("etp") > 1, tp.size, 1.0), tp.stride)
        else:
            here = ones
        found.append(_Shared(
            count * here, numel * here, largest * ones, seconds * here, longest * ones,
            groups["dp_replicate"], shards, tp,
        ))  # fmt: skip
    return found


def _seconds(pricer: Pricer, precision: str, kind: str, short: int, long: int, is_expert: bool) -> float:
    """To make one matrix orthogonal."""
    type_ = "fp32" if precision == "fp32" else "bf16"
    size = 4 if type_ == "fp32" else 2
    name = "experts.muon" if is_expert else "muon"
    products = ((short, short, long), (short, short, short), (short, long, short))
    ledger = Ledger.of(
        Row(name, "forward", kind, "product", "compute", type_, m=m, n=n, k=k, repeat=ITERATIONS,
            bytes=size * (m * k + n * k + 2 * m * n))
        for m, n, k in products
    )  # fmt: skip
    return float((pricer.seconds(ledger) * ledger.repeat).sum())
