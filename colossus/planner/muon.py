"""What Muon's update costs beside AdamW's: each matrix is gathered and made orthogonal (`optim.muon`).

The ranks that share a stage's layers all do so for every matrix of it, but for experts, of which each rank
has whole ones.
"""

from __future__ import annotations

from collections import Counter
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
    ranks = [
        np.sum([count * per_kind[kind] for kind, count in zip(made.kinds, counts, strict=True)], axis=0)
        for counts in made.counts
    ]
    return np.asarray(np.max(np.stack(ranks), axis=0))


def _layer(
    arch: Architecture,
    kind: str,
    layouts: Layouts,
    pricer: Pricer,
    precision: str,
    groups: dict[str, comm.Group],
) -> Columns:
    type_ = "fp32" if precision == "fp32" else "bf16"
    size = 4 if type_ == "fp32" else 2
    seconds = np.zeros(len(layouts))
    for (short, long, is_expert), count in matrices(arch, kind).items():
        name = "experts.muon" if is_expert else "muon"
        products = ((short, short, long), (short, short, short), (short, long, short))
        ledger = Ledger.of(
            Row(name, "forward", kind, "product", "compute", type_, m=m, n=n, k=k, repeat=ITERATIONS,
                bytes=size * (m * k + n * k + 2 * m * n))
            for m, n, k in products
        )  # fmt: skip
        each = float((pricer.seconds(ledger) * ledger.repeat).sum())
        here = np.full(len(layouts), float(count))
        if is_expert:
            here = here / (layouts.number("ep") * np.maximum(groups["experts"].size, 1.0))
        else:
            gathered = np.full(len(layouts), 4.0 * count * short * long)  # in fp32, from all that have a part
            for group in ("fsdp", "tp"):
                seconds = seconds + pricer.messages("all_gather", gathered, groups[group])
        seconds = seconds + here * each
    return seconds
