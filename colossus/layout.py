"""How a job is spread over ranks, and the one table of rules that makes a layout legal.

A rule is a predicate over integers *or numpy columns*, so that the trainer checks one layout in words
and a search checks many thousand at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from colossus.errors import UserError
from colossus.section import Section, derived

AXES = ("dp_replicate", "dp_shard", "pp", "cp", "tp")


class Layout(Section):
    """The `layout` section of a job. ranks = dp_replicate x dp_shard x pp x cp x tp; `ep` regroups them."""

    dp_replicate: int = derived(ge=1, le=10**7)
    dp_shard: int = derived(ge=1, le=10**7)
    tp: int = derived(ge=1, le=10**7)
    pp: int = derived(ge=1, le=10**7)
    cp: int = derived(ge=1, le=10**7)
    ep: int = derived(ge=1, le=10**7)
    micro_batch: int = derived(ge=1, le=10**7)  # sequences that a rank computes at once
    recompute: Literal["none", "full"] = derived()
    compile: bool = derived()

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole job; an axis that is not derived yet counts as 1."""
        ranks = 1
        for axis in AXES:
            ranks *= getattr(self, axis) or 1
        return ranks

    @property
    def dp(self) -> int:
        """Ranks that see different samples."""
        return (self.dp_replicate or 1) * (self.dp_shard or 1)


@dataclass(frozen=True)
class Rule:
    """`holds(row)` is true where the layout is legal; `row` maps names to integers or numpy columns."""

    name: str
    holds: Callable[[Mapping[str, Any]], Any]
    message: Callable[[Mapping[str, Any]], str]


def _not_yet(axis: str, what: str) -> Rule:
    return Rule(
        f"{axis}-available",
        lambda row: row[axis] == 1,
        lambda row: f"layout.{axis}={row[axis]}: {what} parallelism is not available yet; 1",
    )


RULES: tuple[Rule, ...] = (
    _not_yet("tp", "tensor"),
    _not_yet("pp", "pipeline"),
    _not_yet("cp", "context"),
    _not_yet("ep", "expert"),
    Rule(
        "ranks-fit-batch",
        lambda row: row["dp_replicate"] * row["dp_shard"] <= row["global_batch"],
        lambda row: (
            f"run.global_batch={row['global_batch']}: fewer sequences than the "
            f"{row['dp_replicate'] * row['dp_shard']} data-parallel ranks; at least "
            f"{row['dp_replicate'] * row['dp_shard']}, or layout.dp_shard={row['global_batch']}"
        ),
    ),
    Rule(
        "micro-batch-fits",
        lambda row: row["micro_batch"] * row["dp_replicate"] * row["dp_shard"] <= _whole(row),
        lambda row: (
            f"layout.micro_batch={row['micro_batch']}: more than a rank's share of "
            f"run.global_batch={row['global_batch']}; at most "
            f"{_whole(row) // (row['dp_replicate'] * row['dp_shard'])}"
        ),
    ),
)


def _whole(row: Mapping[str, Any]) -> Any:
    """The global batch, padded to an equal count of sequences for every data-parallel rank."""
    dp = row["dp_replicate"] * row["dp_shard"]
    return -(-row["global_batch"] // dp) * dp


def violations(layout: Layout, global_batch: int) -> list[str]:
    """Every rule that `layout` breaks, in words with the nearest legal values."""
    row = {axis: getattr(layout, axis) for axis in (*AXES, "ep", "micro_batch")} | {
        "global_batch": global_batch
    }
    return [rule.message(row) for rule in RULES if not rule.holds(row)]


def check(layout: Layout, global_batch: int) -> None:
    """Raises `UserError` that names every broken rule."""
    broken = violations(layout, global_batch)
    if broken:
        raise UserError("\n".join(broken))
