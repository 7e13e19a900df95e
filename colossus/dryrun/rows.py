"""The ledger of a rank's passes: what was traced, and of the planner's own what no trace shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from colossus.dryrun.work import Message, Pass, Product, Work
from colossus.layout import Layout
from colossus.perf.communication import Group
from colossus.perf.ledger import NUMBERS, WORDS, Kind, Ledger, Phase, Row
from colossus.planner.columns import Layouts
from colossus.planner.estimate import KEYS, Problem
from colossus.planner.formulas import Piece, piece_of
from colossus.planner.stages import Shape

KINDS: dict[str, Kind] = {
    "allgather_base": "all_gather", "allgather": "all_gather", "all_gather_into_tensor": "all_gather",
    "reduce_scatter_base": "reduce_scatter", "reduce_scatter_tensor": "reduce_scatter",
    "allreduce": "all_reduce", "all_reduce": "all_reduce", "broadcast": "all_gather",
    "alltoall_base": "all_to_all", "alltoall": "all_to_all", "all_to_all_single": "all_to_all",
    "shard_dim_alltoall": "all_to_all", "send": "send",
}  # fmt: skip
PHASES: dict[str, tuple[Phase, ...]] = {
    "F": ("forward",),
    "B": ("recompute", "backward", "weights"),
    "I": ("recompute", "backward"),
    "W": ("weights",),
}
BETWEEN = ("memory", "elementwise")  # rows that come of formulas
GATED = "moe.experts.gated"  # the one of these whose bytes follow the rows that experts get


class Rows:
    """Of a pool's replicas. made: what each rank of the pipeline has. load: rows that its experts get, over
    the mean of all ranks."""

    def __init__(self, problem: Problem, layout: Layout, made: Shape, load: float = 1.0) -> None:
        self.problem, self.layout, self.made, self.load = problem, layout, made, load
        self.layouts = Layouts.of_layout(layout)

    def traced(self, work: Mapping[Work, int]) -> Iterator[Row]:
        """As the ledger has them: what was traced, and nothing else."""
        for each, times in work.items():
            if isinstance(each, Message):
                if each.operation != "recv_":
                    yield self.message(each, times)
            else:
                yield from self.product(each, times)

    def message(self, each: Message, times: int) -> Row:
        kind, axis = KINDS[each.operation.strip("_")], self.axis(each)
        stream = "sharding" if each.apart else {"cp": "cp", "ep": "ep", "etp": "ep"}.get(axis, "tp")
        stride, node = max(1, each.stride), self.problem.pricer.hardware.node_size
        if (each.size - 1) * stride < node:  # all in one node, however far apart
            stride = min(stride, node // each.size)
        return Row(
            axis, _phase(each.phase), "", kind, stream, group=f"{each.size} by {stride}",
            sent=float(each.num_bytes), repeat=float(times),
        )  # fmt: skip

    def axis(self, each: Message) -> str:
        """Groups of the same ranks are one, and have the name of the first: layers talk over that of FSDP
        where it is also theirs."""
        if each.apart or each.group not in ("fsdp", "efsdp", "dp_replicate"):
            return each.group
        routed = self.layout.ep > 1 and KINDS[each.operation.strip("_")] == "all_to_all"
        return "ep" if routed else "cp"

    def product(self, each: Product, times: int) -> Iterator[Row]:
        size = 4 if each.precision == "fp32" else 2
        m, n, k, count = each.m, each.n, each.k, each.count
        phase: Phase = "recompute" if each.phase == "recompute" else each.side
        common: dict[str, Any] = {
            "stage": "", "precision": each.precision, "repeat": float(times), "executed": float(each.flops),
        }  # fmt: skip
        if each.kind == "attention":
            # As often as a query multiplies with the keys that it meets: for scores and values once each,
            # backward twice, for scores once more.
            passes = (3.0, 2.0) if each.side == "backward" else (1.0, 1.0)
            square = 2 * m * n * count
            widths = (k, (each.flops / square - passes[0] * k) / passes[1])
            for again, width in zip(passes, widths, strict=True):
                common["executed"] = square * width * again
                yield Row("attention", phase, kind="fused_attention", m=m, n=each.met * again, k=width,
                          count=count, **common)  # fmt: skip
            return
        moved = count * size * (m * k + k * n + m * n)
        if phase == "weights":
            moved += count * m * n * 2 * self.problem.pricer.software.gradient_bytes
        name = "experts.product" if each.kind == "grouped" else "product"
        yield Row(name, phase, kind="product", m=m, n=n, k=k, count=count, bytes=moved, **common)

    @cached_property
    def piece(self) -> Piece:
        return piece_of({name: self.layouts.number(name) for name in KEYS}, self.problem.seq_len)

    @cached_property
    def formulas(self) -> Ledger:
        return self.problem.ledger(self.piece)

    def between(self, at: Pass) -> Iterator[Row]:
        """What lies between the products of a pass, of the planner's ledger."""
        ledger, made, layers = self.formulas, self.made, self.layout.recompute_layers
        again = made.recomputed(None if layers is None else np.array([float(layers)]))[at.stage, :, 0]
        counts = dict(zip(made.kinds, made.by_stage[at.stage].tolist(), strict=True))
        redone = dict(zip(made.kinds, again.tolist(), strict=True))
        edges = {"first": float(at.stage == 0), "last": float(at.stage == len(made.owner) - 1)}
        for i in np.flatnonzero(ledger.where(kind=BETWEEN, phase=PHASES[at.work])):
            row = row_at(ledger, int(i))
            times = (redone if row.phase == "recompute" else counts | edges).get(row.stage, 0.0)
            if row.name == GATED:
                row = replace(row, bytes=np.asarray(row.bytes) * self.load)
            if times and row.repeat:
                yield replace(row, repeat=row.repeat * times)


def groups_of(rows: Sequence[Row]) -> dict[str, Group]:
    found = {}
    for row in rows:
        if row.group:
            size, _, stride = row.group.partition(" by ")
            found[row.group] = Group(np.array([float(size)]), np.array([float(stride)]))
    return found


def row_at(ledger: Ledger, i: int) -> Row:
    """A row of a ledger of one layout."""
    values: dict[str, Any] = {name: getattr(ledger, name)[i] for name in WORDS}
    return Row(**values | {name: float(getattr(ledger, name)[i, 0]) for name in NUMBERS})


def times_of(row: Row) -> float:
    return float(np.asarray(row.repeat))


def _phase(phase: str) -> Phase:
    return "recompute" if phase == "recompute" else "backward" if phase == "backward" else "forward"
