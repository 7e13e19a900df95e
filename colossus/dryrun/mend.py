"""What does not fit, and the smallest change with which it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from colossus.dryrun.ranks import DryRun, dry_run
from colossus.dryrun.routing import Routing
from colossus.errors import UserError
from colossus.job import Job
from colossus.perf.corrections import Corrections


def mended(
    found: DryRun,
    rank: int | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    corrections: Corrections | None = None,
) -> DryRun:
    """With what would make it fit, where it does not and something does: the first of the small changes, the
    cheapest first, with which every kind of rank fits. rank: that alone. See `ranks.dry_run`."""
    if found.fits:
        return found
    job = found.job
    worst = found.worst.kind.stage / max(1, job.layout.pp - 1) if job.layout.pp > 1 else 0.0
    for words, values in _changes(job):
        changed = job.put({f"layout.{name}": value for name, value in values.items()}, "argument")
        say(f"with {words}")
        try:
            stage = round(worst * (changed.layout.pp - 1))
            one = _rank_of(changed, stage, found.routing)
            tried = dry_run(changed, found.hardware, one, routing=found.routing, corrections=corrections)
            is_all = changed.layout.pp == 1 and len(found.ranks) == found.job.layout.pp  # of one kind
            if tried.fits and rank is None and not is_all:
                tried = dry_run(changed, found.hardware, routing=found.routing, corrections=corrections)
            if tried.fits:
                return replace(found, mend=(words, tried))
        except UserError:  # not legal, or too many ranks
            continue
    return found


def _rank_of(job: Job, stage: int, routing: Routing | None) -> int:
    """The one of a stage that needs most."""
    layout = job.layout
    fullest = 0 if routing is None else routing.kinds(layout.ep)[0][0] * layout.etp
    return stage * (layout.num_ranks // layout.dp_replicate // layout.pp) + fullest


def _changes(job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    """What could be changed, the cheapest in time first; not all of it is legal."""
    layout = job.layout
    order = ("none", "selective", "full")
    leaner = [name for name in order if order.index(name) > order.index(layout.recompute)]
    tries: list[dict[str, Any]] = [{"zero": zero} for zero in range(layout.zero + 1, 4)]
    tries += [{"recompute": name} for name in leaner]
    if layout.micro_batch > 1:
        tries += [{"micro_batch": layout.micro_batch // 2}]
        tries += [{"micro_batch": 1, "recompute": name} for name in leaner]
    tightest = {"recompute": "full", "micro_batch": 1, "zero": 3}
    if layout.dp_replicate > 1 and layout.dp_replicate % 2 == 0 and not layout.pools:
        half = {"dp_replicate": layout.dp_replicate // 2, "dp_shard": layout.dp_shard * 2}
        tries += [half, half | tightest]
    if layout.dp_shard % 2 == 0:
        for axis in ("tp", "pp", "cp"):
            tries += [{axis: getattr(layout, axis) * 2, "dp_shard": layout.dp_shard // 2} | tightest]
    for values in tries:
        new = {name: value for name, value in values.items() if getattr(layout, name) != value}
        yield " ".join(f"layout.{name}={_word(value)}" for name, value in new.items()), new


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
