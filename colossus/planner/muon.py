"""What Muon's update costs beside AdamW's: each matrix is sent to its owner, made orthogonal, and sent back
(`optim.owners`). Of experts each rank has whole ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from colossus.architecture import Architecture, parameter_table
from colossus.perf import communication as comm
from colossus.perf.ledger import Columns, Ledger, Row
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


def muon_seconds(
    arch: Architecture,
    layouts: Layouts,
    made: Shape,
    pricer: Pricer,
    precision: str,
    groups: dict[str, comm.Group],
) -> Columns:
    """Of the pipeline rank that has most to do, [N]."""
    per_kind = {kind: _layer(arch, kind, layouts, pricer, precision, groups) for kind in made.kinds}
    return np.asarray(np.max(np.stack([_rank(per_kind, made.kinds, counts, layouts, pricer, groups)
                                       for counts in made.counts]), axis=0))  # fmt: skip


@dataclass(frozen=True)
class _Layer:
    """Seconds that orthogonalising one layer's matrices takes one owner, and of the largest; fp32 elements
    of all, and of the largest. experts: seconds of a rank, which has whole ones, [N]."""

    seconds: float
    longest: float
    numel: float
    largest: float
    experts: Columns


def _rank(
    per_kind: dict[str, _Layer],
    kinds: Sequence[str],
    counts: Sequence[float],
    layouts: Layouts,
    pricer: Pricer,
    groups: dict[str, comm.Group],
) -> Columns:
    """The owner with most to do has its share, or the largest matrix. Along each axis a rank sends its part
    of all once, and so it comes back; an owner is sent all of what it owns."""
    rows = [(per_kind[kind], float(count)) for kind, count in zip(kinds, counts, strict=True) if count]
    sharers = groups["fsdp"].size * groups["tp"].size * layouts.number("dp_replicate")
    total = sum(layer.seconds * count for layer, count in rows)
    longest = max((layer.longest for layer, _ in rows), default=0.0)
    seconds = np.maximum(total / sharers, longest)
    numel = sum(layer.numel * count for layer, count in rows)
    largest = max((layer.largest for layer, _ in rows), default=0.0)
    part = numel / (groups["fsdp"].size * groups["tp"].size)
    for name, times in (("fsdp", 2), ("tp", 2), ("dp_replicate", 1)):  # copies cross replicas on the way back
        sent = 4.0 * np.maximum(part, largest / np.where(name == "fsdp", groups["tp"].size, 1.0))
        if numel:
            seconds = seconds + times * pricer.messages("all_to_all", sent, groups[name])
    experts = [layer.experts * count for layer, count in rows]
    return np.asarray(seconds + np.sum(experts, axis=0))


def _layer(
    arch: Architecture,
    kind: str,
    layouts: Layouts,
    pricer: Pricer,
    precision: str,
    groups: dict[str, comm.Group],
) -> _Layer:
    type_ = "fp32" if precision == "fp32" else "bf16"
    size = 4 if type_ == "fp32" else 2
    seconds, longest, numel, largest = 0.0, 0.0, 0.0, 0.0
    experts = np.zeros(len(layouts))
    for (short, long, is_expert), count in matrices(arch, kind).items():
        name = "experts.muon" if is_expert else "muon"
        products = ((short, short, long), (short, short, short), (short, long, short))
        ledger = Ledger.of(
            Row(name, "forward", kind, "product", "compute", type_, m=m, n=n, k=k, repeat=ITERATIONS,
                bytes=size * (m * k + n * k + 2 * m * n))
            for m, n, k in products
        )  # fmt: skip
        each = float((pricer.seconds(ledger) * ledger.repeat).sum())
        if is_expert:
            here = count / (layouts.number("ep") * np.maximum(groups["experts"].size, 1.0))
            experts = experts + here * each
        else:
            seconds, numel = seconds + count * each, numel + count * short * long
            longest, largest = max(longest, each), max(largest, float(short * long))
    return _Layer(seconds, longest, numel, largest, experts)
