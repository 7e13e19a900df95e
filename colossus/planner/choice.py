"""One layout with what it costs: the estimate of its columns, and the exact timeline of its pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colossus.layout import V_SHAPED
from colossus.perf.schedule import pipeline_seconds
from colossus.planner.columns import Layouts
from colossus.planner.estimate import Estimate, Problem, estimate
from colossus.planner.memory import memory


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
    that needs most, by use; rank: which of a pipeline that is. row: values of `layout.Layout`."""

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
    rank: int = 0
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
        words = [*axes, f"micro_batch={row['micro_batch']}", f"recompute={row['recompute']}"]
        if row["recompute"] != "none" and row["recompute_layers"] is not None:
            words.append(f"recompute_layers={row['recompute_layers']}")
        return " ".join(words)


def refined(problem: Problem, one: Layouts, compiled: bool) -> Choice:
    """One layout with the exact timeline of its pipeline in place of the closed form."""
    return all_refined(problem, one, compiled)[0]


def all_refined(problem: Problem, layouts: Layouts, compiled: bool) -> list[Choice]:
    """Of each layout: see `refined`."""
    made, needs = estimate(problem, layouts), memory(problem, layouts)
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
                mfu=problem.model_flops / (seconds * ranks * problem.peak),
                parts=parts,
                memory={name: float(column[i]) for name, column in needs.parts.items()},
                allocated=float(needs.allocated[i]),
                reserved=float(needs.reserved[i]),
                micro_batches=int(made.micro_batches[i]),
                compiled=compiled,
                rank=int(needs.rank[i]),
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
    layers = row["recompute_layers"]
    recomputed = cut.recomputed(None if layers is None else np.array([float(layers)]))[:, :, 0]

    def of(phase: str) -> NDArray[np.float64]:
        counts = recomputed if phase == "recompute" else cut.by_stage
        out = counts @ np.array([seconds[phase, kind] for kind in cut.kinds])
        out[0] += seconds[phase, "first"]
        out[-1] += seconds[phase, "last"]
        return np.asarray(out)

    forward, weights = of("forward"), of("weights")
    backward = of("backward") + of("recompute")
    m = int(made.micro_batches[i])
    return pipeline_seconds(
        schedule, pp, chunks, m, forward.tolist(), backward.tolist(), weights.tolist(), float(made.send[i])
    )


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A layout as values of `layout.Layout`."""
    row.pop("sp")
    row["zero"] = int(row["zero"])
    row["compile"], row["async_tp"] = bool(row["compile"]), bool(row["async_tp"])
    if row["recompute"] == "none":
        row["recompute_layers"] = None
    if row["pp"] == 1:
        row["schedule"], row["stages_per_rank"] = "1f1b", 1
    return row
